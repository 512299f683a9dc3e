"""Exact scores of a video of the embedded world: pure functions of decoded pixels and the world's truth.

Everything is also a curve over time. A sprite that the truth shows less than half (others cover it) is not scored in
that frame: NaN. A sprite that the video does not show costs MISSING_PX there. This file must know no model.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.data.world import COLOURS, DIRECTIONS, SHAPES, SIZE, SPEEDS, World, motion_velocity, toroidal_offset
from longtake.errors import ShapeError
from longtake.evaluation.world_locate import EXTRA_SHARE, Located, locate

# Mean distance of a uniformly random position from the true one on the torus: SIZE (sqrt 2 + ln(1 + sqrt 2)) / 6.
MISSING_PX = SIZE * (math.sqrt(2) + math.asinh(1)) / 6
SCORED_VISIBILITY = 0.5
STOP_RATIO = 0.25  # a sprite that moves less than this share of the true distance has stopped
STOP_WINDOW = 8  # frames of the stop curve
MAX_PSNR = 100.0  # dB, of identical frames

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class WorldScores:
    """Scores of one video with T frames of a world with S sprites; NaN = not scored.

    Fields, [T, S] unless said: `position_error` in pixels on the torus; `motion_ratio`, distance moved along the true
    direction since frame 0 / true distance; `stopped`, 1 where a sprite moved (whither ever) less than STOP_RATIO of
    the true distance in the last STOP_WINDOW frames; `shape_kept` and `colour_kept`, 0 or 1; `count_kept` [T];
    `psnr` [T] in dB against the true frame; `saturation` and `contrast` [T] in 0..1 (mean HSV saturation, standard
    deviation of the luma). `sprite_motion_ratio` and `sprite_stopped` [S] are those of the whole video.
    `chosen_motion` is the (direction, speed) that the open sprite's motion was nearest to, None without an open
    sprite; `open_moved` is False when that sprite stopped, so that its direction means nothing.
    """

    position_error: Floats
    motion_ratio: Floats
    stopped: Floats
    shape_kept: Floats
    colour_kept: Floats
    count_kept: Floats
    psnr: Floats
    saturation: Floats
    contrast: Floats
    sprite_motion_ratio: Floats
    sprite_stopped: Floats
    chosen_motion: tuple[str, str] | None
    open_moved: bool

    @property
    def first_frame_psnr(self) -> float:
        return float(self.psnr[0])


def measure(world: World, video: NDArray[np.uint8]) -> WorldScores:
    """Scores of `video`, uint8 [T, SIZE, SIZE, 3], against the truth of `world`.

    An open motion is scored against the nearest (lowest mean error) of all directions and speeds from its start.
    Raises: ShapeError when the video has another shape or type.
    """
    if video.ndim != 4 or video.shape[1:] != (SIZE, SIZE, 3) or not len(video) or video.dtype != np.uint8:
        raise ShapeError(f"video is {video.dtype} {video.shape}; the metrics need uint8 [T >= 1, {SIZE}, {SIZE}, 3]")
    frames = len(video)
    seen = locate(world, video)
    truth = resolve_open(world, seen.positions)
    scored = truth.visibility(frames) >= SCORED_VISIBILITY
    offset = toroidal_offset(seen.positions - truth.positions(frames))
    error = np.where(seen.found, np.hypot(offset[..., 0], offset[..., 1]), MISSING_PX)
    shapes = np.array([SHAPES.index(sprite.shape) for sprite in world.sprites])
    colours = np.array([COLOURS.index(sprite.colour) for sprite in world.sprites])
    missing = (scored & ~seen.found).any(1)
    motion = _motion(truth, seen, scored)
    unscored = lambda values: np.where(scored, values, np.nan)  # noqa: E731
    is_open = [index for index, sprite in enumerate(truth.sprites) if sprite.is_open]
    return WorldScores(
        position_error=unscored(error),
        shape_kept=unscored(seen.shape == shapes),
        colour_kept=unscored(seen.colour == colours),
        count_kept=(~missing & (seen.extra < EXTRA_SHARE)).astype(np.float64),
        psnr=_psnr(video, truth.render(frames)),
        saturation=_saturation(video),
        contrast=_contrast(video),
        chosen_motion=(truth.sprites[is_open[0]].direction, truth.sprites[is_open[0]].speed) if is_open else None,
        open_moved=bool(is_open) and motion["sprite_stopped"][is_open[0]] == 0,
        **motion,
    )


def resolve_open(world: World, positions: Floats) -> World:
    """The world with each open sprite's motion replaced by the allowed one nearest to `positions` [T, S, 2]."""
    sprites = list(world.sprites)
    for index, sprite in enumerate(sprites):
        there = np.isfinite(positions[:, index, 0])
        if not sprite.is_open or not there.any():
            continue
        motions = [(direction, speed) for direction in DIRECTIONS for speed in SPEEDS]
        velocity = np.array([motion_velocity(*motion) for motion in motions])
        allowed = np.array([sprite.x, sprite.y]) + velocity[:, None] * np.flatnonzero(there)[:, None]
        offset = toroidal_offset(positions[there, index] - allowed)
        nearest = int(np.hypot(offset[..., 0], offset[..., 1]).mean(1).argmin())
        sprites[index] = replace(sprite, direction=motions[nearest][0], speed=motions[nearest][1])
    return replace(world, sprites=tuple(sprites))


def _motion(truth: World, seen: Located, scored: NDArray[np.bool_]) -> dict[str, Floats]:
    """The fields of WorldScores about motion; a step counts where the sprite is scored and found in both its frames."""
    usable = scored & seen.found
    counted = usable[1:] & usable[:-1]
    steps = np.where(counted[..., None], toroidal_offset(np.diff(seen.positions, axis=0)), 0.0)
    velocity = np.array([sprite.velocity for sprite in truth.sprites])
    speed = np.hypot(velocity[:, 0], velocity[:, 1])
    along = np.cumsum((steps * velocity / speed[:, None]).sum(-1), 0)
    distance = np.cumsum(counted * speed, 0)
    ratio = np.full(scored.shape, np.nan)
    np.divide(along, distance, out=ratio[1:], where=distance > 0)
    stopped = np.full(scored.shape, np.nan)
    for frame in range(1, len(scored)):
        window = slice(max(0, frame - STOP_WINDOW), frame)
        stopped[frame] = _stopped(steps[window], counted[window] * speed)
    return {
        "motion_ratio": ratio,
        "stopped": stopped,
        "sprite_motion_ratio": ratio[-1],
        "sprite_stopped": _stopped(steps, counted * speed),
    }


def _stopped(steps: Floats, distance: Floats) -> Floats:
    """[S] 1 where the steps [T, S, 2] together cover less than STOP_RATIO of the distance [T, S]; NaN without steps."""
    moved, expected = np.hypot(*steps.sum(0).T), distance.sum(0)
    return np.where(expected > 0, moved < STOP_RATIO * expected, np.nan)


def _psnr(video: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Floats:
    error = ((video.astype(np.float32) - truth) ** 2).mean((1, 2, 3), dtype=np.float64)
    return np.minimum(MAX_PSNR, 10 * np.log10(255**2 / np.maximum(error, 1e-9)))


def _saturation(video: NDArray[np.uint8]) -> Floats:
    high, low = video.max(-1), video.min(-1)
    return ((high - low) / np.maximum(high, 1).astype(np.float32)).mean((1, 2), dtype=np.float64)


def _contrast(video: NDArray[np.uint8]) -> Floats:
    luma = video @ (np.array([0.299, 0.587, 0.114], np.float32) / 255)
    return luma.std((1, 2), dtype=np.float64)


def summarise(scores: list[WorldScores]) -> dict[str, Any]:
    """Means over worlds (each world counts once), ready for JSON; None where nothing was scored.

    `position_error_px` has a normal 95 % interval over worlds, `position_error_ci95_px` [low, high];
    `open_entropy_bits` is the entropy of the directions chosen by the open sprites that moved (at most 3 bits);
    `curves` holds one list a score, one number a frame.
    Raises: ShapeError without scores.
    """
    if not scores:
        raise ShapeError("summarise got no scores; it needs those of at least one world")
    errors = _per_world([s.position_error for s in scores])
    directions = Counter(s.chosen_motion[0] for s in scores if s.chosen_motion and s.open_moved)
    mean, half = _mean_and_interval(errors)
    names = ("position_error", "motion_ratio", "stopped", "shape_kept", "colour_kept", "count_kept", "psnr",
             "saturation", "contrast")  # fmt: skip
    return {
        "num_worlds": len(scores),
        "position_error_px": _number(mean),
        "position_error_ci95_px": [_number(mean - half), _number(mean + half)],
        "motion_ratio": _number(_nanmean(_per_world([s.sprite_motion_ratio for s in scores]))),
        "stop_rate": _number(_nanmean(_per_world([s.sprite_stopped for s in scores]))),
        "shape_kept": _number(_nanmean(_per_world([s.shape_kept for s in scores]))),
        "colour_kept": _number(_nanmean(_per_world([s.colour_kept for s in scores]))),
        "count_kept": _number(_nanmean(_per_world([s.count_kept for s in scores]))),
        "first_frame_psnr_db": _number(float(np.mean([s.first_frame_psnr for s in scores]))),
        "saturation": _number(_nanmean(_per_world([s.saturation for s in scores]))),
        "contrast": _number(_nanmean(_per_world([s.contrast for s in scores]))),
        "num_open_worlds": sum(s.chosen_motion is not None for s in scores),
        "num_open_moved": directions.total(),
        "open_entropy_bits": _entropy_bits(directions),
        "curves": {name: _curve([getattr(s, name) for s in scores]) for name in names},
    }


def _nanmean(values: NDArray[Any]) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if kept.size else math.nan


def _per_world(values: list[Floats]) -> Floats:
    return np.array([_nanmean(value) for value in values])


def _mean_and_interval(values: Floats) -> tuple[float, float]:
    kept = values[np.isfinite(values)]
    spread = float(kept.std(ddof=1)) if len(kept) > 1 else math.nan
    return _nanmean(kept), 1.96 * spread / math.sqrt(max(len(kept), 1))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _entropy_bits(counts: Counter[str]) -> float | None:
    total = counts.total()
    return sum(n / total * math.log2(total / n) for n in counts.values()) if total else None


def _curve(values: list[Floats]) -> list[float | None]:
    """Mean over the worlds that have the frame; a world's sprites are averaged first."""
    frames = max(len(value) for value in values)
    rows = np.full((len(values), frames), np.nan)
    for row, value in zip(rows, values):
        row[: len(value)] = [_nanmean(np.atleast_1d(frame)) for frame in value]
    return [_number(_nanmean(column)) for column in rows.T]
