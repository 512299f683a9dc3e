"""A video in memory: what `Generator.video` gives, and a notebook shows. Must know no model."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from longtake.inference.record import VideoRecord, check_output, write_record
from longtake.inference.video_io import VideoWriter

# A preview lies in the notebook's own file: short, small, and never above so many bytes.
_PREVIEW_SECONDS, _PREVIEW_BYTES = 10, 2**20
_PREVIEWS = ((320, 23), (320, 33), (160, 33), (80, 45))  # longest side in pixels, crf: the first that is small enough
_SHOWN_SIDE = 256  # a smaller picture is shown larger, by whole pixels


@dataclass(eq=False)
class Video:
    """Frames uint8 [T, h, w, 3], frames a second, and the file that holds them, where there is one; `describe` makes
    its record.
    """

    frames: NDArray[np.uint8]
    fps: float
    path: Path | None = None
    describe: Callable[[], VideoRecord | None] = lambda: None

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        file = "" if self.path is None else f", {self.path}"
        return f"Video({self._in_words()}{file})"

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return len(self) / self.fps

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes it as the file `path`, which is then that of this video.

        Raises: ConfigError for a name that says no container, and for a file that is there already, unless `overwrite`
        is given; OutputError when it cannot be written.
        """
        check_output(path, overwrite=overwrite)
        record = self.describe()
        tree = None if record is None else record.model_dump(mode="json")
        with VideoWriter(path, self.fps, *self.frames.shape[1:3], record=tree) as writer:
            writer.write(self.frames)
        write_record(path, record)
        self.path = Path(path)
        return self.path

    def _in_words(self) -> str:
        height, width = self.frames.shape[1:3]
        return f"{len(self)} frames of {height}x{width} at {self.fps:g} frames/s, {self.seconds:.1f} s"

    def _repr_html_(self) -> str:
        """A player for notebooks, with the first seconds of the video in it, smaller."""
        shown = self.frames[: max(1, round(_PREVIEW_SECONDS * self.fps))]
        said = escape(repr(self)) + (f"; the first {_PREVIEW_SECONDS} s, smaller" if len(shown) < len(self) else "")
        data = _preview(shown, self.fps)
        if data is None:
            return f"<p>{said}: too large to be shown here; <code>save</code> it</p>"
        side = max(self.frames.shape[1:3])
        zoom = max(1, round(_SHOWN_SIDE / side)) if side < _SHOWN_SIDE else 1
        width = f' width="{self.frames.shape[2] * zoom}" style="image-rendering: pixelated"' if zoom > 1 else ""
        return (
            f'<video controls loop autoplay muted playsinline{width} src="data:video/mp4;base64,'
            f'{b64encode(data).decode()}"></video><br><small>{said}</small>'
        )


def _preview(frames: NDArray[np.uint8], fps: float) -> bytes | None:
    """An mp4 of at most `_PREVIEW_BYTES`; None where noise in the pictures leaves none."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "preview.mp4"
        for side, crf in _PREVIEWS:
            small = _smaller(frames, side)
            with VideoWriter(file, fps, *small.shape[1:3], crf=crf) as writer:
                writer.write(small)
            if file.stat().st_size <= _PREVIEW_BYTES:
                return file.read_bytes()
    return None


def _smaller(frames: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Frames whose sides are at most `side` and even."""
    height, width = frames.shape[1:3]
    scale = min(1.0, side / max(height, width))
    sizes = tuple(max(2, round(one * scale / 2) * 2) for one in (width, height))
    if sizes == (width, height):
        return frames
    return np.stack([np.asarray(Image.fromarray(frame).resize(sizes, Image.Resampling.BOX)) for frame in frames])
