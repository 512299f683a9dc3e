"""A decoder and picture encoder for long streams whose every output tells what it was made from."""

from __future__ import annotations

import torch
from tiny_models import IMAGE_TOKENS
from torch import Tensor

from longtake.models.sizes import DiTConfig
from longtake.rollout.long_video import Picture

STRIDE = 4


class TinyDecoder:
    """Frame k of a latent is the latent times (k + 1): one frame for the first, `STRIDE` for each later one."""

    def __init__(self, log: list[Tensor]) -> None:
        self.log = log

    def decode(self, latents: Tensor) -> Tensor:
        frames = []
        for k in range(latents.shape[1]):
            count = STRIDE if self.log else 1
            self.log.append(latents[:, k])
            frames += [latents[:, k, :3] * (j + 1) for j in range(count)]
        return torch.stack(frames, 1)


class TinyCodec:
    """`decoded` holds what each decoder was given, in order; `pictures` what was encoded."""

    def __init__(self, config: DiTConfig) -> None:
        self.config = config
        self.decoded: list[list[Tensor]] = []
        self.pictures: list[Tensor] = []

    def decoder(self) -> TinyDecoder:
        self.decoded.append([])
        return TinyDecoder(self.decoded[-1])

    def encode(self, images: Tensor) -> Picture:
        self.pictures.append(images)
        config, batch = self.config, images.shape[0]
        latent = images.mean(1, keepdim=True)[:, None].expand(-1, 1, config.out_channels, -1, -1) + 0.1
        if not config.condition_channels:
            return Picture(latent)
        base = images.mean((1, 2, 3))
        tokens = base[:, None, None].expand(batch, IMAGE_TOKENS, config.image_dim or 1).contiguous()
        frames = latent.repeat(1, 3, -(-config.condition_channels // config.out_channels), 1, 1)
        return Picture(latent, tokens, frames[:, :, : config.condition_channels])
