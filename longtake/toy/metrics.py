"""Exact scores of a video of the embedded world: pure functions of decoded pixels and the world's truth.

Everything is also a curve over time. A sprite that the truth shows less than half (others cover it) is not scored in
that frame: NaN. A sprite that the video does not show costs MISSING_PX there. This file must know no model.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.errors import ShapeError
from longtake.toy.locate import Located, locate
from longtake.toy.truth import (
    Floats,
    Truth,
    anchored_truth,
    counted_steps,
    nanmean,
    number,
    resolve_open,
    true_ways,
    what_is_kept,
)
from longtake.toy.windows import WindowRule, WindowScores, measure_windows, summarise_windows
from longtake.toy.world import SIZE, World, toroidal_offset

# Mean distance of a uniformly random position from the true one on the torus: SIZE (sqrt 2 + ln(1 + sqrt 2)) / 6.
MISSING_PX = SIZE * (math.sqrt(2) + math.asinh(1)) / 6
STOP_RATIO = 0.25  # a sprite that moves less than this share of the true distance has stopped
STOP_WINDOW = 8  # frames of the stop curve
MAX_PSNR = 100.0  # dB, of identical frames


@dataclass(frozen=True, eq=False)
class WorldScores:
    """Scores of one video with T frames of a world with S sprites; NaN = not scored.

    Fields, [T, S] unless said: `position_error` in pixels on the torus; `motion_ratio`, distance moved along the true
    direction since frame 0 / true distance; `stopped`, 1 where a sprite moved (whither ever) less than STOP_RATIO of
    the true distance in the last STOP_WINDOW frames; `shape_kept` and `colour_kept`, 0 or 1; `count_kept` [T];
    `psnr` [T] in dB against the true frame; `saturation` and `contrast` [T] in 0..1 (mean HSV saturation, standard
    deviation of the luma). `sprite_motion_ratio` and `sprite_stopped` [S] are those of the whole video.
    `chosen_motion` is the (direction, speed) nearest to the motion of the sprite that the first caption leaves open,
    None without such a sprite; `open_moved` is False when it stopped, so that its direction means nothing. `windows`
    are the scores window by window, where asked for.
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
    windows: WindowScores | None = None


def measure(world: World, video: NDArray[np.uint8], rule: WindowRule | None = None) -> WorldScores:
    """Scores of `video`, uint8 [T, SIZE, SIZE, 3], against the truth of `world`; with `rule` also window by window.

    An open motion is scored against the nearest (lowest mean error) of all directions and speeds from its start. After
    a switch a sprite should move by the new caption from where it is seen then (`anchored_truth`).
    Raises: ShapeError when the video has another shape or type.
    """
    if video.ndim != 4 or video.shape[1:] != (SIZE, SIZE, 3) or not len(video) or video.dtype != np.uint8:
        raise ShapeError(f"video is {video.dtype} {video.shape}; the metrics need uint8 [T >= 1, {SIZE}, {SIZE}, 3]")
    seen = locate(world, video)
    resolved = resolve_open(world, seen.positions)
    truth = anchored_truth(resolved, seen)
    offset = toroidal_offset(seen.positions - truth.positions)
    error = np.where(seen.found, np.hypot(offset[..., 0], offset[..., 1]), MISSING_PX)
    motion = _motion(resolved, seen, truth)
    saturation, contrast = _saturation(video), _contrast(video)
    chosen = next((k for k, sprite in enumerate(world.sprites) if sprite.is_open), None)
    return WorldScores(
        position_error=np.where(truth.scored, error, np.nan),
        psnr=_psnr(video, world.draw(truth.positions)),
        saturation=saturation,
        contrast=contrast,
        chosen_motion=None if chosen is None else (resolved.sprites[chosen].direction, resolved.sprites[chosen].speed),
        open_moved=chosen is not None and motion["sprite_stopped"][chosen] == 0,
        windows=None if rule is None else measure_windows(world, seen, saturation, contrast, rule),
        **motion,
        **what_is_kept(world, seen, truth),
    )


def _motion(world: World, seen: Located, truth: Truth) -> dict[str, Floats]:
    """The fields of WorldScores about motion."""
    steps, lengths = counted_steps(seen, truth)
    along, distance = np.cumsum(true_ways(steps, truth), 0), np.cumsum(lengths, 0)
    ratio = np.full(truth.scored.shape, np.nan)
    np.divide(along, distance, out=ratio[1:], where=distance > 0)
    starts = [segment.pivot for segment in world.segments if segment.pivot < len(steps)]
    stopped = np.full(truth.scored.shape, np.nan)
    for frame in range(1, len(ratio)):
        # A window does not reach over a switch: there and back is no stop.
        window = slice(max(frame - STOP_WINDOW, *(start for start in starts if start < frame), 0), frame)
        stopped[frame] = _stopped(steps[window], lengths[window], [0])
    return {
        "motion_ratio": ratio,
        "stopped": stopped,
        "sprite_motion_ratio": ratio[-1],
        "sprite_stopped": _stopped(steps, lengths, starts),
    }


def _stopped(steps: Floats, lengths: Floats, starts: list[int]) -> Floats:
    """[S] 1 where the steps [T, S, 2] cover less than STOP_RATIO of the true way; NaN without such a way.

    What counts as covered is the distance between the ends of each segment; those begin at the steps `starts`.
    """
    if not len(steps):
        return np.full(steps.shape[1], np.nan)
    ways = np.add.reduceat(steps, starts, 0)
    moved, expected = np.hypot(ways[..., 0], ways[..., 1]).sum(0), lengths.sum(0)
    return np.where(expected > 0, moved < STOP_RATIO * expected, np.nan)


def _psnr(video: NDArray[np.uint8], truth: NDArray[np.uint8]) -> Floats:
    error = ((video.astype(np.float32) - truth) ** 2).mean((1, 2, 3), dtype=np.float64)
    return np.minimum(MAX_PSNR, 10 * np.log10(255**2 / np.maximum(error, 1e-9)))


def _saturation(video: NDArray[np.uint8]) -> Floats:
    red, green, blue = np.moveaxis(video, -1, 0)  # numpy's own maximum over so short an axis takes ten times longer
    high, low = (edge(edge(red, green), blue) for edge in (np.maximum, np.minimum))
    return ((high - low) / np.maximum(high, 1).astype(np.float32)).mean((1, 2), dtype=np.float64)


def _contrast(video: NDArray[np.uint8]) -> Floats:
    luma = video @ (np.array([0.299, 0.587, 0.114], np.float32) / 255)
    return luma.std((1, 2), dtype=np.float64)


def summarise(scores: list[WorldScores]) -> dict[str, Any]:
    """Means over worlds (each world counts once), ready for JSON; None where nothing was scored.

    `position_error_px` has a normal 95 % interval over worlds, `position_error_ci95_px` [low, high];
    `open_entropy_bits` is the entropy of the directions chosen by the open sprites that moved (at most 3 bits), with a
    bootstrap 95 % interval over worlds, `open_entropy_ci95_bits`; `open_stop_rate` is the share that did not move;
    `curves` holds one list a score, one number a frame; `windows`, where measured, what `summarise_windows` gives.
    Raises: ShapeError without scores.
    """
    if not scores:
        raise ShapeError("summarise got no scores; it needs those of at least one world")
    chosen = [s.chosen_motion[0] for s in scores if s.chosen_motion and s.open_moved]
    directions = Counter(chosen)
    num_open = sum(s.chosen_motion is not None for s in scores)
    error, half = _mean_and_interval(_per_world(scores, "position_error"))
    windows = [s.windows for s in scores if s.windows is not None]
    kept, light = ("shape_kept", "colour_kept", "count_kept"), ("saturation", "contrast")
    means = {name: number(nanmean(_per_world(scores, name))) for name in (*kept, *light)}
    return {
        "num_worlds": len(scores),
        "position_error_px": number(error),
        "position_error_ci95_px": [number(error - half), number(error + half)],
        "motion_ratio": number(nanmean(_per_world(scores, "sprite_motion_ratio"))),
        "stop_rate": number(nanmean(_per_world(scores, "sprite_stopped"))),
        **means,
        "first_frame_psnr_db": number(float(np.mean([s.psnr[0] for s in scores]))),
        "num_open_worlds": num_open,
        "num_open_moved": directions.total(),
        "open_entropy_bits": _entropy_bits(directions),
        "open_entropy_ci95_bits": _entropy_interval(chosen),
        "open_stop_rate": 1 - directions.total() / num_open if num_open else None,
        "curves": {
            name: _curve([getattr(s, name) for s in scores])
            for name in ("position_error", "motion_ratio", "stopped", *kept, "psnr", *light)
        },
        **({"windows": summarise_windows(windows)} if len(windows) == len(scores) else {}),
    }


def _per_world(scores: list[WorldScores], name: str) -> Floats:
    return np.array([nanmean(getattr(s, name)) for s in scores])


def _mean_and_interval(values: Floats) -> tuple[float, float]:
    kept = values[np.isfinite(values)]
    spread = float(kept.std(ddof=1)) if len(kept) > 1 else math.nan
    return nanmean(kept), 1.96 * spread / math.sqrt(max(len(kept), 1))


def _entropy_bits(counts: Counter[str]) -> float | None:
    total = counts.total()
    return sum(n / total * math.log2(total / n) for n in counts.values()) if total else None


def _entropy_interval(chosen: list[str]) -> list[float] | None:
    """Percentiles 2.5 and 97.5 of the entropy of samples drawn with replacement, always the same ones."""
    if not chosen:
        return None
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(chosen), (1000, len(chosen)))
    entropies = [_entropy_bits(Counter(chosen[k] for k in row)) for row in drawn]
    return [float(value) for value in np.percentile(np.array(entropies), [2.5, 97.5])]


def _curve(values: list[Floats]) -> list[float | None]:
    """Mean over the worlds that have the frame; a world's sprites are averaged first."""
    frames = max(len(value) for value in values)
    rows = np.full((len(values), frames), np.nan)
    for row, value in zip(rows, values):
        row[: len(value)] = [nanmean(np.atleast_1d(frame)) for frame in value]
    return [number(nanmean(column)) for column in rows.T]
