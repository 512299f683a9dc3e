"""`longtake bench CONFIG`: seconds and memory of a validation of rows, one row a rank, by the trainer's own class.

The row is made in memory, the VAE has random weights, and files go to a folder that is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from longtake.bench.clock import timed
from longtake.config.stage import StageConfig
from longtake.encoders.original import random_vae
from longtake.encoders.vae import VideoVAE
from longtake.evaluation.row_videos import row_of, teacher_maker
from longtake.models.dit import VideoDiT
from longtake.objectives.batch import EncodedBatch
from longtake.parallel.mesh import Mesh
from longtake.rollout.denoise import Denoiser
from longtake.train.ema import EMA
from longtake.train.row_validation import RowValidation, Teacher

GIB = 2**30
_TEACHER_STEPS = 2  # that are made; the seconds are those of all


@dataclass(frozen=True)
class ValidationBench:
    """A stage at which a validation is measured.

    Args: `teacher`, None where the stage holds none; `batch`, encodings of a row; `vae`, the VAE's configuration where
    it is not the published one.
    """

    config: StageConfig
    mesh: Mesh
    student: Denoiser
    average: EMA | None
    teacher: VideoDiT | None
    batch: EncodedBatch
    vae: Mapping[str, Any]

    def run(self) -> dict[str, Any]:
        """Seconds of a validation, and of the teacher's samples of a row, once for all runs; the most GiB of both."""
        with TemporaryDirectory() as folder:
            settings = self.config.validation.model_copy(
                update={"teacher_steps": _TEACHER_STEPS, "teacher_samples": folder, "max_share": 1.0}
            )
            changes = {"logdir": str(Path(folder) / "log"), "validation": settings}
            short = settings.model_copy(update={"times_longer": 1})
            warm = self._validation(changes | {"validation": short})
            warm.prepare()
            first = timed(lambda: warm.evaluate(0), self.mesh.device)
            validation = replace(warm, config=self.config.model_copy(update=changes))  # which has the teacher's videos
            self._forget_peak()
            numbers: dict[str, float] = {}
            seconds = timed(lambda: numbers.update(validation.evaluate(1)), self.mesh.device)
            sheet = timed(lambda: validation.sample(1), self.mesh.device)
            peak = self._peak()
        self._forget_peak()
        teacher = None if self.teacher is None else self._teacher_seconds(self.teacher)
        total, share = seconds + sheet, self.config.validation.max_share
        return {
            "rows": 1,
            "seconds": total,
            "warm_up_seconds": first,
            "peak_gib": peak,
            "teacher_s_a_row": teacher,
            "teacher_peak_gib": self._peak(),
            "errors": validation.errors,
            "seconds_between": total / share,
            "long_motion_px_s": numbers.get("validation/long_motion_px_s"),
        }

    def _validation(self, changes: Mapping[str, Any]) -> RowValidation:
        config, model = self.config.model_copy(update=changes), self.teacher
        teacher = None if model is None else Teacher(lambda: "random", lambda: nullcontext(model))
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        with self.mesh.device:
            module = random_vae(self.student.model.config.out_channels, self.vae).to(dtype).cpu()

        @contextmanager
        def decoder() -> Iterator[VideoVAE]:
            yield VideoVAE(module).copy_to(self.mesh.device)

        row = row_of(self.batch, 0, "made")
        average, denoiser = self.average, self.student
        return RowValidation(
            config=config, mesh=self.mesh, student=Denoiser(denoiser.model, gathering=denoiser.gathered),
            average=average, teacher=teacher, read=lambda: [row], decoder=decoder,
        )  # fmt: skip

    def _teacher_seconds(self, model: VideoDiT) -> float:
        """Of all steps, from those of some."""
        config, settings = self.config, self.config.validation
        make = teacher_maker(
            model, config.video.num_latent_frames, seed=0, num_steps=_TEACHER_STEPS, shift=config.flow.shift,
            guidance=settings.teacher_guidance, first_frame_clean=False,
        )  # fmt: skip
        bf16, device = config.precision == "bf16", self.mesh.device
        row = row_of(self.batch, 0, "made")
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            seconds = timed(lambda: make(row), device)
        return seconds * settings.teacher_steps / _TEACHER_STEPS

    def _forget_peak(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.mesh.device)

    def _peak(self) -> float | None:
        device = self.mesh.device
        return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
