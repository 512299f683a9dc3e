"""Videos in and out, frame by frame. Must know no model."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from longtake.data.clips import open_video
from longtake.errors import ConfigError, DataError, OutputError, ShapeError
from longtake.inference.containers import Record, Sink, Target
from longtake.outputs import writing

_MAX_FPS_DENOMINATOR = 1001  # 29.97 is 30000/1001
_MAX_FPS, _MAX_SIDE, _MAX_SCALE = 1000, 16384, 16


class VideoWriter:
    """Writes a video while frames arrive, in the container that its name says (`Target`). It appears under its name
    only when it is complete; the same frames and record give the same file.

    Use as a context manager: leaving it without an exception publishes the file. Until then what was written lies
    beside it as `NAME.partial.SUFFIX`, which plays, also after the process was killed or the disk full; H.264 holds the
    latest dozen frames back, which an exception still gets. (Without `keep`: under a hidden name, and an exception
    removes it.)

    Args: `fps` frames a second; `height`, `width` of frames in pixels, both even; `crf` 0..51, lower is better (gif and
    png have no such choice); `scale`, by which pictures are enlarged; `record`, what the file says about itself, may be
    changed until it is complete.
    Raises: ShapeError for odd sizes and wrong frames, OutputError when the file cannot be written, DataError when no
    frame came, ConfigError for a name that says no container.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        height: int,
        width: int,
        *,
        crf: int = 15,
        scale: float = 1.0,
        keep: bool = True,
        record: Record | None = None,
    ) -> None:
        self.target, self.size = Target.of(path), scaled_size(height, width, scale)
        if not 1 / _MAX_FPS <= fps <= _MAX_FPS:
            raise DataError(f"fps={fps} must be positive, at most {_MAX_FPS} and at least its inverse")
        if not 0 <= crf <= 51:
            raise DataError(f"crf={crf} must be between 0 (lossless) and 51")
        self.path = Path(path)
        self.fps, self.height, self.width, self.crf, self.keep = fps, height, width, crf, keep
        self.record, self.num_frames = record, 0
        self._sink: Sink | None = None
        self._partial = self.target.path

    def __enter__(self) -> VideoWriter:
        self.target.check(overwrite=True)
        self._partial = self.target.partial(visible=self.keep)
        rate = Fraction(self.fps).limit_denominator(_MAX_FPS_DENOMINATOR)
        with writing(self.path):
            self._sink = self.target.open(self._partial, rate, *self.size, self.crf)
        return self

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Appends `frames`, uint8 [T, h, w, 3] or [h, w, 3]."""
        if self._sink is None:
            raise DataError(f"{self.path} is not open; use `with VideoWriter(...) as writer`")
        frames = np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (self.height, self.width, 3):
            raise ShapeError(
                f"frames must be uint8 [T, {self.height}, {self.width}, 3]; got {frames.dtype} {frames.shape}"
            )
        with writing(self.path):
            for frame in frames:
                self._sink.add(_resized(frame, *self.size))
                self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sink, self._sink = self._sink, None
        assert sink is not None
        plays, failure = False, error
        try:
            with writing(self.path):
                plays = sink.close(drop=self.num_frames == 0 or isinstance(error, OutputError))
            if error is None:
                self._publish(sink)
        except OutputError as refused:
            failure = error or refused
            if error is None:
                raise
        finally:
            if failure is not None and plays and self.keep and self.num_frames > 1:
                failure.add_note(f"what was made until then is kept in {self._partial}")
            else:
                sink.remove()

    def _publish(self, sink: Sink) -> None:
        if self.num_frames == 0:
            raise DataError(f"no frame was written to {self.path}; write at least one")
        with writing(self.path):
            sink.publish(self.target.path, self.record)


def check_scale(scale: float) -> None:
    """Raises ConfigError for a factor that pictures cannot be enlarged by."""
    if not 1 / _MAX_SCALE <= scale <= _MAX_SCALE:
        raise ConfigError(f"scale={scale} must be between 1/{_MAX_SCALE} and {_MAX_SCALE}")


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width of a video whose frames are enlarged by `scale`, even.

    Raises: ConfigError for a scale that is none, ShapeError for sizes that no video has.
    """
    check_scale(scale)
    size = (height, width) if scale == 1 else (2 * round(height * scale / 2), 2 * round(width * scale / 2))
    if not all(2 <= side <= _MAX_SIDE and side % 2 == 0 for side in size):
        raise ShapeError(
            f"a video of {size[0]}x{size[1]} pixels cannot be written; H.264 (yuv420p) needs even sides, at most "
            f"{_MAX_SIDE}"
        )
    return size


def _resized(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


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
