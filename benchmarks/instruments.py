"""How far the instruments of `longtake measure` can be trusted: known motions and known defects, found or missed.

    python -m benchmarks.instruments PHOTOS -o FILE.json      (in the repository; PHOTOS: a folder of photographs)

Makes videos of photographs that a camera moves over, with a second photograph moving before the first, noise and the
losses of an mp4, and writes one line a bar: motion of plain translations within 5 % from 0.2 to 8 pixels a frame; each
of six defects found in 95 of 100 videos and reported in at most 2 of 100 without any; over 64 toy worlds at 0 to 1.5
times their speed a correlation of 0.95 with the exact ratio, and 0 within 0.01 for frozen ones.

Every case is kept in FILE as soon as it is known, and a case that is there is not measured again: stop it when you
like, or give `--seconds`, and call it again to go on. Cases from before a change of the instruments stay there too, so
name another file after one. `--bars motion fade` measures these alone, `clean` the videos without a defect. The exit
code is 1 when a bar is missed or a case is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from longtake.data.file_rows import files_below
from longtake.data.images import decode_image
from longtake.data.samples import IMAGE_SUFFIXES
from longtake.evaluation.instruments import Blocks, measure
from longtake.evaluation.motion import MotionMeter
from longtake.evaluation.report import write_json
from longtake.inference.video_io import VideoWriter, read_video
from longtake.toy.world import sample_world

Video = NDArray[np.uint8]
Picture = NDArray[np.uint8]

HEIGHT, WIDTH, FPS = 144, 256, 16
NUM_FRAMES = 81
BLOCKS = Blocks(12, 9)
DEFECTS = ("fade", "blur", "freeze", "seam", "loop", "uniform")
SPEEDS = (0.2, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0)  # pixels a frame
WORLDS = 64
BARS = ("motion", "toy", "clean", *DEFECTS)
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


def moved(video: Video) -> float:
    """Mean motion in pixels a frame, as `measure` finds it."""
    meter = MotionMeter(*video.shape[1:3], FPS)
    for frame in video:
        meter.add(np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8))
    return float(np.mean(meter.finish().px))


def motion_error(photo: Picture, speed: float, number: int, size: tuple[int, int] = (480, 832)) -> float:
    """Measured over true motion - 1 of a photograph, the `number`-th, that is translated in a random direction."""
    angle = np.random.default_rng([number, round(100 * speed)]).uniform(0, 2 * np.pi)
    return moved(translated(photo, speed * np.cos(angle), speed * np.sin(angle), 33, size)) / speed - 1


def toy_ratios(index: int, num_frames: int = 81) -> tuple[float, float, float] | None:
    """True and measured motion of a slowed toy world over that at full speed, and the measured one when it is frozen;
    None of a world in which nothing moves.
    """
    world, scale = sample_world(1, index), 1.5 * index / (WORLDS - 1)
    whole, slowed, still = (moved(world.render(num_frames, time_scale=s)) for s in (1, scale, 0))
    return (scale, slowed / whole, still / whole) if whole else None


def cases_of(bars: Sequence[str], photos: int, number: int) -> list[tuple[str, float, int]]:
    """(bar, speed, number) of every case; the speed is of translations alone."""
    cases: list[tuple[str, float, int]] = []
    for bar in bars:
        if bar == "motion":
            cases += [(bar, speed, k) for speed in SPEEDS for k in range(photos)]
        else:
            cases += [(bar, 0.0, k) for k in range(WORLDS if bar == "toy" else number)]
    return cases


def outcome(photos: Sequence[Picture], case: tuple[str, float, int]) -> Any:
    """What is kept of a case: an error, ratios, or the names of the defects that are reported."""
    cv2.setNumThreads(1)  # cases run side by side
    bar, speed, number = case
    if bar == "motion":
        return motion_error(photos[number], speed, number)
    if bar == "toy":
        return toy_ratios(number)
    return found(photos, None if bar == "clean" else bar, number)


def as_bars(outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By bar: whether it is met, by the outcomes {bar: {case: outcome}} so far."""
    bars: dict[str, dict[str, Any]] = {}
    if errors := outcomes.get("motion"):
        by_speed = {f"{v:g}": [e for case, e in errors.items() if case.split()[0] == f"{v:g}"] for v in SPEEDS}
        worst = {speed: max(values, key=abs) for speed, values in by_speed.items() if values}
        bars["motion"] = {"met": max(map(abs, worst.values())) <= 0.05, "worst": worst, "of": len(errors)}
    if ratios := outcomes.get("toy"):
        true, seen, frozen = zip(*(three for three in ratios.values() if three is not None))
        correlation = float(np.corrcoef(true, seen)[0, 1]) if len(true) > 1 else float("nan")
        met = correlation >= 0.95 and max(frozen) <= 0.01
        bars["toy"] = {"met": met, "correlation": correlation, "frozen": max(frozen), "of": len(true)}
    clean_ones = list(outcomes.get("clean", {}).values())
    for defect in DEFECTS:
        given = list(outcomes.get(defect, {}).values())
        if given and clean_ones:
            hits, false = (sum(defect in report for report in reports) for reports in (given, clean_ones))
            met = hits >= 0.95 * len(given) and false <= 0.02 * len(clean_ones)
            bars[defect] = {
                "met": met, "found": hits, "of": len(given), "falsely": false, "of_clean": len(clean_ones)
            }  # fmt: skip
    return bars


def measure_cases(
    photos: Sequence[Picture],
    cases: Sequence[tuple[str, float, int]],
    file: Path | None = None,
    *,
    seconds: float = float("inf"),
    workers: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The outcomes {bar: {case: outcome}} of the file and of the cases that it lacks, begun within `seconds`."""
    outcomes: dict[str, dict[str, Any]] = {}
    if file is not None and file.exists():
        outcomes = json.loads(file.read_text())["outcomes"]
    start = monotonic()
    missing = iter([case for case in cases if _name(case) not in outcomes.get(case[0], {})])
    running: dict[Future[Any], tuple[str, float, int]] = {}
    number = workers or os.cpu_count() or 1
    # Spawned, not forked: this process may have threads, whose locks a forked one would wait for without end.
    several = number > 1
    with ProcessPoolExecutor(number, get_context("spawn")) if several else ThreadPoolExecutor(1) as pool:
        while True:
            if monotonic() - start < seconds:
                more = islice(missing, number + 1 - len(running))
                running |= {pool.submit(outcome, photos, case): case for case in more}
            if not running:
                return outcomes
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                case = running.pop(future)
                outcomes.setdefault(case[0], {})[_name(case)] = future.result()
            if file is not None:
                write_json(file, {"bars": as_bars(outcomes), "outcomes": outcomes})


def _name(case: tuple[str, float, int]) -> str:
    bar, speed, number = case
    return f"{speed:g} {number}" if bar == "motion" else str(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the cases that are asked for; 1 when a bar is missed, or not whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="keeps every case; those that are there are not repeated")
    parser.add_argument("--bars", nargs="+", choices=BARS, default=BARS)
    parser.add_argument("--cases", type=int, default=100, help="random videos of each defect, and without any")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case begins later")
    parser.add_argument("--workers", type=int, help="processes; by default one a core")
    options = parser.parse_args(arguments)
    photos = [decode_image(path.read_bytes(), str(path)) for path in files_below(options.photos, IMAGE_SUFFIXES)]
    cases = cases_of(options.bars, len(photos), options.cases)
    outcomes = measure_cases(photos, cases, options.output, seconds=options.seconds, workers=options.workers)
    bars = as_bars(outcomes)
    for name, bar in bars.items():
        print(name, *(f"{key}: {value}" for key, value in bar.items()), sep="  ")
    left = [case for case in cases if _name(case) not in outcomes.get(case[0], {})]
    if left:
        print(f"{len(left)} of {len(cases)} cases are left: call it again with the same file")
    return 0 if not left and all(bar["met"] for bar in bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
