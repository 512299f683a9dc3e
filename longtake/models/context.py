"""What one call's attention sees beyond its own tokens: nothing, a mask, a cache; and the condition's keys and values.

Between the transformer, which knows no cache layout, and the cache, which knows no layers.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from longtake.models.attention import FrameMask, block_mask
from longtake.models.cache import CacheView, KVCache
from longtake.models.layers import Rotation
from longtake.models.sequence_parallel import NO_SPLIT, TokenShard


class Projection(Protocol):
    """A cross-attention, as far as this file knows it."""

    def project(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, ...]: ...


class SelfContext:
    """How one call's self-attention sees keys: everything (bidirectional), a mask, or a cache.

    `shard` says which tokens and heads this process has; queries, keys and values here are of all tokens and its heads.
    """

    def __init__(self, query: Rotation, key: Rotation, shard: TokenShard = NO_SPLIT) -> None:
        self.query, self.key, self.shard = query, key, shard

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, FrameMask | None]:
        return self.key(k), v, None


class MaskedContext(SelfContext):
    """Keys and values of the entries themselves, rearranged into key slots where the layout has more of them."""

    def __init__(
        self, query: Rotation, key: Rotation, mask: FrameMask, key_entry: Tensor | None, shard: TokenShard = NO_SPLIT
    ) -> None:
        super().__init__(query, key, shard)
        self.mask, self.key_entry = mask, key_entry

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, FrameMask | None]:
        if self.key_entry is not None:
            k, v = (
                t.unflatten(1, (-1, self.mask.tokens)).index_select(1, self.key_entry).flatten(1, 2) for t in (k, v)
            )
        return self.key(k), v, self.mask


class CachedContext(SelfContext):
    """The attended past of each block, from the cache, before its own keys and values, which a commit stores."""

    def __init__(self, query: Rotation, key: Rotation, view: CacheView, shard: TokenShard = NO_SPLIT) -> None:
        super().__init__(query, key, shard)
        self.view = view
        self.mask = block_mask(view.blocks, view.cache.tokens_per_frame)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, FrameMask | None]:
        view, cache = self.view, self.view.cache
        relative = cache.rope == "relative"
        k = k if relative else self.key(k)
        keys, values = cache.gather(layer, view, k, v)
        if view.commit:
            cache.write(layer, view, k, v)
        return (self.key(keys) if relative else keys), values, self.mask


class CrossContext:
    """Where cross-attention gets keys and values: projected in each block, or kept in the cache for one condition.

    The projection always runs inside the block's own forward, because sharded weights exist only there.
    """

    def __init__(self, text: Tensor | None, image: Tensor | None, cache: KVCache | None) -> None:
        self.text, self.image, self.cache = text, image, cache

    def keys_values(self, module: Projection, layer: int) -> tuple[Tensor, ...]:
        if self.text is None:
            assert self.cache is not None
            return self.cache.cross(layer)
        projected = module.project(self.text, self.image)
        return projected if self.cache is None else self.cache.set_cross(layer, projected)
