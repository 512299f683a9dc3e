"""Objectives of tiny networks."""

from __future__ import annotations

from typing import Any

from tiny_batches import RULES

from longtake.models.dit import VideoDiT
from longtake.objectives.base import Parts
from longtake.objectives.teacher_forcing import ErrorRecycling, TeacherForcing, TeacherForcingConfig
from longtake.plan import StreamPlan
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser


def parts_of(
    generator: VideoDiT | Denoiser,
    critic: VideoDiT | None = None,
    teacher: VideoDiT | None = None,
    *,
    seed: int = 3,
    plan: StreamPlan = RULES,
    shift: float = 5.0,
    num_frames: int = 7,
    **more: Any,
) -> Parts:
    """What objectives are built from; the generator is image-to-video where it knows pictures."""
    student = generator if isinstance(generator, Denoiser) else Denoiser(generator)
    trained = {"generator": student.model} | ({} if critic is None else {"critic": critic})
    frozen = {} if teacher is None else {"teacher": teacher}
    options = {"given": int(student.model.config.condition_channels > 0), "draws": KeyedRNG(seed), **more}
    return Parts(student, trained, frozen, plan=plan, shift=shift, num_frames=num_frames, **options)


def teacher_forcing(model: VideoDiT, *, recycling: ErrorRecycling | None = None, **more: Any) -> TeacherForcing:
    """Teacher forcing; `more` are parts, or `caption_dropout`."""
    dropout = more.pop("caption_dropout", 0.0)
    settings = TeacherForcingConfig(caption_dropout=dropout, error_recycling=recycling or ErrorRecycling())
    return TeacherForcing(parts_of(model, **more), settings)
