"""Where the sprites of a world should be, given where they were seen: open motions resolved, drift not blamed twice.

What went wrong before a switch of the caption is not counted after it: there a sprite should move by the new caption
from where it *is*. This file must know no model and no mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from longtake.toy.captions import COLOURS, DIRECTIONS, SHAPES, SPEEDS, STILL
from longtake.toy.locate import EXTRA_SHARE, Located
from longtake.toy.world import SIZE, Sprite, World, motion_velocity, toroidal_offset

SCORED_VISIBILITY = 0.5
MAX_GAP = 16  # frames; over a longer gap the shortest way on the torus may be the wrong one for the fastest sprite
_MOTIONS = tuple((direction, speed) for direction in DIRECTIONS for speed in SPEEDS)
_VELOCITIES = np.array([motion_velocity(*motion) for motion in _MOTIONS])

Floats = NDArray[np.float64]
Motion = tuple[str, str]  # direction and speed


@dataclass(frozen=True, eq=False)
class Truth:
    """What T frames of S sprites are held against.

    Fields: `positions` [T, S, 2] in pixels, in [0, SIZE); `velocity` [T, S, 2] of the step that leads into each frame;
    `scored` [T, S], where at least half of a sprite is to be seen.
    """

    positions: Floats
    velocity: Floats
    scored: NDArray[np.bool_]


def anchored_truth(world: World, seen: Located) -> Truth:
    """The truth of a world without open motions (see `resolve_open`): its true course, anchored at each switch.

    From a switch on a sprite moves by the new caption from where it was seen in the last frame before. One that was not
    seen in that frame is taken to have moved by the caption since it was seen last.
    """
    positions = world.positions(len(seen.positions))
    drift = _drift(world, seen)
    for segment, following in zip(world.switches, (*world.switches[1:], None)):
        if segment.frame < len(positions):
            positions[segment.frame : following.frame if following else None] += drift[segment.pivot]
    return _truth(world, positions % SIZE)


def tracked_truth(world: World, seen: Located) -> Truth:
    """The same with each sprite where it was last seen, moved on by the caption: says what is to be seen of it.

    A sprite that drifts is so held against its own surroundings: it may be hidden where the true one is not.
    """
    return _truth(world, (world.positions(len(seen.positions)) + _drift(world, seen)) % SIZE)


def _truth(world: World, positions: Floats) -> Truth:
    velocity = np.empty_like(positions)
    for segment in world.segments:
        velocity[segment.frame :] = segment.velocity
    return Truth(positions, velocity, world.visibility(positions) >= SCORED_VISIBILITY)


def _drift(world: World, seen: Located) -> Floats:
    """[T, S, 2] pixels from the true course to where each sprite was last seen; 0 before it was first seen."""
    frames = np.arange(len(seen.positions))
    drift = np.where(seen.found[..., None], toroidal_offset(seen.positions - world.positions(len(frames))), 0.0)
    last = np.maximum.accumulate(np.where(seen.found, frames[:, None], 0), 0)
    return np.take_along_axis(drift, last[..., None], 0)


def resolve_open(world: World, positions: Floats, *, num_frames: int | None = None, settle: int = 0) -> World:
    """The world with each open motion replaced by the allowed one that is nearest to `positions` [T, S, 2].

    Nearest is, from the given picture on, the lowest mean error; after a switch, when the start is not known exactly,
    the measured velocity (`motion_window`). Args: `num_frames` of a segment that count (default: all), `settle` frames
    after a switch that do not. A sprite that is not seen keeps the motion that it was drawn with.
    """
    switches = []
    for number, segment in enumerate(world.switches, start=1):
        window = motion_window(world, number, len(positions), num_frames=num_frames, settle=settle)
        sprites = tuple(
            _with_motion(sprite, nearest_motion(measured_velocity(positions[window, k]), still=False))
            for k, sprite in enumerate(segment.sprites)
        )
        switches.append(replace(segment, sprites=sprites))
    end = min(world.switches[0].frame if world.switches else len(positions), num_frames or len(positions))
    first = (_with_motion(s, _nearest_course(s, positions[:end, k])) for k, s in enumerate(world.sprites))
    return replace(world, sprites=tuple(first), switches=tuple(switches))


def motion_window(world: World, number: int, total: int, *, num_frames: int | None = None, settle: int = 0) -> slice:
    """The frames from which the motion of segment `number` is measured, in a video of `total` frames.

    They begin `settle` frames after the frame that the motion starts from, and end with the segment or after
    `num_frames`.
    """
    segments = world.segments
    start = segments[number].pivot + settle
    end = segments[number + 1].pivot + 1 if number + 1 < len(segments) else total
    return slice(start, min(end, total) if num_frames is None else min(end, total, start + num_frames))


def measured_velocity(positions: Floats) -> Floats | None:
    """Pixels a frame (x, y) of one sprite at `positions` [T, 2], NaN where it was not seen; None without a step.

    It is the way between the frames in which it was seen, gaps of up to MAX_GAP frames included, over their number.
    """
    there = np.flatnonzero(np.isfinite(positions[:, 0]))
    gaps = np.diff(there)
    steps = toroidal_offset(np.diff(positions[there], axis=0))[gaps <= MAX_GAP]
    return steps.sum(0) / gaps[gaps <= MAX_GAP].sum() if len(steps) else None


def nearest_motion(velocity: Floats | None, *, still: bool = True) -> Motion | None:
    """The allowed (direction, speed) nearest to a velocity in pixels a frame; None stays None.

    With `still` also standing still is one, as ("", STILL).
    """
    if velocity is None:
        return None
    distance = np.hypot(*(_VELOCITIES - velocity).T)
    if still and np.hypot(*velocity) <= distance.min():
        return "", STILL
    return _MOTIONS[int(distance.argmin())]


def _nearest_course(sprite: Sprite, positions: Floats) -> Motion | None:
    """The allowed motion whose course from the sprite's start has the lowest mean distance to `positions` [T, 2]."""
    there = np.isfinite(positions[:, 0])
    if not there.any():
        return None
    allowed = np.array([sprite.x, sprite.y]) + _VELOCITIES[:, None] * np.flatnonzero(there)[:, None]
    offset = toroidal_offset(positions[there] - allowed)
    return _MOTIONS[int(np.hypot(offset[..., 0], offset[..., 1]).mean(1).argmin())]


def _with_motion(sprite: Sprite, motion: Motion | None) -> Sprite:
    """An open sprite with this motion, where there is one; another sprite as it is."""
    if not sprite.is_open or motion is None:
        return sprite
    return replace(sprite, direction=motion[0], speed=motion[1])


def what_is_kept(world: World, seen: Located, truth: Truth) -> dict[str, Floats]:
    """`shape_kept` and `colour_kept` [T, S] of each sprite, and `count_kept` [T]: 0 or 1 in each frame, NaN where not
    scored.
    """
    shapes = np.array([SHAPES.index(sprite.shape) for sprite in world.sprites])
    colours = np.array([COLOURS.index(sprite.colour) for sprite in world.sprites])
    missing = (truth.scored & ~seen.found).any(1)
    return {
        "shape_kept": np.where(truth.scored, seen.shape == shapes, np.nan),
        "colour_kept": np.where(truth.scored, seen.colour == colours, np.nan),
        "count_kept": (~missing & (seen.extra < EXTRA_SHARE)).astype(np.float64),
    }


def lost(seen: Located, truth: Truth) -> Floats:
    """[T, S] 1 where a sprite should be seen and is not found, 0 where it is found, NaN where it is not scored."""
    return np.where(truth.scored, ~seen.found, np.nan)


def counted_steps(seen: Located, truth: Truth) -> tuple[Floats, Floats]:
    """Steps [T - 1, S, 2] in pixels on the torus, and their true lengths [T - 1, S].

    A step counts where the sprite is scored and found in both its frames; others are 0 in both.
    """
    usable = truth.scored & seen.found
    counted = usable[1:] & usable[:-1]
    steps = np.where(counted[..., None], toroidal_offset(np.diff(seen.positions, axis=0)), 0.0)
    return steps, np.where(counted, np.hypot(truth.velocity[1:, :, 0], truth.velocity[1:, :, 1]), 0.0)


def true_ways(steps: Floats, truth: Truth) -> Floats:
    """[T - 1, S] the part of each step along the true direction, in pixels; 0 where the sprite should stand still."""
    velocity = truth.velocity[1:]
    speed = np.hypot(velocity[..., 0], velocity[..., 1])
    return np.divide((steps * velocity).sum(-1), speed, out=np.zeros_like(speed), where=speed > 0)


def nanmean(values: Floats) -> float:
    """The mean of the finite values, NaN without any and without a warning."""
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if kept.size else math.nan


def number(value: float) -> float | None:
    """A number for JSON, None in place of NaN."""
    return float(value) if math.isfinite(value) else None
