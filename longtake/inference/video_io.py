"""mp4 files in and out, frame by frame, with PyAV alone. Must know no model."""

from __future__ import annotations

import struct
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.data.clips import open_video
from longtake.data.h264 import add_h264, encode
from longtake.errors import DataError, OutputError, ShapeError
from longtake.outputs import check_output_file, free_name, partial_name, writing

VIDEO_SUFFIXES = (".mp4",)
_MAX_FPS_DENOMINATOR = 1001  # 29.97 is 30000/1001
_MAX_FPS, _MAX_SIDE = 1000, 16384
_THREADS = 8  # not the machine's number, on which the bytes depend
# A third of the default's work for 0.1 to 0.3 dB less at the same crf (480x832), and files that are no larger: what
# follows a stream must keep up with it.
_PRESET = "veryfast"
_FRAGMENTS = {"movflags": "+hybrid_fragmented", "frag_duration": "1000000"}


class VideoWriter:
    """Writes an H.264 mp4 while frames arrive; the file appears under its name only when it is complete.

    Use as a context manager: leaving it without an exception publishes the file. After an exception, also of the disk,
    what was written until then is kept as `NAME.partial.mp4`, which plays (`keep`: or else nothing is). The same frames
    give the same file.

    Args: `fps` frames a second; `height`, `width` in pixels, both even; `crf` 0..51, lower is better.
    Raises: ShapeError for odd sizes and wrong frames, OutputError when the file cannot be written, DataError when no
    frame came.
    """

    def __init__(
        self, path: str | Path, fps: float, height: int, width: int, *, crf: int = 15, keep: bool = True
    ) -> None:
        if not (2 <= height <= _MAX_SIDE and 2 <= width <= _MAX_SIDE) or height % 2 or width % 2:
            raise ShapeError(
                f"a video of {height}x{width} pixels cannot be written; H.264 (yuv420p) needs even sides, at most "
                f"{_MAX_SIDE}"
            )
        if not 1 / _MAX_FPS <= fps <= _MAX_FPS:
            raise DataError(f"fps={fps} must be positive, at most {_MAX_FPS} and at least its inverse")
        if not 0 <= crf <= 51:
            raise DataError(f"crf={crf} must be between 0 (lossless) and 51")
        self.path = Path(path)
        self.fps, self.height, self.width, self.crf, self.keep = fps, height, width, crf, keep
        self.num_frames = 0
        self._partial = partial_name(self.path)
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        import av

        check_output_file(self.path, overwrite=True)
        with writing(self.path):
            # Fragments until it is complete, then a plain mp4: what a full disk or a power cut leaves can be played.
            self._container = av.open(str(self._partial), "w", format="mp4", options=_FRAGMENTS)
        rate = Fraction(self.fps).limit_denominator(_MAX_FPS_DENOMINATOR)
        size, crf = (self.height, self.width), str(self.crf)
        self._stream = add_h264(
            self._container, rate, *size, pixels="yuv420p", threads=_THREADS, crf=crf, preset=_PRESET
        )
        return self

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Appends `frames`, uint8 [T, h, w, 3] or [h, w, 3]."""
        if self._container is None:
            raise DataError(f"{self.path} is not open; use `with VideoWriter(...) as writer`")
        frames = np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            raise ShapeError(
                f"frames must be uint8 [T, {self.height}, {self.width}, 3]; got {frames.dtype} {frames.shape}"
            )
        with writing(self.path):
            for frame in frames:
                self._container.mux(encode(self._stream, frame))
                self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        container, self._container = self._container, None
        try:
            try:
                if self.num_frames and not isinstance(error, OutputError):
                    with writing(self.path):
                        container.mux(self._stream.encode())
            finally:
                with writing(self.path):
                    container.close()
            if error is None and self.num_frames == 0:
                raise DataError(f"no frame was written to {self.path}; write at least one")
            if error is None:
                with writing(self.path):
                    self._partial.replace(self.path)
        except OutputError as failure:
            if error is None:
                self._keep(failure)
                raise
        finally:
            if error is not None:
                self._keep(error)
            self._partial.unlink(missing_ok=True)

    def _keep(self, error: BaseException) -> None:
        """Keeps what is whole under a name of its own, and says so in a note of the error that ends the video."""
        if not (self.keep and self.num_frames > 1 and self._partial.exists()) or not _cut_to_whole_fragments(
            self._partial
        ):
            return
        kept = free_name(self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}"))
        self._partial.rename(kept)
        error.add_note(f"what was made until then is kept in {kept}")


def _cut_to_whole_fragments(path: Path) -> bool:
    """Cuts an mp4 behind its last whole box that holds pictures; False when it has none."""
    size, position, end = path.stat().st_size, 0, 0
    with path.open("r+b") as file:
        while position + 16 <= size:
            file.seek(position)
            length, kind, longer = struct.unpack(">I4sQ", file.read(16))
            position += longer if length == 1 else length
            if length == 0 or position > size:
                break
            if kind == b"mdat" or (end and kind == b"moov"):
                end = position
        if end:
            file.truncate(end)
    return end > 0


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
