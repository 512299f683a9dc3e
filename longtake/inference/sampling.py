"""Latents from weights: the student's stream, or the teacher's many-step sampler; batched, seeded a video.

Every video's noise depends on its own seed alone, never on the batch it is generated in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.flow.path import guided
from longtake.flow.sampler import euler
from longtake.flow.schedule import sampling_sigmas
from longtake.models.dit import VideoDiT
from longtake.plan import StreamPlan
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser
from longtake.rollout.self_forcing import RollOutNoise
from longtake.rollout.stream import stream_switched


def stream_noise(
    seed: int, videos: Sequence[int], channels: int, size: tuple[int, int], device: torch.device | str
) -> RollOutNoise:
    """Noise of a stream as a function of (seed, video, absolute frame, denoising step)."""
    draws = KeyedRNG(seed)

    def noise(start: int, end: int, step: int) -> Tensor:
        return draws.noise(step, "stream", videos, (end - start, channels, *size), device, part=start)

    return noise


@torch.no_grad()
def student_latents(
    denoiser: Denoiser,
    condition: Condition,
    first_latent: Tensor | None,
    plan: StreamPlan,
    num_frames: int,
    size: tuple[int, int],
    *,
    seed: int,
    videos: Sequence[int],
    later: Sequence[Condition] = (),
    switch_frames: Sequence[int] = (),
) -> Tensor:
    """`num_frames` latent frames [B, F, C, H, W] streamed by causal weights, cut from whole blocks.

    Args: `later`, the conditions from each of `switch_frames` (latent frames) on.
    """
    model = denoiser.model
    cache = model.new_cache(
        plan,
        condition.batch_size,
        size,
        max_frames=None if plan.window_frames is not None else num_frames + plan.block_frames,
    )
    device = condition.text.device
    noise = stream_noise(seed, videos, model.config.out_channels, size, device)
    blocks = list(plan.blocks(0, plan.block_of(num_frames - 1)[1]))
    conditions = [condition, *later]
    stream = stream_switched(denoiser, cache, conditions, switch_frames, first_latent, noise, plan)
    return torch.cat(list(islice(stream, len(blocks))), 1)[:, :num_frames]


@torch.no_grad()
def teacher_latents(
    model: VideoDiT,
    condition: Condition,
    empty_text: Tensor,
    num_frames: int,
    size: tuple[int, int],
    *,
    seed: int,
    videos: Sequence[int],
    num_steps: int,
    shift: float,
    guidance: float,
    first_latent: Tensor | None = None,
) -> Tensor:
    """A clip [B, F, C, H, W] from bidirectional weights with classifier-free guidance.

    Args: `first_latent` [B, 1, C, H, W] is put into frame 0 at sigma 0 at every step (TI2V models); None lets the
    model generate frame 0 from `y` (Wan2.1 models).
    """
    device = condition.text.device
    draws = KeyedRNG(seed)
    noise = draws.noise(0, "teacher", videos, (num_frames, model.config.out_channels, *size), device)
    velocity = teacher_velocity(model, condition, empty_text, guidance, first_latent)
    clip = euler(velocity, noise, sampling_sigmas(num_steps, shift))
    return clip if first_latent is None else torch.cat([first_latent.float(), clip[:, 1:]], 1)


def teacher_velocity(
    model: VideoDiT, condition: Condition, empty_text: Tensor, guidance: float, first_latent: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """velocity(x, sigma [B]) of a whole clip by bidirectional weights, for `flow/sampler.py`; arguments as above."""
    unconditional = condition.with_text(empty_text)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        levels = sigma[:, None].repeat(1, x.shape[1])
        if first_latent is not None:
            x = torch.cat([first_latent, x[:, 1:]], 1)
            levels[:, 0] = 0
        predicted = model(x, levels, condition)
        if guidance != 1:
            predicted = guided(predicted, model(x, levels, unconditional), guidance)
        return predicted

    return velocity
