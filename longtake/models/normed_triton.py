"""Sums of the residual stream and their norms as they enter a product, as kernels for GPUs: the functions of the same
names in `layers.py`. Import it only where triton is.

A token stays in registers from its sum to its norm, and where it is quantised to its rounding: torch's compiler reads
rows of more than 1024 numbers once more for each of these.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtake.models.fp8 import FP8, LARGEST, LEAST, Rows


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)  # what is not finite must show


@triton.jit(do_not_specialize=["tokens"])
def _normed(
    x,
    made,
    gate,
    scale,
    shift,
    total,
    out,
    scales,
    tokens,
    step,  # elements from a frame's gate, scale or shift to the next one's
    eps,
    LEAST: tl.constexpr,
    LARGEST: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    BY_FRAME: tl.constexpr,  # scale and shift, and the scale is one more than it says
    QUANTISED: tl.constexpr,
):
    row = tl.program_id(0)
    frame = (row // tokens) * step
    columns = tl.arange(0, BLOCK)
    real = columns < D
    at = row.to(tl.int64) * D + columns
    part = tl.load(made + at, mask=real, other=0.0).to(tl.float32)
    if GATED:
        part *= tl.load(gate + frame + columns, mask=real, other=0.0)
    value = tl.load(x + at, mask=real, other=0.0) + part
    tl.store(total + at, value, mask=real)
    value = tl.where(real, value - tl.sum(value, axis=0) / D, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    if BY_FRAME:
        scale += frame
        shift += frame
    factor = tl.load(scale + columns, mask=real, other=0.0).to(tl.float32)
    value *= factor + 1.0 if BY_FRAME else factor
    value += tl.load(shift + columns, mask=real, other=0.0).to(tl.float32)
    if QUANTISED:
        row_scale = _larger(tl.reduce(tl.abs(value), 0, _larger), LEAST) / LARGEST
        tl.store(scales + row, row_scale)
        value *= 1.0 / row_scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=real)


def _launched(
    x: Tensor, made: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """The sum of `x` and `made` [B, E, l, D], gated [B, E, 1, D] or not, and its norm as it enters weights of `dtype`,
    by `scale` and `shift` [B, E, 1, D] or [D].
    """
    width, by_frame = x.shape[-1], scale.ndim > 1
    each = [vector for vector in (gate, scale, shift) if vector is not None and vector.ndim > 1]
    step = each[0].stride(1)
    assert x.is_contiguous() and made.is_contiguous() and x.dtype == torch.float32
    assert all(v.stride(-1) == 1 and v.stride(1) == step and v.stride(0) == step * v.shape[1] for v in each)
    total, out = torch.empty_like(x), torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = x.new_empty(*x.shape[:-1], 1) if dtype == FP8 else None
    sizes: dict[str, Any] = {"D": width, "BLOCK": triton.next_power_of_2(width), "LEAST": LEAST, "LARGEST": LARGEST}
    with torch.cuda.device_of(x):
        _normed[(x.numel() // width,)](
            x,
            made,
            x if gate is None else gate,  # any pointer will do: it is not read
            scale,
            shift,
            total,
            out,
            x if scales is None else scales,
            x.shape[2],
            step,
            eps,
            **sizes,
            GATED=gate is not None,
            BY_FRAME=by_frame,
            QUANTISED=scales is not None,
            num_warps=8 if width > 2048 else 4,
        )
    return total, out if scales is None else Rows(out, scales)


def gated_then_modulated(
    x: Tensor, made: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """As that of `layers.py`."""
    return _launched(x, made, gate, scale, shift, eps, dtype)


def gated_then_normed(
    x: Tensor, made: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """As that of `layers.py`."""
    return _launched(x, made, gate, weight, bias, eps, dtype)


def added_then_modulated(
    x: Tensor, made: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """As that of `layers.py`."""
    return _launched(x, made, None, scale, shift, eps, dtype)
