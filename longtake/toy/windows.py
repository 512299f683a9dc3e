"""Scores of a long video window by window, and of what sprites do after a switch of the caption.

Pure functions of the world's truth and of what was seen. A window is as long as the teacher's clips and shares its
first frame with the window before. What is to be seen of a sprite follows from where the sprites *are*
(`tracked_truth`), so that a drift of earlier windows is not blamed again. This file must know no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from longtake.errors import ShapeError
from longtake.toy import truth as true
from longtake.toy.captions import STILL
from longtake.toy.locate import Located
from longtake.toy.truth import Floats, Truth, nanmean, number
from longtake.toy.world import World

MIN_STEPS = 8  # frames in which a sprite must be due for its motion in a window to be measured


@dataclass(frozen=True)
class WindowRule:
    """Pixel frames of a window (those of the teacher's clips), and frames a sprite has to obey a new caption."""

    num_frames: int
    settle_frames: int

    def __post_init__(self) -> None:
        if self.num_frames < 2 or self.settle_frames < 0:
            raise ShapeError(
                f"a window of {self.num_frames} frames that begins {self.settle_frames} frames after a switch cannot "
                "be measured; it needs 2 frames or more, and 0 or more after the switch"
            )

    def starts(self, total: int) -> list[int]:
        """First frames of the whole windows in a video of `total` frames; a rest at its end is in none."""
        return list(range(0, total - self.num_frames + 1, self.num_frames - 1))


@dataclass(frozen=True, eq=False)
class WindowScores:
    """Scores of one video in W windows, S sprites and K switches; NaN = not scored.

    Fields: `motion_ratio` [W, S], distance moved along the true direction / true distance, over the steps between
    frames in which the sprite is due and found; NaN below MIN_STEPS steps. `shape_kept`, `colour_kept`, `count_kept`
    [W], shares of the frames after the window's first. `saturation`, `contrast` [W], means of those frames.
    `lost` [W], of the sprites that are to be seen, the share that is not found. `follows` [K, S], 1 where a sprite
    moves as the new caption says, see `follow_switch`; `after_...` [K], the shares in the window that begins with the
    switch.
    """

    motion_ratio: Floats
    shape_kept: Floats
    colour_kept: Floats
    count_kept: Floats
    saturation: Floats
    contrast: Floats
    follows: Floats
    lost: Floats
    after_shape_kept: Floats
    after_colour_kept: Floats
    after_count_kept: Floats


def measure_windows(
    world: World, seen: Located, saturation: Floats, contrast: Floats, rule: WindowRule
) -> WindowScores:
    """Scores of the windows of a video in which `seen` was located, with its saturation and contrast [T].

    An open motion is that of its segment's first window: later windows are held to the same one.
    """
    world = true.resolve_open(world, seen.positions, num_frames=rule.num_frames, settle=rule.settle_frames)
    truth = true.tracked_truth(world, seen)
    steps, distance = true.counted_steps(seen, truth)
    along = true.true_ways(steps, truth)
    # Of steps; step t leads into frame t + 1.
    spans = [slice(start, start + rule.num_frames - 1) for start in rule.starts(len(seen.positions))]
    kept = true.what_is_kept(world, seen, truth)
    curves = kept | {"saturation": saturation, "contrast": contrast, "lost": true.lost(seen, truth)}
    after = [slice(segment.frame, segment.frame + rule.num_frames) for segment in world.switches]
    switches, sprites = range(len(world.switches)), len(world.sprites)
    return WindowScores(
        motion_ratio=np.array([_ratio(along[span], distance[span]) for span in spans]).reshape(len(spans), sprites),
        follows=np.array([follow_switch(world, seen, truth, k + 1, rule) for k in switches]).reshape(-1, sprites),
        **{name: np.array([nanmean(values[1:][span]) for span in spans]) for name, values in curves.items()},
        **{f"after_{name}": np.array([nanmean(values[span]) for span in after]) for name, values in kept.items()},
    )


def follow_switch(world: World, seen: Located, truth: Truth, number: int, rule: WindowRule) -> Floats:
    """[S] 1 where a sprite moves as segment `number` of the world says, 0 where not, NaN where that cannot be told.

    Its velocity is measured from its located positions over a window that begins `settle_frames` after the switch and
    ends after `num_frames`, with the segment or with the video. It follows when, of all directions and speeds and of
    standing still, the motion nearest to this velocity is the caption's; when the caption leaves the motion open, any
    but standing still. A sprite that is due in fewer than MIN_STEPS frames of the window (covered, or the video ends)
    is not scored; one that is found in less than half of the frames in which it is due does not follow.
    """
    window = true.motion_window(
        world, number, len(seen.positions), num_frames=rule.num_frames, settle=rule.settle_frames
    )
    due = truth.scored[window]
    found = due & seen.found[window]
    follows = np.full(len(world.sprites), np.nan)
    for index, sprite in enumerate(world.segments[number].sprites):
        if due[:, index].sum() <= MIN_STEPS:
            continue
        motion = true.nearest_motion(true.measured_velocity(seen.positions[window, index]))
        told = ("", STILL) if sprite.speed == STILL else (sprite.direction, sprite.speed)
        obeys = motion is not None and (motion[1] != STILL if sprite.is_open else motion == told)
        follows[index] = obeys and found[:, index].sum() >= due[:, index].sum() / 2
    return follows


def summarise_windows(scores: list[WindowScores]) -> dict[str, Any]:
    """Means over worlds, ready for JSON; None where nothing was scored.

    `motion_ratio` and the `kept` shares of each window are means over worlds, each world the mean of its sprites;
    `saturation` and `contrast` are relative to the first window's. `follow_share` is the share of all scored sprites
    that follow a switch, `num_followers` their number, and `follow_shares` the same switch by switch; `lost` is the
    share of sprites that are to be seen and not found.
    Raises: ShapeError unless all videos have as many windows and switches.
    """
    shapes = {(len(s.count_kept), len(s.follows)) for s in scores}
    if len(shapes) != 1:
        raise ShapeError(f"window scores of {sorted(shapes)} windows and switches cannot be averaged; they must agree")
    columns = {
        "motion_ratio": [np.array([nanmean(window) for window in s.motion_ratio]) for s in scores],
        **{name: [getattr(s, name) for s in scores] for name in ("shape_kept", "colour_kept", "count_kept", "lost")},
    }
    brightness = {name: np.array([getattr(s, name) for s in scores]).mean(0) for name in ("saturation", "contrast")}
    follows = [np.concatenate(switch) for switch in zip(*(s.follows for s in scores))]
    everyone = np.concatenate([*follows, []])
    return {
        **{name: [number(nanmean(column)) for column in np.array(rows).T] for name, rows in columns.items()},
        **{name: [number(v / m[0]) if m[0] > 0 else None for v in m] for name, m in brightness.items()},
        "follow_share": number(nanmean(everyone)),
        "num_followers": int(np.isfinite(everyone).sum()),
        "follow_shares": [number(nanmean(switch)) for switch in follows],
    }


def _ratio(along: Floats, distance: Floats) -> Floats:
    """[S] of steps [N, S]; NaN where a sprite has fewer than MIN_STEPS."""
    enough = (distance > 0).sum(0) >= MIN_STEPS
    return np.divide(along.sum(0), distance.sum(0), out=np.full(along.shape[1], np.nan), where=enough)
