"""Denoise one block against a cache, and commit it: the only place that does so, in training and in inference.

Source: Self-Forcing (Huang et al. 2025, arXiv 2506.08009, algorithm 1) with the rules of the project's specification:
context is stored at sigma exactly 0, and only the exit step may carry gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.flow.path import add_noise, clean_from_velocity, guided
from longtake.models.cache import KVCache, Place
from longtake.models.dit import VideoDiT
from longtake.structs import Condition

# noise(step) -> [B, f, C, H, W]: fresh noise for denoising step `step` of one block
BlockNoise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a stream: uncond + `weight` (cond - uncond).

    The unconditional side has a `condition` (same picture, other text) and a `cache` of its own, because what a frame
    leaves in the cache depends on the text. So guidance doubles passes and cache memory.
    """

    weight: float
    condition: Condition
    cache: KVCache


@dataclass(frozen=True)
class ExitStep:
    """The last step that a block took without gradient: its noisy latents `x` [B, f, C, H, W] at noise level `sigma`,
    and its place in the cache.
    """

    x: Tensor
    sigma: float
    place: Place


def denoise_block(
    model: VideoDiT,
    cache: KVCache,
    condition: Condition,
    noise: BlockNoise,
    sigmas: Sequence[float],
    *,
    exit_step: int | None = None,
    graded: bool = False,
    exits: list[ExitStep] | None = None,
    guidance: Guidance | None = None,
) -> Tensor:
    """Clean latents [B, f, C, H, W] of the block at `cache.position`; the cache is only read.

    Args: `sigmas` falling noise levels of the student; `exit_step` stops after that step (default: the last one);
    `graded` lets gradient through the exit step, and through that step alone; or `exits` gets that step, for
    `graded_exits`; `guidance` None = off.
    """
    last = len(sigmas) - 1 if exit_step is None else exit_step
    x = noise(0).float()
    with torch.no_grad():
        for step in range(last):
            clean = _predict(model, cache, condition, x, sigmas[step], guidance)
            x = add_noise(clean, noise(step + 1), _level(x, sigmas[step + 1]))
    trace = None
    if exits is not None:
        assert guidance is None, "training is never guided"
        trace = cache.place(x.shape[1])
        exits.append(ExitStep(x, sigmas[last], trace))
    with torch.set_grad_enabled(graded and exits is None):
        return _predict(model, cache, condition, x, sigmas[last], guidance, trace)


def graded_exits(model: VideoDiT, cache: KVCache, condition: Condition, exits: Sequence[ExitStep]) -> Tensor:
    """The exit steps of several blocks, with gradient: their clean latents [B, sum of f, C, H, W].

    No block's exit step depends on the gradient of another, since the context is detached. So backward recomputes and
    differentiates each layer once for all blocks, not once a block, which keeps a GPU busy.
    """
    x = torch.cat([step.x for step in exits], 1)
    sigma = torch.cat([_level(x, step.sigma)[:, None].expand(-1, step.x.shape[1]) for step in exits], 1)
    with torch.enable_grad():
        velocity = model(x, sigma, condition, cache=cache, places=[step.place for step in exits])
    return clean_from_velocity(x, velocity, sigma)


@torch.no_grad()
def commit_block(
    model: VideoDiT, cache: KVCache, condition: Condition, clean: Tensor, *, guidance: Guidance | None = None
) -> None:
    """The context pass: stores keys and values of finished latents at sigma 0 and advances the cache (both caches)."""
    model(clean.detach(), _level(clean, 0.0), condition, cache=cache, commit=True)
    if guidance is not None:
        model(clean.detach(), _level(clean, 0.0), guidance.condition, cache=guidance.cache, commit=True)


def _predict(
    model: VideoDiT,
    cache: KVCache,
    condition: Condition,
    x: Tensor,
    sigma: float,
    guidance: Guidance | None,
    trace: Place | None = None,
) -> Tensor:
    level = _level(x, sigma)
    velocity = model(x, level, condition, cache=cache, trace=trace)
    if guidance is not None:
        unconditional = model(x, level, guidance.condition, cache=guidance.cache)
        velocity = guided(velocity, unconditional, guidance.weight)
    return clean_from_velocity(x, velocity, level)


def _level(x: Tensor, sigma: float) -> Tensor:
    return torch.full((x.shape[0],), sigma, device=x.device)
