"""What can be measured of any video, without weights and without a truth: metrics, curves over time, named defects.

`measure` is a pure function of frames, which it takes one at a time. What is called after a publication is defined as
there; everything else is ours. Must know no file and no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import cv2
import numpy as np
from numpy.typing import NDArray

from longtake.errors import DataError, ShapeError
from longtake.evaluation.light import LightMeter
from longtake.evaluation.motion import MIN_SIDE, Motion, MotionMeter

Values = NDArray[np.float64]

METRICS = (
    "motion_px_s",
    "dynamic_degree",
    "still_share",
    "first_frame_similarity",
    "drift_saturation",
    "drift_contrast",
    "drift_brightness",
    "drift_sharpness",
    "drift_histogram",
    "flicker",
    "seam_score",
    "sink_returns",
    "bad_frames",
)

STILL_PX = 0.1  # mean flow of a pair of frames that stands still
END_SHARE = 0.15  # the first and the last part of a video whose difference is drift; source: HeliosBench
_BINS = 32  # of the histogram of a colour channel
_UNIFORM = 0.01  # deviation, in [0, 1], of the channels of a frame without a picture
_REPEATED, _REPEATED_SHARE = 0.0005, 0.1  # change, in [0, 1] and in medians of the video, of a frame shown again
_THUMB_SIDE = 32  # pixels that frames are shrunk to before they are compared with the first
_AWAY, _BACK = 0.05, 0.2  # a video has left its first frame at this distance, and is back at this share of the farthest

# What a defect is: the limits were set on photographs moved by a camera; docs/measuring.md says how well they do.
FADE = 0.033  # change of the light on what stays in the picture, between the ends of the video
BLUR = 0.2  # share of the sharpness that is lost between the ends
FREEZE_SECONDS = 0.3  # frames shown again, one after another
SEAM = 1.25  # seam_score


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a video begin: `first` frames, then every `frames`; those of a causal VAE begin shorter."""

    frames: int
    first: int

    def __post_init__(self) -> None:
        if self.frames < 2 or self.first < 1:
            raise ShapeError(f"blocks of {self.frames} frames, the first of {self.first}: 2 or more and 1 or more")


@dataclass(frozen=True)
class Measured:
    """What `measure` found in a video of `frames` frames.

    Fields: `metrics` by the names of METRICS, None where a metric has no meaning; `curves` one number a frame, None in
    the first where it is about a pair; `slope` of the similarity to the first frame, a second; `defects`: their names.
    """

    frames: int
    fps: float
    metrics: dict[str, float | None]
    curves: dict[str, list[float | None]]
    slope: float
    defects: tuple[str, ...]


def measure(frames: Iterable[NDArray[np.uint8]], fps: float, blocks: Blocks | None = None) -> Measured:
    """Measures a video, uint8 [T, h, w, 3] or an iterator of its frames; T >= 2, sides of at least 16 pixels.

    Args: `fps` frames a second; `blocks`, if the video was made block by block, are needed for `seam_score`.
    Raises: DataError for fewer than two frames, ShapeError for frames of another shape or type.
    """
    looks: Looks | None = None
    for looks in _looked_at(frames, fps):  # noqa: B007 (the last one has seen all)
        pass
    if looks is None or len(looks.rows) < 2:
        raise DataError(f"the video has {0 if looks is None else 1} frames; it needs at least 2")
    return looks.finish(fps, blocks)


def measure_beginnings(
    frames: Iterable[NDArray[np.uint8]], fps: float, blocks: Mapping[int, Blocks | None]
) -> dict[int, Measured]:
    """What `measure` finds in the first so many frames, by their number, each with the blocks that it has there; every
    frame is looked at once. Raises: as `measure`, and DataError for a video that is shorter than the longest of them.
    """
    found: dict[int, Measured] = {}
    for looks in _looked_at(frames, fps):
        if (number := len(looks.rows)) in blocks and number > 1:
            found[number] = looks.finish(fps, blocks[number])
    if missing := blocks.keys() - found.keys():
        raise DataError(f"the video has no {max(missing)} frames, or they are fewer than 2")
    return found


def _looked_at(frames: Iterable[NDArray[np.uint8]], fps: float) -> Iterator[Looks]:
    """Yields what is kept of the frames so far, after each of them. Raises: ShapeError."""
    looks: Looks | None = None
    for frame in frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or min(frame.shape[:2]) < MIN_SIDE:
            raise ShapeError(f"a frame is {frame.dtype} {frame.shape}; it must be uint8 [h, w, 3], sides >= {MIN_SIDE}")
        if looks is None:
            looks = Looks(frame.shape, fps)
        elif frame.shape != looks.shape:
            raise ShapeError(f"a frame has the shape {frame.shape} and those before {looks.shape}; cut the video there")
        looks.add(frame)
        yield looks


class Looks:
    """What is kept of the frames that have gone by: some numbers of each, and the last one."""

    def __init__(self, shape: tuple[int, ...], fps: float) -> None:
        self.shape = shape
        self.rows: list[tuple[float, ...]] = []
        self._histograms: list[NDArray[np.float32]] = []
        self._motion = MotionMeter(shape[0], shape[1], fps)
        self._light = LightMeter(shape[0], shape[1], self._motion.points)
        self._last: NDArray[np.uint8] | None = None
        self._first: NDArray[np.float32] | None = None

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Takes the next frame."""
        frame = np.ascontiguousarray(frame)
        luma = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)
        self._light.add(luma, self._motion.add(luma))
        thumb = _thumb(frame)
        self._first = thumb if self._first is None else self._first
        change = math.nan if self._last is None else cv2.norm(frame, self._last, cv2.NORM_L1) / frame.size / 255
        mean, deviation = (float(value.item()) / 255 for value in cv2.meanStdDev(luma))
        saturation = float(cv2.mean(cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)[..., 1])[0]) / 255
        plain = float(cv2.meanStdDev(frame)[1].max()) / 255
        row = (_similarity(thumb, self._first), saturation, deviation, mean, sharpness(luma), change, plain)
        self.rows.append(row)
        self._histograms.append(_histogram(frame))
        self._last = frame

    def finish(self, fps: float, blocks: Blocks | None) -> Measured:
        """The numbers of the video so far."""
        motion, histograms = self._motion.finish(), np.stack(self._histograms)
        curves, plain = self._curves(motion, histograms, fps)
        uniform, repeated = plain < _UNIFORM, _repeated(curves["change"])
        returns = _returns(1 - curves["first_frame_similarity"][~uniform])
        # A change to or from a frame without a picture says nothing of blocks.
        change = np.where(uniform | np.r_[True, uniform[:-1]], np.nan, curves["change"])
        seam = None if blocks is None else seam_score(change, blocks)
        metrics: dict[str, float | None] = {
            "motion_px_s": float(np.mean(motion.px)) * fps,
            "dynamic_degree": float(motion.dynamic),
            "still_share": float((np.array(motion.pair_px) < STILL_PX).mean()),
            "first_frame_similarity": float(curves["first_frame_similarity"][1:].mean()),
            **{f"drift_{name}": drift(curves[name]) for name in ("saturation", "contrast", "brightness", "sharpness")},
            "drift_histogram": _histogram_distance(*(part.mean(0) for part in ends(histograms))),
            "flicker": flicker(curves["brightness"]),
            "seam_score": seam,
            "sink_returns": float(returns),
            "bad_frames": float((uniform | repeated).sum()),
        }
        found = {
            "fade": drift(np.log(curves["light"])) > FADE,
            "blur": _loss(curves["sharpness"]) > BLUR,
            "freeze": _longest(repeated) >= max(2, FREEZE_SECONDS * fps),
            "seam": seam is not None and seam > SEAM,
            "loop": returns > 0,
            "uniform": bool(uniform.any()),
        }
        return Measured(
            frames=len(plain),
            fps=fps,
            metrics=metrics,
            curves={name: [None if np.isnan(v) else float(v) for v in values] for name, values in curves.items()},
            slope=_slope(curves["first_frame_similarity"]) * fps,
            defects=tuple(name for name, there in found.items() if there),
        )

    def _curves(self, motion: Motion, histograms: NDArray, fps: float) -> tuple[dict[str, Values], Values]:
        """The curves [T], NaN in the first frame of those about pairs, and how far frames are from one colour [T]."""
        similarity, saturation, contrast, brightness, sharp, change, plain = np.array(self.rows).T
        curves = {
            "motion_px_s": np.array([np.nan, *motion.px]) * fps,
            "first_frame_similarity": similarity,
            "saturation": saturation,
            "contrast": contrast,
            "brightness": brightness,
            "sharpness": sharp,
            "histogram": np.array([_histogram_distance(histograms[0], row) for row in histograms]),
            "change": change,
            "light": np.exp(self._light.log_light),
        }
        return curves, plain


def ends(values: NDArray) -> tuple[NDArray, NDArray]:
    """The first and the last 15 % of the frames, at least one."""
    number = max(1, int(END_SHARE * len(values)))
    return values[:number], values[-number:]


def drift(values: Values) -> float:
    """|mean of the first 15 % of the frames - mean of the last 15 %|. Source: HeliosBench."""
    first, last = ends(values)
    return float(abs(first.mean() - last.mean()))


def flicker(brightness: Values) -> float:
    """Mean distance of a frame's brightness from the middle of its two neighbours; 0 for a steady fade."""
    if len(brightness) < 3:
        return 0.0
    return float(np.abs(brightness[1:-1] - (brightness[:-2] + brightness[2:]) / 2).mean())


def seam_score(change: Values, blocks: Blocks) -> float | None:
    """Mean over the boundaries of: the change across it over the mean change inside the blocks on both sides.

    `change` [T] is that from the frame before, NaN where it tells nothing. 1 without seams; None when the video has no
    boundary.
    """
    scores = []
    starts = range(blocks.first, len(change), blocks.frames)
    inside = np.isfinite(change)
    inside[[0, *starts]] = False
    for start in starts:
        near = slice(max(1, start - blocks.frames), start + blocks.frames)
        usual = change[near][inside[near]]
        if np.isfinite(change[start]) and len(usual) and usual.mean() > 0:
            scores.append(change[start] / usual.mean())
    return float(np.mean(scores)) if scores else None


def sharpness(luma: NDArray[np.uint8]) -> float:
    """How fine the detail of a picture uint8 [h, w] is, in [0, 1]: 0.79 in white noise.

    The root of mean squared second over first differences: contrast cancels, a blur takes the fine detail first.
    """
    picture = luma.astype(np.float32)
    down, across = np.diff(picture, axis=0)[:, :-1], np.diff(picture, axis=1)[:-1]
    slopes = float((down**2).mean() + (across**2).mean())
    bends = float((cv2.Laplacian(picture, cv2.CV_32F) ** 2).mean())
    return math.sqrt(min(1.0, bends / slopes / 8)) if slopes else 0.0


def _loss(sharp: Values) -> float:
    before, after = (float(part.mean()) for part in ends(sharp))
    return 1 - after / before if before else 0.0


def _thumb(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    height, width = frame.shape[:2]
    scale = _THUMB_SIDE / min(height, width)
    small = cv2.resize(frame, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    values = np.asarray(small, np.float32)
    return values - values.mean((0, 1))


def _similarity(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Correlation of two thumbs in [-1, 1]: blind to brightness and contrast, which have curves of their own."""
    norm = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / norm if norm else float(one is other)


def _returns(distance: Values) -> int:
    """How often a video came back to its first frame after it had left it."""
    farthest, number = 0.0, 0
    for value in distance:
        farthest = max(farthest, float(value))
        if farthest >= _AWAY and value <= _BACK * farthest:
            number, farthest = number + 1, 0.0
    return number


def _histogram(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Shares of the pixels in the bins of each channel, [3, bins]."""
    counts = [cv2.calcHist([frame], [channel], None, [_BINS], [0, 256]).ravel() for channel in range(3)]
    return np.stack(counts) / np.float32(frame.shape[0] * frame.shape[1])


def _histogram_distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Share of the pixels, in [0, 1], that would have to change their bin, mean of the channels."""
    return float(np.abs(one - other).sum(-1).mean()) / 2


def _slope(values: Values) -> float:
    """Of the straight line nearest to `values`, a frame."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def _repeated(change: Values) -> NDArray[np.bool_]:
    """Which frames show the one before again: next to no change, where the video does change."""
    return change <= max(
        _REPEATED, _REPEATED_SHARE * float(np.nanmedian(change))
    )  # NaN, of the first, is no repetition


def _longest(flags: NDArray[np.bool_]) -> int:
    """Longest run of True."""
    return max((len(list(run)) for value, run in groupby(flags) if value), default=0)
