"""How like the picture, and how like the frame before, the frames of a video are to Wan's own CLIP image encoder.

The cosines are of the whole picture, and of this encoder: they cannot be compared with numbers of DINO or of another
CLIP, and have names of their own. A frozen video scores 1. Must know no encoder: it takes what one made of frames.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from longtake.errors import ShapeError

LIKENESS_METRICS = ("clip_picture_likeness", "clip_frame_likeness")


class LikenessMeter:
    """Takes embeddings of frames as they come and keeps two numbers of each.

    Args: `picture` [D], the embedding of the picture that the video was made of.
    """

    def __init__(self, picture: Tensor) -> None:
        if picture.ndim != 1:
            raise ShapeError(f"the embedding of a picture is {tuple(picture.shape)}; it must be [D]")
        self._picture = F.normalize(picture.double(), dim=0)
        self._last: Tensor | None = None
        self._to_picture: list[float] = []
        self._to_last: list[float] = []

    def add(self, frames: Tensor) -> None:
        """Takes the embeddings [T, D] of the next frames. Raises: ShapeError."""
        if frames.ndim != 2 or frames.shape[1] != len(self._picture):
            raise ShapeError(f"embeddings are {tuple(frames.shape)}; they must be [T, {len(self._picture)}]")
        units = F.normalize(frames.double(), dim=1)
        before = units[:1] if self._last is None else self._last
        self._to_picture += (units @ self._picture).tolist()
        self._to_last += (units * torch.cat([before, units[:-1]])).sum(1).tolist()
        self._last = units[-1:]

    def curves(self) -> dict[str, NDArray[np.float64]]:
        """By the names of LIKENESS_METRICS a cosine a frame; that to the frame before is NaN in the first."""
        return dict(zip(LIKENESS_METRICS, (np.array(self._to_picture), np.array([np.nan, *self._to_last[1:]]))))
