"""How much a video moves, by dense optical flow (DIS: Kroeger et al. 2016, arXiv 1603.03590).

Frames come one at a time and a few are kept, so that memory does not grow with the length. Must know no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MIN_SIDE = 16  # pixels; optical flow has nothing to hold on to in less
_WORK_AREA = 480 * 832  # pixels that flow is computed at: more cost time, and hardly change a mean
_WORK_SIDE = 256  # small pictures are enlarged to this, so that flow sees their small parts
# One pair of frames tells a displacement to about a tenth of a pixel: small motions are measured over as many frames as
# bring the fastest parts this far, and at most over these.
_FAR_PX, _MOST_FRAMES = 8.0, 24
_STRIDE = 2  # of every how many pixels the flow is looked at
# Source: VBench, vbench/dynamic_degree.py (which takes its flow from RAFT)
_DYNAMIC_FPS, _DYNAMIC_TOP, _DYNAMIC_PX, _DYNAMIC_SHARE = 8, 0.05, 6 / 256, 4 / 16


@dataclass
class Motion:
    """Motion of T frames, in pixels of the video, one entry a pair of neighbours, [T - 1] each.

    `px` mean flow magnitude of the pair, small motions from several frames; `pair_px` of the pair alone; `dynamic`
    whether the video is dynamic in the sense of VBench's dynamic degree.
    """

    px: list[float] = field(default_factory=list)
    pair_px: list[float] = field(default_factory=list)
    dynamic: bool = False


class MotionMeter:
    """Measures frame after frame: `add` each, then `finish`. `points` [n, m, 2] are the (x, y) of the flow it gives."""

    def __init__(self, height: int, width: int, fps: float) -> None:
        area = math.sqrt(_WORK_AREA / (height * width))
        self._scale = min(area, max(1.0, _WORK_SIDE / min(height, width)))
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._size = (round(width * self._scale), round(height * self._scale))
        columns, rows = (np.arange(0, side, _STRIDE, dtype=np.float32) for side in self._size)
        self.points = (np.stack(np.meshgrid(columns, rows), -1) + 0.5) / np.float32(self._scale) - np.float32(0.5)
        self._motion = Motion()
        self._last: NDArray[np.uint8] | None = None
        # The stretch of small motions that is not measured yet: first frame, pairs, the way of its fastest parts
        self._start: NDArray[np.uint8] | None = None
        self._pairs, self._far = 0, 0.0
        # Dynamic degree: every `step`-th frame
        self._step = max(1, round(fps / _DYNAMIC_FPS))
        self._limit = _DYNAMIC_PX * min(height, width)
        self._number, self._fast = 0, 0
        self._sampled: NDArray[np.uint8] | None = None

    def add(self, luma: NDArray[np.uint8]) -> Floats | None:
        """Takes the luma of the next frame, uint8 [h, w]; the flow at `points` in pixels, None of the first frame."""
        way = cv2.INTER_AREA if self._scale < 1 else cv2.INTER_CUBIC
        frame = luma if self._scale == 1 else np.asarray(cv2.resize(luma, self._size, interpolation=way), np.uint8)
        frame = np.ascontiguousarray(frame)
        flow = None if self._last is None else self._pair(self._last, frame)
        if self._number % self._step == 0:
            if self._sampled is not None:
                self._fast += self._magnitudes(self._between(self._sampled, frame))[1] > self._limit
            self._sampled = frame
        self._last, self._number = frame, self._number + 1
        return flow

    def finish(self) -> Motion:
        """What was measured so far; more frames may come."""
        samples = -(-self._number // self._step)
        dynamic = self._fast >= max(1, round(samples * _DYNAMIC_SHARE))
        last = [] if self._last is None else self._open_px(self._last)
        return Motion(self._motion.px + last, list(self._motion.pair_px), dynamic)

    def _pair(self, last: NDArray[np.uint8], frame: NDArray[np.uint8]) -> Floats:
        flow = self._between(last, frame)
        mean, top = self._magnitudes(flow)
        self._motion.pair_px.append(mean)
        if top * self._scale >= _FAR_PX:
            self._close(last)
            self._motion.px.append(mean)
            return flow
        if self._start is None:
            self._start = last
        self._pairs, self._far = self._pairs + 1, self._far + top * self._scale
        if self._far >= _FAR_PX or self._pairs == _MOST_FRAMES:
            self._close(frame)
        return flow

    def _close(self, end: NDArray[np.uint8]) -> None:
        """Measures the open stretch of small motions up to the frame `end`, and begins another."""
        self._motion.px += self._open_px(end)
        self._start, self._pairs, self._far = None, 0, 0.0

    def _open_px(self, end: NDArray[np.uint8]) -> list[float]:
        """Of each pair of the open stretch up to the frame `end`, the mean over them."""
        if self._start is None:
            return []
        mean, _ = self._magnitudes(self._between(self._start, end))
        return [mean / self._pairs] * self._pairs

    def _between(self, first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Floats:
        flow = np.asarray(self._flow.calc(first, second, None), np.float32)  # type: ignore[call-overload]
        return flow[::_STRIDE, ::_STRIDE] / np.float32(self._scale)

    @staticmethod
    def _magnitudes(flow: Floats) -> tuple[float, float]:
        """Mean magnitude and that of the fastest 5 %."""
        size = np.hypot(flow[..., 0], flow[..., 1]).ravel()
        top = max(1, int(len(size) * _DYNAMIC_TOP))
        return float(size.mean()), float(np.partition(size, len(size) - top)[-top:].mean())
