"""How far the statistics of a video's latents have moved away from those of its beginning.

A student whose own past is its context shifts and rescales channels long before the eye sees another colour. What is
compared, mean and deviation of each channel over a window, is what Context-Matched Distillation anchors a student
with; there the reference is a real video, here it is the video's own first window. Must know no model and no file.

Source: nv-tlabs/cmd, model/context_matched_distillation.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from longtake.errors import ShapeError

Values = NDArray[np.float64]

LATENT_METRICS = ("latent_mean_shift", "latent_deviation_shift")


class LatentMeter:
    """Takes latents as they are made and keeps two numbers a frame and channel."""

    def __init__(self) -> None:
        self._means: list[Values] = []
        self._squares: list[Values] = []

    def add(self, latents: Tensor) -> None:
        """Takes the next latent frames, [F, C, H, W]. Raises: ShapeError."""
        if latents.ndim != 4 or (self._means and latents.shape[1] != len(self._means[0])):
            raise ShapeError(f"latents are {tuple(latents.shape)}; they must be [F, C, H, W], C as before")
        values = latents.detach().double()
        self._means += list(values.mean((2, 3)).cpu().numpy())
        self._squares += list(values.square().mean((2, 3)).cpu().numpy())

    @property
    def num_frames(self) -> int:
        """Latent frames that were added."""
        return len(self._means)

    def shifts(self, window_frames: int, num_frames: int | None = None) -> dict[str, Values]:
        """By the names of LATENT_METRICS a curve, one value for each of the first `num_frames` frames (None: all).

        The value of a frame is that of the `window_frames` frames that end with it, against the first ones: the mean
        over the channels of |mean - mean of the first|, and the same of the deviations. It is 0 in the first window.
        Raises: ShapeError when no frame was added.
        """
        if not self._means or window_frames < 1:
            raise ShapeError(f"{self.num_frames} latent frames in windows of {window_frames}; both must be 1 or more")
        means, squares = (_windows(np.stack(rows[:num_frames]), window_frames) for rows in (self._means, self._squares))
        deviations = np.sqrt(np.maximum(squares - means**2, 0))
        moved = (np.abs(values - values[0]).mean(1) for values in (means, deviations))
        return dict(zip(LATENT_METRICS, moved))


def _windows(frames: Values, size: int) -> Values:
    """Means over the `size` rows that end with each row of [F, C]; the rows of the first window all have its mean."""
    size = min(size, len(frames))
    sums = np.cumsum(np.vstack([np.zeros_like(frames[:1]), frames]), 0)
    full = (sums[size:] - sums[:-size]) / size
    return np.vstack([np.repeat(full[:1], size - 1, 0), full])


def in_pixel_frames(curve: Values, temporal_stride: int) -> Values:
    """A curve with a value a latent frame as one with a value a pixel frame: the first is 1 frame, others `stride`."""
    return np.concatenate([curve[:1], np.repeat(curve[1:], temporal_stride)])
