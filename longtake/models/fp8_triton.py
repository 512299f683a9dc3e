"""GELU and quantising of rows in one pass over memory, as a kernel for GPUs. Import it only where triton is.

A row stays in registers between its largest number and its rounding; torch's compiler reads so long a row twice. What
limits it besides memory are exponentials and quotients that a GPU makes at a time: a row is held in two parts, so
that few lanes have no number of it, and is scaled by a product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gelu(x):
    # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3); the exponential as one of base 2
    return x / (1.0 + tl.exp2(x * (-2.302208198144325 - 0.1029432395800235 * x * x)))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)  # what is not finite must show


@triton.jit
def _gelu_quantised(
    value,
    out,
    scales,
    LEAST: tl.constexpr,
    LARGEST: tl.constexpr,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, MAIN)
    x = _gelu(tl.load(value + row * K + first).to(tl.float32))
    largest = tl.reduce(tl.abs(x), 0, _larger)
    if REST > 0:
        later = MAIN + tl.arange(0, REST)
        y = _gelu(tl.load(value + row * K + later, mask=later < K, other=0.0).to(tl.float32))
        largest = _larger(largest, tl.reduce(tl.abs(y), 0, _larger))
    scale = _larger(largest, LEAST) / LARGEST
    inverse = 1.0 / scale
    tl.store(scales + row, scale)
    # What rounding made larger than the largest number is cast to that one.
    tl.store(out + row * K + first, (x * inverse).to(out.dtype.element_ty))
    if REST > 0:
        tl.store(out + row * K + later, (y * inverse).to(out.dtype.element_ty), mask=later < K)


def gelu_quantised(x: Tensor, least: float, largest: float) -> tuple[Tensor, Tensor]:
    """The values and scales of `fp8.gelu_quantised`, of a contiguous tensor on a GPU."""
    assert x.is_contiguous()
    width = x.shape[-1]
    out = torch.empty(x.shape, device=x.device, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*x.shape[:-1], 1, device=x.device, dtype=torch.float32)
    main = 1 << (width.bit_length() - 1)
    rest = 0 if main == width else triton.next_power_of_2(width - main)
    warps = 8 if main > 2048 else 4
    with torch.cuda.device_of(x):
        _gelu_quantised[(x.numel() // width,)](
            x,
            out,
            scales,
            LEAST=least,
            LARGEST=largest,
            K=width,
            MAIN=main,
            REST=rest,
            num_warps=warps,
        )
    return out, scales
