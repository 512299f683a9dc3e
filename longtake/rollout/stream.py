"""Streaming: blocks of latents for as long as the caller asks, in constant memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from longtake.models.cache import KVCache
from longtake.models.dit import VideoDiT
from longtake.rollout.chunk import Guidance, commit_block, denoise_block
from longtake.rollout.rebuild import KeptLatents, rebuild_cache
from longtake.rollout.self_forcing import RollOutNoise, RollOutRules, block_noise_at
from longtake.structs import Condition


class LatentStream:
    """The latents of one scene: first the given picture, where there is one, then a block at each call, for ever.

    The context pass of a block runs only when the next block is asked for (nobody reads that of the last one); until
    then the block is `pending`. `kept` holds what a rebuild under another condition needs, the pending block included.
    The caller makes the cache (`model.new_cache`; with `guidance` a second one like it), and the stream begins at
    `cache.position`.
    """

    def __init__(
        self,
        model: VideoDiT,
        cache: KVCache,
        condition: Condition,
        first_latent: Tensor | None,
        noise: RollOutNoise,
        rules: RollOutRules,
        *,
        guidance: Guidance | None = None,
    ) -> None:
        self.model, self.cache, self.condition, self.guidance = model, cache, condition, guidance
        self.noise, self.rules = noise, rules
        self.kept = KeptLatents.of_rules(rules)
        self.kept.position = cache.position
        self.pending: Tensor | None = None
        self._first = first_latent

    @property
    def position(self) -> int:
        """The latent frame that the next block starts at."""
        return self.kept.position

    @property
    def caches(self) -> list[KVCache]:
        """The cache, and that of guidance."""
        return [self.cache] if self.guidance is None else [self.cache, self.guidance.cache]

    @torch.no_grad()
    def next(self) -> Tensor:
        """The next clean latents, float32 [B, f, C, H, W]."""
        if self._first is not None:
            made, self._first = self._first.float(), None
        else:
            if (pending := self.pending) is not None:
                self.pending = None
                commit_block(self.model, self.cache, self.condition, pending, guidance=self.guidance)
            start, end = next(self.rules.plan.blocks(self.position))
            block_noise = block_noise_at(self.noise, start, end)
            made = denoise_block(
                self.model, self.cache, self.condition, block_noise, self.rules.sigmas, guidance=self.guidance
            )
        self.pending = made
        self.kept.append(made)
        return made

    def change(
        self,
        condition: Condition,
        unconditional: Condition | None = None,
        *,
        in_place: bool = True,
    ) -> None:
        """Goes on under another condition: the cache is made anew from the kept latents, the pending block included.

        Args: `unconditional`, that of guidance, where the stream has it; `in_place` False leaves the cache that there
        was untouched and goes on with another one.
        """
        if not in_place:
            self._replace_caches(KVCache.copy)
        self.condition = condition
        if self.guidance is not None:
            assert unconditional is not None
            self.guidance = replace(self.guidance, condition=unconditional)
        keep = self.rules.keep_sink
        rebuild_cache(self.model, self.cache, condition, self.kept, keep_sink=keep, guidance=self.guidance)
        self.pending = None

    def copy(self, cache_of: Callable[[KVCache], KVCache] | None = None) -> LatentStream:
        """Another stream at the same place.

        Args: `cache_of` gives the cache that takes the place of each; None: both share them, and of all that do so only
        one goes on at a time, after `return_to_cache`.
        """
        other = copy.copy(self)
        other.kept = self.kept.copy()
        if cache_of is not None:
            other._replace_caches(cache_of)
        return other

    def return_to_cache(self) -> None:
        """Brings caches that another copy has used since back to where this stream stands.

        What that copy wrote must not have taken the place of what this stream still reads: the cache's spare frames.
        """
        for cache in self.caches:
            cache.position = self.position - (0 if self.pending is None else self.pending.shape[1])

    def _replace_caches(self, cache_of: Callable[[KVCache], KVCache]) -> None:
        self.cache = cache_of(self.cache)
        if self.guidance is not None:
            self.guidance = replace(self.guidance, cache=cache_of(self.guidance.cache))


def stream_latents(
    model: VideoDiT,
    cache: KVCache,
    condition: Condition,
    first_latent: Tensor | None,
    noise: RollOutNoise,
    rules: RollOutRules,
    *,
    guidance: Guidance | None = None,
) -> Iterator[Tensor]:
    """Yields the latents of a `LatentStream`, for ever; the caller stops when it has enough."""
    stream = LatentStream(model, cache, condition, first_latent, noise, rules, guidance=guidance)
    while True:
        yield stream.next()
