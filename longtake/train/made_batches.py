"""Micro-batches of a stage's shapes that no data set and no encoder made: for what memory and time they take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.config.stage import StageConfig
from longtake.models.sizes import DiTConfig
from longtake.objectives.batch import EncodedBatch


class MadeBatches:
    """Endless micro-batches of `rows` rows, each batch with rows of its own.

    Args: `size` of the generator; `image_tokens` of a picture; `new` makes a tensor of a shape.
    """

    def __init__(
        self,
        config: StageConfig,
        size: DiTConfig,
        rows: int,
        image_tokens: int,
        new: Callable[..., Tensor] = torch.empty,
    ) -> None:
        self.position = 0
        self._config, self._size, self._rows, self._tokens, self._new = config, size, rows, image_tokens, new

    def seek(self, position: int) -> None:
        """Makes the next micro-batch the one after `position` rows."""
        self.position = position

    def __next__(self) -> EncodedBatch:
        config, size, rows, shape = self._config, self._size, self._rows, self._config.video.shape
        space = shape.latent_height, shape.latent_width
        self.position += rows

        def latents(frames: int, channels: int = size.out_channels) -> Tensor:
            return self._new(rows, frames, channels, *space)

        def text() -> Tensor:
            return self._new(rows, size.text_len, size.text_dim)

        image = None if size.image_dim is None else self._new(rows, self._tokens, size.image_dim)
        y = latents(shape.num_latent_frames, size.condition_channels) if size.condition_channels else None
        return EncodedBatch(
            range(self.position, self.position + rows),
            Condition(text(), image, y),
            text(),
            space,
            latents(config.clip_shape.num_latent_frames) if config.learns_from_videos else None,
            latents(1) if config.model.image_condition == "i2v" else None,
            text() if config.long is not None and config.long.switch_frames else None,
        )
