"""Streaming: blocks of latents for as long as the caller asks, in constant memory, under conditions that may change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.errors import ConfigError
from longtake.models.cache import KVCache
from longtake.plan import StreamPlan
from longtake.rollout.denoise import DenoisedBlock, Denoiser, Guidance, commit_block, denoise_block
from longtake.rollout.recache import LatentHistory, recache
from longtake.rollout.self_forcing import RollOutNoise, block_noise_at


class LatentStream(Iterator[Tensor]):
    """The latents of one scene: first the given picture, where there is one, then a block at each call, for ever.

    The context pass of a block, where it has one, runs only when the next block is asked for (nobody reads that of the
    last one); until then the block is `pending`. `kept` holds what a rebuild under another condition needs, the pending
    block included. `plan` says how many frames are given where the stream begins later than with `first_latent`.
    The caller makes the cache (`VideoDiT.new_cache`; with `guidance` a second one like it), and the stream begins at
    `cache.position`.

    What raises, Ctrl-C included, changes nothing, and the same call made again gives what it would have given: the
    stream moves on when all is done. What a failed call has left in a cache is what the next one would write there, or
    it shows (`KVCache.content`, `holds`) and is made anew.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cache: KVCache,
        condition: Condition,
        first_latent: Tensor | None,
        noise: RollOutNoise,
        plan: StreamPlan,
        *,
        guidance: Guidance | None = None,
    ) -> None:
        self.denoiser, self.cache, self.condition, self.guidance = denoiser, cache, condition, guidance
        self.noise = noise
        self.plan = plan if first_latent is None else plan.with_given(first_latent.shape[1])
        self.kept = LatentHistory(self.plan)
        self.kept.position = cache.position
        self.pending: DenoisedBlock | None = None
        self._first = first_latent
        self._content = object()  # marks caches that hold this stream's past under its present condition
        for one in self.caches:
            one.content = self._content

    @property
    def position(self) -> int:
        """The latent frame that the next block starts at."""
        return self.kept.position

    @property
    def caches(self) -> list[KVCache]:
        """The cache, and that of guidance."""
        return [cache for _, cache in self._sides]

    @property
    def _sides(self) -> list[tuple[Condition, KVCache]]:
        guided = [] if self.guidance is None else [(self.guidance.condition, self.guidance.cache)]
        return [(self.condition, self.cache), *guided]

    @property
    def content(self) -> object:
        """Marks caches that hold this stream's past under its present condition (`KVCache.content`)."""
        return self._content

    @property
    def committed(self) -> int:
        """The end of what has had its context pass."""
        return self.position - (0 if self.pending is None else self.pending.clean.shape[1])

    def __next__(self) -> Tensor:
        return self.next()

    def next(self, check: Callable[[], None] | None = None) -> Tensor:
        """The next clean latents, float32 [B, f, C, H, W]. `check` is called between steps; it may raise."""
        made, kept = self._made(check), self.kept.copy()
        kept.append(made.clean)
        self.pending, self.kept, self._first = made, kept, None
        return made.clean

    @torch.no_grad()
    def _made(self, check: Callable[[], None] | None) -> DenoisedBlock:
        if self._first is not None:
            return DenoisedBlock.given(self._first.float())
        self.commit()
        start, end = next(self.plan.blocks(self.position))
        noise, guidance = block_noise_at(self.noise, start, end), self.guidance
        own = self.denoiser, self.cache, self.condition
        return denoise_block(*own, noise, self.plan, guidance=guidance, check=check)

    def commit(self) -> None:
        """Brings the caches to where the next block begins: the context pass of the pending block runs now, unless the
        caches hold what it would store, and after a change of condition those of all that is kept.
        """
        for condition, cache in self._sides:
            self._make_own(condition, cache)
            if self.pending is not None and not cache.holds(self.committed, self.position):
                cache.position = self.committed
                commit_block(self.denoiser, cache, condition, self.pending.context, self.pending.sigma)
            cache.position = self.position
        self.pending = None

    def _make_own(self, condition: Condition, cache: KVCache) -> None:
        """Makes the cache anew where it does not hold the past of this stream, or holds it under another condition."""
        if cache.content is not self._content:
            cache.content = None
            cache.position = self.committed
            recache(self.denoiser, cache, condition, self.kept, self.noise)
            cache.content = self._content

    def change(
        self,
        condition: Condition,
        unconditional: Condition | None = None,
    ) -> None:
        """Goes on under another condition: with the next block, or `commit`, the cache is made anew from the kept
        latents, the pending block included. With the plan's `recache` "none" it stays, and the pending block is stored
        under the old condition, now.

        Args: `unconditional`, that of guidance, where the stream has it.
        """
        stays, guidance = self.plan.recache == "none", self.guidance
        if stays:
            self.commit()
        if guidance is not None:
            assert unconditional is not None
            guidance = replace(guidance, condition=unconditional)
        content = self._content if stays else object()
        self.condition, self.guidance, self._content = condition, guidance, content  # at once, whatever interrupts

    def copy(self, cache_of: Callable[[KVCache], KVCache] | None = None) -> LatentStream:
        """Another stream at the same place.

        Args: `cache_of` gives the cache that takes the place of each; None: both share them, and of all that do so only
        one goes on at a time, by the same noise. What the one writes must not have taken the place of what another
        still reads: spare frames of the cache, or its owner puts them back.
        """
        other = copy.copy(self)
        other.kept = self.kept.copy()
        if cache_of is not None:
            other.cache, other.guidance = _with_caches(cache_of, self.cache, self.guidance)
        return other

    def return_to_cache(self) -> None:
        """Brings the caches, which a copy or a call that failed may have used since, back to where this stream stands:
        before the pending block.
        """
        for condition, cache in self._sides:
            self._make_own(condition, cache)
            cache.position = self.committed


def _with_caches(
    cache_of: Callable[[KVCache], KVCache], cache: KVCache, guidance: Guidance | None
) -> tuple[KVCache, Guidance | None]:
    other = cache_of(cache)
    return other, None if guidance is None else replace(guidance, cache=cache_of(guidance.cache))


def stream_switched(
    denoiser: Denoiser,
    cache: KVCache,
    conditions: Sequence[Condition],
    switch_frames: Sequence[int],
    first_latent: Tensor | None,
    noise: RollOutNoise,
    plan: StreamPlan,
) -> Iterator[Tensor]:
    """Yields latents for ever, under another condition from the first block that begins at or after each switch frame.

    Args: `cache`, an empty one; `conditions`, one more than `switch_frames` (latent frames, ascending). At a switch the
    cache is made anew as the plan says. Raises: ConfigError when conditions and switch frames do not fit.
    """
    ends = [plan.boundary_after(frame) for frame in switch_frames]
    if len(conditions) != len(ends) + 1 or any(end <= start for start, end in zip([0, *ends], ends)):
        raise ConfigError(
            f"{len(conditions)} conditions and switch frames {list(switch_frames)} do not fit: there must be one "
            "condition more, and between two switches, and before the first, at least one block"
        )
    stream = LatentStream(denoiser, cache, conditions[0], first_latent, noise, plan)
    return _Switched(stream, list(zip(ends, conditions[1:])))


class _Switched(Iterator[Tensor]):
    """A stream whose condition changes at frames (ascending); as its `next`, a call that failed can be made again."""

    def __init__(self, stream: LatentStream, changes: list[tuple[int, Condition]]) -> None:
        self.stream, self.changes = stream, changes

    def __next__(self) -> Tensor:
        if self.changes and self.stream.position >= self.changes[0][0]:
            self.stream.change(self.changes[0][1])
            self.changes = self.changes[1:]
        return self.stream.next()
