"""`longtake evaluate --data`: videos of any rows by students and their teacher, kept as files and measured.

What is measured are the files, by what measures files of any origin, so that `longtake measure` finds the same numbers
again. Beside them go what only the makers know: where blocks begin, how latents drift, and how like CLIP finds frames.
A student makes its longest video alone; the shorter ones are its beginnings.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from longtake.condition import pixel_frames
from longtake.data.loader import to_signed
from longtake.encoders.clip import ImageEncoder
from longtake.errors import ConfigError
from longtake.evaluation.contenders import TEACHER, Asked, Contender, contenders
from longtake.evaluation.html import write_page
from longtake.evaluation.instruments import Blocks
from longtake.evaluation.latents import LatentMeter, in_pixel_frames
from longtake.evaluation.likeness import LikenessMeter
from longtake.evaluation.measure import MeasuredVideo, as_json, as_table, measure_video, measuring_threads, ratio, title
from longtake.evaluation.report import aligned, write_json
from longtake.evaluation.row_reader import Reading, RowReader
from longtake.evaluation.row_videos import against, blocks_of, decoded
from longtake.evaluation.target import EvalTarget
from longtake.evaluation.vbench import LaidVideo, lay_out
from longtake.inference.video_io import VideoWriter
from longtake.outputs import check_output_folder, write_whole
from longtake.parallel.mesh import Mesh
from longtake.plan import StreamPlan
from longtake.progress import Progress, track

VIDEOS, LAYOUT = "videos", "vbench"  # folders beside table, JSON and page
_PART = "videos.part"  # where videos lie until all of them are made and measured: no refusal costs an earlier one
_WINDOW_SHARE = 4  # the first window of latents is a quarter of the training clips
_UNUSUAL, _NAME_SIGNS = re.compile(r"[^\w.-]+"), 60  # of a row's name in that of a file


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of a video beside its files: curves with a value a pixel frame, by latent frames of the video."""

    latents: LatentMeter
    likeness: LikenessMeter | None
    window_frames: int
    temporal_stride: int

    def added_to(self, video: MeasuredVideo, num_latent_frames: int) -> MeasuredVideo:
        """What was measured of a file with the first latent frames, with these curves and what they end with."""
        shifts = self.latents.shifts(self.window_frames, num_latent_frames)
        curves = {name: in_pixel_frames(curve, self.temporal_stride) for name, curve in shifts.items()}
        metrics: dict[str, float | None] = {name: float(curve[-1]) for name, curve in curves.items()}
        if self.likeness is not None:
            found = {name: curve[: video.measured.frames] for name, curve in self.likeness.curves().items()}
            metrics |= {name: float(curve[1:].mean()) for name, curve in found.items()}
            curves |= found
        listed = {name: [None if np.isnan(v) else float(v) for v in curve] for name, curve in curves.items()}
        metrics, listed = video.measured.metrics | metrics, video.measured.curves | listed
        return replace(video, measured=replace(video.measured, metrics=metrics, curves=listed))


@dataclass(frozen=True, eq=False)
class Made:
    """A video in files by their length in training clips, which are measured while others are made."""

    files: Mapping[int, LaidVideo]
    measuring: Mapping[int, Future[MeasuredVideo]]
    seen: Seen


class Pace:
    """How far the videos of this rank are, in frames: those of a video count when all of it is there, since its latents
    are made before any of them.
    """

    def __init__(self, num_videos: int, num_frames: int) -> None:
        self.number, self.num_videos = 0, num_videos
        self.progress = Progress("videos", num_frames, "frames")

    def begin(self, maker: str) -> None:
        """The next video is made, by `maker`."""
        self.number += 1
        self.progress.what = f"video {self.number} of {self.num_videos}, by {maker}"
        self.progress.update(self.progress.done)

    def end(self, num_frames: int) -> None:
        """It is there."""
        self.progress.update(self.progress.done + num_frames)


def evaluate_on_data(
    target: EvalTarget, asked: Asked, folder: Path, mesh: Mesh, *, overwrite: bool = False
) -> list[MeasuredVideo]:
    """Makes and measures the videos of every row, and writes table, JSON, page and videos to `folder`.

    The ranks share the rows; all of them call it.
    Raises: ConfigError for rules that cannot be followed and a folder that is not free, DataError for bad rows.
    """
    every = contenders(target, asked)
    names = [one.row_name(multiple) for one in every for multiple in one.multiples]
    mesh.on_main(lambda: _check_free(folder, names, overwrite=overwrite))
    reader = RowReader(asked.data, asked.num_rows, mesh)
    mesh.every(lambda: _read(reader, every))  # rows that cannot be read cost no earlier video
    mesh.on_main(lambda: _make_room(folder / _PART, names))
    try:
        parts = mesh.every(lambda: _make_share(every, reader, asked, folder / _PART))
    finally:
        if mesh.is_main and not any((folder / _PART).rglob("*.mp4")):
            shutil.rmtree(folder / _PART, ignore_errors=True)
    mesh.on_main(lambda: _take_place(folder, names))
    made = sorted((_placed(folder, *video) for part in parts for video in part), key=lambda one: one[1].path.name)
    by_name = {name: [pair for pair in made if pair[1].name == name] for name in names}
    videos = [video for pairs in by_name.values() for _, video in pairs]
    longest = {one.row_name(one.multiples[-1]) for one in every}
    prompts = {laid.path.stem: laid.prompt for laid, _ in made}

    def write() -> None:
        _write(folder, videos, longest, asked, prompts)
        for name, pairs in by_name.items() if asked.layout else ():
            lay_out([laid for laid, _ in pairs], folder / LAYOUT / name)

    mesh.on_main(write)
    return videos


def _check_free(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Raises ConfigError when there are videos of these rows and `overwrite` is not given."""
    check_output_folder(folder)
    there = [found for name in names for found in _earlier(folder, name)]
    if there and not overwrite:
        raise ConfigError(f"{there[0]} exists already; name another folder with -o, or give --overwrite")


def _make_room(part: Path, names: Sequence[str]) -> None:
    """Makes the folders of the rows, without what an interrupted evaluation left there."""
    shutil.rmtree(part, ignore_errors=True)
    for name in names:
        (part / name).mkdir(parents=True)


def _take_place(folder: Path, names: Sequence[str]) -> None:
    """Puts the new videos of the rows where the earlier ones were."""
    for name in names:
        for found in _earlier(folder, name):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
        (target := folder / VIDEOS / name).mkdir(parents=True, exist_ok=True)
        for video in (folder / _PART / name).iterdir():
            video.replace(target / video.name)
    shutil.rmtree(folder / _PART)


def _placed(folder: Path, laid: LaidVideo, video: MeasuredVideo) -> tuple[LaidVideo, MeasuredVideo]:
    """Both with the path that the file has now."""
    path = folder / VIDEOS / video.name / video.path.name
    return replace(laid, path=path), replace(video, path=path)


def _earlier(folder: Path, name: str) -> list[Path]:
    """The videos of a row that lie there already, and their layout for VBench."""
    laid = folder / LAYOUT / name
    return sorted((folder / VIDEOS / name).glob("*.mp4")) + ([laid] if laid.exists() else [])


def _read(reader: RowReader, every: Sequence[Contender]) -> None:
    """Reads the rows as all contenders take them; the reader keeps them. Raises: ConfigError, DataError."""
    for one in every:
        reader.read(one.source)


def _make_share(
    every: Sequence[Contender], reader: RowReader, asked: Asked, part: Path
) -> list[tuple[LaidVideo, MeasuredVideo]]:
    """Files of this rank's rows by all contenders, one of whom is in memory at a time, and what was measured."""
    counts = [len(reader.read(one.source).rows) * asked.samples for one in every]
    frames = [_longest(one, reader.read(one.source)) for one in every]
    pace = Pace(sum(counts), sum(count * each for count, each in zip(counts, frames)))
    with measuring_threads() as pool:
        try:
            made = [(one, video) for one in every for video in _videos_of(one, reader, asked, part, pool, pace)]
        finally:
            pace.progress.finish()
        files = [(one, video, *file) for one, video in made for file in video.files.items()]
        return [
            (laid, video.seen.added_to(video.measuring[multiple].result(), one.num_latent_frames(multiple)))
            for one, video, multiple, laid in track(files, "measuring", "videos")
        ]


def _longest(one: Contender, reading: Reading) -> int:
    """Pixel frames of a contender's videos, the shorter ones of which are its beginnings."""
    return pixel_frames(one.num_latent_frames(one.multiples[-1]), reading.decoder.temporal_stride)


def _videos_of(one: Contender, reader: RowReader, asked: Asked, part: Path, pool: Executor, pace: Pace) -> list[Made]:
    """Makes the videos of all rows of this rank, while the files of those before are measured."""
    reading = reader.read(one.source)
    denoiser = one.load(reader.mesh.device)
    plan, clean = reading.beginning.plan_of(given=reading.given), not reading.beginning.needed
    if (denoiser.model.config.condition_channels > 0) == clean:
        raise ConfigError(f"{one.name} takes pictures in another way than the student does; leave it out")
    if reading.given and reading.beginning.picture == "still" and not one.streams:
        raise ConfigError(f"{one.name} has no blocks for a picture to stand still in; set picture=frame")
    made = []
    for (row, sample), index in product(zip(reading.rows, reading.samples), range(asked.samples)):
        pace.begin(one.name)
        name = f"{row.number:05d}-{_UNUSUAL.sub('_', row.name)[:_NAME_SIGNS]}"
        stem = f"{name}-{index}" if asked.samples > 1 else name
        files = {multiple: part / one.row_name(multiple) / f"{stem}.mp4" for multiple in one.multiples}
        latents = one.maker(denoiser, plan, first_frame_clean=clean, seed=asked.seed + index)(row)
        picture, seen = _write_videos(one, latents, reading, sample.image, files)
        measuring = {
            multiple: pool.submit(measure_video, one.row_name(multiple), path, _blocks(one, plan, multiple, reading))
            for multiple, path in files.items()
        }
        laid = {n: LaidVideo(path, name, sample.prompt, picture, index) for n, path in files.items()}
        made.append(Made(laid, measuring, seen))
        pace.end(_longest(one, reading))
    return made


def _blocks(one: Contender, plan: StreamPlan, multiple: int, reading: Reading) -> Blocks | None:
    if not one.streams:
        return None
    _, end = plan.block_of(one.num_latent_frames(multiple) - 1)  # videos are cut from whole blocks
    return blocks_of(plan, end, reading.decoder.temporal_stride)


def _write_videos(
    one: Contender, latents: Tensor, reading: Reading, picture: NDArray[np.uint8] | None, files: Mapping[int, Path]
) -> tuple[NDArray[np.uint8], Seen]:
    """Decodes latents [1, F, C, H, W] into files, each with its beginning of the video.

    Returns the picture (None: the first frame stands in for it) and what is seen of the video on the way.
    """
    settings, stride = one.source.settings, reading.decoder.temporal_stride
    lengths = {pixel_frames(one.num_latent_frames(multiple), stride): path for multiple, path in files.items()}
    meter, likeness, number = LatentMeter(), None, 0
    meter.add(latents[0])
    with ExitStack() as stack:
        writers: dict[int, VideoWriter] = {}
        for piece in decoded(reading.decoder, latents):
            if number == 0:
                picture = piece[0] if picture is None else picture
                likeness = None if reading.image is None else LikenessMeter(_embed(reading.image, picture[None])[0])
                for length, path in lengths.items():
                    writer = VideoWriter(path, settings.fps, *piece.shape[1:3], keep=False)
                    writers[length] = stack.enter_context(writer)
            for length, writer in writers.items():
                if number < length:
                    writer.write(piece[: length - number])
            if likeness is not None and reading.image is not None:
                likeness.add(_embed(reading.image, piece))
            number += len(piece)
    assert picture is not None
    window = max(1, one.clip_frames // _WINDOW_SHARE)
    return picture, Seen(meter, likeness, window, stride)


def _embed(image: ImageEncoder, frames: NDArray[np.uint8]) -> Tensor:
    return image.embed(to_signed(frames))


def ratios_to_teacher(videos: Sequence[MeasuredVideo]) -> dict[str, dict[str, float | None]]:
    """By row `against` of its videos and the teacher's, None where a ratio has no meaning; empty without a teacher."""
    teacher = [video.measured for video in videos if video.name == TEACHER]
    names = [name for name in dict.fromkeys(video.name for video in videos) if name != TEACHER]
    rows = {name: [video.measured for video in videos if video.name == name] for name in names if teacher}
    found = {name: against(own, teacher) for name, own in rows.items()}
    return {name: {key: v if math.isfinite(v) else None for key, v in row.items()} for name, row in found.items()}


def tables(videos: Sequence[MeasuredVideo]) -> str:
    """What is printed: the table of `measure`, and that of the ratios to the teacher's videos."""
    ratios = ratios_to_teacher(videos)
    cells = [["", *(title(key) for row in list(ratios.values())[:1] for key in row)]]
    cells += [[name, *map(ratio, row.values())] for name, row in ratios.items()]
    return "\n\n".join([as_table(videos), *([aligned(cells)] if ratios else [])])


def _write(
    folder: Path, videos: Sequence[MeasuredVideo], longest: set[str], asked: Asked, prompts: Mapping[str, str]
) -> None:
    settings: dict[str, Any] = {**asdict(asked), "data": str(asked.data)}
    ratios = ratios_to_teacher(videos)
    write_json(folder / "evaluation.json", {"settings": settings, **as_json(videos), "against_teacher": ratios})
    write_whole(folder / "evaluation.md", tables(videos) + "\n")
    played = [video for video in videos if video.name in longest]
    write_page(folder / "evaluation.html", videos, played=played, captions=prompts, ratios=ratios)
