"""Worlds whose caption changes half-way: `sample_story` is to worlds with switches what `sample_world` is to others.

What the captions say after a switch does not depend on when it happens, so a training run may choose other frames than
a data set was written with. This file must know no file format, no model and no metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from longtake.errors import ConfigError
from longtake.toy.captions import DIRECTIONS, SPEEDS, STILL, write_caption
from longtake.toy.world import OPEN_SHARE, Segment, Sprite, World, sample_world

STOP_SHARE = 0.3  # share of switches, where stops are asked for, at which one sprite stops


def sample_story(seed: int, index: int, switch_frames: Sequence[int], *, stops: bool = False) -> World:
    """World number `index` of `seed`, in which the caption changes at each of `switch_frames` (pixel frames).

    Up to the first switch it is `sample_world(seed, index)`. At a switch every sprite gets another motion: another
    direction, another speed, or both; the motion of one sprite may be left open, as in `sample_world`.
    Args: `stops` also lets sprites stop; the words for it are not in VOCABULARY (see `captions.py`).
    Raises: ConfigError unless the frames are above 0 and ascend.
    """
    frames = list(switch_frames)
    if any(frame <= before for before, frame in zip([0, *frames], frames)):
        raise ConfigError(f"switch frames {frames} must be above 0 and ascend; each is the first frame of its caption")
    world = sample_world(seed, index)
    segments: list[Segment] = []
    sprites = world.sprites
    for number, frame in enumerate(frames, start=1):
        # The spawn key keeps these numbers apart from those of `sample_world`.
        rng = np.random.default_rng(np.random.SeedSequence([seed, index], spawn_key=(number,)))
        sprites = _other_motions(sprites, rng, stops)
        segments.append(Segment(frame, sprites, write_caption([sprite.clause for sprite in sprites], rng)))
    return replace(world, switches=tuple(segments))


def _other_motions(sprites: tuple[Sprite, ...], rng: np.random.Generator, stops: bool) -> tuple[Sprite, ...]:
    """The sprites with new motions, drawn in the same number of steps whatever they were."""
    open_sprite = int(rng.integers(len(sprites))) if rng.random() < OPEN_SHARE else -1
    changed = []
    for number, sprite in enumerate(sprites):
        direction, speed = _other_motion(sprite, rng)
        changed.append(replace(sprite, direction=direction, speed=speed, is_open=number == open_sprite))
    if stops and rng.random() < STOP_SHARE:
        number = int(rng.integers(len(sprites)))
        if sprites[number].speed != STILL:
            changed[number] = replace(changed[number], speed=STILL, is_open=False)
    return tuple(changed)


def _other_motion(sprite: Sprite, rng: np.random.Generator) -> tuple[str, str]:
    """A direction, a speed or both, unlike those of `sprite`; a sprite that stands still gets any."""
    change = int(rng.integers(3))
    directions = [name for name in DIRECTIONS if name != sprite.direction]
    speeds = [name for name in SPEEDS if name != sprite.speed]
    direction = directions[int(rng.integers(len(directions)))]
    speed = speeds[int(rng.integers(len(speeds)))]
    if change == 0 and sprite.speed != STILL:
        return direction, sprite.speed
    return direction if change == 2 else sprite.direction, speed
