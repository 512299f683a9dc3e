"""Videos of rows that a stage never learns from, made and measured while it trains, beside the teacher's of the same.

An error ends no training: it is agreed by all ranks, logged and counted, and the next validation tries again. But where
one rank fails in a call that the others wait in, the run ends at once, and says why, rather than when it has timed out.
Nor does it take much of it: how long one takes is measured, and one that is due waits until there is time for it.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtake.condition import pixel_frames
from longtake.config.stage import StageConfig
from longtake.encoders.vae import VideoVAE
from longtake.errors import OutputError
from longtake.evaluation.measure import measuring_threads
from longtake.evaluation.pictures import Scene, contact_sheet, curves, write_png
from longtake.evaluation.row_videos import (
    Cut,
    KeptLatents,
    Maker,
    SeenVideo,
    VideoRow,
    against,
    blocks_of,
    decoded,
    look,
    mean_curves,
    means,
    student_maker,
    teacher_maker,
)
from longtake.models.dit import VideoDiT
from longtake.parallel.mesh import Mesh
from longtake.parallel.together import GRACE_SECONDS, RanksApart, Together
from longtake.rollout.denoise import Denoiser
from longtake.train.ema import EMA

logger = logging.getLogger(__name__)

LONG = "long"
_VERSION = 1  # of how the teacher samples: another one makes kept samples useless
# By row number
Seen = dict[int, SeenVideo]


class Budget:
    """Whether there is time for a validation: `share` of the seconds since it was made, by rank 0's clock (1: any).

    Room must be for this one and for the last of the run, each as long as the longest so far but the first, which may
    have compiled, and sampled the teacher.
    """

    def __init__(self, share: float, mesh: Mesh, clock: Callable[[], float] = time.monotonic) -> None:
        self.share, self._mesh, self._clock = share, mesh, clock
        self._start, self._spent = clock(), 0.0
        self._taken: list[float] = []

    def allows(self) -> bool:
        """Whether there is time for one now; the same on every rank."""
        return self._mesh.on_main(self._allows)

    def _allows(self) -> bool:
        longest = max(self._taken[1:] or self._taken or [0.0])
        return self.share == 1 or self._spent + 2 * longest <= self.share * (self._clock() - self._start)

    @contextmanager
    def counted(self, *, more: bool = False) -> Iterator[None]:
        """Counts the time inside as that of a validation, or as `more` of the last one."""
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._taken.append(seconds + (self._taken.pop() if more else 0.0))
            self._spent += seconds

    @property
    def last(self) -> float:
        """Seconds of the last one."""
        return self._taken[-1]


@dataclass(frozen=True)
class Teacher:
    """The bidirectional weights beside which a student is measured: `identity` tells them from others, `model` gives
    the network, which may be read for the time of the context alone.
    """

    identity: Callable[[], str]
    model: Callable[[], AbstractContextManager[VideoDiT]]


@dataclass(kw_only=True)
class RowValidation:
    """Validates the rows of a stage; every rank calls its methods.

    Args: `read` gives this rank's rows; `decoder` a VAE for the time of the context; `student` as it streams, `average`
    of its weights; `teacher` None where there is none.
    """

    config: StageConfig
    mesh: Mesh
    student: Denoiser
    average: EMA | None
    teacher: Teacher | None
    read: Callable[[], list[VideoRow]]
    decoder: Callable[[], AbstractContextManager[VideoVAE]]
    errors: int = 0
    budget: Budget = field(init=False)
    _together: Together = field(init=False)
    _rows: list[VideoRow] | None = None
    _teacher_seen: Seen | None = None
    _fresh: dict[str, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.budget = Budget(self.config.validation.max_share, self.mesh)
        self._together = Together(self.mesh, GRACE_SECONDS if self._is_shared else math.inf)

    def prepare(self) -> None:
        """Reads the rows, while the encoders are there."""
        self._survived("reading the rows", self._read)

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Numbers after `step` iterations; nothing where there was no time."""
        if step not in (0, self.config.max_steps) and not self.budget.allows():
            return {}
        with self.budget.counted():
            numbers = self._survived(f"step {step}", lambda: self._measured(step))
        seconds = self.mesh.on_main(lambda: self.budget.last)
        numbers = {**(numbers or {}), "errors": self.errors, "seconds": seconds}
        return {f"validation/{name}": value for name, value in numbers.items()}

    def sample(self, step: int) -> Mapping[str, NDArray[np.uint8]]:
        """Contact sheet and curves of the last evaluation, also written to the stage's folder."""
        seen, self._fresh = self._fresh, {}
        if not seen or not self.mesh.is_main:
            return {}
        with self.budget.counted(more=True):
            return self._survived(f"sheet of step {step}", lambda: self._drawn(seen)) or {}

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _drawn(self, seen: Mapping[str, Seen]) -> dict[str, NDArray[np.uint8]]:
        scenes = [
            Scene(video.name, {name: part[number].shown for name, part in seen.items()})
            for number, video in seen["student"].items()
        ]
        looks = {name: {"looks": mean_curves([v.measured for v in part.values()])} for name, part in seen.items()}
        drawn = {"contact_sheet": contact_sheet(scenes), "validation": curves(looks, "looks")}
        for name, picture in drawn.items():
            write_png(self.config.folder / f"{name}.png", picture)
        return drawn

    def _survived(self, what: str, work: Callable[[], Any]) -> Any:
        """What `work` returned, which ends on all ranks alike; None after an error, which is logged and counted."""
        try:
            return work()
        except RanksApart:
            raise
        except Exception as error:  # noqa: BLE001 (a validation must not end a training; said loudly, counted)
            self.errors += 1
            logger.error("VALIDATION FAILED (%s, error %d of this run): %s: %s", what, self.errors,
                         type(error).__name__, error, exc_info=error if self.mesh.is_main else None)  # fmt: skip
        finally:
            gc.collect()
            if self.mesh.device.type == "cuda":
                torch.cuda.empty_cache()
        return None

    def _read(self) -> None:
        rows: list[VideoRow] = []  # which do not travel: each rank keeps its own, once all have theirs
        self.mesh.every(lambda: rows.extend(self.read()))
        self._rows = rows

    def _measured(self, step: int) -> dict[str, float]:
        if self._rows is None:
            self._read()
        seen: dict[str, Seen] = {}
        if self.teacher is not None:
            seen["teacher"] = self._of_teacher(self.teacher)
        makers = list(self._makers())
        made: list[list[Tensor]] = []  # which do not travel

        def stream() -> None:
            with self.average.applied() if self.average is not None else nullcontext(), self.student.gathered():
                made.extend(self._made(make) for make, _ in makers)

        self._together.every(stream)
        for _, lengths in makers:
            seen |= self._videos(made.pop(0), lengths, f"step_{step:06d}")
        self._fresh = seen
        return self._numbers({name: [video.measured for video in part.values()] for name, part in seen.items()})

    def _numbers(self, measured: Mapping[str, Sequence[Any]]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        distances = []
        for name, videos in measured.items():
            start = "" if name == "student" else f"{name}_"
            numbers |= {f"{start}{key}": value for key, value in means(videos).items()}
            if name != "teacher" and "teacher" in measured:
                compared = against(videos, measured["teacher"])
                distances.append(compared.pop("distance_to_teacher"))
                numbers |= {f"{start}{key}": value for key, value in compared.items()}
        return numbers | ({"distance_to_teacher": float(np.mean(distances))} if distances else {})

    def _makers(self) -> Iterator[tuple[Maker, dict[str, int]]]:
        """What makes videos of the student, and the beginnings of them that are looked at: latent frames by name."""
        config, frames = self.config, self.config.video.num_latent_frames
        settings, plan = config.validation, config.stream_plan
        if not config.objective.causal:
            yield self._sampler(self.student.model), {"student": frames}
            return
        switch, longer = None, config.longer_frames
        if settings.times_longer > 1:
            # On all rows or none: a rebuilt cache is a call more, and the calls of sharded networks are shared.
            have = all(self.mesh.every(lambda: all(row.later is not None for row in self._rows or [])))
            switch = plan.block_of(longer // 2)[0] if have else None
        lengths = {"student": frames} | ({LONG: longer} if settings.times_longer > 1 else {})
        # A stream does not know how long it will be: the shorter video is the beginning of the longer one.
        apart = switch is not None and switch < frames
        for part in [{name: length} for name, length in lengths.items()] if apart else [lengths]:
            turn = switch if LONG in part else None
            most = max(part.values())
            yield student_maker(self.student, plan, most, seed=settings.seed, switch_frame=turn), part

    def _sampler(self, model: VideoDiT) -> Maker:
        return teacher_maker(model, self.config.video.num_latent_frames, **self._sampling)

    @property
    def _is_shared(self) -> bool:
        """Whether ranks compute the calls of networks together."""
        return self.mesh.fsdp_mesh is not None or self.mesh.sequence is not None

    @property
    def _sampling(self) -> dict[str, Any]:
        settings, model = self.config.validation, self.config.model
        return {
            "seed": settings.seed,
            "num_steps": settings.teacher_steps,
            "shift": self.config.flow.shift,
            "guidance": settings.teacher_guidance,
            "first_frame_clean": model.image_condition == "i2v" and model.first_frame_sigma == "zero",
        }

    def _of_teacher(self, teacher: Teacher) -> Seen:
        """The teacher's videos, once a process; their latents are kept for all."""
        if self._teacher_seen is None:
            frames = self.config.video.num_latent_frames
            identity = self.mesh.on_main(teacher.identity)
            about = {"weights": identity, "num_latent_frames": frames, "precision": self.config.precision}
            kept = KeptLatents(self.config.teacher_samples, {"version": _VERSION, **about, **self._sampling})
            found = [kept.get(row) for row in self._rows or []]
            made = [latents for latents in found if latents is not None]
            if not all(self.mesh.every(lambda: len(made) == len(found))):
                if self.mesh.is_main:
                    logger.info("The teacher samples the rows of the validation, once; kept in %s", kept.folder)

                def sample() -> None:
                    with teacher.model() as model:
                        made[:] = self._made(self._sampler(model))

                self._together.every(sample)
                self.mesh.every(lambda: self._keep(kept, made) if self.mesh.leads_sequence else None)
            self._teacher_seen = self._videos(made, {"teacher": frames}, "teacher")["teacher"]
        return self._teacher_seen

    def _made(self, make: Maker) -> list[Tensor]:
        """The latents of this rank's rows. Sharded networks are called by all ranks alike: nothing is done in between
        that might fail on one of them.
        """
        with self._precision():
            return [make(row) for row in self._rows or []]

    def _videos(self, latents: Sequence[Tensor], lengths: Mapping[str, int], prefix: str) -> dict[str, Seen]:
        """The beginnings of these latent frames of the videos of all rows, measured and written, by name and row; every
        rank knows them.
        """

        def work() -> dict[int, list[SeenVideo]]:
            jobs: dict[int, Future[list[SeenVideo]]] = {}
            # Measured in threads, which let others run, while the next video is decoded.
            with self.decoder() as vae, measuring_threads(self.mesh.world_size) as pool:
                for row, made in zip(self._rows or [], latents, strict=True):
                    cuts = [self._cut(name, length, f"{prefix}_row{row.number}") for name, length in lengths.items()]
                    frames = list(decoded(vae, made))
                    jobs[row.number] = pool.submit(look, row.title, frames, self.config.video.fps, cuts)
            return {number: job.result() for number, job in jobs.items()}

        parts = self.mesh.every(lambda: work() if self.mesh.leads_sequence else {})
        found = {number: videos for part in parts for number, videos in part.items()}
        return {name: {number: found[number][k] for number in sorted(found)} for k, name in enumerate(lengths)}

    def _cut(self, name: str, num_latent_frames: int, stem: str) -> Cut:
        """How a video of these latent frames is looked at, and where it goes."""
        config, blocks = self.config, None
        if config.objective.causal and name != "teacher":
            blocks = blocks_of(config.stream_plan, num_latent_frames, config.video.temporal_stride)
        file = config.folder / "samples" / f"{stem}{f'_{name}' if name == LONG else ''}.mp4"
        return Cut(pixel_frames(num_latent_frames, config.video.temporal_stride), blocks, file)

    def _keep(self, kept: KeptLatents, latents: Sequence[Tensor]) -> None:
        """Keeps the teacher's samples; where the disk does not take them, they serve this run alone, which is said."""
        for row, made in zip(self._rows or [], latents, strict=True):
            try:
                kept.put(row, made)
            except OutputError as error:
                logger.warning("The teacher's samples are not kept for other runs: %s", error)
                return

    def _precision(self) -> AbstractContextManager[Any]:
        """As the losses are computed (`stage.InPrecision`)."""
        if self.config.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.mesh.device.type, torch.bfloat16, cache_enabled=self.mesh.fsdp_mesh is None)
