"""Norms of rows with what is added before and multiplied after them, and their gradients, each in one pass over memory.
Import it only where triton is. A row stays in registers; torch's compiler reads rows wider than 1024 twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # of a program of the gradient, which adds up over them


@triton.jit
def _hat(x, real, eps, WIDTH: tl.constexpr, MEAN: tl.constexpr):
    """A row without its mean (where it is a layer norm), divided by its size; and what it was multiplied by."""
    if MEAN:
        x = tl.where(real, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    return x * scale, scale


@triton.jit
def _factor(place, real, SHARED: tl.constexpr):
    """What a norm is multiplied by: a weight, or 1 and a scale."""
    value = tl.load(place, mask=real, other=0.0).to(tl.float32)
    return value if SHARED else value + 1.0


@triton.jit
def _forward(
    x,
    made,
    gate,
    scale,
    shift,
    out,
    normed,
    tokens,
    gate_stride,
    scale_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    GATES: tl.constexpr,
    SHARED: tl.constexpr,
    MEAN: tl.constexpr,
):
    entry, columns = tl.program_id(1), tl.arange(0, BLOCK)
    real = columns < WIDTH
    at = (entry.to(tl.int64) * tokens + tl.program_id(0)) * WIDTH + columns
    value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if ADDS:
        more = tl.load(made + at, mask=real, other=0.0).to(tl.float32)
        if GATES:
            more *= tl.load(gate + entry * gate_stride + columns, mask=real, other=0.0)
        value += more
        tl.store(out + at, value, mask=real)
    hat, _ = _hat(value, real, eps, WIDTH, MEAN)
    place = columns if SHARED else entry * scale_stride + columns
    hat *= _factor(scale + place, real, SHARED)
    if MEAN:
        hat += tl.load(shift + place, mask=real, other=0.0).to(tl.float32)
    tl.store(normed + at, hat.to(normed.dtype.element_ty), mask=real)


@triton.jit
def _backward(
    value,
    made,
    gate,
    scale,
    of_normed,
    of_out,
    of_value,
    of_made,
    scale_sums,
    shift_sums,
    gate_sums,
    tokens,
    gate_stride,
    scale_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    GATES: tl.constexpr,
    SHARED: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    part, entry, columns = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    real = columns < WIDTH
    factor = _factor(scale + (columns if SHARED else entry * scale_stride + columns), real, SHARED)
    if GATES:
        opening = tl.load(gate + entry * gate_stride + columns, mask=real, other=0.0)
    of_scale = tl.zeros((BLOCK,), dtype=tl.float32)
    of_shift = tl.zeros((BLOCK,), dtype=tl.float32)
    of_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(part * ROWS, tl.minimum(part * ROWS + ROWS, tokens)):
        at = (entry.to(tl.int64) * tokens + row) * WIDTH + columns
        # All loads first: what follows waits several times for the whole row.
        hat = tl.load(value + at, mask=real, other=0.0).to(tl.float32)
        change = tl.load(of_normed + at, mask=real, other=0.0).to(tl.float32)
        if MEAN:
            through = tl.load(of_out + at, mask=real, other=0.0)
        if GATES:
            added = tl.load(made + at, mask=real, other=0.0).to(tl.float32)
        hat, size = _hat(hat, real, eps, WIDTH, MEAN)
        of_scale += change * hat
        of_shift += change
        change *= factor
        along = tl.sum(change * hat, axis=0) / WIDTH
        if MEAN:
            change -= tl.sum(change, axis=0) / WIDTH
        change = (change - hat * along) * size
        if MEAN:
            change += through
        tl.store(of_value + at, change.to(of_value.dtype.element_ty), mask=real)
        if GATES:
            of_gate += change * added
            change *= opening
        if ADDS:
            tl.store(of_made + at, change.to(of_made.dtype.element_ty), mask=real)
    place = (entry * tl.num_programs(0) + part) * WIDTH + columns  # at most a part in ROWS of all numbers
    tl.store(scale_sums + place, of_scale, mask=real)
    if MEAN:
        tl.store(shift_sums + place, of_shift, mask=real)
    if GATES:
        tl.store(gate_sums + place, of_gate, mask=real)


def forward(
    x: Tensor,
    made: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`x` [E, L, D] and `made`, times `gate`, added up; and the norm of that, scaled and shifted, in `dtype`.

    Args: contiguous `x` and `made`; `gate` [E, D] or None; `scale`, `shift` [E, D], of which 1 is added to the former,
    or [D]; without `shift` the norm is a root-mean-square one.
    """
    out = x if made is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    strides, options = _options(x, made, gate, scale, shift, warps=4)
    given = [x, made, gate, scale, shift, out, normed, x.shape[1], *strides, eps]
    with torch.cuda.device_of(x):
        _forward[(x.shape[1], x.shape[0])](*_without_none(given, x), **options)
    return out, normed


def backward(
    value: Tensor,
    made: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    of_normed: Tensor,
    of_out: Tensor | None,
    of_made: torch.dtype | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """The gradients of `x`, `made`, `gate` [E, D], and of scale and shift [E, D], float32, from those of the norm and
    of the sum `value` [E, L, D].

    Args: as those of `forward`; `of_out` None where the norm is a root-mean-square one; `of_made`, the type of what
    was added, None where nothing was.
    """
    entries, tokens, width = value.shape
    parts = triton.cdiv(tokens, _ROWS)
    found = torch.empty_like(value)
    added = None if of_made is None else torch.empty_like(value, dtype=of_made)
    wanted = (True, of_out is not None, gate is not None)  # of scale, shift and gate
    sums = [value.new_empty(entries, parts, width, dtype=torch.float32) if on else None for on in wanted]
    strides, options = _options(value, added, gate, scale, of_out, warps=8)
    given = [value, made, gate, scale, of_normed, of_out, found, added, *sums, tokens, *strides, eps]
    with torch.cuda.device_of(value):
        _backward[(parts, entries)](*_without_none(given, value), **options, ROWS=_ROWS)
    of_scale, of_shift, of_gate = (None if each is None else each.sum(1) for each in sums)
    assert of_scale is not None
    return found, added, of_gate, of_scale, of_shift


def _options(
    x: Tensor, made: Tensor | None, gate: Tensor | None, scale: Tensor, mean: Tensor | None, warps: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Steps from one entry to the next of gate and scale; and what a kernel is compiled for. Args: `warps` of 2048
    columns.
    """
    block = triton.next_power_of_2(x.shape[-1])
    return (0 if gate is None else gate.stride(0), scale.stride(0)), {
        "WIDTH": x.shape[-1],
        "BLOCK": block,
        "ADDS": made is not None,
        "GATES": gate is not None,
        "SHARED": scale.ndim == 1,
        "MEAN": mean is not None,
        "num_warps": max(4, min(16, block * warps // 2048)),
    }


def _without_none(given: list[Any], x: Tensor) -> list[Any]:
    return [x if one is None else one for one in given]  # a pointer that is never used
