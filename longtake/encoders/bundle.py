"""The three frozen encoders that surround the transformer, loaded from one folder.

The classes live in `vae.py`, `text_encoder.py` and `image_encoder.py`; this file bundles them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from longtake.encoders.clip import ImageEncoder
from longtake.encoders.text import TextEncoder, clean_prompt
from longtake.encoders.vae import DecoderSession, EncoderSession, VideoVAE
from longtake.weights.locate import encoder_paths

__all__ = [
    "DecoderSession",
    "EncoderSession",
    "Encoders",
    "ImageEncoder",
    "TextEncoder",
    "VideoVAE",
    "clean_prompt",
]


@dataclass(frozen=True, eq=False)
class Encoders:
    """VAE, text encoder and image encoder; `image` is None for text-to-video models."""

    vae: VideoVAE
    text: TextEncoder
    image: ImageEncoder | None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        text_len: int | None = None,
        with_image: bool = True,
        clip_preprocess: str = "original",
        text_dtype: torch.dtype | None = None,
        vae_dtype: torch.dtype = torch.float32,
    ) -> Encoders:
        """The encoders of a Wan model folder: an original one, or one of diffusers (`folders.py` knows both).

        Args: `dtype` of text and image encoder; `vae_dtype` of the VAE, float32 wherever something is trained (spec
        B.2). `text_dtype` of the text encoder alone (None = `dtype`): in float32 umT5-xxl takes 23 GB, in bfloat16, as
        it is published, 11 GB. `with_image` False leaves the image encoder out. `clip_preprocess`, see `ImageEncoder`.
        Raises: CheckpointError that names what is missing and where to get it.
        """
        paths = encoder_paths(folder, with_image=with_image)
        image = paths.image
        return cls(
            VideoVAE.load(paths.vae, device, vae_dtype),
            TextEncoder.load(paths.text, device, text_dtype or dtype, text_len=text_len),
            None if image is None else ImageEncoder.load(image, device, dtype, preprocess=clip_preprocess),
        )

    @classmethod
    def build_toy_random(cls, seed: int = 0) -> Encoders:
        """Encoders of the toy sizes with random weights, for tests that need no files."""
        from longtake.toy import encoders as toy

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = VideoVAE(toy.build_vae())
            tokenizer = toy.build_tokenizer()
            text = TextEncoder(toy.build_text_model(len(tokenizer)), tokenizer, toy.TEXT_LEN)
            return cls(vae, text, ImageEncoder(toy.build_image_model()))
