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
from functools import cached_property

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


class _Picture:
    """A frame at the size of a level."""

    def __init__(self, luma: Floats) -> None:
        self.luma = luma

    @cached_property
    def with_slopes(self) -> Floats:
        """[h, w, 3]: luma, and how it changes across and down, in levels a pixel."""
        across, down = (cv2.Sobel(self.luma, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1)))
        return np.asarray(cv2.merge([self.luma, across, down]), np.float32)


class _Level:
    """Pictures of one size: the places that are compared, and how each moves with the camera."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        stride = 1 if min(self.size) <= _SIDES[1] else 2
        columns, rows = (np.arange(1, side - 1, stride, dtype=np.float32) for side in self.size)
        self._inner = (slice(1, height - 1, stride), slice(1, width - 1, stride))
        self.places = np.stack(np.meshgrid(columns, rows), -1)
        self._half = np.float32(max(self.size) / 2)
        self._x, self._y = x, y = self.places.reshape(-1, 2).T - np.array([[width - 1], [height - 1]], np.float32) / 2
        whole, none = np.full_like(x, self._half), np.zeros_like(x)
        across, down = np.stack([whole, none, x, -y]), np.stack([none, whole, y, x])
        self._moves = np.stack([across, down], -1).reshape(4, -1)

    def shrunk(self, luma: Floats) -> _Picture:
        """The frame at this size, without the finest detail, which compression takes."""
        small = cv2.resize(luma, self.size, interpolation=cv2.INTER_AREA)
        return _Picture(np.asarray(cv2.GaussianBlur(small, (0, 0), 1.0), np.float32))

    def fit(self, key: _Picture, frame: _Picture, way: Floats, gain: float, steps: int) -> _Fit | None:
        """The motion and gain nearest to those given under which `frame` looks like `key`; None when nothing is shared.

        Gauss-Newton on frame(place + motion) - gain key(place); what moves on its own, and misfits, counts little.
        """
        before = key.luma[self._inner].ravel()
        unsaturated = before < _CUT
        for step in range(steps + 1):
            places = self.places + (way @ self._moves).reshape(self.places.shape)
            now, slope_x, slope_y = np.ascontiguousarray(_at(frame.with_slopes, places).T)
            inside = _inside(places, *self.size)
            lit = inside & unsaturated & (now < _CUT)
            if np.count_nonzero(lit) < _MIN_POINTS:
                return None
            misfit = now - np.float32(gain) * before
            far = np.abs(misfit[lit])
            size = 0.4 + 1.5 * _median(far)
            weight = lit / (1 + (misfit / size) ** 2) ** 2
            if step == steps:
                break
            x, y = self._x, self._y
            turn = (slope_x * x + slope_y * y, slope_y * x - slope_x * y)
            slopes = np.stack([slope_x * self._half, slope_y * self._half, *turn, -before])
            way, gain = _improved(way, gain, slopes, weight, misfit)
        now, before, weight = now[lit], before[lit], weight[lit]
        mean = float((weight * now).sum() / max(1e-6, (weight * before).sum()))
        cost = float(np.minimum(far, _WIDE).mean())
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
        self._points = points
        self._last: Floats | None = None
        self.log_light = [0.0]

    def add(self, picture: Floats, flow: Floats | None) -> None:
        """Arguments as those of `LightMeter.add`."""
        if self._last is not None and flow is not None:
            self.log_light.append(self.log_light[-1] + self._gain(self._last, picture, flow))
        self._last = picture

    def _gain(self, last: Floats, picture: Floats, flow: Floats) -> float:
        """Logarithm of how much brighter the parts that both frames show became; 0 across a cut."""
        height, width = last.shape
        places = self._points + flow
        before, now = _at(last, self._points).ravel(), _at(picture, places).ravel()
        inside = _inside(places, width, height) & (np.maximum(before, now) < _CUT)
        before, now = before[inside], now[inside]
        if len(now) < _MIN_POINTS or _match(before, now) < _MIN_MATCH:
            return 0.0
        misfit = now - before
        misfit = np.abs(misfit - _median(misfit))
        same = misfit <= 1 + _MISFIT * _median(misfit)
        return math.log(max(1.0, float(now[same].mean())) / max(1.0, float(before[same].mean())))


class _AlongCamera:
    """Compares each frame with one up to 32 frames before, so that errors add up over few comparisons."""

    def __init__(self, height: int, width: int) -> None:
        scales = sorted({min(1.0, side / min(height, width)) for side in _SIDES})
        self._levels = [_Level(round(width * scale), round(height * scale)) for scale in scales]
        self._key: list[_Picture] = []
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

    def _begin(self, frame: list[_Picture]) -> None:
        """From here on frames are compared with this one."""
        self._key, self._base = frame, self.log_light[-1]
        self._way, self._gain, self._number = np.zeros(4, np.float32), 1.0, 0

    def _follow(self, frame: list[_Picture]) -> _Fit | None:
        """The steady camera's motion, unless another one, found from coarse to fine, fits clearly better."""
        last, steady = self._levels[-1], self._way + self._pace
        fits = [last.fit(self._key[-1], frame[-1], steady, self._gain, _STEPS)]
        starts = [self._way, steady] if self._pace.any() else [self._way]
        if self._number or (len(self._levels) == 1 and not self._pace.any()):
            starts = []  # the first fit began there too
        for way in starts:
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
    diagonal = square.reshape(-1)[:: len(square) + 1]
    # What no detail holds stays as it is.
    diagonal[:4] += 1e-3 * diagonal[:4].sum() / 4
    diagonal += 1e-3
    step = np.linalg.solve(square, -(weighted @ misfit))
    return (way + step[:4]).astype(np.float32), float(np.clip(gain + step[4], 0.5, 2))


def _match(before: Floats, now: Floats) -> float:
    """Correlation; 0 where one is of one level."""
    now, before = now - now.mean(), before - before.mean()
    spread = math.sqrt(float((now**2).mean()) * float((before**2).mean()))
    return float((now * before).mean()) / spread if spread > 1e-6 else 0.0


def _median(values: Floats) -> float:
    """As np.median, which spends longer on what it checks."""
    middle = len(values) // 2
    around = np.partition(values, (middle - 1, middle))[middle - 1 : middle + 1]
    return float(around.mean() if len(values) % 2 == 0 else around[-1])


def _inside(places: Floats, width: int, height: int) -> NDArray[np.bool_]:
    """Which of the places [n, m, 2] lie in the picture, [n m]."""
    held = (places >= 0) & (places <= np.array([width - 1, height - 1], np.float32))
    return (held[..., 0] & held[..., 1]).ravel()


def _at(picture: Floats, places: Floats) -> Floats:
    """The values of a picture [h, w] or [h, w, c] at places [n, m, 2], between pixels too: [n m, c or 1]."""
    values = cv2.remap(picture, places, None, cv2.INTER_LINEAR)  # type: ignore[call-overload]
    return np.asarray(values, np.float32).reshape(places.shape[0] * places.shape[1], -1)
