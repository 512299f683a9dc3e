"""Encoded worlds for the scripts that train toy assets on a GPU: drawn by processes, rendered and encoded on it.

New worlds are drawn and encoded all the time: with 24,000 of them, however long it trained, the loss of the teacher on
others was half as high again (docs/log.md).
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from multiprocessing import get_context
from multiprocessing.pool import AsyncResult
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.condition import pixel_frames
from longtake.encoders.bundle import Encoders
from longtake.toy.story import sample_story
from longtake.toy.world import CROSS_WIDTH, REACH, SHAPES, SIZE, World, sample_world

TRAIN_SEED = 0
WANTED_SEED = 10_000  # candidate k for a world as wanted is of the list with seed WANTED_SEED + k; held-out ones differ
TRIES = 2000
GOLDEN, SQUARE = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1  # their multiples are spread evenly, and independently
MOST_SPRITES = 3


class Sampled(NamedTuple):
    """What is drawn of some worlds: background [N, h, w, 3], centres [N, T, S, 2], and the looks of the S sprites."""

    background: np.ndarray
    centres: np.ndarray
    looks: np.ndarray  # [N, S, 6]: shape number (-1 for no sprite), radius, reach of the shape's formula, RGB
    captions: list[str]


class Task(NamedTuple):
    """Worlds `start` to `start + number`; a share of `stops` is seen after a change of motion, with stops; one of
    `hard` has sprites that overlap: in some frame less than `visibility` of one is to be seen; and one of `opened` has
    a caption that leaves a motion open, beside those that would anyway. Each share is spread evenly, whatever the
    others are.
    """

    start: int
    number: int
    num_frames: int
    stops: float
    hard: float
    opened: float
    visibility: float


def shown(seed: int, index: int, num_frames: int, changed: bool) -> tuple[World, np.ndarray]:
    """World `index` of `seed` and the centres [T, S, 2] of its sprites; when `changed`, from a change of motion on."""
    world = sample_story(seed, index, [1], stops=True) if changed else sample_world(seed, index)
    return world, world.positions(num_frames + changed)[int(changed) :]


def wanted_world(
    index: int, num_frames: int, *, changed: bool, opened: bool, visibility: float | None
) -> tuple[World, np.ndarray]:
    """The first candidate for number `index` with an open motion, and with a sprite of which less than `visibility` is
    to be seen in some frame.
    """
    for candidate in range(TRIES):
        world, centres = shown(WANTED_SEED + candidate, index, num_frames, changed)
        if opened and not any(sprite.is_open for sprite in world.segments[-1].sprites):
            continue
        if visibility is not None and not is_hidden(world, centres, visibility):
            continue
        return world, centres
    raise RuntimeError(f"none of {TRIES} candidates for number {index} is as wanted: {opened=}, {visibility=}")


def is_hidden(world: World, centres: np.ndarray, visibility: float) -> bool:
    """Whether less than `visibility` of some sprite is to be seen in some frame."""
    return len(world.sprites) > 1 and bool(world.visibility(centres).min() < visibility)


def sample(task: Task) -> Sampled:
    """The worlds of a task, always the same ones."""
    start, number, num_frames, stops, hard_share, open_share, visibility = task
    sampled = Sampled(
        np.empty((number, SIZE, SIZE, 3), np.uint8),
        np.zeros((number, num_frames, MOST_SPRITES, 2)),
        np.full((number, MOST_SPRITES, 6), -1, np.float32),
        [],
    )
    for row, index in enumerate(range(start, start + number)):
        changed = index % 100 < 100 * stops
        hard, opened = index * GOLDEN % 1 < hard_share, index * SQUARE % 1 < open_share
        if hard or opened:
            world, centres = wanted_world(
                index, num_frames, changed=changed, opened=opened, visibility=visibility if hard else None
            )
        else:
            world, centres = shown(TRAIN_SEED, index, num_frames, changed)
        count = len(world.sprites)
        sampled.background[row] = world.background
        sampled.centres[row, :, :count] = centres
        for number_of, (sprite, colour) in enumerate(zip(world.sprites, world.colours)):
            shape = SHAPES.index(sprite.shape)
            sampled.looks[row, number_of] = [shape, sprite.radius, REACH[sprite.shape] * sprite.radius, *colour]
        sampled.captions.append(world.segments[-1].caption)
    return sampled


def draw(worlds: Sampled, device: torch.device) -> Tensor:
    """What `World.draw` draws, uint8 [N, T, h, w, 3], on the device: sending the videos there would take longer."""
    background, centres, looks = (torch.from_numpy(part).to(device) for part in worlds[:3])
    video = background.float()[:, None].repeat(1, centres.shape[1], 1, 1, 1)
    pixels = torch.arange(SIZE, device=device, dtype=torch.float64)
    for sprite in range(looks.shape[1]):
        dx, dy = (
            (((pixels - centres[:, :, sprite, axis, None] + SIZE / 2) % SIZE) - SIZE / 2).float() for axis in (0, 1)
        )  # [N, T, w], [N, T, h]
        dx, dy = dx[:, :, None, :], dy[:, :, :, None]
        shape, radius, size = (looks[:, sprite, part, None, None, None] for part in range(3))
        ax, ay, width = dx.abs(), dy.abs(), CROSS_WIDTH * radius
        distances = {
            "circle": (dx * dx + dy * dy).sqrt() - size,
            "square": torch.maximum(ax, ay) - size,
            "triangle": torch.maximum(dy.expand(-1, -1, -1, SIZE), math.sqrt(0.75) * ax - dy / 2) - size / 2,
            "cross": torch.minimum(torch.maximum(ax - size, ay - width), torch.maximum(ax - width, ay - size)),
        }
        distance = torch.full_like(distances["circle"], 1.0)
        for number, name in enumerate(SHAPES):
            distance = torch.where(shape == number, distances[name], distance)
        mask = (0.5 - distance).clamp(0, 1)[..., None]
        colour = looks[:, sprite, None, None, None, 3:]
        video = torch.where(mask > 0, (video + (colour - video) * mask + 0.5).floor(), video)
    return video.byte()


class Pool:
    """Latents, y, text and CLIP tokens of worlds in half precision on the device; it grows while training goes on.

    `y` is encoded as far as the clips reach, so they must reach as far as anything in training does.
    """

    def __init__(self, encoders: Encoders, args: argparse.Namespace, frames: int, device: torch.device) -> None:
        self.encoders, self.device, self.frames = encoders, device, frames
        self.chunk, self.most = args.chunk, args.most_worlds
        self.shares = args.stops, args.hard_share, args.open_share, args.hard_visibility
        self.rows: list[Tensor] = []
        self.count = torch.zeros((), device=device)  # on the device, so that a captured step reads it
        self.filled, self.asked = 0, args.first_world
        self.workers = get_context("spawn").Pool(args.processes)
        self.waiting: deque[AsyncResult[Sampled]] = deque()
        for _ in range(2 * args.processes):
            self._ask()

    def _ask(self) -> None:
        task = Task(self.asked, self.chunk, pixel_frames(self.frames), *self.shares)
        self.waiting.append(self.workers.apply_async(sample, (task,)))
        self.asked += self.chunk

    @torch.no_grad()
    def grow(self) -> None:
        """Encodes the next chunk of worlds."""
        worlds = self.waiting.popleft().get()
        self._ask()
        videos = draw(worlds, self.device).permute(0, 1, 4, 2, 3).float().div(127.5).sub(1)
        padded = torch.zeros_like(videos)
        padded[:, :1] = videos[:, :1]
        y = self.encoders.vae.encode(padded)
        mask = torch.zeros_like(y[:, :, :4])
        mask[:, 0] = 1
        assert self.encoders.image is not None
        parts = [
            self.encoders.vae.encode(videos),
            torch.cat([mask, y], 2),
            self.encoders.text.encode(worlds.captions),
            self.encoders.image.encode(videos[:, 0]),
        ]
        if not self.rows:
            self.rows = [part.new_zeros(self.most, *part.shape[1:], dtype=torch.float16) for part in parts]
        for held, part in zip(self.rows, parts):
            held[self.filled : self.filled + self.chunk] = part[: self.most - self.filled]
        self.filled = min(self.most, self.filled + self.chunk)
        self.count.fill_(self.filled)

    def batch(self, size: int) -> list[Tensor]:
        """Random worlds: [latents, y, text, CLIP tokens]."""
        chosen = (torch.rand(size, device=self.device) * self.count).long()
        return [part[chosen].float() for part in self.rows]
