"""Finds the sprites of a world in decoded pixels: where each one is, what shape it has, and what else is there.

Every function works on all frames of a video at once. Sprites are looked for by the colour that the world gives them
(no two share one), first on whole pixels by template matching on the torus, then to a small part of a pixel by fitting
the renderer itself to the video, so that occlusion and wrapping are exact. This file must know no score.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from longtake.toy.captions import COLOURS, SHAPES
from longtake.toy.world import (
    PALETTE,
    RADII,
    SIZE,
    World,
    coverage,
    sprite_mask,
    sprite_patch,
    sprite_reach,
    square_patch,
)

COLOUR_SPREAD = 35.0  # levels of 255; how far a pixel may be from a colour and still belong to it
FOUND_SHARE = 0.2  # a sprite is found when this share of its area shows its colour
PRESENT_SHARE = 0.08  # a sprite of which less is seen cannot be located, but from here on it explains what is seen
EXTRA_SHARE = 0.4  # unexplained colour, in areas of the smallest sprite, that counts as one more sprite
_EXTRA_BOX = 9  # pixels, side of the box in which unexplained colour is summed
_FIT_STEPS = 12
_FIT_TOLERANCE = 0.001  # pixels; a frame is done when none of its sprites moves more
_FIT_BLUR = 0.75  # pixels, half the baseline of the template's derivative
_FIT_OUTLIER = 60.0  # levels of 255, scale of the robust weights
_CHUNK_FRAMES = 32  # looked at together: as many as the processor's caches hold
_SHAPE_STEP, _SHAPE_REACH = 0.5, 1.0  # pixels, grid of the search over shapes
_SHAPE_BLURS = (0.0, 1.0, 2.0)  # pixels, standard deviations: a decoder blurs, and a blurred square is no circle


@dataclass(frozen=True)
class Located:
    """What was seen in T frames of a world with S sprites.

    Fields: `positions` [T, S, 2] centres (x, y) in pixels, NaN where the sprite was not found; `shape` [T, S] index
    into SHAPES and `colour` [T, S] index into COLOURS, -1 where not found or background; `extra` [T] colour that no
    sprite explains, in areas of the smallest sprite.
    """

    positions: NDArray[np.float64]
    shape: NDArray[np.intp]
    colour: NDArray[np.intp]
    extra: NDArray[np.float64]

    @property
    def found(self) -> NDArray[np.bool_]:
        """[T, S] whether the sprite was found."""
        return np.isfinite(self.positions[..., 0])


def locate(world: World, video: NDArray[np.uint8]) -> Located:
    """Finds every sprite of `world` in `video`, uint8 [T, SIZE, SIZE, 3]; each frame is looked at by itself."""
    starts = range(0, len(video), _CHUNK_FRAMES)
    parts = [_Search(world, video[start : start + _CHUNK_FRAMES]).located() for start in starts]
    return Located(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Located)))


class _Search:
    """The search in T frames of a world with S sprites.

    Fields: `planes` [3, T * SIZE * SIZE] RGB of the video, `background` [3, SIZE * SIZE] of the world; `member`
    [C + 1, T, SIZE, SIZE] how much each pixel belongs to each colour of COLOURS, and last to the background;
    `positions` [T, S, 2]; `share` [T, S] of each sprite's area that shows its colour; `masks`, for each sprite its
    coverage as drawn at its position, flat [T * SIZE * SIZE], zero in frames where too little of it is seen.
    """

    def __init__(self, world: World, video: NDArray[np.uint8]) -> None:
        self.world, self.sprites = world, world.sprites
        self.planes = np.ascontiguousarray(video.reshape(-1, 3).T).astype(np.float32)
        self.background = np.ascontiguousarray(world.background.reshape(-1, 3).T).astype(np.float32)
        self.member = self._membership().reshape(-1, *video.shape[:3])
        self.positions, self.share = self._coarse_positions()
        self.masks = [np.zeros(self.planes.shape[1], np.float32) for _ in self.sprites]

    def located(self) -> Located:
        """What is found."""
        self._fit()
        found = self.share >= FOUND_SHARE
        indices = range(len(self.sprites))
        shape, colour = (np.stack([look(k) for k in indices], 1) for look in (self._best_shape, self._mean_colour))
        return Located(
            np.where(found[..., None], self.positions % SIZE, np.nan),
            np.where(found, shape, -1),
            np.where(found, colour, -1),
            self._unexplained(),
        )

    def _membership(self) -> NDArray[np.float32]:
        palette = np.array([PALETTE[colour] for colour in COLOURS], np.float32)
        # Squared distances without the pixel's own square, which is in all of them. Whole numbers below 2^24: exact.
        distance = np.empty((len(COLOURS) + 1, self.planes.shape[1]), np.float32)
        np.matmul(-2 * palette, self.planes, out=distance[:-1])
        distance[:-1] += (palette * palette).sum(1)[:, None]
        by_frame = self.planes.reshape(3, -1, SIZE * SIZE)
        own = distance[-1].reshape(by_frame.shape[1:])
        np.multiply(by_frame[0], -2 * self.background[0], out=own)
        for channel in (1, 2):
            own -= by_frame[channel] * (2 * self.background[channel])
        own += (self.background * self.background).sum(0)
        distance -= distance.min(0)
        distance *= np.float32(-0.5 / COLOUR_SPREAD**2)
        member = np.exp(distance, out=distance)
        member /= member.sum(0)
        return member

    def _coarse_positions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Whole-pixel centres of least squared difference to the template, and the shares of colour there."""
        own = [self.member[COLOURS.index(sprite.colour)] for sprite in self.sprites]
        frames = len(own[0])
        positions = np.zeros((frames, len(own), 2))
        share = np.zeros((frames, len(own)))
        for index, (sprite, seen) in enumerate(zip(self.sprites, own)):
            # Pixels that a sprite in front has taken say nothing about this one.
            free = 1 - sum(own[index + 1 :], np.zeros_like(seen))
            template, squared = _template_spectra(sprite.shape, sprite.radius)
            free_spectrum, seen_spectrum = np.fft.rfft2(free), np.fft.rfft2(free * seen)
            cost = np.fft.irfft2(free_spectrum * squared - 2 * seen_spectrum * template, s=(SIZE, SIZE))
            rows, columns = np.divmod(cost.reshape(frames, -1).argmin(1), SIZE)
            positions[:, index] = np.stack([columns, rows], 1)
            where, mask = sprite_mask(sprite.shape, sprite.radius, positions[:, index])
            shown = ((free * seen).reshape(-1)[where] * mask).sum((1, 2))
            share[:, index] = shown / mask.sum((1, 2))
        return positions, share

    def _fit(self) -> None:
        """Moves the positions to where the renderer reproduces the video best, and draws the masks there.

        Gauss-Newton, one sprite after another with the others held, robust to pixels that the renderer cannot explain.
        A frame is done when none of its sprites moves any more.
        """
        present = self.share >= PRESENT_SHARE
        active = np.arange(len(self.positions))
        for index in range(len(self.sprites)):
            self._draw_mask(index, active, present)
        for _ in range(_FIT_STEPS):
            largest = np.zeros(len(active))
            for index in range(len(self.sprites)):
                step = self._step(index, active) * present[active, index, None]
                self.positions[active, index] += step
                self._draw_mask(index, active, present)
                largest = np.maximum(largest, np.abs(step).max(1))
            active = active[largest >= _FIT_TOLERANCE]
            if not len(active):
                break

    def _draw_mask(self, index: int, active: NDArray[np.intp], present: NDArray[np.bool_]) -> None:
        """Coverage of one sprite in the `active` frames, at its position."""
        sprite = self.sprites[index]
        self.masks[index].reshape(-1, SIZE * SIZE)[active] = 0
        where, own = sprite_mask(sprite.shape, sprite.radius, self.positions[active, index])
        self.masks[index][where + _skipped(active)] = own * present[active, index, None, None]

    def _step(self, index: int, active: NDArray[np.intp]) -> NDArray[np.float64]:
        """[T, 2] pixels by which a sprite should move in the `active` frames, at most one along each axis."""
        sprite = self.sprites[index]
        where, dx, dy = sprite_patch(sprite.shape, sprite.radius, self.positions[active, index], margin=2)
        where += _skipped(active)
        own = coverage(sprite.shape, sprite.radius, dx, dy)
        under, through = self._layers(index, where)
        contrast = self.world.colours[index][:, None, None, None] - under
        in_front = range(index + 1, len(self.masks))
        shown = self._draw(under + contrast * own, in_front, where)
        contrast *= through
        residual = self.planes.take(where, 1) - shown
        weight = (1 + _dot(residual, residual) / np.float32(_FIT_OUTLIER**2)) ** -2
        slopes = [
            coverage(sprite.shape, sprite.radius, dx - sx, dy - sy)
            - coverage(sprite.shape, sprite.radius, dx + sx, dy + sy)
            for sx, sy in ((np.float32(_FIT_BLUR), np.float32(0)), (np.float32(0), np.float32(_FIT_BLUR)))
        ]
        return _newton_step(slopes, weight * _dot(contrast, contrast), weight * _dot(contrast, residual))

    def _layers(self, index: int, where: NDArray[np.intp]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What lies under a sprite at pixels `where` (RGB first), and the share that sprites in front let through."""
        under = self._draw(self.background.take(where % (SIZE * SIZE), 1), range(index), where)
        through = np.ones(where.shape, np.float32)
        for mask in self.masks[index + 1 :]:
            through *= 1 - mask.take(where)
        return under, through

    def _draw(self, colour: NDArray[np.float32], sprites: range, where: NDArray[np.intp]) -> NDArray[np.float32]:
        """Draws `sprites` over `colour` [3, ...], in place."""
        for sprite in sprites:
            colour += (self.world.colours[sprite][:, None, None, None] - colour) * self.masks[sprite].take(where)
        return colour

    def _best_shape(self, index: int) -> NDArray[np.intp]:
        """[T] index into SHAPES of the silhouette that explains a sprite best, near its position, at its size."""
        half, dictionary, squares = _silhouettes(self.sprites[index].radius)
        where, _, _ = square_patch(half, self.positions[:, index])
        under, through = self._layers(index, where)
        contrast = self.world.colours[index][:, None, None, None] - under
        # The share of the sprite's colour in each pixel; exact for an anti-aliased edge.
        share = _dot(self.planes.take(where, 1) - under, contrast) / _dot(contrast, contrast)
        share, through = (values.reshape(len(where), -1) for values in (np.clip(share, -0.5, 1.5), through))
        # Best amplitude for each silhouette, so that a paler sprite keeps its shape.
        match = (through * share) @ dictionary.T
        energy = squares.sum(1)[None].repeat(len(match), 0)
        covered = (through < 1).any(1)
        energy[covered] = through[covered] @ squares.T
        score = np.where(match > 0, match * match / np.maximum(energy, 1e-3), 0)
        return score.reshape(len(where), len(SHAPES), -1).max(-1).argmax(-1)

    def _mean_colour(self, index: int) -> NDArray[np.intp]:
        """[T] index into COLOURS that most of the sprite's visible area shows, -1 when it is the background."""
        sprite = self.sprites[index]
        where, _ = sprite_mask(sprite.shape, sprite.radius, self.positions[:, index])
        visible = self.masks[index].take(where)
        for other in self.masks[index + 1 :]:
            visible *= 1 - other.take(where)
        shares = np.array([(seen.take(where) * visible).sum((1, 2)) for seen in self.member])
        colour = shares.argmax(0)
        return np.where(colour == len(COLOURS), -1, colour)

    def _unexplained(self) -> NDArray[np.float64]:
        """[T] the most sprite colour in one box that no located sprite explains, in areas of the smallest sprite."""
        taken = np.maximum.reduce(self.masks).reshape(-1, SIZE, SIZE)
        for axis in (1, 2):  # a blurred outline is no new sprite
            taken = np.maximum(taken, np.maximum(np.roll(taken, 1, axis), np.roll(taken, -1, axis)))
        box = (1 - self.member[-1]) * (taken < 0.5)
        for axis in (1, 2):
            box = sum(np.roll(box, shift, axis) for shift in range(_EXTRA_BOX))
        smallest = np.pi * min(RADII.values()) ** 2
        return box.max((1, 2)).astype(np.float64) / smallest


def _skipped(active: NDArray[np.intp]) -> NDArray[np.intp]:
    """[T, 1, 1] what takes pixel indices in the `active` frames alone to those in all frames."""
    return (active - np.arange(len(active)))[:, None, None] * (SIZE * SIZE)


@lru_cache(maxsize=64)
def _template_spectra(shape: str, radius: float) -> tuple[NDArray[np.complexfloating], NDArray[np.complexfloating]]:
    """Conjugated spectra of a sprite's coverage centred on pixel (0, 0), and of its square."""
    where, mask = sprite_mask(shape, radius, np.zeros((1, 2)))
    full = np.zeros(SIZE * SIZE, np.float32)
    full[where] = mask
    image = full.reshape(SIZE, SIZE)
    return np.conj(np.fft.rfft2(image)), np.conj(np.fft.rfft2(image * image))


def _dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum over the three channels, the first axis."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _newton_step(
    slopes: list[NDArray[np.float32]], curvature: NDArray[np.float32], pull: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[T, 2] step in pixels, at most one pixel along each axis."""
    baseline = 2 * _FIT_BLUR
    xx, xy, yy = (np.einsum("tyx,tyx,tyx->t", curvature, a, b, dtype=np.float64) / baseline**2
                  for a, b in ((slopes[0], slopes[0]), (slopes[0], slopes[1]), (slopes[1], slopes[1])))  # fmt: skip
    bx, by = (np.einsum("tyx,tyx->t", pull, slope, dtype=np.float64) / baseline for slope in slopes)
    damping = 1e-3 * (xx + yy) + 1.0  # keeps a covered sprite where it is
    xx, yy = xx + damping, yy + damping
    step = np.stack([yy * bx - xy * by, xx * by - xy * bx], 1) / (xx * yy - xy * xy)[:, None]
    return np.clip(step, -1, 1)


@lru_cache(maxsize=8)
def _silhouettes(radius: float) -> tuple[int, NDArray[np.float32], NDArray[np.float32]]:
    """`(half, masks, squares)`: coverage [shapes * centres * blurs, P * P] of every shape, centred near the middle."""
    half = int(np.ceil(max(sprite_reach(shape, radius) for shape in SHAPES) + _SHAPE_REACH + max(_SHAPE_BLURS)))
    axis = np.arange(-half, half + 1, dtype=np.float32)
    grid = np.arange(-_SHAPE_REACH, _SHAPE_REACH + 1e-6, _SHAPE_STEP, dtype=np.float32)
    masks = [
        coverage(shape, radius, (axis - cx)[None, :], (axis - cy)[:, None])
        for shape in SHAPES for cx in grid for cy in grid
    ]  # fmt: skip
    blurred = []
    for blur in _SHAPE_BLURS:
        kernel = np.exp(-((axis[:, None] - axis[None, :]) ** 2) / (2 * blur**2)) if blur else np.eye(len(axis))
        kernel = (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)
        blurred.append(kernel @ np.stack(masks) @ kernel.T)
    dictionary = np.stack(blurred, 1).reshape(len(masks) * len(blurred), -1)
    return half, dictionary, dictionary * dictionary
