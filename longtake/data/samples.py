"""What a data set is: a list of `Sample` by row number, in one of three formats on disk.

Readers raise DataError with file and row for a row that cannot be used; what then happens is the loader's decision.
This file must know no tensor, no batch and no training stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from longtake.errors import ConfigError, DataError

Kind = Literal["images", "clips", "lmdb"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CLIP_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")
METADATA = "metadata.jsonl"


@dataclass(frozen=True, eq=False)
class Sample:
    """One row: its name, prompt, picture uint8 [h, w, 3], video uint8 [T, h, w, 3], and stored encodings by name.

    With a video, `image` is its first frame. `extras` holds what was encoded before (`latents`, `y`, `clip`, `text`).
    """

    name: str
    prompt: str
    image: NDArray[np.uint8] | None = None
    video: NDArray[np.uint8] | None = None
    extras: dict[str, NDArray] = field(default_factory=dict)


class Dataset(Protocol):
    """A map-style data set; reading is safe from several threads and after a fork."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample:
        """The sample of a row. Raises: DataError naming file and row when it cannot be used."""
        ...


@dataclass(frozen=True)
class FileSize:
    """The pixel size that pictures are brought to (cropped to its aspect, then scaled); None keeps each one's own."""

    height: int
    width: int


def open_dataset(
    path: str | Path,
    *,
    kind: str = "auto",
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
) -> Dataset:
    """The data set in a folder.

    Args: `kind` is `images`, `clips`, `lmdb`, or `auto` to look into the folder; `num_frames` is needed for clips;
    `height` and `width` in pixels, both or none; `fps` at which clips are sampled, None = every stored frame.
    Raises: DataError when the folder is missing, empty or of no known format.
    """
    path = Path(path)
    if (height is None) != (width is None):
        raise ConfigError(f"height={height} and width={width} must be given together")
    size = None if height is None or width is None else FileSize(height, width)
    if not path.is_dir():
        raise DataError(f"data folder {path} does not exist; write it (`longtake world`) or set data.path")
    kind = detect_kind(path) if kind == "auto" else kind
    if kind == "images":
        from longtake.data.images import ImageFolder

        return ImageFolder(path, size)
    if kind == "clips":
        from longtake.data.clips import ClipFolder

        if num_frames is None:
            raise ConfigError(f"{path} holds clips; say how many frames to read with num_frames")
        return ClipFolder(path, num_frames, size, fps)
    if kind == "lmdb":
        from longtake.data.lmdb_shards import LmdbShards

        return LmdbShards(path, size)
    raise ConfigError(f"data.kind={kind} must be auto, images, clips or lmdb")


def detect_kind(path: Path) -> Kind:
    """The format of a data folder. Raises: DataError when it is none of ours."""
    if (path / "data.mdb").is_file() or any(path.glob("shard*/data.mdb")):
        return "lmdb"
    if (path / METADATA).is_file():
        for line in read_metadata(path):
            suffix = Path(line.file_name or "").suffix.lower()
            if suffix in CLIP_SUFFIXES:
                return "clips"
            if suffix in IMAGE_SUFFIXES:
                return "images"
    raise DataError(
        f"{path} is no data set: it needs {METADATA} beside images ({', '.join(IMAGE_SUFFIXES)}) or clips "
        f"({', '.join(CLIP_SUFFIXES)}), or LMDB folders (data.mdb, or shard*/data.mdb)"
    )


@dataclass(frozen=True)
class MetadataRow:
    """One line of `metadata.jsonl`: `where` names it in errors; `problem` says why it cannot be used, if so."""

    where: str
    file_name: str | None = None
    text: str | None = None
    problem: str | None = None

    def check(self) -> tuple[str, str]:
        """File name and prompt. Raises: DataError when the line cannot be used."""
        if self.problem is not None or self.file_name is None or self.text is None:
            raise DataError(f"{self.where}: {self.problem}")
        return self.file_name, self.text


def load_metadata(folder: Path) -> list[MetadataRow]:
    """The rows of a folder's `metadata.jsonl`, unusable lines included (they raise when they are read).

    Raises: DataError when the file is missing or has no line.
    """
    file = folder / METADATA
    if not file.is_file():
        raise DataError(
            f'{folder} has no {METADATA}; it needs one line a file: {{"file_name": "a.png", "text": "..."}}'
        )
    rows = list(read_metadata(folder))
    if not rows:
        raise DataError(f'{file} is empty; it needs one line a file: {{"file_name": "a.png", "text": "a prompt"}}')
    return rows


def read_metadata(folder: Path) -> Iterator[MetadataRow]:
    """Yields the lines of `metadata.jsonl` one by one; empty lines are no rows."""
    file = folder / METADATA
    row = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _metadata_row(line, f"{file} row {row} (line {number})")
                row += 1


def _metadata_row(line: bytes, where: str) -> MetadataRow:
    try:
        entry = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both of this kind
        return MetadataRow(where, problem=f"is not valid JSON ({error})")
    if not isinstance(entry, dict):
        return MetadataRow(where, problem="must be a JSON object with file_name and text")
    name, text = entry.get("file_name"), entry.get("text")
    if not isinstance(name, str) or not name:
        return MetadataRow(where, problem="file_name is missing or no text")
    if not isinstance(text, str) or not text.strip():
        return MetadataRow(where, file_name=name, problem="text is missing or empty; every row needs a prompt")
    return MetadataRow(where, name, text.strip())
