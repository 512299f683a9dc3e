"""Micro-batches of a stage's shapes that no data set and no encoder made: for what memory and time they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.config.stage import StageConfig
from longtake.encoders.original import random_vae
from longtake.encoders.vae import VideoVAE
from longtake.models.sizes import DiTConfig
from longtake.objectives.batch import EncodedBatch
from longtake.train.window_codec import EncoderCodec


@dataclass
class MadeBatches:
    """Micro-batches of a stage's shapes, `accumulation` an update, each with `rows` of its own.

    Args: `size` of the generator; `new` makes a tensor of a shape.
    """

    config: StageConfig
    size: DiTConfig
    image_tokens: int
    accumulation: int
    rows: int
    new: Callable[..., Tensor] = torch.empty
    position: int = 0

    def seek(self, position: int) -> None:
        """Makes the next micro-batch the one after `position` rows."""
        self.position = position

    def __next__(self) -> list[EncodedBatch]:
        return [self._micro_batch() for _ in range(self.accumulation)]

    def _micro_batch(self) -> EncodedBatch:
        size, rows, config, shape = self.size, self.rows, self.config, self.config.video
        space = shape.latent_height, shape.latent_width
        self.position += rows

        def latents(frames: int, channels: int = size.out_channels) -> Tensor:
            return self.new(rows, frames, channels, *space)

        def text() -> Tensor:
            return self.new(rows, size.text_len, size.text_dim)

        def path() -> Tensor:
            states = len(config.stream_plan.all_levels) + 1
            return self.new(rows, states, config.clip_shape.num_latent_frames, size.out_channels, *space)

        image = None if size.image_dim is None else self.new(rows, self.image_tokens, size.image_dim)
        y = latents(shape.num_latent_frames, size.condition_channels) if size.condition_channels else None
        return EncodedBatch(
            range(self.position, self.position + rows),
            Condition(text(), image, y),
            text(),
            space,
            latents(config.clip_shape.num_latent_frames) if config.objective.learns_from_videos else None,
            latents(1) if config.model.image_condition == "i2v" else None,
            text() if config.objective.second_prompts else None,
            path=path() if config.objective.paths is not None else None,
        )


def made_codec(vae: Mapping[str, Any], size: DiTConfig, image_tokens: int, num_latent_frames: int) -> EncoderCodec:
    """A VAE of a configuration (as published where it is empty) with random weights; CLIP tokens that are zeros."""

    def encode(images: Tensor) -> Tensor:
        return torch.zeros(len(images), image_tokens, size.image_dim or 0, device=images.device)

    tokens: Any = SimpleNamespace(encode=encode) if size.image_dim else None
    with_y = size.condition_channels > 0
    made = VideoVAE(random_vae(size.out_channels, vae))
    return EncoderCodec(made, tokens, with_y=with_y, num_latent_frames=num_latent_frames)
