"""A video as it arrives, of a generator whose passes and decoding are timed where they run."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtake.bench.clock import wholes
from longtake.encoders.sessions import DecoderSession
from longtake.inference.generator import Generator
from longtake.models.cache import KVCache
from longtake.plan import StreamPlan
from longtake.rollout.cuda_graphs import EAGER_PASSES
from longtake.train.metrics import PhaseTimer

PROMPT = "a red circle drifts to the right"  # words that the toy knows; any text takes as long


class TimedDenoiser:
    """A denoiser whose passes are timed by their place in a block of a `plan`: "pass 0", "pass 1", ..., and "context",
    one that commits and denoises nothing.
    """

    def __init__(self, denoiser: Any, phases: PhaseTimer, plan: StreamPlan) -> None:
        self._denoiser, self._phases, self._plan, self._next = denoiser, phases, plan, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def __call__(
        self, x: Tensor, sigma: Tensor, condition: Any, cache: KVCache, *, commit: bool = False, **given: Any
    ) -> Tensor:
        levels = len(self._plan.levels(cache.position))
        last = commit and self._next == levels - 1 and self._plan.stores_itself(cache.position)
        name = "context" if commit and not last else f"pass {self._next}"
        self._next = 0 if commit else (self._next + 1) % levels
        with self._phases.whole(name):
            return self._denoiser(x, sigma, condition, cache, commit=commit, **given)


class TimedDecoder:
    """A decoder on a `device` whose calls are timed there as "decode", from when their latents have come."""

    def __init__(self, decoder: DecoderSession, phases: PhaseTimer, device: torch.device) -> None:
        self._decoder, self._phases, self._device = decoder, phases, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def decode(self, latents: Tensor) -> Tensor:
        """As the decoder's."""
        latents = latents.to(self._device)
        with self._phases.whole("decode"):
            return self._decoder.decode(latents)

    def copy(self) -> TimedDecoder:
        """As the decoder's."""
        return TimedDecoder(self._decoder.copy(), self._phases, self._device)


class TimedGenerator(Generator):
    """A generator of the same networks that times its passes, and its decoding where it decodes."""

    phases: PhaseTimer
    decoding: PhaseTimer

    @classmethod
    def of(cls, generator: Generator) -> Self:
        """Of another one."""
        made = cls(**{field.name: getattr(generator, field.name) for field in fields(generator)})
        made.phases = PhaseTimer(generator.device)
        made.decoding = PhaseTimer(made.decoding_device)
        plan = generator.beginning.plan_of(given=picture_of(generator) is not None)
        made.denoiser = TimedDenoiser(generator.denoiser, made.phases, plan)  # type: ignore[assignment]
        return made

    def new_decoder(self) -> Any:
        """A timed decoder."""
        return TimedDecoder(super().new_decoder(), self.decoding, self.decoding_device)

    def take(self) -> dict[str, float]:
        """Seconds by what was timed since they were last taken; waits for the devices."""
        return wholes(self.phases.take()) | wholes(self.decoding.take())


@dataclass(frozen=True)
class Watched:
    """A video as it arrived: seconds since it was asked for and frames of each chunk, the picture first, then where
    blocks are made ahead the first one in two; bytes that were allocated then (none on a CPU).
    """

    arrivals: list[float]
    frames: list[int]
    allocated: list[int]
    last: NDArray[np.uint8]
    given: bool = True  # the picture, as the first chunk

    @property
    def first_generated(self) -> float:
        """Seconds to the first frame that is not the picture."""
        return self.arrivals[self.given]

    def generated(self, fps: int) -> tuple[list[float], list[float]]:
        """Arrivals of the chunks that were generated, and the seconds for which each plays."""
        return self.arrivals[self.given :], [count / fps for count in self.frames[self.given :]]


def picture_of(generator: Generator) -> NDArray[np.uint8] | None:
    """A picture, for weights that take one."""
    if generator.beginning.picture == "none":
        return None
    size = generator.settings.height, generator.settings.width, 3
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


def watch(generator: Generator, blocks: int, settled: int | None = None) -> Watched:
    """Streams a video of `blocks` generated blocks as `generate` does, without writing it.

    Args: `settled`, the block after which a timed generator forgets what it timed before.
    """
    picture = picture_of(generator)
    block_frames = generator.plan.block_frames * generator.encoders.vae.temporal_stride
    begun = generator.first_pixels(given=picture is not None)
    num_frames = begun + blocks * block_frames
    arrivals, frames, allocated = [], [], []
    start = time.perf_counter()
    for chunk in generator.stream(picture, PROMPT, num_frames=num_frames, ahead=generator.is_ahead):
        arrivals.append(time.perf_counter() - start)
        frames.append(len(chunk))
        if generator.device.type == "cuda":
            allocated.append(torch.cuda.memory_allocated(generator.device))
        now = settled is not None and sum(frames) == begun + settled * block_frames
        if now and isinstance(generator, TimedGenerator):
            generator.take()
    return Watched(arrivals, frames, allocated, chunk, picture is not None)


def settled_block(generator: Generator) -> int:
    """The first block of a warm video that is like all later ones: the window is full, y encoded to its end, and levels
    and context are those of later blocks.
    """
    plan, steady = generator.plan, generator.encoders.vae.steady_index
    frames = max(plan.window_frames or 0, steady if generator.model.config.condition_channels else 0)
    like_later = plan.context_from + 2 if plan.context == "last_step" else 1 if plan.later_sigmas is None else 2
    full = max(like_later, 1 + max(0, -(-(frames - plan.first_frames) // plan.block_frames)))
    # Ranks have a new cache for each video, and record the context pass, one a block, when it came that often.
    records = generator.denoiser.graphs is not None and generator.model.execution.split is not None
    return full + (EAGER_PASSES + 1 if records else 0)


@dataclass(frozen=True)
class Settled:
    """Blocks that are like all later ones: when they arrived, the one before the first among them; seconds of each part
    of a block, by name; pixel frames of one; bytes that were allocated as each arrived; and their whole `video`.
    """

    arrivals: list[float]
    parts: dict[str, float]
    frames: int
    allocated: list[int]
    video: Watched

    @property
    def block_seconds(self) -> float:
        """From block to block."""
        return (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1)

    @property
    def passes(self) -> list[float]:
        """Of each denoising pass."""
        return [self.parts[f"pass {index}"] for index in range(sum(name.startswith("pass") for name in self.parts))]


def settled(generator: Generator, blocks: int) -> Settled:
    """The last `blocks` blocks that count of a video of a warm generator; `Generator.warm_up` makes it warm."""
    timed, first = TimedGenerator.of(generator), settled_block(generator)
    # Where blocks are made ahead, the one that is counted first has begun when the frames of the one before it come.
    # The last of a video comes early, since no other is begun before it: one more than is counted is made.
    extra = int(generator.is_ahead)
    video = watch(timed, first + blocks + extra, first - extra)
    parts = {name: seconds / (blocks + extra) for name, seconds in timed.take().items()}
    counted = slice(-blocks - 1 - extra, -extra or None)
    return Settled(video.arrivals[counted], parts, video.frames[-1], video.allocated[counted], video)
