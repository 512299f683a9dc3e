"""Micro-batches of a stage's shapes that no data set and no encoder made: for what memory and time they take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtake.condition import Condition, VideoShape
from longtake.models.sizes import DiTConfig
from longtake.objectives.batch import EncodedBatch


class MadeBatches:
    """Micro-batches of a stage's shapes, `accumulation` an update, each with rows of its own."""

    def __init__(
        self,
        shape: VideoShape,
        num_clip_frames: int | None,
        size: DiTConfig,
        accumulation: int,
        rows: int,
        image_tokens: int,
        *,
        with_picture: bool,
        second_prompts: bool,
        new: Callable[..., Tensor] = torch.empty,
    ) -> None:
        """Args: `num_clip_frames` of the rows' videos, None where they have none; `new` makes a tensor of a shape."""
        self.position, self._new = 0, new
        self._shape, self._clip_frames, self._size = shape, num_clip_frames, size
        self._accumulation, self._rows, self._tokens = accumulation, rows, image_tokens
        self._with_picture, self._second_prompts = with_picture, second_prompts

    def seek(self, position: int) -> None:
        """Makes the next micro-batch the one after `position` rows."""
        self.position = position

    def __next__(self) -> list[EncodedBatch]:
        return [self._micro_batch() for _ in range(self._accumulation)]

    def _micro_batch(self) -> EncodedBatch:
        size, rows, shape = self._size, self._rows, self._shape
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
            None if self._clip_frames is None else latents(self._clip_frames),
            latents(1) if self._with_picture else None,
            text() if self._second_prompts else None,
        )
