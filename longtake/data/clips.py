"""Video clips: decoding with PyAV, and folders of mp4 files with captions."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.data.file_rows import identities, list_files
from longtake.data.images import fit_pixels
from longtake.data.samples import Sample, Sizes
from longtake.errors import DataError


class ClipFolder:
    """A folder of videos with captions (`file_rows.py`); a row is the first `num_frames` frames.

    With `fps`, the frames nearest to the times 0, 1/fps, 2/fps, ... are taken, so that motion keeps its real speed;
    without it every stored frame counts as one.
    """

    def __init__(self, path: Path, num_frames: int, sizes: Sizes = (), fps: float | None = None) -> None:
        self.path = path
        self.num_frames = num_frames
        self.sizes = sizes
        self.fps = fps
        self._rows = list_files(path, "clips")

    def identities(self) -> Iterable[str]:
        """Names of the files, and prompts that are known without reading a caption."""
        return identities(self._rows, self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        file, prompts = self._rows[row].check()
        where = self._rows[row].where
        video = read_clip(file, self.num_frames, sizes=self.sizes, fps=self.fps, where=f"{where}: clip {file}")
        return Sample(file.stem, prompts[0], video[0], video, prompts=prompts, where=where)

    def pixel_size(self, row: int) -> tuple[int, int]:
        """(height, width) of the first frame on disk, upright. Raises: DataError."""
        file, _ = self._rows[row].check()
        return clip_size(file, where=f"{self._rows[row].where}: clip {file}")


def read_clip(
    source: Path | bytes, num_frames: int, *, sizes: Sizes = (), fps: float | None = None, where: str | None = None
) -> NDArray[np.uint8]:
    """The first `num_frames` frames of a video file, or of its bytes, as uint8 [num_frames, h, w, 3].

    The frames are brought to the nearest of `sizes`.
    Raises: DataError naming `where` when the file is missing, damaged, too short, or changes its size.
    """
    where = where or str(source)
    with _opened(source, where) as container:
        frames = [fit_pixels(pixels, sizes) for pixels in _pick_frames(container, num_frames, fps)]
    if len(frames) < num_frames:
        rate = f" at {fps:g} frames a second" if fps else ""
        raise DataError(
            f"{where} has {len(frames)} frames{rate} and {num_frames} are needed; remove it or cut it longer"
        )
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{where} changes its picture size on the way; set height and width")
    return np.stack(frames)


def clip_size(source: Path | bytes, where: str) -> tuple[int, int]:
    """(height, width) of a video's first frame, upright. Raises: DataError naming `where`."""
    with _opened(source, where) as container:
        for pixels in _pick_frames(container, 1, None):
            return pixels.shape[0], pixels.shape[1]
    raise DataError(f"{where} has no frames")


@contextmanager
def _opened(source: Path | bytes, where: str) -> Iterator[Any]:
    """The container of a video. Raises: DataError naming `where`, also for what its user meets while decoding."""
    import av

    if isinstance(source, Path) and not source.is_file():
        raise DataError(f"{where} does not exist")
    try:
        # One thread: clips are already read in parallel, and a loader must not outnumber the cores.
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            yield container
    except (av.FFmpegError, ValueError) as error:
        raise DataError(f"{where} cannot be decoded ({error})") from error


def _pick_frames(container: Any, num_frames: int, fps: float | None) -> Iterator[NDArray[np.uint8]]:
    """Yields at most `num_frames` decoded frames, one a tick of `fps`: the one shown nearest to the tick."""
    if not container.streams.video:
        raise ValueError("it has no video stream")
    stream = container.streams.video[0]
    half = float(1 / stream.average_rate) / 2 if stream.average_rate else 0.0
    start: float | None = None
    taken = 0
    for frame in container.decode(stream):
        if fps is None:
            repeats = 1
        else:
            if frame.time is None:
                raise ValueError("its frames carry no time stamps")
            start = frame.time if start is None else start
            # The frame is the nearest one to every tick before the middle between it and the next frame.
            repeats = max(0, int(np.ceil((frame.time - start + half) * fps - 1e-6)) - taken)
        if repeats:
            pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
            # Telephones store portrait videos lying down, with the turn beside them.
            pixels = np.rot90(pixels, round(frame.rotation / 90) % 4)
            for _ in range(min(repeats, num_frames - taken)):
                yield pixels
            taken += repeats
        if taken >= num_frames:
            return
