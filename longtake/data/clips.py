"""Video clips of a given length and rate, and folders of mp4 files with captions."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longtake.data.file_rows import identities, list_files
from longtake.data.images import fit_pixels
from longtake.data.samples import Sample, Sizes
from longtake.data.video_frames import open_video
from longtake.errors import DataError


class ClipFolder:
    """A folder of videos with captions (`file_rows.py`); a row is the first `num_frames` frames.

    With `fps`, what a player shows at the times 0, 1/fps, 2/fps, ... is taken, so that motion keeps its real speed;
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
    Raises: DataError naming `where`, and the time in the file, when it is missing, damaged, interlaced, HDR, too short,
    has too few pictures a second for `fps`, or changes its size.
    """
    where = where or str(source)
    with open_video(source, where) as video:
        shown = video.at_rate(fps, num_frames) if fps else map(video.pixels, islice(video.frames(), num_frames))
        frames = [fit_pixels(pixels, sizes) for pixels in shown]
    if len(frames) < num_frames:
        rate = f" at {fps:g} frames a second" if fps else ""
        raise DataError(
            f"{where} has {len(frames)} frames{rate} and {num_frames} are needed; remove it or cut it longer"
        )
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{where} changes its picture size on the way; set height and width")
    return np.stack(frames)


def clip_size(source: Path | bytes, where: str) -> tuple[int, int]:
    """(height, width) of a video's first frame as it is shown. Raises: DataError naming `where`."""
    with open_video(source, where) as video:
        for frame in video.frames():
            height, width, _ = video.pixels(frame).shape
            return height, width
    raise DataError(f"{where} has no frames")
