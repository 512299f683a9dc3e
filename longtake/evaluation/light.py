"""How the light changes on what stays in the picture, followed along the optical flow.

A camera that turns from a wall to a window changes the mean of the pictures and fades nothing: only what two frames
both show is compared, and the changes are added up over the video. Must know no file.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_MIN_POINTS = 16
_MIN_MATCH = 0.8  # correlation of a frame with the one before, along the flow; below it the picture is another one
_CUT = 250.0  # pixels above are as white as they get: they neither brighten, nor tell how much darker they became
_MISFIT = 3.0  # in median misfits; what fits worse has come to the fore, or was hidden


class LightMeter:
    """Adds up the changes from frame to frame at `points` [n, m, 2], (x, y) in pixels.

    `log_light` [T] is the logarithm of the light on what is seen against that in the first frame; a cut leaves it.
    """

    def __init__(self, points: Floats) -> None:
        self._points = points
        self._last: Floats | None = None
        self.log_light = [0.0]

    def add(self, luma: NDArray[np.uint8], flow: Floats | None) -> None:
        """Takes the next frame, uint8 [h, w], and the flow that led to it from the one before (None: the first)."""
        picture = luma.astype(np.float32)  # between whole numbers rounding would add up to a fade
        if self._last is not None and flow is not None:
            self.log_light.append(self.log_light[-1] + self._gain(self._last, picture, flow))
        self._last = picture

    def _gain(self, last: Floats, picture: Floats, flow: Floats) -> float:
        """Logarithm of how much brighter the parts that both frames show became; 0 across a cut."""
        height, width = last.shape
        places = self._points + flow
        inside = ((places >= 0) & (places <= np.array([width - 1, height - 1], np.float32))).all(-1)
        if inside.sum() < _MIN_POINTS:
            return 0.0
        before, now = _at(last, self._points)[inside], _at(picture, places)[inside]
        lit = np.maximum(before, now) < _CUT
        before, now = before[lit], now[lit]
        if len(now) < _MIN_POINTS:
            return 0.0
        spread = float(now.std() * before.std())
        match = float(((now - now.mean()) * (before - before.mean())).mean()) / spread if spread else 0.0
        if match < _MIN_MATCH:
            return 0.0
        misfit = now - before
        misfit = np.abs(misfit - np.median(misfit))
        same = misfit <= 1 + _MISFIT * np.median(misfit)
        return math.log(max(1.0, float(now[same].mean())) / max(1.0, float(before[same].mean())))


def _at(picture: Floats, places: Floats) -> Floats:
    return np.asarray(cv2.remap(picture, places, None, cv2.INTER_LINEAR), np.float32)  # type: ignore[call-overload]
