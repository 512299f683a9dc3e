"""What every data format shares: from where a row's prompts and picture lie to its `Sample`.

A format is a subclass of `Rows` in a file of its own and a line in `config/formats.py`. This file must know no format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

from numpy.typing import NDArray

from longtake.data.clips import clip_size, read_clip
from longtake.data.images import decode_image, image_size
from longtake.data.samples import Dataset, Sample, Sizes
from longtake.errors import ConfigError, DataError


@dataclass(frozen=True)
class PictureSpec:
    """What pictures and clips are brought to: the nearest of `sizes`, () = as they are.

    Of a clip the first `num_frames` frames are taken: with `fps` what a player shows at the times 0, 1/fps, 2/fps, ...,
    so that motion keeps its real speed; without it every stored frame counts as one.
    """

    sizes: Sizes = ()
    num_frames: int | None = None
    fps: float | None = None

    def frames_of(self, what: str) -> int:
        """How many frames to read. Raises: ConfigError when nobody said it."""
        if self.num_frames is None:
            raise ConfigError(f"{what} holds clips; say how many frames to read with num_frames")
        return self.num_frames


AS_STORED = PictureSpec()


@dataclass(frozen=True)
class Picture:
    """A picture or video as it is stored: its file or bytes; `label` names it in errors; `scene`, the frames
    [start, end) of a video that are one scene.
    """

    data: Path | bytes
    label: str
    is_clip: bool = False
    scene: tuple[int, int | None] = (0, None)

    def read(self, spec: PictureSpec) -> NDArray:
        """Pixels uint8 [h, w, 3], or of a clip [T, h, w, 3]. Raises: DataError naming the label."""
        if self.is_clip:
            frames = spec.frames_of(self.label)
            return read_clip(self.data, frames, sizes=spec.sizes, fps=spec.fps, where=self.label, scene=self.scene)
        return decode_image(self._bytes(), self.label, spec.sizes)

    def size(self) -> tuple[int, int]:
        """(height, width) as it lies on disk, upright. Raises: DataError naming the label."""
        return clip_size(self.data, self.label) if self.is_clip else image_size(self._bytes(), self.label)

    def _bytes(self) -> bytes:
        if isinstance(self.data, bytes):
            return self.data
        try:
            return self.data.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            why = getattr(error, "strerror", None) or error
            raise DataError(f"{self.label} cannot be read ({why})") from error


class Format(Dataset, ABC):
    """A data set of one format, made of a path and what is asked of its pictures."""

    LAYOUT: ClassVar[str]  # what the format looks like on disk, for errors

    def __init__(self, path: Path, spec: PictureSpec = AS_STORED) -> None:
        self.path, self.spec = path, spec

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} rows)"

    @classmethod
    @abstractmethod
    def lies_at(cls, path: Path) -> bool:
        """Whether a file or folder that exists holds this format; asked where nobody named one."""

    @classmethod
    def takes_file(cls, path: Path) -> bool:
        """Whether a file, and not only a folder, can be opened."""
        return False


class Rows(Format):
    """A format that says where prompts and pictures lie; this class makes samples of them.

    All methods that take a row raise DataError naming file and row when it cannot be used.
    """

    @abstractmethod
    def place(self, row: int) -> tuple[str, str]:
        """The row's name, and the words that name file and row in errors."""

    @abstractmethod
    def prompts(self, row: int) -> tuple[str, ...]:
        """All prompts of the row."""

    def picture(self, row: int) -> Picture | None:
        """The row's picture or video, None without one."""
        return None

    def extras(self, row: int) -> dict[str, NDArray]:
        """Stored encodings of the row by name."""
        return {}

    def switch_frames(self, row: int) -> tuple[int, ...]:
        """The pixel frame of the row's video from which each further prompt holds; () = the first holds throughout."""
        return ()

    def __getitem__(self, row: int) -> Sample:
        name, where = self.place(row)
        prompts, picture = self.prompts(row), self.picture(row)
        image = video = None
        if picture is not None:
            image = picture.read(self.spec)
            if picture.is_clip:
                image, video = image[0], image
        switches = self.switch_frames(row) if video is not None else ()
        return Sample(name, prompts[0], image, video, self.extras(row), prompts, where, switches)

    def pixel_size(self, row: int) -> tuple[int, int] | None:
        """(height, width) of the stored picture, upright; None without one."""
        picture = self.picture(row)
        return None if picture is None else picture.size()


class ShardEnds:
    """Rows numbered through shards of `sizes` rows."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._ends = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, row: int) -> tuple[int, int]:
        """The number of a row's shard, and the row's number in it. Raises: IndexError."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        shard = bisect_right(self._ends, row) - 1
        return shard, row - self._ends[shard]
