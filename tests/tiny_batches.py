"""Encoded micro-batches for tests whose every sample is a function of its global index, and a recorder of calls."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import HEIGHT, IMAGE_TOKENS, WIDTH
from tiny_plan import tiny_plan

from longtake.condition import Condition, MaskLayout
from longtake.models.cache import CacheView
from longtake.models.dit import VideoDiT
from longtake.objectives.batch import EncodedBatch
from longtake.rollout.denoise import Denoiser

RULES = tiny_plan(2, 1, 5, 1, sigmas=(1.0, 0.9, 0.75, 0.5))


def make_batch(model: VideoDiT, indices: list[int], num_frames: int = 7, *, videos: bool = True) -> EncodedBatch:
    """The micro-batch of some global samples: another caption, picture and video for each index."""
    config = model.config

    def sample(index: int, what: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * index + what))

    def batch(what: int, *shape: int) -> torch.Tensor:
        return torch.stack([sample(index, what, *shape) for index in indices])

    text = batch(0, 5, config.text_dim)
    text[:, 4:] = 0
    image = None if config.image_dim is None else batch(1, IMAGE_TOKENS, config.image_dim)
    frames = batch(2, num_frames, config.condition_channels, HEIGHT, WIDTH) if config.condition_channels else None
    latents = batch(3, num_frames, config.out_channels, HEIGHT, WIDTH)
    empty = torch.full((1, 5, config.text_dim), 0.3).expand(len(indices), -1, -1)
    return EncodedBatch(
        indices=list(indices),
        condition=Condition(text, image, frames),
        empty_text=empty,
        latent_size=(HEIGHT, WIDTH),
        latents=latents if videos else None,
        first_latent=None if frames is None else latents[:, :1],
    )


def record(model: VideoDiT | Denoiser, monkeypatch: Any) -> list[dict[str, Any]]:
    """The calls of `model` from now on, in order: arguments, whether gradient was on, and what came out."""
    calls: list[dict[str, Any]] = []
    model = model.model if isinstance(model, Denoiser) else model
    forward = model.forward

    def spy(x, sigma, condition, context=None):
        view = context if isinstance(context, CacheView) else None
        call = {
            "x": x,
            "sigma": sigma,
            "condition": condition,
            "mask": context if isinstance(context, MaskLayout) else None,
            "commit": view is not None and view.commit,
            "position": None if view is None else view.cache.position,
            "with_grad": torch.is_grad_enabled(),
            "blocks": 0 if view is None else len(view.blocks),
        }
        call["out"] = forward(x, sigma, condition, context)
        calls.append(call)
        return call["out"]

    monkeypatch.setattr(model, "forward", spy)
    return calls
