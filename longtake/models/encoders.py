"""The three frozen encoders that surround the transformer, loaded from one folder.

The classes live in `vae.py`, `text_encoder.py` and `image_encoder.py`; this file bundles them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from longtake.errors import CheckpointError
from longtake.models.image_encoder import ImageEncoder
from longtake.models.text_encoder import TextEncoder, clean_prompt
from longtake.models.vae import DecoderSession, EncoderSession, VideoVAE

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
    ) -> Encoders:
        """The encoders of `folder/{vae,text_encoder,image_encoder}`, as in the library's Wan repositories.

        Args: `dtype` of text and image encoder; the VAE stays float32 (spec B.2). `with_image` False leaves the image
        encoder out.
        Raises: CheckpointError that names the folder or file which is missing.
        """
        root = Path(folder)
        if not root.is_dir():
            raise CheckpointError(
                f"the encoder folder {root} does not exist; it must hold vae/, text_encoder/ and image_encoder/"
            )
        return cls(
            VideoVAE.load(root / "vae", device),
            TextEncoder.load(root / "text_encoder", device, dtype, text_len=text_len),
            ImageEncoder.load(root / "image_encoder", device, dtype) if with_image else None,
        )

    @classmethod
    def build_toy_random(cls, seed: int = 0) -> Encoders:
        """Encoders of the toy sizes with random weights, for tests that need no files."""
        from longtake.models import toy

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = VideoVAE(toy.build_vae())
            tokenizer = toy.build_tokenizer()
            text = TextEncoder(toy.build_text_model(len(tokenizer)), tokenizer, toy.TEXT_LEN)
            return cls(vae, text, ImageEncoder(toy.build_image_model()))
