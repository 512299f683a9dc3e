"""Sums of the residual stream and their norms as they enter a product, as kernels for GPUs: the functions of the same
names in `layers.py`, and their gradients. Import it only where triton is.

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

_ROWS = 32  # of a program of the gradient, which adds up over them


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)  # what is not finite must show


@triton.jit
def _hat(value, real, eps, D: tl.constexpr, MEAN: tl.constexpr):
    """A row without its mean, where it is to lose that, divided by its size; and what it was multiplied by."""
    if MEAN:
        value = tl.where(real, value - tl.sum(value, axis=0) / D, 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    return value * inverse, inverse


@triton.jit
def _factor(scale, real, BY_FRAME: tl.constexpr):
    """What a norm is multiplied by: its weight, or of a frame one more than the scale says."""
    factor = tl.load(scale, mask=real, other=0.0).to(tl.float32)
    return factor + 1.0 if BY_FRAME else factor


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
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
    BY_FRAME: tl.constexpr,  # scale and shift
    MEAN: tl.constexpr,  # a layer norm; else a root-mean-square one, without shift
    QUANTISED: tl.constexpr,
):
    row = tl.program_id(0)
    frame = (row // tokens) * step
    columns = tl.arange(0, BLOCK)
    real = columns < D
    at = row.to(tl.int64) * D + columns
    value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if ADDS:
        part = tl.load(made + at, mask=real, other=0.0).to(tl.float32)
        if GATED:
            part *= tl.load(gate + frame + columns, mask=real, other=0.0)
        value += part
        tl.store(total + at, value, mask=real)
    value, _ = _hat(value, real, eps, D, MEAN)
    if BY_FRAME:
        scale += frame
        shift += frame
    value *= _factor(scale + columns, real, BY_FRAME)
    if MEAN:
        value += tl.load(shift + columns, mask=real, other=0.0).to(tl.float32)
    if QUANTISED:
        row_scale = _larger(tl.reduce(tl.abs(value), 0, _larger), LEAST) / LARGEST
        tl.store(scales + row, row_scale)
        value *= 1.0 / row_scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=real)


@triton.jit
def _through(change, hat, inverse, D: tl.constexpr, MEAN: tl.constexpr):
    """The gradient of a row from that of its norm `hat`, which was divided by 1 / `inverse`."""
    along = tl.sum(change * hat, axis=0) / D
    if MEAN:
        change -= tl.sum(change, axis=0) / D
    return (change - hat * along) * inverse


@triton.jit(do_not_specialize=["tokens"])
def _gradients(
    total,
    made,
    gate,
    scale,
    of_out,
    of_total,
    of_x,
    of_made,
    of_scale,
    of_shift,
    of_gate,
    tokens,
    step,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
    BY_FRAME: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    part, frame, columns = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    real = columns < D
    if BY_FRAME:
        scale += frame * step
    factor = _factor(scale + columns, real, BY_FRAME)
    if GATED:
        opening = tl.load(gate + frame * step + columns, mask=real, other=0.0)
    scale_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    shift_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    gate_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(part * ROWS, tl.minimum(part * ROWS + ROWS, tokens)):
        at = (frame.to(tl.int64) * tokens + row) * D + columns
        # All loads first: what follows waits several times for the whole row.
        hat = tl.load(total + at, mask=real, other=0.0).to(tl.float32)
        change = tl.load(of_out + at, mask=real, other=0.0).to(tl.float32)
        if MEAN:
            through = tl.load(of_total + at, mask=real, other=0.0)
        if GATED:
            added = tl.load(made + at, mask=real, other=0.0).to(tl.float32)
        hat, inverse = _hat(hat, real, eps, D, MEAN)
        scale_sum += change * hat
        shift_sum += change
        change = _through(change * factor, hat, inverse, D, MEAN)
        if MEAN:
            change += through
        tl.store(of_x + at, change.to(of_x.dtype.element_ty), mask=real)
        if GATED:
            gate_sum += change * added
            change *= opening
        if ADDS:
            tl.store(of_made + at, change.to(of_made.dtype.element_ty), mask=real)
    place = (frame * tl.num_programs(0) + part) * D + columns  # of a ROWS-th of all numbers
    tl.store(of_scale + place, scale_sum, mask=real)
    if MEAN:
        tl.store(of_shift + place, shift_sum, mask=real)
    if GATED:
        tl.store(of_gate + place, gate_sum, mask=real)


def normed(
    x: Tensor,
    made: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | Rows]:
    """The sum of `x` and `made` [..., l, D], gated [..., 1, D] or not, and its norm as it enters weights of `dtype`, by
    `scale` and `shift` [..., 1, D] or [D]; without `made` of `x` itself, without `shift` a root-mean-square norm.
    """
    assert x.is_contiguous() and (made is None or made.is_contiguous())
    vectors, step = _by_frame(gate, scale, shift)
    total = x if made is None else torch.empty_like(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) if dtype == FP8 else None
    given = [x, made, *vectors, total, out, scales]
    with torch.cuda.device_of(x):
        _normed[(x.numel() // x.shape[-1],)](
            *_without_none(given, x),
            x.shape[-2],
            step,
            eps,
            **_options(x, made, gate, scale, shift),
            LEAST=LEAST,
            LARGEST=LARGEST,
            QUANTISED=scales is not None,
            num_warps=8 if x.shape[-1] > 2048 else 4,
        )
    return total, out if scales is None else Rows(out, scales)


def gradients(
    total: Tensor,
    made: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    of_out: Tensor,
    of_total: Tensor | None,
    added: torch.dtype | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """The gradients of x, made, gate, scale and shift from those of the norm and of the sum, `total`; the last three
    for each frame, [..., 1, D] in float32.

    Args: as those of `normed`; `of_total` None where the norm is a root-mean-square one; `added`, the type of what was
    added, None where nothing was; `made` itself is read only with a gate.
    """
    tokens, width = total.shape[-2:]
    vectors, step = _by_frame(gate, scale)
    assert total.is_contiguous() and of_out.is_contiguous()
    frames, parts = total.numel() // (tokens * width), triton.cdiv(tokens, _ROWS)
    of_made = None if added is None else torch.empty_like(total, dtype=added)
    of_x, sums = (
        torch.empty_like(total),
        [
            total.new_empty(frames, parts, width, dtype=torch.float32) if on else None
            for on in (True, of_total is not None, gate is not None)
        ],
    )
    given = [total, made, *vectors, of_out, of_total, of_x, of_made, *sums]
    with torch.cuda.device_of(total):
        _gradients[(parts, frames)](
            *_without_none(given, total),
            tokens,
            step,
            eps,
            **_options(total, of_made, gate, scale, of_total),
            ROWS=_ROWS,
            num_warps=16 if width > 2048 else 8,
        )
    of_scale, of_shift, of_gate = (
        None if one is None else one.sum(1).view(*total.shape[:-2], 1, width) for one in sums
    )
    assert of_scale is not None
    return of_x, of_made, of_gate, of_scale, of_shift


def _by_frame(*vectors: Tensor | None) -> tuple[list[Tensor | None], int]:
    """Vectors [..., 1, D] of frames as one after the other, [E, D], and the elements from one to the next, the same in
    all; [D] as they are.
    """
    found = [v if v is None or v.ndim == 1 else v.squeeze(-2).flatten(0, -2) for v in vectors]
    each = [v for v in found if v is not None and v.ndim > 1]
    if any(v.stride(-1) != 1 or v.stride(0) != each[0].stride(0) for v in each):
        found = [None if v is None else v.contiguous() for v in found]
        each = [v for v in found if v is not None and v.ndim > 1]
    return found, each[0].stride(0) if each else 0


def _options(x: Tensor, made: Tensor | None, gate: Tensor | None, scale: Tensor, mean: Tensor | None) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "D": x.shape[-1],
        "BLOCK": triton.next_power_of_2(x.shape[-1]),
        "ADDS": made is not None,
        "GATED": gate is not None,
        "BY_FRAME": scale.ndim > 1,
        "MEAN": mean is not None,
    }


def _without_none(given: list[Any], x: Tensor) -> list[Any]:
    return [x if one is None else one for one in given]  # any pointer will do: it is not read


def gated_then_modulated(
    x: Tensor, made: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """As that of `layers.py`."""
    return normed(x, made, gate, scale, shift, eps, dtype)


def gated_then_normed(
    x: Tensor, made: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """As that of `layers.py`."""
    return normed(x, made, gate, weight, bias, eps, dtype)


def added_then_modulated(
    x: Tensor, made: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """As that of `layers.py`."""
    return normed(x, made, None, scale, shift, eps, dtype)
