"""Frames into their places and their gradients back, in one pass over memory, as kernels for GPUs. Import it only where
triton is. `apart.plainly` says what they compute.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 8, 512  # of a program: each thread has 32 numbers


@triton.jit
def _turned(x, turn, sign, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pairs of [ROWS, COLUMNS] times the complex numbers in `turn` (sign 1) or their conjugates (-1)."""
    real, imaginary = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    cos, sin = tl.split(tl.reshape(turn, (ROWS, COLUMNS // 2, 2)))
    sin = sin * sign
    return tl.reshape(tl.join(real * cos - imaginary * sin, imaginary * cos + real * sin), (ROWS, COLUMNS))


@triton.jit
def _put(
    x,
    turn,
    entry,
    out,
    tokens,
    entries,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tile, slot, video = tl.program_id(0) // chunks, tl.program_id(1), tl.program_id(2)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % chunks * COLUMNS + tl.arange(0, COLUMNS)
    real = (rows < tokens)[:, None] & (columns < WIDTH)[None, :]
    source = (video * entries + tl.load(entry + slot)).to(tl.int64) * tokens + rows
    value = tl.load(x + source[:, None] * WIDTH + columns[None, :], mask=real, other=0.0)
    if TURNS:
        place = (slot.to(tl.int64) * tokens + rows)[:, None] * HEAD + (columns % HEAD)[None, :]
        value = _turned(value.to(tl.float32), tl.load(turn + place, mask=real, other=0.0), 1.0, ROWS, COLUMNS)
    target = (video * tl.num_programs(1) + slot).to(tl.int64) * tokens + rows
    tl.store(out + target[:, None] * WIDTH + columns[None, :], value.to(out.dtype.element_ty), mask=real)


@triton.jit
def _taken(
    grad,
    turn,
    order,
    first,
    out,
    tokens,
    slots,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tile, entry, video = tl.program_id(0) // chunks, tl.program_id(1), tl.program_id(2)
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % chunks * COLUMNS + tl.arange(0, COLUMNS)
    real = (rows < tokens)[:, None] & (columns < WIDTH)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for index in range(tl.load(first + entry), tl.load(first + entry + 1)):
        slot = tl.load(order + index)
        source = (video * slots + slot).to(tl.int64) * tokens + rows
        value = tl.load(grad + source[:, None] * WIDTH + columns[None, :], mask=real, other=0.0).to(tl.float32)
        if TURNS:
            place = (slot.to(tl.int64) * tokens + rows)[:, None] * HEAD + (columns % HEAD)[None, :]
            value = _turned(value, tl.load(turn + place, mask=real, other=0.0), -1.0, ROWS, COLUMNS)
        total += value
    target = (video * tl.num_programs(1) + entry).to(tl.int64) * tokens + rows
    tl.store(out + target[:, None] * WIDTH + columns[None, :], total.to(out.dtype.element_ty), mask=real)


def put(x: Tensor, turn: Tensor | None, entry: Tensor, tokens: int) -> Tensor:
    """`apart.plainly` of contiguous `x` [B, E * tokens, N, K], int32 `entry` [S] and `turn` [S * tokens, 1, K/2, 2]."""
    assert x.is_contiguous()
    made = x.new_empty(x.shape[0], entry.numel() * tokens, *x.shape[2:])
    given = x, turn, entry, made, tokens, x.shape[1] // tokens
    return _launched(_put, given, made, entry.numel(), turn, tokens)


def taken(grad: Tensor, turn: Tensor | None, order: Tensor, first: Tensor, tokens: int) -> Tensor:
    """The gradient of `put`, added up in float32. Args: `order`, `first` as those of `apart.Places`."""
    assert grad.is_contiguous()
    entries = first.numel() - 1
    made = grad.new_empty(grad.shape[0], entries * tokens, *grad.shape[2:])
    given = grad, turn, order, first, made, tokens, grad.shape[1] // tokens
    return _launched(_taken, given, made, entries, turn, tokens)


def _launched(kernel: Any, given: tuple, made: Tensor, frames: int, turn: Tensor | None, tokens: int) -> Tensor:
    """`made`, which `kernel` fills: programs for its rows and columns, frames and videos."""
    heads, head = made.shape[2:]
    grid = (triton.cdiv(tokens, _ROWS) * triton.cdiv(heads * head, _COLUMNS), frames, made.shape[0])
    given = tuple(made if one is None else one for one in given)  # a pointer that is never read
    assert turn is None or turn.is_contiguous()
    with torch.cuda.device_of(made):
        kernel[grid](
            *given, WIDTH=heads * head, HEAD=head, TURNS=turn is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4
        )
    return made
