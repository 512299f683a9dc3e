"""`longtake evaluate --data`: videos of any rows by students and their teacher, kept as files and measured.

What is measured are the files, by what measures files of any origin, so that `longtake measure` finds the same numbers
again. Beside them go what only the makers know: where blocks begin, how latents drift, and how like CLIP finds frames.
A student makes its longest video alone; the shorter ones are its beginnings.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
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
from longtake.outputs import check_output_folder, writing
from longtake.parallel.mesh import Mesh

VIDEOS, LAYOUT = "videos", "vbench"  # folders beside table, JSON and page
_WINDOW_SHARE = 4  # the first window of latents is a quarter of the training clips
_UNUSUAL, _NAME_SIGNS = re.compile(r"[^\w.-]+"), 60  # of a row's name in that of a file

logger = logging.getLogger(__name__)


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
    """Video number `index` of a row and its `picture`, in files by their length in training clips; these are measured
    while others are made.
    """

    row: str
    prompt: str
    index: int
    picture: NDArray[np.uint8]
    seen: Seen
    files: Mapping[int, Path]
    measuring: Mapping[int, Future[MeasuredVideo]]


def evaluate_on_data(
    target: EvalTarget, asked: Asked, folder: Path, mesh: Mesh, *, overwrite: bool = False
) -> list[MeasuredVideo]:
    """Makes and measures the videos of every row, and writes table, JSON, page and videos to `folder`.

    The ranks share the rows; all of them call it.
    Raises: ConfigError for rules that cannot be followed and a folder that is not free, DataError for bad rows.
    """
    every = contenders(target, asked)
    names = [one.row_name(multiple) for one in every for multiple in one.multiples]
    mesh.on_main(lambda: _prepare(folder, names, overwrite=overwrite))
    parts = mesh.every(lambda: _make_share(every, asked, folder, mesh))
    videos = [video for name in names for part, _ in parts for video in part if video.name == name]
    prompts = {stem: prompt for _, part in parts for stem, prompt in part.items()}
    longest = {one.row_name(one.multiples[-1]) for one in every}
    mesh.on_main(lambda: _write(folder, videos, longest, asked, prompts))
    return videos


def _prepare(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Makes room for the videos. Raises: ConfigError when there are others and `overwrite` is not given."""
    check_output_folder(folder)
    for name in names:
        there = sorted((folder / VIDEOS / name).glob("*.mp4"))
        if there and not overwrite:
            raise ConfigError(f"{there[0]} exists already; name another folder with -o, or give --overwrite")
        for file in there:
            file.unlink()
        shutil.rmtree(folder / LAYOUT / name, ignore_errors=True)
        (folder / VIDEOS / name).mkdir(parents=True, exist_ok=True)


def _make_share(
    every: Sequence[Contender], asked: Asked, folder: Path, mesh: Mesh
) -> tuple[list[MeasuredVideo], dict[str, str]]:
    """This rank's rows by all contenders, one of whom is in memory at a time; and the prompts by names of files."""
    reader = RowReader(asked.data, asked.num_rows, mesh)
    found: list[MeasuredVideo] = []
    with measuring_threads() as pool:
        made = [(one, _videos_of(one, reader, asked, folder, pool)) for one in every]
        for one, videos in made:
            for multiple in one.multiples:
                frames = one.num_latent_frames(multiple)
                found += [video.seen.added_to(video.measuring[multiple].result(), frames) for video in videos]
                if asked.layout:
                    laid = [LaidVideo(v.files[multiple], v.row, v.prompt, v.picture, v.index) for v in videos]
                    lay_out(laid, folder / LAYOUT / one.row_name(multiple))
    prompts = {video.files[1].stem: video.prompt for _, videos in made for video in videos}
    return found, prompts


def _videos_of(one: Contender, reader: RowReader, asked: Asked, folder: Path, pool: Executor) -> list[Made]:
    """Makes the videos of all rows of this rank, while the files of those before are measured."""
    reading = reader.read(one.source)
    model = one.load(reader.mesh.device)
    if model.config.condition_channels != reading.condition_channels:
        raise ConfigError(f"{one.name} takes pictures in another way than the student does; leave it out")
    made = []
    for (row, sample), index in product(zip(reading.rows, reading.samples), range(asked.samples)):
        begun = time.perf_counter()
        name = f"{row.number:05d}-{_UNUSUAL.sub('_', row.name)[:_NAME_SIGNS]}"
        stem = f"{name}-{index}" if asked.samples > 1 else name
        files = {multiple: folder / VIDEOS / one.row_name(multiple) / f"{stem}.mp4" for multiple in one.multiples}
        latents = one.maker(model, asked.seed + index)(row)
        picture, seen = _write_videos(one, latents, reading, sample.image, files)
        measuring = {
            multiple: pool.submit(measure_video, one.row_name(multiple), path, _blocks(one, multiple, reading))
            for multiple, path in files.items()
        }
        made.append(Made(name, sample.prompt, index, picture, seen, files, measuring))
        logger.info("%s made %s in %.1f s", one.name, stem, time.perf_counter() - begun)
    return made


def _blocks(one: Contender, multiple: int, reading: Reading) -> Blocks | None:
    if one.plan is None:
        return None
    _, end = one.plan.block_of(one.num_latent_frames(multiple) - 1)  # videos are cut from whole blocks
    return blocks_of(one.plan, end, reading.vae.temporal_stride)


def _write_videos(
    one: Contender, latents: Tensor, reading: Reading, picture: NDArray[np.uint8] | None, files: Mapping[int, Path]
) -> tuple[NDArray[np.uint8], Seen]:
    """Decodes latents [1, F, C, H, W] into files, each with its beginning of the video.

    Returns the picture (None: the first frame stands in for it) and what is seen of the video on the way.
    """
    settings, stride = one.source.settings, reading.vae.temporal_stride
    lengths = {pixel_frames(one.num_latent_frames(multiple), stride): path for multiple, path in files.items()}
    meter, likeness, number = LatentMeter(), None, 0
    meter.add(latents[0])
    with ExitStack() as stack:
        writers: dict[int, VideoWriter] = {}
        for piece in decoded(reading.vae, latents):
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
    with writing(folder / "evaluation.json"):
        ratios = ratios_to_teacher(videos)
        write_json(folder / "evaluation.json", {"settings": settings, **as_json(videos), "against_teacher": ratios})
        (folder / "evaluation.md").write_text(tables(videos) + "\n")
        played = [video for video in videos if video.name in longest]
        write_page(folder / "evaluation.html", videos, played=played, captions=prompts, ratios=ratios)
