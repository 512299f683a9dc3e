"""Videos in folders, whoever made them: measured, averaged with intervals, as a table, JSON and an HTML page.

Everything that can be wrong with the input is found before the first video is measured. Must know no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from longtake.data.clips import open_video
from longtake.data.file_rows import files_below
from longtake.data.samples import CLIP_SUFFIXES
from longtake.devices import num_cores
from longtake.errors import ConfigError, DataError, ShapeError
from longtake.evaluation.instruments import METRICS, Blocks, Measured, measure
from longtake.evaluation.report import aligned

_RESAMPLES = 2000  # of the bootstrap
_POSTER_HEIGHT = 120  # pixels
_TITLES = {
    "motion_px_s": "motion px/s",
    "dynamic_degree": "dynamic",
    "still_share": "still",
    "first_frame_similarity": "like 1st frame",
    "seam_score": "seam",
    "sink_returns": "returns",
    "bad_frames": "bad frames",
}


@dataclass(frozen=True, eq=False)
class MeasuredVideo:
    """A file of the folder that is called `name`, what was measured in it, and its first frame, small."""

    name: str
    path: Path
    measured: Measured
    poster: NDArray[np.uint8]


def parse_folders(texts: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` texts by name. Raises: ConfigError for what is none, and for a name that is there twice."""
    found: dict[str, Path] = {}
    for text in texts:
        name, sign, folder = text.partition("=")
        if not (name and sign and folder):
            raise ConfigError(f"{text!r} is no NAME=FOLDER; give a folder of videos a name: mine=outputs/videos")
        if name in found:
            raise ConfigError(f"the name {name} is given twice ({found[name]} and {folder}); call one otherwise")
        found[name] = Path(folder).expanduser()
    return found


def parse_blocks(text: str | None) -> Blocks | None:
    """`12`, or `9+12` where the first block has 9 frames. Raises: ConfigError."""
    if text is None:
        return None
    first, plus, frames = text.partition("+")
    try:
        return Blocks(int(frames if plus else first), int(first))
    except (ValueError, ShapeError):
        raise ConfigError(
            f"--block {text} is no length of blocks; give frames, 2 or more, such as 12, or 9+12 where the first has 9"
        ) from None


def find_videos(folders: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """Name and path of every video in the folders and below them; the first frames of each were decoded.

    Raises: ConfigError for a folder that does not exist or holds no video, DataError for a file that cannot be read.
    """
    found = []
    for name, folder in folders.items():
        if not os.path.isdir(folder):
            raise ConfigError(f"{name}={folder}: there is no such folder; name one that holds videos")
        paths = files_below(folder, CLIP_SUFFIXES)
        if not paths:
            raise ConfigError(f"{name}={folder}: there is no video in it ({', '.join(CLIP_SUFFIXES)})")
        found += [(name, path) for path in paths]
    for _, path in found:
        with open_video(path, f"video {path}") as video:
            if len(list(islice(video.frames(), 2))) < 2:
                raise DataError(f"video {path} has fewer than 2 frames; remove it")
            if not (video.stream.average_rate or video.stream.guessed_rate):
                raise DataError(f"video {path} states no frame rate; write it again as mp4")
    return found


def measure_video(name: str, path: Path, blocks: Blocks | None = None) -> MeasuredVideo:
    """Reads a video frame by frame and measures it. Raises: DataError that names the file."""
    posters: list[NDArray[np.uint8]] = []
    with open_video(path, f"video {path}") as video:
        fps = float(video.stream.average_rate or video.stream.guessed_rate)

        def frames() -> Any:
            for frame in video.frames():
                pixels = video.pixels(frame)
                if not posters:
                    width = max(1, round(pixels.shape[1] * _POSTER_HEIGHT / pixels.shape[0]))
                    small = cv2.resize(pixels, (width, _POSTER_HEIGHT), interpolation=cv2.INTER_AREA)
                    posters.append(np.asarray(small, np.uint8))
                yield pixels

        try:
            measured = measure(frames(), fps, blocks)
        except ShapeError as error:
            raise DataError(f"video {path}: {error}") from error
    return MeasuredVideo(name, path, measured, posters[0])


def measure_folders(folders: Mapping[str, Path], blocks: Blocks | None = None) -> list[MeasuredVideo]:
    """Measures every video of the folders, as many at a time as there are cores, in the order of names and paths.

    Raises: as `find_videos`, before anything is measured, and DataError for damage further on in a file.
    """
    jobs = find_videos(folders)
    with measuring_threads() as pool:
        running = [pool.submit(measure_video, name, path, blocks) for name, path in jobs]
        return [one.result() for one in running]


@contextmanager
def measuring_threads(processes: int = 1) -> Iterator[Executor]:
    """As many threads as there are cores for each of `processes`, to measure in; after an error none begins."""
    # Decoding and measuring let other threads run; those of OpenCV itself would only stand in each other's way.
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(max(1, num_cores() // processes)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def metrics_of(videos: Sequence[MeasuredVideo]) -> list[str]:
    """METRICS, then what was measured of some of the videos beside them."""
    return list(dict.fromkeys([*METRICS, *(metric for video in videos for metric in video.measured.metrics)]))


def summarise(videos: Sequence[MeasuredVideo]) -> dict[str, dict[str, dict[str, float | None]]]:
    """`{NAME: {METRIC: {mean, low, high}}}`, means over the videos of a name with 95 % intervals.

    The intervals are percentiles of the means of videos drawn with replacement, always the same ones; a single video
    has none. A metric that no video has is None.
    """
    metrics = metrics_of(videos)
    rows: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in dict.fromkeys(video.name for video in videos):
        own = [video.measured.metrics for video in videos if video.name == name]
        rows[name] = {
            metric: _interval([value for one in own if (value := one.get(metric)) is not None]) for metric in metrics
        }
    return rows


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "low": None, "high": None}
    array = np.array(values)
    if len(array) == 1:
        return {"mean": float(array[0]), "low": None, "high": None}
    drawn = np.random.default_rng(0).integers(0, len(array), (_RESAMPLES, len(array)))
    low, high = np.percentile(array[drawn].mean(1), [2.5, 97.5])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}


def as_json(videos: Sequence[MeasuredVideo]) -> dict[str, Any]:
    """What `--json` writes: every video with its curves, and the rows of the table."""
    listed = [
        {
            "name": video.name,
            "path": str(video.path),
            "frames": video.measured.frames,
            "fps": video.measured.fps,
            "metrics": video.measured.metrics,
            "first_frame_similarity_slope": video.measured.slope,
            "defects": list(video.measured.defects),
            "curves": {name: [_short(value) for value in curve] for name, curve in video.measured.curves.items()},
        }
        for video in videos
    ]
    return {"videos": listed, "rows": summarise(videos)}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def as_table(videos: Sequence[MeasuredVideo]) -> str:
    """The rows as a Markdown table with a line a metric: mean, and its interval in brackets."""
    rows = summarise(videos)
    counts = {name: sum(video.name == name for video in videos) for name in rows}
    cells = [["", *(f"{name} ({counts[name]})" for name in rows)]]
    cells += [[title(metric), *(shown(rows[name][metric]) for name in rows)] for metric in metrics_of(videos)]
    return aligned(cells)


def title(metric: str) -> str:
    """A metric as a table calls it."""
    return _TITLES.get(metric, metric.replace("_", " "))


def ratio(value: float | None) -> str:
    """A ratio as a table shows it."""
    return "-" if value is None else f"{value:.2f}"


def shown(cell: Mapping[str, float | None]) -> str:
    """A mean and its interval."""
    mean, low, high = cell["mean"], cell["low"], cell["high"]
    if mean is None:
        return "-"
    return f"{mean:.3g}" if low is None or high is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"
