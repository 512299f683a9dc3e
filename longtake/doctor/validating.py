"""What a validation of rows does, as far as memory goes: run with networks and tensors that hold no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from longtake.encoders.vae import VideoVAE
from longtake.evaluation.row_videos import LATENTS_AT_ONCE, Maker, row_of, student_maker, teacher_maker
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
    decoder: nn.Module,
    during: Callable[[str], AbstractContextManager[None]],
) -> None:
    """The teacher's sample of a row (once a run), the student's video, and the decoder, which is loaded for it.

    Once its cache is full, a longer video needs no more. Args: `decoder`, the module of the VAE, without data so far;
    `during` is entered around the three, with their names.
    """
    config = builder.config
    row, student, frames = row_of(batch.first(), 0, ""), networks.student, config.video.num_latent_frames

    def half() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext()

    def sample(model: VideoDiT) -> Maker:
        rules: Mapping[str, Any] = {"shift": config.flow.shift, "guidance": config.validation.teacher_guidance}
        return teacher_maker(model, frames, first_frame_clean=False, seed=0, num_steps=1, **rules)

    if (teacher := builder.teacher(networks)) is not None:
        with during("the teacher's sample of a validation"), teacher.model() as model, half():
            sample(model)(row)
    applied = average.applied() if average is not None else nullcontext()
    with during("the student's video of a validation"), applied, student.gathered(), half():
        plan = config.stream_plan
        length = config.longer_frames if plan.window_frames is None else min(frames, plan.window_frames)
        causal = partial(student_maker, Denoiser(student.model, gathering=student.gathered), plan, length, seed=0)
        latents = (causal() if config.objective.causal else sample(student.model))(row)
    with during("the decoder of a validation"):
        session = VideoVAE(decoder.to_empty(device="cpu")).decoder_session()
        for piece in latents.split(LATENTS_AT_ONCE, dim=1)[:2]:
            to_bytes(session.decode(piece)[0])
