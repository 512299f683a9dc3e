"""The kinds of files that a video can be, each written frame by frame; the name's suffix says which.

What is written lies on the disk after every frame and can be looked at while more comes: H.264 in fragments of one
frame, VP9 in clusters, gif and webp as files that end with their latest frame, PNG as a folder. Only `publish` gives it
the asked-for name. Must know no model and nothing about what a video is made for.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from longtake.data.h264 import BT601, add_colours, add_h264, encode
from longtake.errors import ConfigError, DataError
from longtake.outputs import check_new_folder, check_output_file, free_name, partial_name

Record = Mapping[str, Any]
SUFFIXES = (".mp4", ".webm", ".gif", ".webp")
_PATTERN = re.compile(r"[^%]*%0?[1-9]?d[^%]*\.png", re.IGNORECASE)

_THREADS = 8  # not the machine's number, on which the bytes depend
# A third of the default's work for 0.1 to 0.3 dB less at the same crf (480x832), and files that are no larger: what
# follows a stream must keep up with it. Without looking ahead (tune=zerolatency) no frame would wait in the encoder,
# and files are 2.4 times as large (480x832, a drifting picture with grain).
_H264 = {"preset": "veryfast"}
# Not BT.709 as for HD: where no GPU draws, Chromium shows its blue 12 of 255 levels too dark and green as much too blue
# (libyuv holds its largest factor in 8 bits); and OpenCV and decord read every file by BT.601.
_MATRIX = BT601
_VP9 = {"deadline": "realtime", "cpu-used": "7", "row-mt": "1", "lag-in-frames": "0"}
# Fragments are of one frame; the head waits for the first, which says when pictures are shown.
_FRAGMENTS = {"movflags": "+frag_every_frame+delay_moov+default_base_moof+skip_trailer"}
_IMAGE_DESCRIPTION = 0x010E  # of EXIF
_GIF_COMMENT = b"\x21\xfe"  # before its parts of at most 255 bytes
_COMMENT = "comment"  # what players show of a file's record; Matroska's tags are written in capitals


class Sink(Protocol):
    """A video in the making, in files of its own."""

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Appends a picture, uint8 [h, w, 3]; it is on its way to the disk, whole, when this returns."""

    def close(self, *, drop: bool) -> bool:
        """Ends the file; `drop` leaves out what waits in an encoder. Returns whether it holds pictures."""

    def publish(self, path: Path, record: Record | None) -> None:
        """Gives what was closed its name, complete and at once, with `record` in it."""

    def remove(self) -> None:
        """Removes what `publish` left or was not asked for."""


@dataclass(frozen=True)
class Target:
    """Where a video goes: a file `path`, or a folder of pictures named by `pattern`; `kind`, its container."""

    path: Path
    kind: str
    pattern: str = "%05d.png"

    @classmethod
    def of(cls, path: str | Path) -> Target:
        """What a name asks for: `.mp4`, `.webm`, `.gif`, `.webp`, or PNG files where it is `FOLDER/%05d.png` or has no
        suffix. Raises: ConfigError for any other.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            return cls(path, suffix[1:])
        if _PATTERN.fullmatch(path.name) and path.parent != Path():
            return cls(path.parent, "png", path.name)
        if not suffix and path.name and path.name != "..":
            return cls(path, "png")
        fix = path.with_suffix(SUFFIXES[0]) if path.name else path / f"video{SUFFIXES[0]}"
        folder = path.with_suffix("") if path.name else path
        raise ConfigError(
            f"{path} must end in {', '.join(SUFFIXES)}, or be {folder / '%05d.png'} for a folder of pictures; "
            f"call it {fix}"
        )

    def check(self, *, inputs: Sequence[str | Path | None] = (), overwrite: bool = False) -> None:
        """Raises ConfigError or OutputError when it exists already, is one of `inputs`, or cannot be written."""
        if self.kind == "png":
            check_new_folder(self.path, own=["*.png"], inputs=inputs, overwrite=overwrite)
        else:
            check_output_file(self.path, inputs=inputs, overwrite=overwrite)

    def numbered(self) -> Path:
        """The name that it was given, or where it is taken the first of NAME-2, NAME-3, ... that is not."""
        free = free_name(self.path)
        return free / self.pattern if self.kind == "png" else free

    def partial(self, *, visible: bool) -> Path:
        """A free name for what is not complete yet."""
        if visible:
            return free_name(self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}"))
        return partial_name(self.path)

    def open(self, partial: Path, rate: Fraction, height: int, width: int, crf: int) -> Sink:
        """A video of `rate` frames a second in the making, under the name `partial`."""
        if self.kind == "png":
            return _Pngs(partial, self.pattern)
        if self.kind == "gif":
            return _Gif(partial, rate, height, width)
        if self.kind == "webp":
            return _Webp(partial, rate, height, width, crf)
        return _Film(partial, rate, height, width, crf, kind=self.kind)


class _WholeFile:
    """A file to which writers append what belongs together: `flush` writes it at once or takes it back."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._file = path.open("xb", buffering=0)
        self._waiting = bytearray()

    def write(self, data: bytes) -> int:
        self._waiting += data
        return len(data)

    def flush(self) -> None:
        data = memoryview(bytes(self._waiting))
        self._waiting.clear()
        try:
            while data:
                data = data[self._file.write(data) :]
            self.size = self._file.tell()
        except OSError:  # a full disk: what is whole stays
            self._file.truncate(self.size)
            raise

    def patch(self, offset: int, data: bytes) -> None:
        """Writes over what is there."""
        os.pwrite(self._file.fileno(), data, offset)

    def close(self) -> None:
        self._file.close()


def read_metadata(target: Target) -> str | None:
    """The text that `publish` put into a file; None when there is none. Raises: DataError when it is no such file."""
    try:
        if target.kind in ("mp4", "webm"):
            import av

            with av.open(str(target.path)) as container:
                return {name.lower(): text for name, text in container.metadata.items()}.get(_COMMENT)
        if target.kind == "gif":
            return _gif_comment(target.path.read_bytes())
        file = target.path / (target.pattern % 0) if target.kind == "png" else target.path
        if target.kind == "png" and target.path.is_dir() and not file.exists():
            return None  # other names were asked for; the file beside the folder knows
        with Image.open(file) as picture:
            text = picture.info.get(_COMMENT) if target.kind == "png" else picture.getexif().get(_IMAGE_DESCRIPTION)
            return None if text is None else str(text)
    except (OSError, ValueError) as error:  # PyAV's errors are both
        raise DataError(f"{target.path} cannot be read as {target.kind} ({error})") from error


def _ended(container: Any, stream: Any, file: _WholeFile, *, drop: bool) -> bool:
    """Ends a container, with what its encoder still holds unless that is dropped; whether anything was written."""
    try:
        if not drop:
            container.mux(stream.encode())
        container.close()
        if not drop:
            file.flush()
    finally:
        file.close()
    return file.size > 0


class _Film:
    """H.264 in mp4, or VP9 in webm."""

    def __init__(self, path: Path, rate: Fraction, height: int, width: int, crf: int, *, kind: str) -> None:
        import av

        self._kind, self._file = kind, _WholeFile(path)
        options = _FRAGMENTS if kind == "mp4" else {"cluster_time_limit": "0"}
        # One stream, so that no packet waits for those of others.
        self._container: Any = av.open(self._file, "w", format=kind, options=options)
        if kind == "mp4":
            how: dict[str, Any] = {
                "pixels": "yuv420p",
                "threads": _THREADS,
                "matrix": _MATRIX,
                "crf": str(crf),
                **_H264,
            }
            self._stream = add_h264(self._container, rate, height, width, **how)
        else:
            scaled = str(round(crf * 63 / 51))  # VP9 counts to 63 where H.264 does to 51
            self._stream = self._container.add_stream("libvpx-vp9", rate=rate, options={"crf": scaled, **_VP9})
            self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
            self._stream.codec_context.bit_rate, self._stream.codec_context.thread_count = 0, _THREADS
            add_colours(self._stream.codec_context, _MATRIX)

    def add(self, frame: NDArray[np.uint8]) -> None:
        self._container.mux(encode(self._stream, frame))
        self._file.flush()

    def close(self, *, drop: bool) -> bool:
        return _ended(self._container, self._stream, self._file, drop=drop)

    def publish(self, path: Path, record: Record | None) -> None:
        remux(self._file.path, path, self._kind, record)

    def remove(self) -> None:
        self._file.path.unlink(missing_ok=True)


def remux(source: Path, path: Path, kind: str, record: Record | None = None) -> None:
    """The packets of `source` in a file of the same `kind`, mp4 or webm, that players and browsers open at once: what
    they must know stands first, and `record`. It appears as `path` when it is complete.
    """
    import av

    whole = partial_name(path.with_name(f"{path.name}.whole"))  # `source` may have the name without that
    # `bitexact`: no random numbers among what a file says of itself
    options = {"movflags": "+faststart"} if kind == "mp4" else {"cues_to_front": "1", "fflags": "+bitexact"}
    try:
        with av.open(str(source)) as made, av.open(str(whole), "w", format=kind, options=options) as target:
            if record is not None:
                target.metadata[_COMMENT] = json.dumps(record)
            stream = target.add_stream_from_template(made.streams.video[0])
            for packet in made.demux(made.streams.video[0]):
                if packet.dts is not None:  # the last one is empty
                    packet.stream = stream
                    target.mux(packet)
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)


class _Gif:
    """gif: a palette of 256 colours for each frame, exact where it has no more; else the nearest, dithered."""

    def __init__(self, path: Path, rate: Fraction, height: int, width: int) -> None:
        import av

        self._file = _WholeFile(path)
        self._container: Any = av.open(self._file, "w", format="gif", options={"loop": "0"})
        self._stream = self._container.add_stream("gif", rate=rate)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "pal8"
        self._table = np.empty(1 << 24, np.uint8)  # each colour's place in the palette

    def add(self, frame: NDArray[np.uint8]) -> None:
        import av

        paletted: Any = self._paletted(frame)
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(paletted, format="pal8")))
        self._file.flush()

    def close(self, *, drop: bool) -> bool:
        return _ended(self._container, self._stream, self._file, drop=drop)

    def publish(self, path: Path, record: Record | None) -> None:
        if record is not None:
            with self._file.path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)  # before the byte that ends the file
                text = json.dumps(record).encode()
                parts = (text[k : k + 255] for k in range(0, len(text), 255))
                file.write(_GIF_COMMENT + b"".join(bytes([len(part)]) + part for part in parts) + b"\x00\x3b")
        self._file.path.replace(path)

    def remove(self) -> None:
        self._file.path.unlink(missing_ok=True)

    def _paletted(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Indices [h, w] and the colours that they stand for, uint8 [256, 4] (opacity, red, green, blue)."""
        values = frame.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        colours = np.unique(values)
        if len(colours) > 256:
            picture = Image.fromarray(frame)
            chosen = picture.quantize(256, Image.Quantize.MEDIANCUT)
            indices = np.asarray(picture.quantize(palette=chosen, dither=Image.Dither.FLOYDSTEINBERG))
            parts = np.array(chosen.getpalette(), np.uint8).reshape(-1, 3)
        else:
            self._table[colours] = np.arange(len(colours))
            indices = self._table[values]
            parts = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).astype(np.uint8)
        palette = np.zeros((256, 4), np.uint8)
        palette[:, 0] = 255
        palette[: len(parts), 1:] = parts
        return indices, palette


class _Webp:
    """Animated webp, each frame a picture of its own; crf 0 is lossless, else quality is 100 - crf."""

    def __init__(self, path: Path, rate: Fraction, height: int, width: int, crf: int) -> None:
        self._file, self._rate, self._count, self._size = _WholeFile(path), rate, 0, (height, width)
        self._options: dict[str, Any] = {"lossless": True} if crf == 0 else {"quality": 100 - crf}
        self._head = _chunk(b"VP8X", bytes([2, 0, 0, 0]) + _sides(height, width)) + _chunk(b"ANIM", bytes(6))

    def add(self, frame: NDArray[np.uint8]) -> None:
        data = io.BytesIO()
        Image.fromarray(frame).save(data, "WEBP", method=2, **self._options)
        begin, end = (round(1000 * (self._count + k) / self._rate) for k in (0, 1))
        place = bytes(6) + _sides(*self._size) + struct.pack("<I", end - begin)  # 24 bits of time, no flag
        if self._count == 0:
            self._file.write(b"RIFF" + bytes(4) + b"WEBP" + self._head)
        self._file.write(_chunk(b"ANMF", place + data.getvalue()[12:]))
        self._file.flush()
        self._file.patch(4, struct.pack("<I", self._file.size - 8))
        self._count += 1

    def close(self, *, drop: bool) -> bool:
        self._file.close()
        return self._file.size > 0

    def publish(self, path: Path, record: Record | None) -> None:
        if record is not None:
            text = Image.Exif()
            text[_IMAGE_DESCRIPTION] = json.dumps(record)
            with self._file.path.open("r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(_chunk(b"EXIF", text.tobytes().removeprefix(b"Exif\x00\x00")))
                size = file.tell() - 8
                file.seek(4)
                file.write(struct.pack("<I", size))
                file.seek(20)
                file.write(bytes([2 | 8]))  # animated, with EXIF
        self._file.path.replace(path)

    def remove(self) -> None:
        self._file.path.unlink(missing_ok=True)


def _gif_comment(data: bytes) -> str | None:
    """The last comment of a gif file."""
    begin, text = data.rfind(_GIF_COMMENT) + len(_GIF_COMMENT), b""
    if begin < len(_GIF_COMMENT):
        return None
    while begin < len(data) and (length := data[begin]):
        text += data[begin + 1 : begin + 1 + length]
        begin += 1 + length
    return text.decode("utf-8", errors="replace")


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def _sides(height: int, width: int) -> bytes:
    return struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]


class _Pngs:
    """A folder of PNG files, `00000.png` and on, or named as the pattern says."""

    def __init__(self, path: Path, pattern: str) -> None:
        self._folder, self._pattern, self._count = path, pattern, 0
        path.mkdir()

    def add(self, frame: NDArray[np.uint8]) -> None:
        file = self._folder / (self._pattern % self._count)
        part = partial_name(file)
        try:
            Image.fromarray(frame).save(part, "PNG", compress_level=3)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        self._count += 1

    def close(self, *, drop: bool) -> bool:
        return self._count > 0

    def publish(self, path: Path, record: Record | None) -> None:
        first = self._folder / (self._pattern % 0)
        if record is not None:
            text = PngInfo()
            text.add_itxt(_COMMENT, json.dumps(record))
            with Image.open(first) as picture:
                picture.load()
                picture.save(first, "PNG", compress_level=3, pnginfo=text)
        if path.exists():  # it was asked to be replaced, and holds pictures alone (`check_new_folder`)
            shutil.rmtree(path)
        self._folder.rename(path)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
