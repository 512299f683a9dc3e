"""The encoders of a running video in long tuning: VAE and image encoder, never the text encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.encoders.clip import ImageEncoder
from longtake.encoders.condition import condition_frames
from longtake.encoders.sessions import DecoderSession
from longtake.encoders.vae import VideoVAE
from longtake.rollout.long_video import Picture


class EncoderCodec:
    """Decodes windows and encodes their pictures in float32, also under autocast.

    Args: `image` None for models without CLIP tokens; `with_y`, whether the models take `y`; `num_latent_frames` of a
    window.
    """

    def __init__(self, vae: VideoVAE, image: ImageEncoder | None, *, with_y: bool, num_latent_frames: int) -> None:
        self.vae, self.image, self.with_y, self.num_latent_frames = vae, image, with_y, num_latent_frames

    def decoder(self) -> DecoderSession:
        """A decoder at its beginning."""
        return self.vae.decoder_session()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Picture:
        """Encodings of pictures [B, 3, h, w] in [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            tokens = None if self.image is None else self.image.encode(images)
            if not self.with_y:
                return Picture(self.vae.encode(images[:, None]), tokens)
            frames = condition_frames(self.vae, images, self.num_latent_frames)
        return Picture(frames[:, :1, self.vae.temporal_stride :], tokens, frames)
