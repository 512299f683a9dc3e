"""What self-attention of a block that streams reads, from its projections and a cache in one pass over memory, as a
kernel for GPUs. Import it only where triton is.

Queries and keys are normed over their whole width and rotated, keys and values are put behind those of the past, and
where the pass stores they are written into the cache too. A program does one token. As compiled functions that was five
kernels and two copies, of which the rotated window went at half the speed of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _normed(x, weight, columns, real, eps, D: tl.constexpr, KIND: tl.constexpr):
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    x = x * tl.load(weight + columns, mask=real, other=0.0).to(KIND).to(tl.float32)
    return x.to(KIND).to(tl.float32)  # as it is where it is kept without its rotation


@triton.jit
def _turned(x, turn, columns, real, K: tl.constexpr, BLOCK: tl.constexpr):
    """Adjacent pairs rotated by the cosines and sines of a token, [K / 2, 2], which all heads share."""
    angles = tl.load(turn + columns % K, mask=real, other=0.0)
    cos, sin = tl.split(tl.reshape(angles, (BLOCK // 2, 2)))
    even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK,))


# Indices are parts of one tensor, and numbers of frames and tokens differ: code for each would be compiled for nothing.
@triton.jit(do_not_specialize=["past_rows", "own_rows", "tokens", "slots", "write_slots"])
def _attended(
    q,
    k,
    v,
    q_weight,
    k_weight,
    query_turn,
    key_turn,
    keys,
    values,
    slots,
    write_slots,
    q_out,
    k_out,
    v_out,
    past_rows,
    own_rows,
    tokens,
    kept_step,  # elements of `keys` from an item of the batch to the next
    eps,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    RELATIVE: tl.constexpr,
    STORES: tl.constexpr,
):
    # 64 bits where elements are counted: long caches have more than 32 can count. Divisions are of 32, which are quick.
    row, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    real = columns < D
    kind = k_out.dtype.element_ty
    to = (item * (past_rows + own_rows) + row) * D + columns
    if row < past_rows:
        slot = tl.load(slots + row // tokens)  # 64 bits, as what follows
        at = item * kept_step + (slot * tokens + row % tokens) * D + columns
        tl.store(v_out + to, tl.load(values + at, mask=real), mask=real)
        past = tl.load(keys + at, mask=real, other=0.0).to(tl.float32)
        if RELATIVE:
            past = _turned(past, key_turn + row.to(tl.int64) * K, columns, real, K, BLOCK)
        tl.store(k_out + to, past.to(kind), mask=real)
    else:
        own = row - past_rows
        at = (item * own_rows + own) * D + columns
        query = tl.load(q + at, mask=real, other=0.0).to(tl.float32)
        query = _normed(query, q_weight, columns, real, eps, D, kind)
        query = _turned(query, query_turn + own.to(tl.int64) * K, columns, real, K, BLOCK)
        tl.store(q_out + at, query.to(kind), mask=real)
        key = tl.load(k + at, mask=real, other=0.0).to(tl.float32)
        key = _normed(key, k_weight, columns, real, eps, D, kind)
        turned = _turned(key, key_turn + (row if RELATIVE else own).to(tl.int64) * K, columns, real, K, BLOCK)
        tl.store(k_out + to, turned.to(kind), mask=real)
        value = tl.load(v + at, mask=real)
        tl.store(v_out + to, value, mask=real)
        if STORES:
            slot = tl.load(write_slots + own // tokens)
            kept = item * kept_step + (slot * tokens + own % tokens) * D + columns
            tl.store(keys + kept, (key if RELATIVE else turned).to(kind), mask=real)
            tl.store(values + kept, value, mask=real)


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, Tensor],
    eps: float,
    turns: tuple[Tensor, Tensor],
    stored: tuple[Tensor, Tensor],
    slots: Tensor,
    write_slots: Tensor | None,
    *,
    relative: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, L, N, K], and keys and values [B, P * tokens + L, N, K] of the past and the block.

    Args: `q`, `k`, `v` [B, L, D], contiguous; `weights` [D] of the norms of queries and keys, and their `eps`; `turns`
    of queries [L, K/2, 2] and keys, as `rotated` takes them, where keys are `relative` for all that is attended to,
    else for the block's own; `stored` keys and values [B, slots, tokens, N, K] of a layer, of which `slots` [P] are
    read; `write_slots` [f], where the block's own are stored, None: nowhere.
    """
    batch, own, width = q.shape
    keys, values = stored
    tokens, heads, head_width = keys.shape[2:]
    past = slots.numel() * tokens
    assert all(t.is_contiguous() for t in (q, k, v, *turns, keys[0], values[0]))
    made = q.new_empty(batch, own, heads, head_width)
    seen = [q.new_empty(batch, past + own, heads, head_width) for _ in range(2)]
    with torch.cuda.device_of(q):
        _attended[(past + own, batch)](
            q,
            k,
            v,
            *weights,
            *turns,
            keys,
            values,
            slots,
            slots if write_slots is None else write_slots,
            made,
            *seen,
            past,
            own,
            tokens,
            keys.stride(0),
            eps,
            D=width,
            K=head_width,
            BLOCK=triton.next_power_of_2(width),
            RELATIVE=relative,
            STORES=write_slots is not None,
            num_warps=8 if width > 2048 else 4,
        )
    return made, seen[0], seen[1]
