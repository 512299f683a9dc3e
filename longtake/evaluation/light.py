"""How the light changes on what stays in the picture, followed by the camera's motion and along the optical flow.

A camera that turns from a wall to a window changes the mean of the pictures and fades nothing: only what two frames
both show is compared. Each way of following errs in scenes of its own, and the mean of both in few. Dense flow errs
where a smooth sky has shades: it finds the place whose light has not changed. A camera's motion (shift, roll, zoom) is
held by everything that has detail, and is a wrong one where little has, or where everything moves on its own. Must know
no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_SIDES = (32, 64, 128)  # short sides of the pictures that are compared, from coarse to fine
_MIN_POINTS = 16
_MIN_MATCH = 0.8  # correlation of a frame with the one that it is compared with; below it the picture is another one
_MISFIT = 3.0  # in median misfits along the flow; what fits worse has come to the fore, or was hidden
_CUT = 250.0  # pixels above are as white as they get: they neither brighten, nor tell how much darker they became
_MOST_FRAMES, _MIN_SHARED = 32, 0.65  # frames, and share of the picture, over which one is compared with
_STEPS, _COARSE_STEPS = 4, 6  # Gauss-Newton
_ROW = 256
_WIDE = 10.0  # levels of 256; misfits above say nothing more of how good a motion is
_STEADY = 0.8  # another motion than the steady one must fit this much better: a fade in a sky looks like a pan


@dataclass(frozen=True)
class _Fit:
    """A camera's motion `way` (x, y, zoom, roll) and the `gain` of the light along it; `shared`, the part of the
    picture that both show; `misfit` in levels of 256; `match`, correlation of both there.
    """

    way: Floats
    gain: float
    shared: float
    misfit: float
    match: float


class _Level:
    """Pictures of one size: the places that are compared, and how each moves with the camera."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        stride = 1 if min(self.size) <= _SIDES[1] else 2
        columns, rows = (np.arange(1, side - 1, stride, dtype=np.float32) for side in self.size)
        self.places = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
        half = np.float32(max(self.size) / 2)
        x, y = self.places.T - np.array([[width - 1], [height - 1]], np.float32) / 2
        whole, none = np.full_like(x, half), np.zeros_like(x)
        self._across, self._down = np.stack([whole, none, x, -y]), np.stack([none, whole, y, x])

    def shrunk(self, luma: Floats) -> Floats:
        """The frame at this size, without the finest detail, which compression takes."""
        return cv2.GaussianBlur(cv2.resize(luma, self.size, interpolation=cv2.INTER_AREA), (0, 0), 1.0)  # type: ignore[return-value]

    def fit(self, key: Floats, frame: Floats, way: Floats, gain: float, steps: int) -> _Fit | None:
        """The motion and gain nearest to those given under which `frame` looks like `key`; None when nothing is shared.

        Gauss-Newton on frame(place + motion) - gain key(place); what moves on its own, and misfits, counts little.
        """
        before = _at(key, self.places)
        slope_x, slope_y = (_slopes(frame, *axis) for axis in ((1, 0), (0, 1)))
        most = np.array(self.size, np.float32) - 1
        for step in range(steps + 1):
            places = (self.places + np.stack([way @ self._across, way @ self._down], -1)).astype(np.float32)
            now, inside = _at(frame, places), ((places >= 0) & (places <= most)).all(-1)
            lit = inside & (np.maximum(now, before) < _CUT)
            if lit.sum() < _MIN_POINTS:
                return None
            misfit = now - np.float32(gain) * before
            size = 0.4 + 1.5 * float(np.median(np.abs(misfit[lit])))
            weight = lit / (1 + (misfit / size) ** 2) ** 2
            if step == steps:
                break
            along = _at(slope_x, places) * self._across + _at(slope_y, places) * self._down
            way, gain = _improved(way, gain, np.concatenate([along, -before[None]]), weight, misfit)
        now, before, weight = now[lit], before[lit], weight[lit]
        mean = float((weight * now).sum() / max(1e-6, (weight * before).sum()))
        cost = float(np.minimum(np.abs(misfit[lit]), _WIDE).mean())
        return _Fit(way, mean, float(inside.mean()), cost, _match(before, now))


class LightMeter:
    """Follows the light over frames of `height` x `width`, with the flow at `points` [n, m, 2], (x, y) in pixels.

    `log_light` [T] is the logarithm of the light on what is seen against that in the first frame; a cut leaves it.
    """

    def __init__(self, height: int, width: int, points: Floats) -> None:
        self._camera, self._flow = _AlongCamera(height, width), _AlongFlow(points)

    def add(self, luma: NDArray[np.uint8], flow: Floats | None) -> None:
        """Takes the next frame, uint8 [h, w], and the flow that led to it from the one before (None: the first)."""
        picture = luma.astype(np.float32)  # between whole numbers rounding would add up to a fade
        self._camera.add(picture)
        self._flow.add(picture, flow)

    @property
    def log_light(self) -> list[float]:
        return [(one + other) / 2 for one, other in zip(self._camera.log_light, self._flow.log_light, strict=True)]


class _AlongFlow:
    """Adds up the changes from each frame to the next."""

    def __init__(self, points: Floats) -> None:
        self._points = points.reshape(-1, 2)
        self._last: Floats | None = None
        self.log_light = [0.0]

    def add(self, picture: Floats, flow: Floats | None) -> None:
        """Arguments as those of `LightMeter.add`."""
        if self._last is not None and flow is not None:
            self.log_light.append(self.log_light[-1] + self._gain(self._last, picture, flow.reshape(-1, 2)))
        self._last = picture

    def _gain(self, last: Floats, picture: Floats, flow: Floats) -> float:
        """Logarithm of how much brighter the parts that both frames show became; 0 across a cut."""
        height, width = last.shape
        places = self._points + flow
        before, now = _at(last, self._points), _at(picture, places)
        inside = ((places >= 0) & (places <= np.array([width - 1, height - 1], np.float32))).all(-1)
        inside &= np.maximum(before, now) < _CUT
        before, now = before[inside], now[inside]
        if len(now) < _MIN_POINTS or _match(before, now) < _MIN_MATCH:
            return 0.0
        misfit = now - before
        misfit = np.abs(misfit - np.median(misfit))
        same = misfit <= 1 + _MISFIT * np.median(misfit)
        return math.log(max(1.0, float(now[same].mean())) / max(1.0, float(before[same].mean())))


class _AlongCamera:
    """Compares each frame with one up to 32 frames before, so that errors add up over few comparisons."""

    def __init__(self, height: int, width: int) -> None:
        scales = sorted({min(1.0, side / min(height, width)) for side in _SIDES})
        self._levels = [_Level(round(width * scale), round(height * scale)) for scale in scales]
        self._key: list[Floats] = []
        self._pace = np.zeros(4, np.float32)  # a frame, of the camera
        self.log_light: list[float] = []
        # Since the frame that is compared with: its light, the camera's way, the gain, the number of frames
        self._base, self._way, self._gain, self._number = 0.0, np.zeros(4, np.float32), 1.0, 0

    def add(self, picture: Floats) -> None:
        """Takes the next frame."""
        frame = [level.shrunk(picture) for level in self._levels]
        if not self._key:
            self.log_light.append(0.0)
            return self._begin(frame)
        fit = self._follow(frame)
        self._number += 1
        if fit is None or fit.match < _MIN_MATCH or fit.gain <= 0:
            self.log_light.append(self.log_light[-1])
            self._pace = np.zeros(4, np.float32)
            return self._begin(frame)
        self._pace, self._way, self._gain = fit.way - self._way, fit.way, fit.gain
        self.log_light.append(self._base + math.log(fit.gain))
        if self._number == _MOST_FRAMES or fit.shared < _MIN_SHARED:
            self._begin(frame)
        return None

    def _begin(self, frame: list[Floats]) -> None:
        """From here on frames are compared with this one."""
        self._key, self._base = frame, self.log_light[-1]
        self._way, self._gain, self._number = np.zeros(4, np.float32), 1.0, 0

    def _follow(self, frame: list[Floats]) -> _Fit | None:
        """The steady camera's motion, unless another one, found from coarse to fine, fits clearly better."""
        last, steady = self._levels[-1], self._way + self._pace
        fits = [last.fit(self._key[-1], frame[-1], steady, self._gain, _STEPS)]
        for way in (self._way, steady) if self._number == 0 else ():
            gain = self._gain
            for level, key, small in zip(self._levels[:-1], self._key, frame):
                if (rough := level.fit(key, small, way, gain, _COARSE_STEPS)) is not None:
                    way, gain = rough.way, rough.gain
            fits.append(last.fit(self._key[-1], frame[-1], way, gain, _STEPS))
        margins = (_STEADY, 1.0, 1.0)
        found = [(fit.misfit * margin, order, fit) for order, (fit, margin) in enumerate(zip(fits, margins)) if fit]
        return min(found)[2] if found else None


def _improved(way: Floats, gain: float, slopes: Floats, weight: NDArray, misfit: Floats) -> tuple[Floats, float]:
    """A weighted least-squares step: `slopes` [5, n] of the misfit [n] by the motion's four numbers and by the gain."""
    weighted = slopes * weight
    square = (weighted @ slopes.T).astype(np.float64)
    # What no detail holds stays as it is.
    square[range(4), range(4)] += 1e-3 * np.trace(square[:4, :4]) / 4
    square += 1e-3 * np.eye(5)
    step = np.linalg.solve(square, -(weighted @ misfit))
    return (way + step[:4]).astype(np.float32), float(np.clip(gain + step[4], 0.5, 2))


def _match(before: Floats, now: Floats) -> float:
    """Correlation; 0 where one is of one level."""
    spread = float(now.std() * before.std())
    return float(((now - now.mean()) * (before - before.mean())).mean()) / spread if spread > 1e-6 else 0.0


def _slopes(picture: Floats, across: int, down: int) -> Floats:
    """Levels a pixel."""
    return np.asarray(cv2.Sobel(picture, cv2.CV_32F, across, down, scale=1 / 8), np.float32)


def _at(picture: Floats, places: Floats) -> Floats:
    """Its values at places [n, 2], between pixels too."""
    rows = np.resize(places, (-(-len(places) // _ROW), _ROW, 2))  # OpenCV takes no more than 32767 rows
    values = cv2.remap(picture, rows, None, cv2.INTER_LINEAR)  # type: ignore[call-overload]
    return np.asarray(values, np.float32).ravel()[: len(places)]
