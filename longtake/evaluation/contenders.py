"""Who makes videos in an evaluation on data: students by their own rules, and bidirectional weights whole clips."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longtake.config.generation import MAX_FRAMES
from longtake.errors import ConfigError
from longtake.evaluation.row_videos import Maker, student_maker, teacher_maker
from longtake.evaluation.target import EvalTarget, load_denoiser
from longtake.inference.source import Source
from longtake.plan import StreamPlan
from longtake.rollout.denoise import Denoiser

TEACHER = "teacher"


@dataclass(frozen=True)
class Asked:
    """What is made: `samples` videos of each of the first `num_rows` rows of `data`, each `multiples` of the length of
    the training clips, with the seeds `seed`, `seed` + 1, ...; `layout` has them laid out for VBench too.

    Source of the teacher's values: Wan-Video/Wan2.1, generate.py. Raises: ConfigError.
    """

    data: Path
    num_rows: int = 16
    multiples: tuple[int, ...] = (1,)
    samples: int = 1
    seed: int = 0
    teacher_steps: int = 50
    teacher_guidance: float = 5.0
    layout: bool = False

    def __post_init__(self) -> None:
        if not self.multiples or min(self.multiples) < 1 or len(set(self.multiples)) < len(self.multiples):
            given = ",".join(map(str, self.multiples))
            raise ConfigError(f"--multiples {given} must be whole numbers from 1 on, each once, such as 1,4,10")
        object.__setattr__(self, "multiples", tuple(sorted(self.multiples)))
        if min(self.num_rows, self.samples, self.teacher_steps) < 1:
            raise ConfigError("--rows, --samples and --teacher-steps must be at least 1")
        if not 0 <= self.teacher_guidance < math.inf:  # not a number is neither
            raise ConfigError(f"--teacher-guidance {self.teacher_guidance:g} must be a finite number, 0 or more")
        if not 0 <= self.seed < 2**63 - self.samples:
            raise ConfigError(f"--seed {self.seed} must be at least 0 and below 2^63, with that of every sample")


def parse_multiples(text: str) -> tuple[int, ...]:
    """`1,4,10`. Raises: ConfigError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise ConfigError(f"--multiples {text} must be whole numbers, such as 1,4,10")
    return tuple(map(int, parts))


@dataclass(frozen=True)
class Contender:
    """Who makes videos; `streams` False for bidirectional weights, whose `sampling` are number of steps and guidance.

    `multiples` are the lengths of its videos in clips of `clip_frames` latent frames: bidirectional weights know one.
    """

    name: str
    source: Source
    load: Callable[[torch.device], Denoiser]
    clip_frames: int
    multiples: tuple[int, ...] = (1,)
    streams: bool = False
    sampling: tuple[int, float] = (1, 1.0)

    def row_name(self, multiple: int) -> str:
        """What the table calls its videos of one length."""
        return self.name if self.multiples == (1,) else f"{self.name} {multiple}x"

    def num_latent_frames(self, multiple: int) -> int:
        """Latent frames of so many clips."""
        return self.clip_frames * multiple

    def maker(self, denoiser: Denoiser, plan: StreamPlan, *, first_frame_clean: bool, seed: int) -> Maker:
        """What makes the latents of its longest videos; students stream by `plan`."""
        frames = self.num_latent_frames(self.multiples[-1])
        if self.streams:
            return student_maker(denoiser, plan, frames, seed=seed)
        steps, guidance = self.sampling
        rules: dict[str, Any] = {"num_steps": steps, "guidance": guidance, "shift": self.source.settings.shift}
        return teacher_maker(denoiser.model, frames, first_frame_clean=first_frame_clean, seed=seed, **rules)


def contenders(target: EvalTarget, asked: Asked) -> list[Contender]:
    """The teacher, where there is one, then the students; all clips are as long as those that the last one was trained
    on, but bidirectional students keep to their own. Raises: ConfigError.
    """
    clip_frames = target.result.settings.num_latent_frames
    if asked.multiples[-1] * clip_frames > MAX_FRAMES:
        raise ConfigError(
            f"--multiples {asked.multiples[-1]} of clips of {clip_frames} latent frames must be at most "
            f"{MAX_FRAMES // clip_frames}"
        )
    sampling = asked.teacher_steps, asked.teacher_guidance
    found: list[Contender] = []
    if (teacher := target.teacher) is not None:

        def of_teacher(device: torch.device) -> Denoiser:
            return Denoiser(teacher(device))

        found.append(Contender(TEACHER, target.result, of_teacher, clip_frames, sampling=sampling))
        if TEACHER in target.students:
            raise ConfigError(f"a model is called {TEACHER} as the teacher's row is; give its folder another name")
    for name, source in target.students.items():
        settings, load = source.settings, partial(load_denoiser, source, by_rules=True)
        own_frames = settings.num_latent_frames
        if settings.sampler == "whole":
            own = len(settings.steps), settings.guidance
            found.append(Contender(name, source, load, own_frames, sampling=own))
        elif source.plan is None:
            found.append(Contender(name, source, load, own_frames, sampling=sampling))
        elif settings.guidance != 1:
            raise ConfigError(
                f"{name} streams with guidance={settings.guidance:g}, which is not evaluated; give guidance=1, or make "
                "its videos with `longtake generate` and measure them with `longtake measure`"
            )
        else:
            found.append(Contender(name, source, load, clip_frames, asked.multiples, streams=True))
    return found
