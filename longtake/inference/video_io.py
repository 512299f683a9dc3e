"""mp4 files in and out, frame by frame, with PyAV alone. Must know no model."""

from __future__ import annotations

import os
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.data.video_frames import open_video
from longtake.errors import DataError, ShapeError

_MAX_FPS_DENOMINATOR = 1001  # 29.97 is 30000/1001


class VideoWriter:
    """Writes an H.264 mp4 while frames arrive; the file appears under its name only when it is complete.

    Use as a context manager: leaving it without an exception publishes the file, an exception removes what was written.

    Args: `fps` frames a second; `height`, `width` in pixels, both even; `crf` 0..51, lower is better.
    Raises: ShapeError for odd sizes and wrong frames, DataError when the file cannot be written or no frame came.
    """

    def __init__(self, path: str | Path, fps: float, height: int, width: int, *, crf: int = 15) -> None:
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise ShapeError(f"a video of {height}x{width} pixels cannot be written; H.264 (yuv420p) needs even sides")
        if not fps > 0:
            raise DataError(f"fps={fps} must be positive")
        if not 0 <= crf <= 51:
            raise DataError(f"crf={crf} must be between 0 (lossless) and 51")
        self.path = Path(path)
        self.fps, self.height, self.width, self.crf = fps, height, width, crf
        self.num_frames = 0
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        import av

        if not self.path.parent.is_dir():
            raise DataError(f"the folder of {self.path} does not exist; create it first")
        try:
            self._container = av.open(str(self._partial), "w", format="mp4")
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error}") from error
        rate = Fraction(self.fps).limit_denominator(_MAX_FPS_DENOMINATOR)
        self._stream = self._container.add_stream("libx264", rate=rate)
        self._stream.height, self._stream.width, self._stream.pix_fmt = self.height, self.width, "yuv420p"
        self._stream.options = {"crf": str(self.crf)}
        return self

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Appends `frames`, uint8 [T, h, w, 3] or [h, w, 3]."""
        import av

        if self._container is None:
            raise DataError(f"{self.path} is not open; use `with VideoWriter(...) as writer`")
        frames = np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            raise ShapeError(
                f"frames must be uint8 [T, {self.height}, {self.width}, 3]; got {frames.dtype} {frames.shape}"
            )
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(picture))
            self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.num_frames == 0:
                raise DataError(f"no frame was written to {self.path}; write at least one")
            if kind is None:
                self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None
            if kind is None:
                self._partial.replace(self.path)
        finally:
            if self._container is not None:
                self._container.close()
                self._container = None
            self._partial.unlink(missing_ok=True)


def read_video(path: str | Path, *, num_frames: int | None = None) -> tuple[NDArray[np.uint8], float]:
    """The frames, uint8 [T, h, w, 3], and the frames a second of a video file; at most `num_frames` of them.

    Raises: DataError, naming the file, when it is missing, is no video, or is damaged.
    """
    where = f"video {path}"
    with open_video(Path(path), where, threads=True) as video:
        frames = [video.pixels(frame) for frame in islice(video.frames(), num_frames)]
        rate = video.stream.average_rate or video.stream.guessed_rate
    if not frames or not rate:
        raise DataError(f"{where} holds no frame or states no frame rate; give an mp4 file that plays")
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{where} changes its picture size on the way; cut it there")
    return np.stack(frames), float(rate)
