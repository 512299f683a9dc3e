"""The image encoder: a picture to CLIP tokens of the penultimate layer.

Must know no text, no video and no transformer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.encoders.offload import FrozenEncoder
from longtake.encoders.original import load_image_model
from longtake.encoders.strict import check_folder, load_strictly
from longtake.errors import ConfigError, ShapeError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What full CLIP checkpoints hold beside the vision tower.
_OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def check_image(image: Tensor) -> None:
    """Raises ShapeError unless `image` is a batch of pictures as encoders take it."""
    if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
        got = f"{image.dtype} {tuple(image.shape)}"
        raise ShapeError(f"an image must be a float tensor [B, 3, h, w] in [-1, 1]; got {got}")


def _stretch(image: Tensor, size: int) -> Tensor:
    # The resize overshoots at edges; clamping would be better, but the released models never saw it.
    return F.interpolate(image, size=(size, size), mode="bicubic", align_corners=False, antialias=False)


def _cut(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[-2:]
    shorter = min(height, width)
    sides = (size * height // shorter, size * width // shorter)
    # PIL, with which the library resizes, cuts what overshoots.
    resized = F.interpolate(image, size=sides, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    top, left = ((side - size) // 2 for side in sides)
    return resized[..., top : top + size, left : left + size]


PREPROCESS = {"original": _stretch, "diffusers": _cut}


class ImageEncoder(FrozenEncoder):
    """A frozen `CLIPVisionModel`, read at its penultimate layer.

    Args: `preprocess`, how pixels are prepared. "original" is Wan's way: resized to a square without keeping the
    aspect, bicubic without antialiasing. "diffusers" is the way of its pipelines (transformers' CLIPImageProcessor):
    the shorter side resized, bicubic with antialiasing, and the square in the middle cut out, so that the ends of a
    long picture are not seen.
    """

    def __init__(self, model: Any, preprocess: str = "original") -> None:
        if preprocess not in PREPROCESS:
            raise ConfigError(f"preprocess={preprocess!r} is unknown; the values are {' and '.join(PREPROCESS)}")
        self._resize = PREPROCESS[preprocess]
        super().__init__(model)
        config = self.model.config
        self.image_size: int = config.image_size
        self.width: int = config.hidden_size
        self.num_tokens: int = (config.image_size // config.patch_size) ** 2 + 1

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        preprocess: str = "original",
    ) -> ImageEncoder:
        """The encoder of a library folder, or the vision half of the original `models_clip_open-clip-....pth`.

        Raises: CheckpointError.
        """
        path = Path(folder)
        if path.suffix == ".pth":
            return cls(load_image_model(path, device, dtype), preprocess)
        from transformers import CLIPVisionModel

        check_folder(path, "image encoder")
        # Reshaped weights are not ignored: load_strictly refuses them by name, the library would not name them.
        model = load_strictly(CLIPVisionModel, path, ignore=_OTHER_PARTS, dtype=dtype, ignore_mismatched_sizes=True)
        return cls(model.to(device), preprocess)

    def preprocess(self, image: Tensor) -> Tensor:
        """float32 [B, 3, s, s] as CLIP expects it, of `image` [B, 3, h, w] in [-1, 1]. Source: Wan2.1; spec C.2."""
        resized = self._resize(image.float(), self.image_size)
        mean, std = (torch.tensor(v, device=image.device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return (resized * 0.5 + 0.5 - mean) / std

    def encode(self, image: Tensor) -> Tensor:
        """float32 [B, L, D]: class token and patches after all blocks but the last, without a final norm.

        Args: `image` [B, 3, h, w] in [-1, 1], any size.
        Raises: ShapeError.
        """
        return self._call(image, output_hidden_states=True).hidden_states[-2].float()

    def embed(self, image: Tensor) -> Tensor:
        """float32 [B, D]: the class token after all blocks and the final norm, to compare whole pictures by.

        It is a linear map away from what CLIP was trained to compare; that map is no part of a vision model's files.
        Args and Raises: as `encode`.
        """
        return self._call(image).pooler_output.float()

    @torch.no_grad()
    def _call(self, image: Tensor, **outputs: bool) -> Any:
        check_image(image)
        with self.working():
            return self.model(pixel_values=self.preprocess(image.to(self.device)).to(self.dtype), **outputs)
