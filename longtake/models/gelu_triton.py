"""GELU and its gradient in one pass over memory, as kernels for GPUs. Import it only where triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_ONCE = 4096  # numbers of a program
_ROWS, _COLUMNS, _STEPS = 16, 256, 32  # of a program of the gradient, which goes on to the rows below so many times


@triton.jit
def _slope(x):
    """By what GELU multiplies: (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _gelu(value, out, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(value + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, (x * _slope(x)).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def _gelu_backward(
    value,
    grad,
    out,
    sums,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        real = (row < rows)[:, None] & (columns < WIDTH)[None, :]
        x = tl.load(value + at, mask=real, other=0.0).to(tl.float32)
        change = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
        part = _slope(x)
        change *= part + x * part * (1.0 - part) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        rounded = change.to(grad.dtype.element_ty)
        tl.store(out + at, (x * part).to(out.dtype.element_ty), mask=real)
        tl.store(grad + at, rounded, mask=real)
        total += rounded.to(tl.float32)
    place = sums + tl.program_id(1) * WIDTH + columns
    tl.store(place, tl.sum(total, axis=0), mask=columns < WIDTH)


def gelu(x: Tensor) -> Tensor:
    """GELU of a contiguous tensor."""
    assert x.is_contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _gelu[(triton.cdiv(x.numel(), _AT_ONCE),)](x, out, x.numel(), SIZE=_AT_ONCE, num_warps=8)
    return out


def gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `gelu.gelu_backward`, of contiguous tensors."""
    assert x.is_contiguous() and grad.is_contiguous()
    rows, width = x.shape
    blocks = triton.cdiv(rows, _ROWS * _STEPS)
    out, sums = torch.empty_like(x), torch.empty(blocks, width, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gelu_backward[(triton.cdiv(width, _COLUMNS), blocks)](
            x, grad, out, sums, rows, WIDTH=width, ROWS=_ROWS, COLUMNS=_COLUMNS, STEPS=_STEPS, num_warps=4
        )
    return out, grad, sums.sum(0)
