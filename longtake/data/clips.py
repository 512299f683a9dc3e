"""Video files: their pictures as a player shows them, and clips of a given length and rate.

Shown is the film and not its cover, upright, with square pixels. What cannot be shown so (damage, HDR, half pictures)
is an error that names file and time. Must know no data set.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from longtake.data.file_rows import what_it_is
from longtake.data.images import fit_pixels
from longtake.data.samples import Sizes
from longtake.errors import DataError

# Numbers of ITU-T H.273, as frames carry them. Left out of both: linear, logarithmic, PQ, HLG; BT.2020, DCI-P3 and P3.
_SDR_TRANSFERS = {0, 1, 2, 4, 5, 6, 7, 11, 12, 13, 14, 15}
_WIDE_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_UNSPECIFIED = 2
_STEEPEST_PIXEL = 8  # width over height of a pixel; more is a damaged head
_TOLERANCE = 0.002  # seconds: many containers count whole milliseconds, and both ends of a difference are rounded
_MOST_REPEATS = 3  # ticks that a picture may fill where no two of a clip are nearer; more is no motion to learn from


class VideoFrames:
    """The pictures of an open video, in the order in which they are shown; made by `open_video`."""

    def __init__(self, container: Any, where: str) -> None:
        import av

        films = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not films:
            what = "only a cover picture" if container.streams.video else "no video stream"
            raise DataError(f"{where} has {what}; give a file with a film")
        self.where, self._container = where, container
        self.stream = max(films, key=lambda s: bool(s.disposition & av.stream.Disposition.default))
        if self.stream.codec_context is None:
            raise DataError(f"{where} names a codec that is not known here; repair it or write it again as H.264")
        # libavcodec reports damage in H.264 by flags; there `explode` would also refuse harmless additions of cameras.
        if self.stream.codec_context.name != "h264":
            self.stream.codec_context.options = {"err_detect": "explode"}
        self._first: float | None = None
        self._matrix: NDArray[np.int32] | None = None
        self._time = 0.0

    def frames(self) -> Iterator[Any]:
        """Yields the decoded frames. Raises: DataError with the time of one that is damaged or cannot be shown."""
        import av

        try:
            for packet in self._container.demux(self.stream):
                if packet.is_corrupt:
                    raise self.fault("is damaged or cut off")
                for frame in packet.decode():
                    self._look_at(frame)
                    yield frame
        except (av.FFmpegError, ValueError) as error:
            raise self.fault(f"cannot be decoded ({error})") from error

    def pixels(self, frame: Any) -> NDArray[np.uint8]:
        """A frame as it is shown, uint8 [h, w, 3]."""
        import av
        from av.video.reformatter import Colorspace

        untagged = int(frame.colorspace) == _UNSPECIFIED and not frame.format.is_rgb
        high = frame.width >= 1280 or frame.height > 576  # where no tag says it, players take these for BT.709
        colours = {"src_colorspace": Colorspace.ITU709} if untagged and high else {}
        try:
            pixels = self._square(np.asarray(frame.to_ndarray(format="rgb24", threads=1, **colours), dtype=np.uint8))
        except (av.FFmpegError, ValueError) as error:
            raise self.fault(f"has pictures that cannot be shown as RGB ({error})") from error
        return self._turned(pixels)

    def at_rate(self, fps: float, number: int) -> Iterator[NDArray[np.uint8]]:
        """Yields what is shown at the times 0, 1/fps, ..., at most `number` pictures; time 0 is the first picture's.

        Raises: DataError as `frames`, and for a video of so few pictures a second that each would fill many ticks.
        """
        taken, held, shortest = 0, None, float("inf")
        for frame in self.frames():
            if frame.time is None or held is not None and frame.time < held.time:
                raise self.fault("has pictures without time stamps, or of times that go back,")
            if held is not None:
                shortest = min(shortest, frame.time - held.time)
                due = self._ticks_before(frame.time, fps, number) - taken
                yield from self._repeated(held, due)
                taken += max(due, 0)
                if taken >= number:
                    break
            held = frame
        else:
            if held is not None:
                rate = self.stream.average_rate or self.stream.guessed_rate
                lasts = float(held.duration * held.time_base) if held.duration else float(1 / rate) if rate else 0.0
                shortest = min(shortest, lasts or shortest)
                yield from self._repeated(held, self._ticks_before(held.time + lasts, fps, number) - taken)
        if number > 1 and shortest * fps > _MOST_REPEATS + 0.01 and shortest < float("inf"):
            raise DataError(
                f"{self.where} has a picture every {shortest:.3g} s, and at {fps:g} frames a second each would be "
                f"shown {round(shortest * fps)} times ({_MOST_REPEATS} at most): remove it, or lower video.fps"
            )

    def fault(self, what: str) -> DataError:
        """An error at the time that decoding has reached."""
        return DataError(f"{self.where} {what} at {self._time:.2f} s; repair or remove it")

    def _ticks_before(self, time: float, fps: float, number: int) -> int:
        assert self._first is not None
        return min(number, int(np.ceil(max(0.0, time - self._first - _TOLERANCE) * fps - 1e-6)))

    def _repeated(self, frame: Any, times: int) -> Iterator[NDArray[np.uint8]]:
        if times > 0:
            pixels = self.pixels(frame)
            for _ in range(times):
                yield pixels

    def _look_at(self, frame: Any) -> None:
        """Moves the time on. Raises: DataError when the frame is not what a player would show."""
        if frame.time is not None:
            self._first = frame.time if self._first is None else self._first
            self._time = frame.time - self._first
        if self._matrix is None:
            # Of one frame alone: PyAV ties a frame that was asked in a circle, which is freed much later.
            stored = {data.type.name: data for data in frame.side_data}.get("DISPLAYMATRIX")
            values = np.zeros(9, np.int32) if stored is None else np.frombuffer(bytes(stored), np.int32)
            self._matrix = values[[0, 1, 3, 4]]
        if frame.is_corrupt:
            raise self.fault("is damaged")
        if frame.interlaced_frame:
            raise DataError(f"{self.where} is interlaced; deinterlace it first (ffmpeg -i IN -vf bwdif OUT)")
        if int(frame.color_trc) not in _SDR_TRANSFERS or int(frame.color_primaries) in _WIDE_PRIMARIES:
            gamut = _WIDE_PRIMARIES.get(int(frame.color_primaries))
            raise DataError(
                f"{self.where} is HDR or of a wide gamut (transfer {int(frame.color_trc)}"
                f"{f', {gamut} primaries' if gamut else ''}); convert it to SDR in BT.709 first"
            )

    def _square(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        shape = self.stream.sample_aspect_ratio
        if not shape or shape == 1:
            return pixels
        if not 1 / _STEEPEST_PIXEL <= shape <= _STEEPEST_PIXEL:
            raise DataError(f"{self.where} says that its pixels are {shape} as wide as high; write the file again")
        height, width = pixels.shape[:2]
        size = (round(width * shape), height) if shape > 1 else (width, round(height / shape))
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))

    def _turned(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture after the display matrix a b c d: x' = a x + c y, y' = b x + d y, with y downwards."""
        assert self._matrix is not None
        if not self._matrix.any():
            return pixels
        scaled = self._matrix / np.abs(self._matrix).max()
        a, b, c, d = np.rint(scaled).astype(int).tolist()
        if np.abs(scaled - (a, b, c, d)).max() > 0.01 or abs(a * d - b * c) != 1 or abs(a) + abs(b) != 1:
            raise DataError(f"{self.where} is to be turned by no right angle; turn the pictures themselves")
        if b:
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        return np.ascontiguousarray(pixels[::d, ::a])


@contextmanager
def open_video(source: Path | bytes, where: str, *, threads: bool = False) -> Iterator[VideoFrames]:
    """The pictures of a video file or of its bytes.

    Args: `threads` decodes with several; a loader reads clips in parallel already, and must not outnumber the cores.
    Raises: DataError naming `where`, also for what its user meets while decoding.
    """
    import av

    if isinstance(source, Path) and not os.path.isfile(source):
        raise DataError(f"{where} does not exist")
    try:
        container = av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source.absolute()))
    except (av.FFmpegError, ValueError) as error:
        raise DataError(f"{where} cannot be decoded ({what_it_is(source) or error})") from error
    with container:
        video = VideoFrames(container, where)
        video.stream.thread_type = "AUTO" if threads else "NONE"
        yield video


def read_clip(
    source: Path | bytes,
    num_frames: int,
    *,
    sizes: Sizes = (),
    fps: float | None = None,
    where: str | None = None,
    scene: tuple[int, int | None] = (0, None),
) -> NDArray[np.uint8]:
    """The first `num_frames` frames of a video file, or of its bytes, as uint8 [num_frames, h, w, 3].

    Args: `scene`, frames [start, end) at the rate asked for, of which the first are taken and no other.
    The frames are brought to the nearest of `sizes`.
    Raises: DataError naming `where`, and the time in the file, when it is missing, damaged, interlaced, HDR, too short,
    has too few pictures a second for `fps`, or changes its size.
    """
    where, (start, end) = where or str(source), scene
    last = start + num_frames if end is None else min(start + num_frames, end)
    with open_video(source, where) as video:
        shown = video.at_rate(fps, last) if fps else map(video.pixels, islice(video.frames(), last))
        frames = [fit_pixels(pixels, sizes) for pixels in islice(shown, start, None)]
    if len(frames) < num_frames:
        rate = f" at {fps:g} frames a second" if fps else ""
        rate += f" from frame {start} on" if start else ""
        rate += f", before the cut at {end}," if end is not None else ""
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
