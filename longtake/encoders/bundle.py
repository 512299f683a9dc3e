"""The three frozen encoders that surround the transformer, loaded from one folder.

The classes live in `vae.py`, `text.py` and `clip.py`; this file bundles them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from longtake.encoders.clip import ImageEncoder
from longtake.encoders.text import TextEncoder
from longtake.encoders.vae import VideoVAE
from longtake.weights.locate import encoder_paths


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
        with_image: bool = True,
        clip_preprocess: str = "original",
        text_dtype: torch.dtype | None = None,
        vae_dtype: torch.dtype = torch.float32,
        low_memory: bool = False,
    ) -> Encoders:
        """The encoders of a Wan model folder: an original one, or one of diffusers (`folders.py` knows both).

        Args: `dtype` of text and image encoder; `vae_dtype` of the VAE, float32 wherever something is trained (spec
        B.2). `text_dtype` of the text encoder alone (None = `dtype`): in float32 umT5-xxl takes 23 GB, in bfloat16, as
        it is published, 11 GB. `with_image` False leaves the image encoder out. `clip_preprocess`, see `ImageEncoder`.
        `low_memory`: text and image encoder lie in this process's memory, of which one matrix at a time is on
        the device, and the VAE works on one latent frame at a time: the same results, later.
        Raises: CheckpointError that names what is missing and where to get it.
        """
        paths = encoder_paths(folder, with_image=with_image)
        image = paths.image
        place = "cpu" if low_memory else device
        found = cls(
            VideoVAE.load(paths.vae, device, vae_dtype, **vae_calls(low_memory=low_memory)),
            TextEncoder.load(paths.text, place, text_dtype or dtype),
            None if image is None else ImageEncoder.load(image, place, dtype, preprocess=clip_preprocess),
        )
        if low_memory:
            found.offload(torch.device(device))
        return found

    def offload(self, device: torch.device) -> None:
        """From now on of text and image encoder one matrix at a time is on `device`."""
        self.text.offload(device)
        if self.image is not None:
            self.image.offload(device)


def import_libraries() -> None:
    """Imports what encoders are loaded with, as far as it is there: some seconds, for who has them to spare."""
    with suppress(ImportError, RuntimeError):  # it is told where it is needed
        _ = import_module("diffusers").AutoencoderKLWan
        transformers = import_module("transformers")
        _ = transformers.AutoTokenizer, transformers.CLIPVisionModel, transformers.UMT5EncoderModel


def vae_calls(*, low_memory: bool) -> dict[str, Any]:
    """How a VAE is called: four latent frames at a time, or one in as little memory as it takes."""
    return {"latents_per_call": 1 if low_memory else 4, "low_memory": low_memory}
