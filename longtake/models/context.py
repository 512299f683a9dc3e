"""What one call's attention sees beyond its own tokens: nothing, a mask, a cache; and the condition's keys and values.

Between the transformer, which knows no cache layout, and the cache, which knows no layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longtake.condition import MaskLayout
from longtake.models.apart import Places, apart, joined, turned
from longtake.models.attention import FrameMask, block_mask, make_mask
from longtake.models.cache import CacheView, KVCache, beside
from longtake.models.execution import WHOLE_NETWORK, Execution, Run
from longtake.models.layers import rotated
from longtake.models.sequence_parallel import NO_SPLIT, TokenShard


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
        heads: tuple[torch.dtype, int] | None = None,
    ) -> PreparedMask:
        """As `make_mask` makes it of the layout. Args: `heads`, type and width of heads, where each part shall have
        slots of its own (`apart.py`).
        """
        moved = layout.to(device)
        entry, position = moved.key_entry, moved.key_position
        mask = make_mask(moved.allowed, tokens, device, flex=flex)
        if heads is None or len(mask.parts) < 2:
            return cls(moved.frame_index, position, None if layout.plain_keys else entry, mask, layout.later_from)
        mask, slots = apart(mask)
        places = Places.of(entry[slots], tokens, int(entry.max()) + 1)
        mask = joined(mask, *heads)
        return cls(moved.frame_index, position[slots], entry[slots], mask, layout.later_from, places)

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
