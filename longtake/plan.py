"""How a student streams, in one object: blocks, window, sink, positions and noise levels.

Training, inference, masks, caches and data checks all ask a `StreamPlan`; nothing else knows a block boundary. What a
file says of it are two groups of keys, `plan:` and `flow:`, which `PlanConfig.stream` puts together. It must know no
model, no tensor (but for the masks that it lays out) and no file format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from longtake.config.base import Settings
from longtake.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import MaskLayout

FloatOrTensor = TypeVar("FloatOrTensor", float, "Tensor")
Rope = Literal["relative", "absolute"]
Clock = Literal["exact", "whole", "bf16"]
# Denoising steps after which the blocks of a roll-out stop: one for all, or one of the first generated block and one of
# those after it. A block that has fewer stops at its last.
Exits = int | tuple[int, int]
Levels = Annotated[tuple[float, ...], BeforeValidator(tuple)]

# A published student begins at 1600/1601. Far below 1, noise times the level is nothing that training has seen.
LEAST_START = 0.99
MAX_STEPS = 1000  # Wan's clock has no more


def warp(u: FloatOrTensor, shift: float) -> FloatOrTensor:
    """sigma = shift u / (1 + (shift - 1) u). Source: Wan2.1's flow schedulers; Esser et al. 2024, eq. 23."""
    return shift * u / (1 + (shift - 1) * u)


def unwarp(sigma: float, shift: float) -> float:
    """The u that `warp` makes `sigma` of."""
    return sigma / (shift - (shift - 1) * sigma)


class FlowConfig(Settings):
    """The noise schedule."""

    steps: list[float] = Field(
        default=[1.0, 0.75, 0.5, 0.25],
        min_length=1,
        max_length=MAX_STEPS,
        description="noise levels of the few-step student before the warp, descending from 1, final 0 left out",
    )
    later_steps: list[float] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_STEPS,
        description="those of every generated block but the first, as many or fewer; null = `steps` for all",
    )
    shift: float = Field(default=5.0, ge=1e-3, le=1e3, description="warp of noise levels, s u / (1 + (s - 1) u)")
    warp_steps: bool = Field(
        default=True, description="false: `steps` and `later_steps` are the noise levels themselves, without the warp"
    )

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Noise levels of the student."""
        return self._levels(self.steps)

    @property
    def later_sigmas(self) -> tuple[float, ...] | None:
        """Those of every generated block but the first, where they are others."""
        return None if self.later_steps is None else self._levels(self.later_steps)

    def _levels(self, steps: list[float]) -> tuple[float, ...]:
        return tuple(warp(u, self.shift) if self.warp_steps else u for u in steps)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, steps in (("steps", self.steps), ("later_steps", self.later_steps)):
            if steps is None:
                continue
            if max(steps) > 1:
                raise ValueError(f"{name}={steps} are noise levels in (0, 1], not a 0..1000 clock; divide them by 1000")
            if min(steps) <= 0:
                raise ValueError(f"{name}={steps} must be above 0; the last step ends at 0 without naming it")
            if steps[0] < LEAST_START or any(a <= b for a, b in zip(steps, steps[1:])):
                raise ValueError(f"{name}={steps} must descend strictly from 1, e.g. [1, 0.75, 0.5, 0.25]")
        return self

    @classmethod
    def familiar_names(cls) -> dict[str, str]:
        return {
            **{name: f"objective.{name}" for name in ("guidance", "sigma_min", "sigma_max")},
            "negative_prompt": "objective.negative_prompt (text: in a file, words such as no go in quotes)",
            "warp_denoising_step": "warp_steps",
        }


class PlanConfig(Settings):
    """Blocks that are generated at once, and what a block attends to."""

    block_frames: int = Field(default=4, gt=0, description="latent frames of a block")
    first_frames: int = Field(
        default=1, gt=0, description="latent frames of the first block: 1 for i2v (the given picture)"
    )
    window_frames: int | None = Field(
        default=9, gt=0, description="latent frames that a block attends to, sink and itself counted; null = all"
    )
    sink_frames: int = Field(
        default=1, ge=0, description="first latent frames that are never evicted: 0 or a block boundary"
    )
    keep_sink: bool = Field(
        default=False,
        description="leave the sink as the old prompt made it where the prompt changes in mid-stream; false = rebuild",
    )
    context: Literal["pass", "last_step"] = Field(
        default="pass",
        description="what stores a finished block as context: `pass` = a call of its own on the clean block; "
        "`last_step` = its last denoising step, on what that sees, one call less a block. Only for students trained so",
    )
    context_from: int = Field(
        default=1,
        ge=0,
        description="with context=last_step, the first block that is stored so, counted from the first generated one; "
        "those before have the call of their own",
    )
    context_sigma: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="noise level (after the warp) at which a finished block is stored by a call of its own",
    )
    recache: Literal["rebuild", "last_window", "none"] = Field(
        default="rebuild",
        description="where the prompt changes in mid-stream: `rebuild` = the cache is made anew from kept latents, "
        "block by block; `last_window` = the window's frames in one call in which all see each other, as LongLive does "
        "(with keep_sink); `none` = it stays as the old prompt made it",
    )

    def stream(self, flow: FlowConfig, *, rope: Rope = "relative", clock: Clock = "exact") -> StreamPlan:
        """How a student with these blocks streams, by the levels and the rules of positions and of the clock that are
        beside this group: the one place where a configuration becomes a plan.
        """
        return StreamPlan(**dict(self), rope=rope, clock=clock, sigmas=flow.sigmas, later_sigmas=flow.later_sigmas)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_window()
        self._check_recache()
        return self

    def _check_recache(self) -> None:
        if self.recache == "last_window" and self.sink_frames and not self.keep_sink:
            raise ConfigError(
                "recache='last_window' is not implemented with keep_sink=false, where later frames would take the "
                "place of the sink's; set keep_sink=true, sink_frames=0 or recache='rebuild'"
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
        if not self.is_boundary(sink_frames):
            below, above = self.block_of(sink_frames)
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

    def boundary_after(self, frame: int) -> int:
        """The first frame of the first block that begins at or after `frame`: a change there takes effect with it."""
        return frame if self.is_boundary(frame) else self.block_of(frame)[1]

    def attended(self, start: int, end: int) -> list[int]:
        """Absolute past frames that block `[start, end)` attends to, ascending (itself not included).

        Sink frames that exist, then the latest frames that fit the window; the window counts sink and current block.
        """
        if self.window_frames is None:
            return list(range(start))
        oldest = end - (self.window_frames - self.sink_frames)
        return [p for p in range(start) if p < self.sink_frames or p >= oldest]


class StreamPlan(PlanConfig):
    """How a student streams: in blocks `[first, n, n, ...]`, each attending to the sink, the window and itself.

    Blocks and attention are the keys of `PlanConfig`; `first_frames` is n for text-to-video. A file's windows hold
    whole blocks, those of a plan need not: a picture that enters a text student zero-shot moves the boundaries.
    `given_frames` of a video are given and not generated (0 or `first_frames`): whoever has the picture says so
    (`with_given`), and blocks are counted from the first generated one.
    Levels: `sigmas`, the falling noise levels of a block; `later_sigmas`, those of every generated block but the first
    (None: the same). A block begins with noise times its first level. `clock`, what the network reads of a level l:
    "exact", 1000 l; or that rounded to whole numbers, "whole", or to bfloat16, "bf16" (936 for 937.5), as some
    publishers hand it over. `rope`: positions counted in the attended window, or since the start.
    The picture is always stored clean. Where the prompt changes and `keep_sink` is on, the sink stays as the old one
    made it.
    `commit_role` and `sink_law` have one value each that this version can play (`_ONLY`).
    Source of the context without a pass: Causal-rCM (NVlabs/rcm), specification T.
    Raises: ConfigError for a value that is not known, not implemented, or contradicts another.
    """

    # Anything else is refused by name: a student that is played by another law than its own would look worse, and
    # nobody would know why.
    _ONLY: ClassVar[dict[str, tuple[str, str]]] = {
        "commit_role": ("student", "the network that denoises also makes the context"),
        "sink_law": ("first", "the sink is the first frames, as they were stored"),
    }

    rope: Rope = "relative"
    clock: Clock = "exact"
    sigmas: Levels = (1.0,)
    later_sigmas: Levels | None = None
    commit_role: str = "student"
    sink_law: str = "first"
    given_frames: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:  # in place of the rule of files
        for name, (only, meaning) in self._ONLY.items():
            if (got := getattr(self, name)) != only:
                raise ConfigError(f"{name}={got!r} is not implemented; only {only!r} is: {meaning}")
        if self.given_frames not in (0, self.first_frames):
            raise ConfigError(
                f"given_frames={self.given_frames} must be 0 or the first block, first_frames={self.first_frames}"
            )
        self._check_levels()
        self._check_recache()
        return self

    def _check_levels(self) -> None:
        later = self.later_sigmas
        if later is not None and not 0 < len(later) <= len(self.sigmas):
            raise ConfigError(
                f"later blocks have {len(later)} noise levels and the first one {len(self.sigmas)}; give them at least "
                "one, and no more than that"
            )
        under_the_rule = [later or self.sigmas, *([self.sigmas] if self.context_from == 0 else [])]
        if self.context == "last_step" and min(map(len, under_the_rule)) < 2:
            raise ConfigError(
                "context='last_step' stores what the last denoising step sees, and with one noise level that is noise "
                "alone; give such blocks two levels or more, or set context='pass'"
            )

    def with_given(self, frames: int) -> StreamPlan:
        """The same for a video whose first `frames` are given (0: all are generated)."""
        return self if frames == self.given_frames else self.but(given_frames=frames)

    def _generated_number(self, start: int) -> int:
        """Number of the block at `start` among the generated ones; -1 for the given one."""
        number = 0 if start < self.first_frames else 1 + (start - self.first_frames) // self.block_frames
        return number - (1 if self.given_frames else 0)

    def levels(self, start: int) -> tuple[float, ...]:
        """Noise levels at which the block that begins at frame `start` is denoised."""
        return self.sigmas if self.later_sigmas is None or self._generated_number(start) < 1 else self.later_sigmas

    def exit_step(self, start: int, exits: Exits | None) -> int:
        """The denoising step after which the block at `start` is finished: its last one, or that of `exits` if earlier.

        Source: specification T; a pair is Causal-Forcing++'s way, one step for all Causal-rCM's.
        """
        last = len(self.levels(start)) - 1
        if isinstance(exits, tuple):
            exits = exits[self._generated_number(start) > 0]
        return last if exits is None else min(exits, last)

    @property
    def all_levels(self) -> list[float]:
        """The noise levels of all blocks, falling."""
        return sorted({*self.sigmas, *(self.later_sigmas or ())}, reverse=True)

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

    def teacher_forcing_layout(self, num_frames: int) -> MaskLayout:
        """Layout of `[clean F | noisy F]`: a noisy block sees itself and the clean frames it would find in the cache.

        A clean block sees the same. Source: spec of Self-Forcing's teacher forcing, extended to a first block of
        another size.
        """
        self.check(num_frames)
        calls: list[Call] = []
        for start, end in self.blocks(0, num_frames):
            self.check_fits(start, end)
            past = self.attended(start, end)
            calls += [(range(half + start, half + end), past) for half in (0, num_frames)]
        frames = [*range(num_frames)] * 2
        return packed_layout(frames, calls, self.rope, stored=_first_of(len(frames), num_frames))

    def replay_layout(self, first: int, exits_from: int, end: int) -> MaskLayout:
        """Layout of `[clean first .. | noisy exits_from .. end)`, as in teacher forcing, of what a roll-out made.

        The last block has no clean half, which nobody would see. Frames before `first` lie in a cache: those that are
        seen, `self.past(first)`, are key slots numbered after the entries. All three are block boundaries.
        """
        blocks, past = list(self.blocks(first, end)), self.past(first)
        last = blocks[-1][0]
        entries = last - first + end - exits_from
        entry_of = {frame: entries + k for k, frame in enumerate(past)} | {p: p - first for p in range(first, last)}
        calls: list[Call] = []
        for start, stop in blocks:
            self.check_fits(start, stop)
            seen = [entry_of[p] for p in self.attended(start, stop)]
            if start < last:
                calls.append((range(start - first, stop - first), seen))
            if start >= exits_from:
                begin = last - first + start - exits_from
                calls.append((range(begin, begin + stop - start), seen))
        frames, stored = [*range(first, last), *range(exits_from, end), *past], last - first
        return packed_layout(frames, calls, self.rope, cached=len(past), stored=_first_of(entries, stored))

    def past(self, start: int) -> list[int]:
        """Absolute past frames that any block from `start`, a boundary, on attends to, ascending."""
        return self.attended(*self.block_of(start))

    def check_fits(self, start: int, end: int) -> None:
        """Raises ConfigError where a cache would refuse the block [start, end): a mask must not invent an answer."""
        window, sink = self.window_frames, min(self.sink_frames, start)
        if window is not None and end - start > window - sink:
            raise ConfigError(
                f"the block of frames [{start}, {end}) does not fit window_frames={window} beside "
                f"sink_frames={self.sink_frames}; set window_frames to {end - start + sink} or more"
            )


def _first_of(entries: int, count: int) -> tuple[bool, ...]:
    return tuple(entry < count for entry in range(entries))


# The entries of what a cache would make in one call, which see each other, and those of the past that they see.
Call = tuple[Sequence[int], Sequence[int]]


def packed_layout(
    frames: Sequence[int],
    calls: Sequence[Call],
    rope: Rope,
    *,
    later_from: int | None = None,
    cached: int = 0,
    stored: tuple[bool, ...] | None = None,
) -> MaskLayout:
    """Layout of one masked forward over entries of these absolute `frames`, which stands for calls against a cache.

    Args: `calls`, whose own entries are frames one after the other; those of the past ascend. `later_from` and `stored`
    as in `MaskLayout`; `cached`, how many of the last `frames` lie in a cache and are no entries of the forward.
    """
    import torch

    from longtake.condition import MaskLayout

    key_entry, key_position = list(range(len(frames))), list(frames)
    moved: dict[tuple[int, int], int] = {}  # slots of entries that are seen at another position than their own
    seen: list[tuple[Sequence[int], list[int]]] = []
    for own, past in calls:
        slots = list(own)
        # Relative RoPE: a cache counts positions in the attended list, where the sink sits right before the window.
        # Attention sees only differences of positions, so the sink moves up by the number of evicted frames instead.
        first = frames[own[0]] - len(past)
        for index, entry in enumerate(past):
            place = entry, frames[entry] if rope == "absolute" else first + index
            if place[1] != frames[entry] and place not in moved:
                moved[place] = len(key_entry)
                key_entry.append(entry)
                key_position.append(place[1])
            slots.append(moved.get(place, entry))
        seen.append((own, slots))
    entries = len(frames) - cached
    allowed = torch.zeros(entries, len(key_entry), dtype=torch.bool)
    for own, slots in seen:
        allowed[torch.tensor(own)[:, None], torch.tensor(slots)] = True
    frame_index = torch.tensor(frames[:entries])
    return MaskLayout(frame_index, torch.tensor(key_entry), torch.tensor(key_position), allowed, later_from, stored)
