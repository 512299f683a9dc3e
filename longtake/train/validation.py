"""What a stage generates and measures while it trains: the motion of the student beside the teacher's.

Students that freeze are this field's first complaint; the motion ratio of both goes into `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.condition import VideoShape
from longtake.config.groups import ModelConfig
from longtake.config.stage import StageConfig
from longtake.encoders.bundle import Encoders
from longtake.evaluation.pictures import contact_sheet, curves, scenes, write_png
from longtake.evaluation.report import write_samples
from longtake.evaluation.rows import Row, Videos, caption, held_out, score_row, student_row, teacher_row, truth
from longtake.models.dit import VideoDiT
from longtake.parallel.mesh import Mesh
from longtake.rollout.denoise import Denoiser
from longtake.toy.metrics import summarise
from longtake.toy.world import SIZE
from longtake.train.state import TrainState

# Numbers that are written to metrics.jsonl, by their name in the summary
_LOGGED = ("position_error_px", "motion_ratio", "stop_rate", "shape_kept", "colour_kept", "count_kept")
_SHEET_VIDEOS = 3


def can_measure(model: ModelConfig, video: VideoShape) -> bool:
    """Whether a stage can be measured: image-to-video at the size of the embedded world."""
    return model.image_condition == "i2v" and (video.height, video.width) == (SIZE, SIZE)


class Validation:
    """Generates the held-out worlds with the current (averaged) weights, and once with the teacher's.

    `can_measure` says whether a stage can be measured.
    """

    def __init__(
        self, config: StageConfig, encoders: Encoders, state: TrainState, teacher: VideoDiT | None, mesh: Mesh
    ) -> None:
        self.config, self.encoders, self.state, self.mesh, self.folder = config, encoders, state, mesh, config.folder
        self.teacher = teacher
        self._batches: list | None = None
        self._teacher_numbers: dict[str, float] = {}
        self._shown: dict[str, Videos] = {}
        self._summaries: dict[str, dict[str, Any]] = {}

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Scores after `step` iterations; all ranks call it."""
        settings = self.config.validation
        frames = settings.num_latent_frames or self.config.video.num_latent_frames
        if self._batches is None:
            self._batches = held_out(
                self.encoders,
                self.mesh,
                seed=settings.seed,
                num_worlds=settings.num_worlds,
                num_latent_frames=frames,
                batch_size=8,
                with_y=self.config.model.with_y,
            )
            self._shown["truth"] = truth(self._batches[0])
            if self.teacher is not None:
                self._teacher_numbers = self._measure("teacher", self._teacher(self.teacher))
        generator = self.state.networks["generator"]
        assert isinstance(generator, VideoDiT)
        average = self.state.ema.get("generator")
        with average.applied() if average is not None else nullcontext():
            numbers = self._measure(self.config.name, self._student(generator))
        return {
            **{f"validation/{name}": value for name, value in numbers.items()},
            **{f"validation/teacher_{name}": value for name, value in self._teacher_numbers.items()},
        }

    def sample(self, step: int) -> Mapping[str, NDArray[np.uint8]]:
        """Contact sheet and curves of the last evaluation, also written to the stage's folder with its videos."""
        if not self.mesh.is_main or self._batches is None:
            return {}
        captions = [caption(world) for world in self._batches[0].worlds[:_SHEET_VIDEOS]]
        drawn = {"contact_sheet": contact_sheet(scenes(self._shown, captions)), "validation": curves(self._summaries)}
        for name, picture in drawn.items():
            write_png(self.folder / f"{name}.png", picture)
        shown = self._shown[self.config.name][:_SHEET_VIDEOS]
        videos = {f"step_{step:06d}_{k}": video for k, video in enumerate(shown)}
        write_samples(self.folder / "samples", videos, self.config.video.fps)
        return drawn

    def _measure(self, name: str, row: Row) -> dict[str, float]:
        assert self._batches is not None
        scores, shown = score_row(row, self._batches, self.mesh)
        self._shown[name] = shown
        self._summaries[name] = summary = summarise(scores)
        return {key: float("nan") if summary[key] is None else summary[key] for key in _LOGGED}

    def _student(self, model: VideoDiT) -> Row:
        if not self.config.objective.causal:
            return self._teacher(model)
        return student_row(Denoiser(model), self.config.stream_plan, seed=self.config.validation.seed)

    def _teacher(self, model: VideoDiT) -> Row:
        flow = self.config.flow
        return teacher_row(
            model,
            seed=self.config.validation.seed,
            num_steps=self.config.validation.teacher_steps,
            shift=flow.shift,
            guidance=self.config.validation.teacher_guidance,
            first_frame_clean=self.config.model.first_frame_sigma == "zero",
        )
