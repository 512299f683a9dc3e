"""How a student streams, in one object: blocks, window, sink, positions and noise levels.

Training, inference, masks, caches and data checks all ask a `StreamPlan`; nothing else knows a block boundary. It must
know no model, no tensor (but for the masks that it lays out) and no file format: `PlanConfig.stream` builds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from longtake.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import MaskLayout

FloatOrTensor = TypeVar("FloatOrTensor", float, "Tensor")

# A published student begins at 1600/1601. Far below 1, noise times the level is nothing that training has seen.
LEAST_START = 0.99
# Values of fields that have several. Anything else is refused by name: a student that is played by another law than its
# own would look worse, and nobody would know why.
_CHOICES = {
    "rope": ("relative", "absolute"),
    "clock": ("exact", "whole", "bf16"),
    "context": ("pass", "last_step"),
    "recache": ("rebuild", "last_window", "none"),
}
# What published students differ in besides, each with the one value that this version can play.
_ONLY = {
    "commit_role": ("student", "the network that denoises also makes the context"),
    "sink_law": ("first", "the sink is the first frames, as they were stored"),
}


@dataclass(frozen=True)
class StreamPlan:
    """How a student streams: in blocks `[first, n, n, ...]`, each attending to the sink, the window and itself.

    Blocks: `block_frames` is n; `first_frames` is 1 for image-to-video (the given picture is a block of its own) and n
    for text-to-video. `given_frames` of a video are given and not generated (0 or `first_frames`): whoever has the
    picture says so (`with_given`), and blocks are counted from the first generated one.
    Attention: `window_frames` latent frames that a block attends to, sink and itself counted (None: all);
    `sink_frames` first frames that are never evicted. `rope`, "relative" or "absolute": positions counted in the
    attended window, or since the start.
    Levels: `sigmas`, the falling noise levels of a block; `later_sigmas`, those of every generated block but the first
    (None: the same). A block begins with noise times its first level. `clock`, what the network reads of a level l:
    "exact", 1000 l; or that rounded to whole numbers, "whole", or to bfloat16, "bf16" (936 for 937.5), as some
    publishers hand it over.
    Context, what a finished block leaves in the cache: "pass", a call of its own on the clean latents, noised to
    `context_sigma`; or "last_step", the last denoising step on its noisy latents, without a call of its own, from
    generated block number `context_from` on (those before have the pass). The picture is always stored clean.
    Where the prompt changes: `recache` "rebuild" makes the cache anew from kept latents, block by block; "last_window"
    (LongLive) the frames of the window in one call in which all see each other, beside the kept sink; "none" leaves it
    as the old prompt made it. `keep_sink`: the sink stays as the old one made it.
    The others have one value each (`_ONLY`).
    Source of the context without a pass: Causal-rCM (NVlabs/rcm), specification T.
    Raises: ConfigError for a value that is not known, not implemented, or contradicts another.
    """

    block_frames: int
    first_frames: int = 1
    window_frames: int | None = None
    sink_frames: int = 0
    rope: str = "relative"
    clock: str = "exact"
    keep_sink: bool = False
    sigmas: tuple[float, ...] = (1.0,)
    later_sigmas: tuple[float, ...] | None = None
    context: str = "pass"
    context_from: int = 1
    context_sigma: float = 0.0
    recache: str = "rebuild"
    commit_role: str = "student"
    sink_law: str = "first"
    given_frames: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(self.sigmas))
        if self.later_sigmas is not None:
            object.__setattr__(self, "later_sigmas", tuple(self.later_sigmas))
        for name, (only, meaning) in _ONLY.items():
            if (got := getattr(self, name)) != only:
                raise ConfigError(f"{name}={got!r} is not implemented; only {only!r} is: {meaning}")
        for name, known in _CHOICES.items():
            if (got := getattr(self, name)) not in known:
                raise ConfigError(f"{name}={got!r} is not known; use {' or '.join(map(repr, known))}")
        if self.block_frames < 1 or self.first_frames < 1:
            raise ConfigError(
                f"block_frames={self.block_frames} and first_frames={self.first_frames} must be at least 1"
            )
        if self.given_frames not in (0, self.first_frames):
            raise ConfigError(
                f"given_frames={self.given_frames} must be 0 or the first block, first_frames={self.first_frames}"
            )
        self._check_levels()
        if self.recache == "last_window" and self.sink_frames and not self.keep_sink:
            raise ConfigError(
                "recache='last_window' is not implemented with keep_sink=false, where later frames would take the "
                "place of the sink's; set keep_sink=true, sink_frames=0 or recache='rebuild'"
            )

    def _check_levels(self) -> None:
        later = self.later_sigmas
        if later is not None and not 0 < len(later) <= len(self.sigmas):
            raise ConfigError(
                f"later blocks have {len(later)} noise levels and the first one {len(self.sigmas)}; give them at least "
                "one, and no more than that"
            )
        if not 0 <= self.context_sigma < 1 or self.context_from < 0:
            raise ConfigError(
                f"context_sigma={self.context_sigma} must be in [0, 1) and context_from={self.context_from} at least 0"
            )
        under_the_rule = [later or self.sigmas, *([self.sigmas] if self.context_from == 0 else [])]
        if self.context == "last_step" and min(map(len, under_the_rule)) < 2:
            raise ConfigError(
                "context='last_step' stores what the last denoising step sees, and with one noise level that is noise "
                "alone; give such blocks two levels or more, or set context='pass'"
            )

    # ---- what a block does ------------------------------------------------------------------------------------------
    def with_given(self, frames: int) -> StreamPlan:
        """The same for a video whose first `frames` are given (0: all are generated)."""
        return self if frames == self.given_frames else replace(self, given_frames=frames)

    def _generated_number(self, start: int) -> int:
        """Number of the block at `start` among the generated ones; -1 for the given one."""
        number = 0 if start < self.first_frames else 1 + (start - self.first_frames) // self.block_frames
        return number - (1 if self.given_frames else 0)

    def levels(self, start: int) -> tuple[float, ...]:
        """Noise levels at which the block that begins at frame `start` is denoised."""
        return self.sigmas if self.later_sigmas is None or self._generated_number(start) < 1 else self.later_sigmas

    def stores_itself(self, start: int) -> bool:
        """Whether the last denoising step of the block at `start` stores its keys and values."""
        return self.context == "last_step" and self._generated_number(start) >= self.context_from

    def context_level(self, start: int) -> float:
        """Noise level of what the keys and values of the block at `start` are made of; later blocks see these."""
        if start < self.given_frames:
            return 0.0
        return self.levels(start)[-1] if self.stores_itself(start) else self.context_sigma

    def context_levels(self, num_frames: int) -> list[float]:
        """`context_level` of each of `num_frames` frames, whole blocks."""
        return [self.context_level(start) for start, end in self.blocks(0, num_frames) for _ in range(start, end)]

    @property
    def context_step(self) -> int:
        """The number, after those of all denoising steps, of the noise that makes context of finished latents."""
        return len(self.sigmas)

    @property
    def num_noises(self) -> int:
        """How many noises a block can draw: one a denoising step, and one for its context where that has a level."""
        return len(self.sigmas) + (self.context == "last_step" or self.context_sigma > 0)

    # ---- blocks -----------------------------------------------------------------------------------------------------
    def check(self, num_frames: int, name: str = "num_latent_frames") -> None:
        """Raises ConfigError, naming the nearest valid values, unless `num_frames` ends on a block boundary."""
        if num_frames >= self.first_frames and self.is_boundary(num_frames):
            return
        below = self.first_frames + max(0, (num_frames - self.first_frames) // self.block_frames) * self.block_frames
        above = below + self.block_frames
        layout = f"[{self.first_frames}, {self.block_frames}, {self.block_frames}, ...]"
        raise ConfigError(f"{name}={num_frames} does not fit the block plan {layout}; set it to {below} or {above}")

    def is_boundary(self, frame: int) -> bool:
        """True when a block starts at `frame` (frame 0 included)."""
        return frame == 0 or (frame >= self.first_frames and (frame - self.first_frames) % self.block_frames == 0)

    def block_of(self, frame: int) -> tuple[int, int]:
        """The block `(start, end)` that holds `frame`."""
        if frame < self.first_frames:
            return 0, self.first_frames
        start = self.first_frames + (frame - self.first_frames) // self.block_frames * self.block_frames
        return start, start + self.block_frames

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yields `(start, end)` of the blocks from frame `start` on, for ever when `end` is None.

        Raises: ConfigError when `start` or `end` is not a boundary.
        """
        for frame in (start, end):
            if frame is not None and not self.is_boundary(frame):
                raise ConfigError(
                    f"frame {frame} is no block boundary of [{self.first_frames}, {self.block_frames}, ...]"
                )
        while end is None or start < end:
            block = self.block_of(start)
            yield block
            start = block[1]

    def num_blocks(self, num_frames: int) -> int:
        return len(list(self.blocks(0, num_frames)))

    def check_window(self) -> None:
        """Raises ConfigError unless window and sink respect the block boundaries (the rule of recipes)."""
        window_frames, sink_frames = self.window_frames, self.sink_frames
        if sink_frames < 0 or not self.is_boundary(sink_frames):
            below = self.block_of(sink_frames)[0] if sink_frames > 0 else 0
            above = self.block_of(max(sink_frames, 0))[1]
            raise ConfigError(f"sink_frames={sink_frames} must be 0 or a block boundary; set it to {below} or {above}")
        if window_frames is None:
            return
        n = self.block_frames
        room = window_frames - sink_frames
        fewest = max(1, -(-(self.first_frames - sink_frames) // n))  # a larger first block must fit, too
        if room < fewest * n or room % n:
            below = sink_frames + max(fewest, room // n) * n
            raise ConfigError(
                f"window_frames={window_frames} minus sink_frames={sink_frames} must be a multiple of "
                f"block_frames={n} (at least {fewest * n}); set window_frames to {below} or {below + n}"
            )

    def attended(self, start: int, end: int) -> list[int]:
        """Absolute past frames that block `[start, end)` attends to, ascending (itself not included).

        Sink frames that exist, then the latest frames that fit the window; the window counts sink and current block.
        """
        if self.window_frames is None:
            return list(range(start))
        oldest = end - (self.window_frames - self.sink_frames)
        return [p for p in range(start) if p < self.sink_frames or p >= oldest]

    def causal_layout(self, num_frames: int) -> MaskLayout:
        """Layout of one pass over `num_frames` frames, each block seeing itself and its attended past."""
        return self._layout(num_frames, teacher_forcing=False)

    def teacher_forcing_layout(self, num_frames: int) -> MaskLayout:
        """Layout of `[clean F | noisy F]`: a noisy block sees itself and the clean frames it would find in the cache.

        Clean blocks see clean frames as in `causal_layout`. Source: spec of Self-Forcing's teacher forcing, extended
        to a first block of another size.
        """
        return self._layout(num_frames, teacher_forcing=True)

    def _layout(self, num_frames: int, *, teacher_forcing: bool) -> MaskLayout:
        import torch

        from longtake.condition import MaskLayout

        self.check(num_frames)
        window_frames, sink_frames = self.window_frames, self.sink_frames
        halves = 2 if teacher_forcing else 1
        frame_index = torch.arange(num_frames).repeat(halves)
        key_entry = list(range(halves * num_frames))
        key_position = frame_index.tolist()
        pairs: list[tuple[int, int, list[int]]] = []  # (first query entry, last query entry, key slots)
        for start, end in self.blocks(0, num_frames):
            if window_frames is not None and end - start > window_frames - min(sink_frames, start):
                # A cache refuses this block, so the mask that stands for it must not invent an answer.
                raise ConfigError(
                    f"the block of frames [{start}, {end}) does not fit window_frames={window_frames} beside "
                    f"sink_frames={sink_frames}; set window_frames to {end - start + min(sink_frames, start)} or more"
                )
            past = self.attended(start, end)
            slots = list(past)
            # Relative RoPE: inside the attended list the sink sits right before the window. Attention only sees
            # differences of positions, so the sink moves up by the number of evicted frames instead.
            evicted = start - len(past)
            if self.rope == "relative" and evicted > 0:
                slots = [p for p in past if p >= sink_frames]
                for p in range(min(sink_frames, start)):
                    slots.append(len(key_entry))
                    key_entry.append(p)
                    key_position.append(p + evicted)
            for half in range(halves):
                offset = half * num_frames
                pairs.append((offset + start, offset + end, slots + list(range(offset + start, offset + end))))
        allowed = torch.zeros(halves * num_frames, len(key_entry), dtype=torch.bool)
        for first, last, slots in pairs:
            allowed[first:last, torch.tensor(slots)] = True
        return MaskLayout(frame_index, torch.tensor(key_entry), torch.tensor(key_position), allowed)


def warp(u: FloatOrTensor, shift: float) -> FloatOrTensor:
    """sigma = shift u / (1 + (shift - 1) u). Source: Wan2.1's flow schedulers; Esser et al. 2024, eq. 23."""
    return shift * u / (1 + (shift - 1) * u)


def student_sigmas(steps: Sequence[float], shift: float, name: str = "flow.steps") -> list[float]:
    """Noise levels at which the student is called, from un-warped `steps`.

    Raises: ConfigError unless `steps` starts at 1 (or `LEAST_START` or more) and falls strictly, above 0.
    """
    if not steps or not LEAST_START <= steps[0] <= 1 or any(b >= a for a, b in zip(steps, steps[1:])) or steps[-1] <= 0:
        raise ConfigError(f"{name}={list(steps)} must start at 1, fall strictly and stay above 0: [1, 0.75, 0.5, 0.25]")
    return [warp(float(u), shift) for u in steps]
