"""The embedded world: sprites of known shape, colour and size that move at constant velocity on a torus.

`sample_world(seed, index)` is a pure function, and a world knows its true video for any length: the metrics of
`toy/metrics.py` are exact because of it. In a world with switches the caption and with it the velocities
change at given frames (`toy/story.py` samples such worlds). Pixel (row i, column j) has its centre at (x=j, y=i); x
runs to the right, y downwards, both modulo SIZE. This file must know no file format, no model and no metric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from longtake.toy.captions import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, STILL, Clause, pick, write_caption

SIZE = 64
FPS = 16
RADII = {"small": 5.0, "medium": 7.0, "large": 9.0}  # pixels
SPEED_PX = {"slow": 0.5, "medium": 1.0, "fast": 1.5, STILL: 0.0}  # pixels a frame, along the direction
PALETTE = {
    "red": (225, 40, 40),
    "yellow": (240, 215, 40),
    "green": (40, 175, 60),
    "cyan": (60, 215, 225),
    "blue": (50, 70, 225),
    "purple": (185, 50, 205),
}
OPEN_SHARE = 0.2  # share of worlds in which one sprite's motion is left open

# Distance from the centre to the outermost point, in radii. Areas are about equal for one size, but for the triangle.
REACH = {"circle": 1.0, "square": 0.887, "triangle": 1.35, "cross": 1.15}
CROSS_WIDTH = 0.42  # half the width of a cross's arms, in radii
_START_GAP = 1.0  # pixels between two sprites in the first frame


@dataclass(frozen=True)
class Sprite:
    """One sprite: its looks, where its centre starts (pixels), how it moves, and if the caption leaves that open."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    direction: str
    speed: str
    is_open: bool = False

    @property
    def radius(self) -> float:
        return RADII[self.size]

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels a frame (x, y)."""
        return motion_velocity(self.direction, self.speed)

    @property
    def clause(self) -> Clause:
        """What the caption says of it."""
        said = (None, None) if self.is_open else (self.direction if self.speed != STILL else None, self.speed)
        return Clause(self.size, self.shape, self.colour, *said)


@dataclass(frozen=True)
class Segment:
    """A caption of a world, and the motions that it names, one a sprite in the order of the world's.

    `frame` is the first pixel frame of the segment: the step from the frame before to it is already the new motion.
    Of `sprites` the motion alone counts (direction, speed, is_open); looks and start are the world's.
    """

    frame: int
    sprites: tuple[Sprite, ...]
    caption: str

    @property
    def pivot(self) -> int:
        """The frame that the motion starts from: the last one of the segment before (0 for the first segment)."""
        return max(self.frame - 1, 0)

    @property
    def velocity(self) -> NDArray[np.float64]:
        """[S, 2] pixels a frame."""
        return np.array([sprite.velocity for sprite in self.sprites])


@dataclass(frozen=True, eq=False)
class World:
    """One world. Sprites are drawn in the order of the list, a later one covers an earlier one.

    No two sprites of a world share a colour (stronger than "no two share shape and colour"): each pixel then belongs
    to one sprite at most, which makes the metrics exact. `switches` are the later segments, in the order of frames;
    without them the first caption holds for ever.
    """

    seed: int
    index: int
    sprites: tuple[Sprite, ...]
    caption: str
    background: NDArray[np.uint8]
    switches: tuple[Segment, ...] = ()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The first caption and those that follow."""
        return (Segment(0, self.sprites, self.caption), *self.switches)

    @cached_property
    def colours(self) -> NDArray[np.float32]:
        """[S, 3] RGB in 0..255."""
        return np.array([PALETTE[sprite.colour] for sprite in self.sprites], np.float32)

    def positions(self, num_frames: int, *, time_scale: float = 1.0, wrap: bool = True) -> NDArray[np.float64]:
        """[T, S, 2] centres (x, y) in pixels, in [0, SIZE) unless `wrap` is False; `time_scale` 0 freezes the world.

        Switches stay at their frames whatever `time_scale` is.
        """
        frames = np.arange(num_frames)
        centres = np.array([(sprite.x, sprite.y) for sprite in self.sprites])[None].repeat(num_frames, 0)
        segments = self.segments
        for segment, following in zip(segments, (*segments[1:], None)):
            elapsed = np.maximum(frames - segment.pivot, 0)
            if following is not None:
                elapsed = np.minimum(elapsed, following.pivot - segment.pivot)
            centres = centres + segment.velocity * (time_scale * elapsed)[:, None, None]
        return centres % SIZE if wrap else centres

    def render(self, num_frames: int, *, time_scale: float = 1.0) -> NDArray[np.uint8]:
        """The true video, uint8 [T, SIZE, SIZE, 3]; `time_scale` 0 gives a frozen one, 0.5 one at half the speed."""
        return self.draw(self.positions(num_frames, time_scale=time_scale))

    def draw(self, centres: NDArray[np.float64]) -> NDArray[np.uint8]:
        """uint8 [T, SIZE, SIZE, 3]: the sprites at `centres` [T, S, 2] (wrapped)."""
        video = np.repeat(self.background[None], len(centres), axis=0)
        flat = video.reshape(-1, 3)
        for sprite, centre, colour in zip(self.sprites, centres.swapaxes(0, 1), self.colours):
            where, mask = sprite_mask(sprite.shape, sprite.radius, centre)
            where, mask = where[mask > 0], mask[mask > 0, None]
            under = flat[where].astype(np.float32)
            flat[where] = (under + (colour - under) * mask + 0.5).astype(np.uint8)
        return video

    def visibility(self, centres: NDArray[np.float64]) -> NDArray[np.float64]:
        """[T, S] share of each sprite's area that no later sprite covers, of sprites at `centres` [T, S, 2]."""
        free = np.ones(len(centres) * SIZE * SIZE, np.float32)
        visible = np.ones(centres.shape[:2])
        for index in reversed(range(len(self.sprites))):
            sprite = self.sprites[index]
            where, mask = sprite_mask(sprite.shape, sprite.radius, centres[:, index])
            visible[:, index] = (mask * free[where]).sum((1, 2)) / mask.sum((1, 2))
            free[where] *= 1 - mask
        return visible

    def shifted(self, dx: float, dy: float) -> World:
        """The same world with every sprite moved by (dx, dy) pixels; background and captions stay."""
        moved = tuple(replace(s, x=(s.x + dx) % SIZE, y=(s.y + dy) % SIZE) for s in self.sprites)
        return replace(self, sprites=moved)


def motion_velocity(direction: str, speed: str) -> tuple[float, float]:
    """Pixels a frame (x, y) of a named motion; diagonals have the same magnitude as the others."""
    x, y = DIRECTIONS[direction]
    pixels = SPEED_PX[speed] / math.hypot(x, y)
    return x * pixels, y * pixels


def sprite_reach(shape: str, radius: float) -> float:
    """Pixels from the centre to the outermost point."""
    return REACH[shape] * radius * (math.sqrt(2) if shape == "square" else 1.0)


def sprite_patch(
    shape: str, radius: float, centres: NDArray[np.floating], *, margin: int = 1
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float32]]:
    """The square patch of P x P pixels around one sprite in each of T frames.

    Args: `centres` [T, 2] (x, y) in pixels, any value (wrapped); `margin` in pixels, kept free around the sprite.
    Returns `(where, dx, dy)`: [T, P, P] indices into the flattened pixels [T * SIZE * SIZE], and the offsets of those
    pixels from the centre, [T, 1, P] and [T, P, 1].
    """
    return square_patch(math.ceil(sprite_reach(shape, radius)) + margin, centres)


def square_patch(
    half: int, centres: NDArray[np.floating]
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float32]]:
    """The same of a patch that reaches `half` pixels from its middle."""
    nearest = np.rint(centres).astype(np.intp)
    offsets = np.arange(-half, half + 1)
    columns, rows = ((nearest[:, axis, None] + offsets) % SIZE for axis in (0, 1))
    frames = np.arange(len(centres), dtype=np.intp)[:, None, None] * (SIZE * SIZE)
    where = frames + rows[:, :, None] * SIZE + columns[:, None, :]
    dx, dy = ((offsets - (centres - nearest)[:, axis, None]).astype(np.float32) for axis in (0, 1))
    return where, dx[:, None, :], dy[:, :, None]


def sprite_mask(
    shape: str, radius: float, centres: NDArray[np.floating]
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """`(where, mask)` of one sprite in T frames: indices as in `sprite_patch`, and coverage in 0..1, both [T, P, P]."""
    where, dx, dy = sprite_patch(shape, radius, centres)
    return where, coverage(shape, radius, dx, dy)


def coverage(shape: str, radius: float, dx: NDArray[np.float32], dy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Coverage 0..1 of pixels at (dx, dy) from the centre: the signed distance to the outline, as a one-pixel ramp."""
    size = np.float32(REACH[shape] * radius)
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - size
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - size
    elif shape == "triangle":
        distance = np.maximum(dy, np.float32(math.sqrt(0.75)) * np.abs(dx) - dy / 2) - size / 2
    else:
        width = np.float32(CROSS_WIDTH * radius)
        ax, ay = np.abs(dx), np.abs(dy)
        distance = np.minimum(np.maximum(ax - size, ay - width), np.maximum(ax - width, ay - size))
    return np.clip(np.float32(0.5) - distance, 0, 1)


def sample_world(seed: int, index: int) -> World:
    """World number `index` of the endless list named `seed`, always the same one."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    number = int(rng.integers(1, 4))
    colours = rng.permutation(len(COLOURS))[:number]
    open_sprite = int(rng.integers(number)) if rng.random() < OPEN_SHARE else -1
    kinds = [(pick(SHAPES, rng), COLOURS[c], pick(SIZES, rng)) for c in colours]
    starts = _sample_starts([sprite_reach(shape, RADII[size]) for shape, _, size in kinds], rng)
    sprites = tuple(
        Sprite(*kind, x=float(x), y=float(y), direction=pick(tuple(DIRECTIONS), rng), speed=pick(SPEEDS, rng),
               is_open=position == open_sprite)
        for position, (kind, (x, y)) in enumerate(zip(kinds, starts))
    )  # fmt: skip
    caption = write_caption([sprite.clause for sprite in sprites], rng)
    return World(seed, index, sprites, caption, _sample_background(rng))


def toroidal_offset(offset: NDArray[np.float64]) -> NDArray[np.float64]:
    """The shortest equivalent of an offset in pixels on the torus, each component in [-SIZE/2, SIZE/2)."""
    return (offset + SIZE / 2) % SIZE - SIZE / 2


def _sample_starts(reaches: list[float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Start centres [S, 2] such that the first frame shows every sprite whole."""
    needed = np.add.outer(reaches, reaches) + _START_GAP
    np.fill_diagonal(needed, 0)
    while True:
        starts = rng.random((len(reaches), 2)) * SIZE
        offsets = toroidal_offset(starts[:, None] - starts[None])
        if (np.hypot(offsets[..., 0], offsets[..., 1]) >= needed).all():
            return starts


def _sample_background(rng: np.random.Generator) -> NDArray[np.uint8]:
    """A smooth grey texture of low contrast and low saturation, far from every sprite colour."""
    grey = rng.uniform(105, 150)
    tint = rng.uniform(-7, 7, 3)
    frequency = rng.uniform(0.5, 2.5, (3, 2)) * rng.choice((-1, 1), (3, 2)) * (2 * np.pi / SIZE)
    phase = rng.uniform(0, 2 * np.pi, 3)
    amplitude = rng.uniform(3, 6, (3, 1)) + rng.uniform(-1.5, 1.5, (3, 3))  # wave, channel
    axis = np.arange(SIZE)
    waves = np.cos(
        frequency[:, 0, None, None] * axis + frequency[:, 1, None, None] * axis[:, None] + phase[:, None, None]
    )
    return np.rint(grey + tint + np.einsum("whv,wc->hvc", waves, amplitude)).astype(np.uint8)
