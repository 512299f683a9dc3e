"""What a validation of rows does, as far as memory goes: run with networks and tensors that hold no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.encoders.vae import VideoVAE
from longtake.evaluation.row_videos import LATENTS_AT_ONCE, Maker, VideoRow, row_of, student_maker, teacher_maker
from longtake.inference.frames import to_bytes
from longtake.models.dit import VideoDiT
from longtake.objectives.batch import EncodedBatch
from longtake.rollout.denoise import Denoiser
from longtake.train.ema import EMA
from longtake.train.networks import Builder, Networks


def validate(
    builder: Builder,
    networks: Networks,
    average: EMA | None,
    batch: EncodedBatch,
    vae: Mapping[str, Any],
    during: Callable[[str], AbstractContextManager[None]],
) -> None:
    """The teacher's sample of a row (once a run), the student's video, and the decoder, which is loaded for it.

    Once its cache is full, a longer video needs no more. Args: `vae`, the VAE's configuration where it is not
    Wan2.1's; `during` is entered around the three, with their names.
    """
    config = builder.config
    row, student, frames = _first(row_of(batch, 0, "")), networks.student, config.video.num_latent_frames

    def half() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext()

    def sample(model: VideoDiT) -> Maker:
        rules: dict[str, Any] = {"shift": config.flow.shift, "guidance": config.validation.teacher_guidance}
        return teacher_maker(model, frames, first_frame_clean=False, seed=0, num_steps=1, **rules)

    if (teacher := builder.teacher(networks)) is not None:
        with during("the teacher's sample of a validation"), teacher.model() as model, half():
            sample(model)(row)
    applied = average.applied() if average is not None else nullcontext()
    with during("the student's video of a validation"), applied, student.gathered(), half():
        plan = config.stream_plan
        length = config.longer_frames if plan.window_frames is None else min(frames, plan.window_frames)
        denoiser = Denoiser(student.model, gathering=student.gathered)
        causal = config.objective.causal
        make = student_maker(denoiser, plan, length, seed=0) if causal else sample(student.model)
        latents = make(row)
    with during("the decoder of a validation"):
        from diffusers import AutoencoderKLWan

        with _default_type(torch.bfloat16 if config.precision == "bf16" else torch.float32):
            module = AutoencoderKLWan(**vae)
        session = VideoVAE(module).decoder_session()
        for piece in latents.split(LATENTS_AT_ONCE, dim=1)[:2]:
            to_bytes(session.decode(piece)[0])


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    """Inside, networks are made in this type: those without data cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _first(row: VideoRow) -> VideoRow:
    """The first row of a micro-batch."""

    def cut(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor[:1]

    given = row.condition
    condition = Condition(given.text[:1], cut(given.image), cut(given.frames))
    return replace(
        row, condition=condition, empty_text=row.empty_text[:1], first_latent=cut(row.first_latent), later=None
    )
