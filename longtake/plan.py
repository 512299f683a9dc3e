"""How a student streams, in one object: blocks, window, sink, positions and noise levels.

Training, inference, masks, caches and data checks all ask a `StreamPlan`; nothing else knows a block boundary. It must
know no model, no tensor (but for the masks that it lays out) and no file format: `PlanConfig.stream` builds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from longtake.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import MaskLayout

FloatOrTensor = TypeVar("FloatOrTensor", float, "Tensor")

# What published students differ in besides, each with the one value that this version can play. Anything else is
# refused: a student that is played by another law than its own would look worse, and nobody would know why.
_ONLY = {
    "later_sigmas": (None, "every block has the same noise levels"),
    "context_sigma": (0.0, "a finished block becomes context without noise"),
    "context": ("pass", "a pass of its own stores a block's keys and values, not its last denoising step"),
    "commit_role": ("student", "the network that denoises also makes the context"),
    "recache": ("rebuild", "where the prompt changes the cache is made anew from kept latents, block by block"),
    "sink_law": ("first", "the sink is the first frames, as they were stored"),
}


@dataclass(frozen=True)
class StreamPlan:
    """How a student streams: in blocks `[first, n, n, ...]`, each attending to the sink, the window and itself.

    Fields: `block_frames` is n; `first_frames` is 1 for image-to-video (the given picture is a block of its own) and n
    for text-to-video. `window_frames` latent frames that a block attends to, sink and itself counted (None: all);
    `sink_frames` first frames that are never evicted. `rope`, "relative" or "absolute": positions counted in the
    attended window, or since the start. `keep_sink`: where the prompt changes in mid-stream, the sink stays as the old
    one made it. `sigmas`, the falling noise levels of a block. The others have one value each (`_ONLY`).
    Raises: ConfigError for a value that is not known, or not implemented.
    """

    block_frames: int
    first_frames: int = 1
    window_frames: int | None = None
    sink_frames: int = 0
    rope: str = "relative"
    keep_sink: bool = False
    sigmas: tuple[float, ...] = (1.0,)
    later_sigmas: tuple[float, ...] | None = None
    context_sigma: float = 0.0
    context: str = "pass"
    commit_role: str = "student"
    recache: str = "rebuild"
    sink_law: str = "first"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(self.sigmas))
        for name, (only, meaning) in _ONLY.items():
            if (got := getattr(self, name)) != only:
                raise ConfigError(f"{name}={got!r} is not implemented; only {only!r} is: {meaning}")
        if self.rope not in ("absolute", "relative"):
            raise ConfigError(f"rope={self.rope!r} is not known; use 'absolute' or 'relative'")
        if self.block_frames < 1 or self.first_frames < 1:
            raise ConfigError(
                f"block_frames={self.block_frames} and first_frames={self.first_frames} must be at least 1"
            )

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


def student_sigmas(steps: Sequence[float], shift: float) -> list[float]:
    """Noise levels at which the student is called, from un-warped `steps`.

    Raises: ConfigError unless `steps` starts at 1 and falls strictly, above 0.
    """
    if not steps or steps[0] != 1 or any(b >= a for a, b in zip(steps, steps[1:])) or steps[-1] <= 0:
        raise ConfigError(
            f"flow.steps={list(steps)} must start at 1, fall strictly and stay above 0: [1, 0.75, 0.5, 0.25]"
        )
    return [warp(float(u), shift) for u in steps]
