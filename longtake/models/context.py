"""What one call's attention sees beyond its own tokens: nothing, a mask, a cache; and the condition's keys and values.

Between the transformer, which knows no cache layout, and the cache, which knows no layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.condition import MaskLayout
from longtake.models.apart import Joins, Places, apart, turned
from longtake.models.attention import FrameMask, block_mask, has_triton, make_mask
from longtake.models.cache import CacheView, KVCache, beside
from longtake.models.execution import WHOLE_NETWORK, Execution, Run
from longtake.models.layers import RMSNorm, rotated
from longtake.models.norms import rms_norm
from longtake.models.sequence_parallel import NO_SPLIT, TokenShard
from longtake.models.trial import is_right

Projected = tuple[Tensor, Tensor, Tensor]  # queries, keys and values of a call's tokens
Made = tuple[Tensor, Tensor, Tensor]  # queries, and keys and values that they attend to


class Projection(Protocol):
    """A cross-attention, as far as this file knows it."""

    def project(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True, eq=False)
class PreparedMask:
    """A `MaskLayout` (`key_entry` None: its keys are plain) for frames of some number of tokens, on a device; `places`,
    where each part of the mask has slots of its own.
    """

    frame_index: Tensor
    key_position: Tensor
    key_entry: Tensor | None
    mask: FrameMask
    later_from: int | None = None
    places: Places | None = None

    @classmethod
    def of(
        cls,
        layout: MaskLayout,
        tokens: int,
        device: torch.device,
        *,
        flex: bool | None = None,
        joins: Joins | None = None,
    ) -> PreparedMask:
        """As `make_mask` makes it of the layout. Args: `joins`, where each part shall have slots of its own
        (`apart.py`).
        """
        moved = layout.to(device)
        entry, position = moved.key_entry, moved.key_position
        mask = make_mask(moved.allowed, tokens, device, flex=flex)
        if joins is None or len(mask.parts) < 2:
            return cls(moved.frame_index, position, None if layout.plain_keys else entry, mask, layout.later_from)
        mask, slots = apart(mask)
        places = Places.of(entry[slots], tokens, int(entry.max()) + 1)
        return cls(moved.frame_index, position[slots], entry[slots], joins(mask), layout.later_from, places)

    @property
    def num_entries(self) -> int:
        return self.frame_index.numel()


@dataclass(frozen=True, eq=False)
class MaskOverCache:
    """A mask over entries and over frames of a cache, in `slots` [P], which its layout numbers after the entries.

    They carry no gradient. Positions follow the cache's law, and its clock. `offset`, how many frames later everything
    is than its layout says, so that one layout serves all late parts of a long video.
    """

    layout: MaskLayout
    cache: KVCache
    slots: Tensor
    offset: int = 0

    @property
    def num_entries(self) -> int:
        return self.layout.num_entries


class SelfContext:
    """How one call's self-attention sees keys: everything (bidirectional), a mask, or a cache.

    `query_turn` [E, l, 1, K/2, 2] rotates the queries of this process's tokens, `key_turn` [S, 1, K/2, 2] keys, which
    here are of all tokens and this process's heads. `shard` says which these are, `execution` how the call is computed.
    """

    def __init__(
        self, query_turn: Tensor, key_turn: Tensor, shard: TokenShard = NO_SPLIT, execution: Execution = WHOLE_NETWORK
    ) -> None:
        self.query_turn, self.key_turn, self.shard, self.execution = query_turn, key_turn, shard, execution

    def attended(
        self, layer: int, projected: Projected, norms: tuple[RMSNorm, RMSNorm], heads: int
    ) -> tuple[Tensor, Tensor, Tensor, FrameMask | None]:
        """Queries, and keys and values that they attend to, [B, L or S, n, K], and the mask if there is one.

        Args: `projected` queries, keys and values [B, E, l, D] of this process's tokens; `norms` of the first two.
        """
        (q_norm, k_norm), (q, k, v) = norms, projected
        q, k = (rms_norm(t, one.weight, one.eps, self.execution) for t, one in ((q, q_norm), (k, k_norm)))
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        q = self.turned(q)
        # From here on all tokens of the call, and where processes shard them, some of the heads: [B, E * L, n, K].
        q, k, v = (t.flatten(1, 2) for t in self.shard.to_heads(q, k, v))
        return q, *self.extend(layer, k, v)

    def turned(self, q: Tensor) -> Tensor:
        """Queries [B, E, l, N, K] of this process's tokens, rotated."""
        # A kernel of its own: the compiler's one for norm and rotation took longer than both (41 and 32 us on an H200).
        return self.execution.fused(rotated)(q, self.query_turn)

    def rotated(self, k: Tensor) -> Tensor:
        return self.execution.fused(rotated)(k, self.key_turn)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, FrameMask | None]:
        """Keys, rotated, and values that the call's queries attend to, from its own, and the mask if there is one."""
        return self.rotated(k), v, None


class MaskedContext(SelfContext):
    """Keys and values of the entries themselves, rearranged into key slots where the layout has more of them; of the
    frames of a cache, too, where `past` names some.
    """

    def __init__(self, prepared: PreparedMask, past: MaskOverCache | None, *common: Any) -> None:
        super().__init__(*common)
        self.mask, self.key_entry, self.places = prepared.mask, prepared.key_entry, prepared.places
        self.past = past if past is not None and past.slots.numel() else None

    def turned(self, q: Tensor) -> Tensor:
        return super().turned(q) if self.places is None else turned(q, self.query_turn)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, FrameMask | None]:
        if self.past is not None:
            k, v = self._with_past(self.past, layer, k, v)
        if self.places is not None:
            return self.places.put(k, self.key_turn), self.places.put(v), self.mask
        if self.key_entry is not None:
            k, v = (
                t.unflatten(1, (-1, self.mask.tokens)).index_select(1, self.key_entry).flatten(1, 2) for t in (k, v)
            )
        return self.rotated(k), v, self.mask

    def _with_past(self, past: MaskOverCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Own keys and values, then those of the cache."""
        older = (t[layer].index_select(1, past.slots).flatten(1, 2) for t in (past.cache.keys, past.cache.values))
        keys, values = (torch.cat([own, old.to(own.dtype)], 1) for own, old in zip((k, v), older))
        return keys, values


class CachedContext(SelfContext):
    """The attended past of each block, from the cache, before its own keys and values, which a commit stores."""

    def __init__(self, view: CacheView, *common: Any) -> None:
        super().__init__(*common)
        self.view = view
        self.mask = block_mask(view.blocks, view.cache.tokens_per_frame)

    def attended(
        self, layer: int, projected: Projected, norms: tuple[RMSNorm, RMSNorm], heads: int
    ) -> tuple[Tensor, Tensor, Tensor, FrameMask | None]:
        """As that of all contexts; of one block, where work is fused on a GPU, in one pass over memory."""
        device, dtype = projected[0].device, projected[0].dtype
        fuses = self.execution.fuses and device.type == "cuda" and has_triton() and not torch.is_grad_enabled()
        if fuses and self.mask is None and self.shard is NO_SPLIT and self.view.cache.keys.dtype == dtype:
            kernel = attended_at_once(device, dtype)
            if kernel is not None:
                return self.by_kernel(kernel, layer, projected, norms)
        return super().attended(layer, projected, norms, heads)

    def by_kernel(
        self, kernel: Callable[..., Made], layer: int, projected: Projected, norms: tuple[RMSNorm, RMSNorm]
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """As `attended`, by a function like that of `attended_triton.py`."""
        view, cache, (q_norm, k_norm) = self.view, self.view.cache, norms
        assert q_norm.eps == k_norm.eps
        made = kernel(
            *(t.flatten(1, 2) for t in projected),
            (q_norm.weight, k_norm.weight),
            q_norm.eps,
            (self.query_turn.flatten(0, 1), self.key_turn),
            (cache.keys[layer], cache.values[layer]),
            view.slots,
            view.write_slots if view.commit else None,
            relative=cache.rope == "relative",
        )
        return *made, None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, FrameMask | None]:
        view, cache, together = self.view, self.view.cache, self.execution.fused(beside)
        if cache.rope == "relative":  # where all are rotated, not only the block's own, and for this call
            turn = self.key_turn
        else:
            k, turn = self.rotated(k), None
        keys = together(cache.keys[layer], view.slots, k, view.blocks, turn)
        values = together(cache.values[layer], view.slots, v, view.blocks)
        if view.commit:
            cache.write(layer, view, k, v)
        return keys, values, self.mask


@cache
def attended_at_once(device: torch.device, dtype: torch.dtype) -> Callable[..., Made] | None:
    """The kernel of `attended_triton.py`; None, which is said once, where it is not right."""
    from longtake.models.attended_triton import attended as kernel

    def off() -> list[float]:
        return [_difference(kernel, rope, device, dtype) for rope in ("relative", "absolute")]

    return kernel if is_right("the kernel of what attention reads", device, off) else None


@torch.no_grad()
def _difference(kernel: Callable[..., Made], rope: str, device: torch.device, dtype: torch.dtype) -> float:
    """How far a kernel is from plain work on a small problem that stores: the norm of errors by that of results."""
    generator, heads, width, tokens = torch.Generator(device).manual_seed(0), 3, 16, 7

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    sizes: dict[str, Any] = {"num_layers": 1, "batch_size": 2, "num_heads": heads, "head_width": width}
    sizes |= {"window_frames": 6, "sink_frames": 1, "max_frames": None, "spare_frames": 0, "clock": "exact"}
    one = KVCache(**sizes, tokens_per_frame=tokens, rope=rope, device=device, dtype=dtype)
    for stored in (one.keys, one.values):
        stored.copy_(drawn(*stored.shape))
    slots, write_slots = (torch.tensor(numbers, device=device) for numbers in ([0, 4, 2], [5, 1]))
    q, k, v = (drawn(2, 2, tokens, heads * width).to(dtype) for _ in range(3))
    q_norm, k_norm = (RMSNorm(heads * width, 1e-6).to(device) for _ in range(2))
    for norm in (q_norm, k_norm):
        norm.weight.data = drawn(heads * width).to(dtype)
    given: Any = {"layer": 0, "projected": (q, k, v), "norms": (q_norm, k_norm)}
    query_turn, key_turn = drawn(2, tokens, 1, width // 2, 2), drawn(5 * tokens, 1, width // 2, 2)
    if rope == "absolute":
        key_turn = query_turn.flatten(0, 1)
    found = []
    for by_kernel in (True, False):
        own = one.copy()
        view = CacheView(own, slots, *(write_slots,) * 4, blocks=((3, 2),), commit=True)
        context = CachedContext(view, query_turn, key_turn)
        run = partial(context.by_kernel, kernel) if by_kernel else partial(context.attended, heads=heads)
        made = run(**given)[:3]
        found.append(torch.cat([t.flatten().double() for t in (*made, own.keys, own.values)]))
    return float((found[0] - found[1]).norm() / found[1].norm())


class CrossContext:
    """Where cross-attention gets keys and values: projected in each block, or kept in the cache for one condition.

    The projection always runs inside the block's own forward, because sharded weights exist only there. `later`: the
    first entry that reads another text, and that text. `runs`, where entries have low-rank updates of several kinds:
    keys and values of the text are of each kind.
    """

    def __init__(
        self,
        text: Tensor | None,
        image: Tensor | None,
        cache: KVCache | None,
        later: tuple[int, Tensor] | None = None,
        runs: Sequence[Run] | None = None,
    ) -> None:
        self.text, self.image, self.cache, self.later, self.runs = text, image, cache, later, runs

    def parts(self, module: Projection, layer: int, entries: int) -> list[tuple[int, tuple[Tensor, ...]]]:
        """How many entries, one run after the other, read which keys and values."""
        if self.later is None and self.runs is None:
            return [(entries, self.keys_values(module, layer))]
        first, later = self.later or (entries, self.text)
        found: list[tuple[int, tuple[Tensor, ...]]] = []
        made: dict[tuple[object, bool], tuple[Tensor, ...]] = {}
        start = 0
        for count, kind, on in self.runs or [(entries, None, nullcontext())]:
            before = min(max(first - start, 0), count)
            for part, text in ((before, self.text), (count - before, later)):
                if part == 0:
                    continue
                assert text is not None
                if (key := (kind, text is later)) not in made:
                    with on:
                        made[key] = module.project(text, self.image)
                found.append((part, made[key]))
            start += count
        return found

    def keys_values(self, module: Projection, layer: int) -> tuple[Tensor, ...]:
        if self.text is None:
            assert self.cache is not None
            return self.cache.cross(layer)
        projected = module.project(self.text, self.image)
        return projected if self.cache is None else self.cache.set_cross(layer, projected)
