"""What a data set is: a list of `Sample` by row number, with pictures brought to a size that training asks for.

Readers raise DataError with file and row for a row that cannot be used; what then happens is the loader's decision.
This file must know no tensor, no batch, no file format and no training stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from longtake.errors import printable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif", ".gif")
CLIP_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")


@dataclass(frozen=True, eq=False)
class Sample:
    """One row: its name, prompt, picture uint8 [h, w, 3], video uint8 [T, h, w, 3], and stored encodings by name.

    With a video, `image` is its first frame. `extras` holds what was encoded before (`latents`, `y`, `clip`, `text`).
    `prompts` are all prompts of the row in the order of their shots; the first is `prompt`, and mostly the only one.
    `switch_frames`, in ascending order: the pixel frame of the video from which each further prompt holds; empty = the
    first holds throughout. `where` names file and row for errors that later steps find.
    """

    name: str
    prompt: str
    image: NDArray[np.uint8] | None = None
    video: NDArray[np.uint8] | None = None
    extras: dict[str, NDArray] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    where: str = ""
    switch_frames: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            object.__setattr__(self, "prompts", (self.prompt,))
        object.__setattr__(self, "name", printable(self.name))
        object.__setattr__(self, "where", printable(self.where))

    def __repr__(self) -> str:
        parts = {"image": self.image, "video": self.video, **self.extras}
        sizes = "".join(f", {name} {list(part.shape)}" for name, part in parts.items() if part is not None)
        return f"Sample({self.name!r}, {self.prompt!r}{sizes})"


class Dataset(Protocol):
    """A map-style data set; reading is safe from several threads and after a fork."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample:
        """The sample of a row. Raises: DataError naming file and row when it cannot be used."""
        ...

    def pixel_size(self, row: int) -> tuple[int, int] | None:
        """(height, width) of the row's picture as it lies on disk, upright; None when the row has no picture.

        Raises: DataError as `__getitem__`, where the size cannot be read.
        """
        ...

    def identities(self) -> Iterable[str]:
        """What tells the rows apart, in their order, without a look at pictures: names of files, prompts, sizes."""
        ...


@dataclass(frozen=True)
class FirstRows(Dataset):
    """The first `num_rows` rows of a data set; the others cannot be read through it."""

    dataset: Dataset
    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> Sample:
        return self.dataset[self._checked(row)]

    def pixel_size(self, row: int) -> tuple[int, int] | None:
        """As the data set's."""
        return self.dataset.pixel_size(self._checked(row))

    def identities(self) -> Iterable[str]:
        """As the data set's, of these rows."""
        return islice(self.dataset.identities(), self.num_rows)

    def _checked(self, row: int) -> int:
        if not 0 <= row < self.num_rows:
            raise IndexError(row)
        return row


@dataclass(frozen=True)
class FileSize:
    """A pixel size that pictures are brought to (cropped to its aspect, then scaled, never stretched)."""

    height: int
    width: int


# No size keeps each picture as it is; several sizes are aspect-ratio buckets, of which each picture takes the nearest.
Sizes = tuple[FileSize, ...]


def nearest_size(sizes: Sizes, height: int, width: int) -> int:
    """Index of the size whose aspect is nearest to that of `height` x `width`, measured as the log of the ratio.

    It is the size of which the crop keeps most. On a tie the first one wins.
    """
    aspect = math.log(width / height)
    distances = [abs(math.log(size.width / size.height) - aspect) for size in sizes]
    return distances.index(min(distances))
