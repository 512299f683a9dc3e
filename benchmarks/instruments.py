"""How far the instruments of `longtake measure` can be trusted: known motions and known defects, found or missed.

    python -m benchmarks.instruments PHOTOS [-o FILE.json]      (in the repository; PHOTOS: a folder of photographs)

Makes videos of photographs that a camera moves over, with a second photograph moving before the first, noise and the
losses of an mp4, and writes one line a bar: motion of plain translations within 5 % from 0.2 to 8 pixels a frame; each
of six defects found in 95 of 100 videos and reported in at most 2 of 100 without any; over 64 toy worlds at 0 to 1.5
times their speed a correlation of 0.95 with the exact ratio, and 0 within 0.01 for frozen ones. About 17 minutes on
one core; the exit code is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from longtake.data.file_rows import files_below
from longtake.data.images import decode_image
from longtake.data.samples import IMAGE_SUFFIXES
from longtake.evaluation.instruments import Blocks, measure
from longtake.inference.video_io import VideoWriter, read_video
from longtake.toy.world import sample_world

Video = NDArray[np.uint8]
Picture = NDArray[np.uint8]

HEIGHT, WIDTH, FPS = 144, 256, 16
NUM_FRAMES = 81
BLOCKS = Blocks(12, 9)
DEFECTS = ("fade", "blur", "freeze", "seam", "loop", "uniform")
SPEEDS = (0.2, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0)  # pixels a frame
_FINE = 2  # pictures are drawn at twice the size and shrunk, so that parts of a pixel do not blur them


@dataclass(frozen=True)
class Camera:
    """Where a camera looks: pixels a frame, growth a frame, and the centre of its first picture."""

    dx: float
    dy: float
    zoom: float = 1.0
    x: float = 0.0
    y: float = 0.0

    def shot(self, photo: Picture, time: float, size: tuple[int, int], jump: tuple[float, float] = (0, 0)) -> Picture:
        """What it sees at a time in frames, uint8 [h, w, 3] of `size`; a photograph goes on mirrored at its edges."""
        height, width = size
        scale = 1 / (_FINE * self.zoom**time)
        x = self.x + self.dx * time + jump[0] - scale * (_FINE * width - 1) / 2
        y = self.y + self.dy * time + jump[1] - scale * (_FINE * height - 1) / 2
        way = np.array([[scale, 0, x], [0, scale, y]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        fine = cv2.warpAffine(photo, way, (_FINE * width, _FINE * height), flags=flags, borderMode=cv2.BORDER_REFLECT)
        return np.asarray(cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def translated(photo: Picture, dx: float, dy: float, num_frames: int, size: tuple[int, int]) -> Video:
    """A camera that moves by (dx, dy) pixels a frame over a photograph."""
    height, width = photo.shape[:2]
    camera = Camera(-dx, -dy, x=width / 2, y=height / 2)
    return np.stack([camera.shot(photo, time, size) for time in range(num_frames)])


class Scene:
    """A random camera over one photograph and a part of another that moves before it."""

    def __init__(self, photos: Sequence[Picture], rng: np.random.Generator) -> None:
        self.rng, self.size = rng, (HEIGHT, WIDTH)
        back, front = rng.choice(len(photos), 2)
        self.back, self.front = photos[back], photos[front]
        speed, angle = np.exp(rng.uniform(np.log(0.3), np.log(3))), rng.uniform(0, 2 * np.pi)
        height, width = self.back.shape[:2]
        zoom = float(np.exp(rng.uniform(-0.15, 0.15) / NUM_FRAMES))
        self.camera = Camera(
            speed * np.cos(angle),
            speed * np.sin(angle),
            zoom,
            rng.uniform(0.3, 0.7) * width,
            rng.uniform(0.3, 0.7) * height,
        )
        self.start, self.way = rng.uniform(0.2, 0.8, 2), rng.uniform(-0.5, 0.5, 2) / NUM_FRAMES
        self.radius = rng.uniform(0.1, 0.25) * HEIGHT
        self.noise, self.seed = rng.uniform(0, 1), int(rng.integers(2**32))

    def draw(self, time: float, jump: tuple[float, float] = (0, 0)) -> Picture:
        """The picture at a time in frames; `jump` moves the camera by pixels."""
        picture = self.camera.shot(self.back, time, self.size, jump)
        x, y = (self.start + self.way * time) * (WIDTH, HEIGHT)
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        mask = np.clip(self.radius - np.hypot(columns - x, rows - y) + 0.5, 0, 1)[..., None]
        height, width = self.front.shape[:2]
        stuck = Camera(0, 0, x=width / 2 + WIDTH / 2 - x, y=height / 2 + HEIGHT / 2 - y)
        over = stuck.shot(self.front, 0, self.size)
        noise = self.noise * np.random.default_rng([self.seed, int(time)]).normal(size=picture.shape)
        return np.clip(picture + (over.astype(np.float32) - picture) * mask + noise + 0.5, 0, 255).astype(np.uint8)


def clean(scene: Scene) -> Video:
    """The scene as it is."""
    return np.stack([scene.draw(time) for time in range(NUM_FRAMES)])


def spoilt(scene: Scene, defect: str) -> Video:
    """The scene with one defect, at a random place or over a random stretch of time."""
    rng = scene.rng
    if defect == "seam":
        return _with_seams(scene)
    video = clean(scene)
    begin, end = rng.uniform(0, 0.35) * NUM_FRAMES, rng.uniform(0.6, 0.85) * NUM_FRAMES
    share = np.clip((np.arange(NUM_FRAMES) - begin) / (end - begin), 0, 1)
    if defect == "fade":
        gain = 1 + 0.1 * share * rng.choice([-1, 1])
        return np.clip(video * gain[:, None, None, None] + 0.5, 0, 255).astype(np.uint8)
    if defect == "blur":
        return np.stack([cv2.GaussianBlur(f, (0, 0), s) if s > 0.05 else f for f, s in zip(video, share)])
    if defect == "freeze":
        first, length = int(rng.integers(1, NUM_FRAMES - 10)), round(0.5 * FPS)
        order = np.arange(NUM_FRAMES)
        order[first : first + length] = first - 1
        if rng.random() < 0.5:  # goes on from where it stopped, not from where it would be
            order[first + length :] -= length
        return video[order]
    if defect == "loop":
        return video[np.arange(NUM_FRAMES) % int(rng.integers(35, 60))]
    assert defect == "uniform"
    video[rng.integers(NUM_FRAMES)] = rng.choice([np.zeros(3), np.full(3, 255), rng.uniform(0, 255, 3)])
    return video


def _with_seams(scene: Scene) -> Video:
    """Blocks whose borders change 1.5 times as much as usual: a jump of the camera, or of the colours."""
    frames = clean(scene)
    usual = float(np.abs(np.diff(frames.astype(np.float32), axis=0)).mean())
    angle, moves = scene.rng.uniform(0, 2 * np.pi), scene.rng.random() < 0.5
    tint = cv2.resize(scene.rng.normal(size=(3, 4, 3)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    jump, side = np.zeros(2), 0.0

    def at(time: int, strength: float) -> Picture:
        if moves:
            x, y = jump + strength * np.array([np.cos(angle), np.sin(angle)])
            return scene.draw(time, (float(x), float(y)))
        shade = side + (strength if side <= 0 else -strength)
        return np.clip(frames[time] + shade * tint + 0.5, 0, 255).astype(np.uint8)

    video = [frames[0]]
    for time in range(1, NUM_FRAMES):
        strength = 0.0
        if time >= BLOCKS.first and (time - BLOCKS.first) % BLOCKS.frames == 0:
            low, high = 0.0, 64.0
            for _ in range(10):
                strength = (low + high) / 2
                change = float(np.abs(at(time, strength).astype(np.float32) - video[-1]).mean())
                low, high = (strength, high) if change < 1.5 * usual else (low, strength)
        video.append(at(time, strength))
        if moves:
            jump = jump + strength * np.array([np.cos(angle), np.sin(angle)])
        else:
            side += strength if side <= 0 else -strength
    return np.stack(video)


def through_mp4(video: Video, rng: np.random.Generator) -> Video:
    """The video written and read again."""
    with TemporaryDirectory() as folder:
        with VideoWriter(path := Path(folder) / "v.mp4", FPS, HEIGHT, WIDTH, crf=int(rng.integers(12, 22))) as writer:
            writer.write(video)
        return read_video(path)[0]


def found(photos: Sequence[Picture], defect: str | None, number: int) -> tuple[str, ...]:
    """The defects that are reported of the random video `number`, with `defect` or with none."""
    rng = np.random.default_rng([number, 0 if defect is None else 1 + DEFECTS.index(defect)])
    scene = Scene(photos, rng)
    video = clean(scene) if defect is None else spoilt(scene, defect)
    return measure(through_mp4(video, rng), FPS, BLOCKS).defects


def motion_errors(photos: Sequence[Picture], size: tuple[int, int] = (480, 832)) -> dict[float, list[float]]:
    """Measured over true motion - 1 of translated photographs, one a photograph, by speed."""
    rng = np.random.default_rng(0)
    errors: dict[float, list[float]] = {}
    for speed in SPEEDS:
        for photo in photos:
            angle = rng.uniform(0, 2 * np.pi)
            video = translated(photo, speed * np.cos(angle), speed * np.sin(angle), 33, size)
            motion = measure(video, FPS).metrics["motion_px_s"]
            assert motion is not None
            errors.setdefault(speed, []).append(motion / FPS / speed - 1)
    return errors


def toy_ratios(num_worlds: int = 64, num_frames: int = 81) -> tuple[list[float], list[float], list[float]]:
    """True and measured motion of slowed toy worlds over that at full speed, and the measured one of frozen worlds."""
    true, seen, frozen = [], [], []
    for index in range(num_worlds):
        world, scale = sample_world(1, index), 1.5 * index / (num_worlds - 1)
        px = [measure(world.render(num_frames, time_scale=s), FPS).metrics["motion_px_s"] for s in (1, scale, 0)]
        whole, slowed, still = (float(value or 0) for value in px)
        if whole > 0:
            true.append(scale)
            seen.append(slowed / whole)
            frozen.append(still / whole)
    return true, seen, frozen


def motion_bar(photos: Sequence[Picture]) -> dict[str, dict[str, Any]]:
    """The worst error of all photographs at each speed."""
    worst = {speed: max(values, key=abs) for speed, values in motion_errors(photos).items()}
    return {"motion": {"met": max(map(abs, worst.values())) <= 0.05, "worst": worst}}


def toy_bar() -> dict[str, dict[str, Any]]:
    """How measured motion of slowed toy worlds follows the true one."""
    true, seen, frozen = toy_ratios()
    correlation = float(np.corrcoef(true, seen)[0, 1])
    met = correlation >= 0.95 and max(frozen) <= 0.01
    return {"toy": {"met": met, "correlation": correlation, "frozen": max(frozen), "worlds": len(true)}}


def defect_bars(photos: Sequence[Picture], cases: int) -> dict[str, dict[str, Any]]:
    """By defect: in how many videos with it, and in how many without any, it is reported."""
    jobs = [(defect, number) for defect in (None, *DEFECTS) for number in range(cases)]
    with ProcessPoolExecutor() as pool:
        reports = list(pool.map(partial(_found, photos), jobs, chunksize=8))
    bars = {}
    for defect in DEFECTS:
        hits, false = (
            sum(defect in report for (given, _), report in zip(jobs, reports) if given == wanted)
            for wanted in (defect, None)
        )
        met = hits >= 0.95 * cases and false <= 0.02 * cases
        bars[defect] = {"met": met, "found": hits, "falsely": false, "of": cases}
    return bars


def _found(photos: Sequence[Picture], job: tuple[str | None, int]) -> tuple[str, ...]:
    return found(photos, *job)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--cases", type=int, default=100)
    options = parser.parse_args(arguments)
    photos = [decode_image(path.read_bytes(), str(path)) for path in files_below(options.photos, IMAGE_SUFFIXES)]
    bars: dict[str, dict[str, Any]] = {}
    # Each is told as soon as it is known: a run that is stopped leaves what it had.
    for measured in (lambda: motion_bar(photos), toy_bar, lambda: defect_bars(photos, options.cases)):
        for name, bar in (found_bars := measured()).items():
            print(name, *(f"{key}: {value}" for key, value in bar.items()), sep="  ", flush=True)
        bars |= found_bars
    if options.output:
        options.output.write_text(json.dumps(bars, indent=1) + "\n")
    return 0 if all(bar["met"] for bar in bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
