"""Rows in LMDB databases, one folder or many `shard*` folders: our own format, and the published layouts.

Own format: `longtake_format` = `1`, `num_rows`; for row i `img_{i}_data` (bytes of a PNG, JPEG or WebP file) and
`prompts_{i}_data` (UTF-8, one prompt a line).
Published layouts (no `longtake_format`): `img_{i}_data` is raw RGB of one fixed size, `latents_{i}_data` raw fp16 of
the shape in `latents_shape` after its first number, which counts the rows; without that key the rows go up to the
largest number of a picture or prompt.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from longtake.data.file_rows import split_caption
from longtake.data.images import fit_pixels
from longtake.data.rows import AS_STORED, Picture, PictureSpec, Rows, ShardEnds
from longtake.errors import DataError

if TYPE_CHECKING:
    import lmdb

FORMAT_VERSION = b"1"
PUBLISHED_IMAGE_SHAPE = (480, 832, 3)  # the published layout stores no picture size; this is the only one in use

# LMDB allows a database to be open once in a process, and not across a fork. A read opens it, copies the bytes and
# closes it (45 microseconds), so that any number of readers, threads and forked workers can share a folder.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class _Shard:
    """One database: its folder, number of rows, and for a published layout the shape of its latents."""

    path: Path
    num_rows: int
    is_own: bool
    has_images: bool
    latents_shape: tuple[int, ...] | None = None


class LmdbShards(Rows):
    """The rows of one LMDB folder or of all `shard*` folders in it, in the order of their numbers.

    Args: `published_image_shape` [h, w, 3] of raw pictures in the published layout.
    Raises: DataError when there is no database, or one that is damaged or of an unknown format version.
    """

    LAYOUT = "data.mdb, or shard*/data.mdb"

    def __init__(
        self,
        path: Path,
        spec: PictureSpec = AS_STORED,
        published_image_shape: tuple[int, int, int] = PUBLISHED_IMAGE_SHAPE,
    ) -> None:
        super().__init__(path, spec)
        self.published_image_shape = published_image_shape
        if not (folders := _databases(path)):
            raise DataError(f"{path} holds no LMDB: it needs data.mdb, or shard*/data.mdb")
        self._shards = [_inspect(folder) for folder in folders]
        self._ends = ShardEnds(shard.num_rows for shard in self._shards)
        if not len(self):
            raise DataError(f"{path} has no rows")

    @classmethod
    def lies_at(cls, path: Path) -> bool:
        """Whether there are databases."""
        return bool(_databases(path))

    def __len__(self) -> int:
        return len(self._ends)

    def identities(self) -> Iterable[str]:
        """The prompts of each row as they are stored. Raises: DataError when a shard cannot be read."""
        for shard in self._shards:
            keys = [f"prompts_{row}_data" for row in range(shard.num_rows)]
            yield from map(repr, _read(shard.path, keys).values())

    def place(self, row: int) -> tuple[str, str]:
        """The number, with the shard where there are several; folder and row in words."""
        shard, local, where = self._find(row)
        return f"{local:06d}" if len(self._shards) == 1 else f"{shard.path.name}_{local:06d}", where

    def prompts(self, row: int) -> tuple[str, ...]:
        """One a line in the own format, always one in published layouts. Raises: DataError."""
        shard, local, where = self._find(row)
        key = f"prompts_{local}_data"
        return split_caption(_needed(_read(shard.path, [key]), key, where), f"{where}: {key}", lines=shard.is_own)

    def picture(self, row: int) -> Picture | None:
        """The stored picture; None in shards without pictures. Raises: DataError."""
        shard, local, where = self._find(row)
        if not shard.has_images:
            return None
        key = f"img_{local}_data"
        data, label = _needed(_read(shard.path, [key]), key, where), f"{where}: {key}"
        return Picture(data, label) if shard.is_own else _RawPicture(data, label, shape=self.published_image_shape)

    def extras(self, row: int) -> dict[str, NDArray]:
        """Latents of a published layout. Raises: DataError when they are damaged, or a row has neither them nor a
        picture.
        """
        shard, local, where = self._find(row)
        key = f"latents_{local}_data"
        data = None if shard.is_own else _read(shard.path, [key])[key]
        if data is None:
            if not shard.has_images:
                raise DataError(f"{where}: has neither img_{local}_data nor {key}")
            return {}
        if shard.latents_shape is None:
            raise DataError(f"{where}: {key}: the database has no latents_shape that says its shape")
        return {"latents": _numbers(data, shard.latents_shape, np.float16, f"{where}: {key}")}

    def pixel_size(self, row: int) -> tuple[int, int] | None:
        """As `Rows.pixel_size`; raw pictures, all of one size, need not be read for it."""
        shard, _, _ = self._find(row)
        return self.published_image_shape[:2] if shard.has_images and not shard.is_own else super().pixel_size(row)

    def _find(self, row: int) -> tuple[_Shard, int, str]:
        """The shard of a row, the row's number in it, and both in words."""
        number, local = self._ends.place(row)
        return self._shards[number], local, f"{self._shards[number].path} row {local}"


@dataclass(frozen=True)
class _RawPicture(Picture):
    """Raw RGB of one fixed shape [h, w, 3]."""

    shape: tuple[int, ...] = ()

    def read(self, spec: PictureSpec) -> NDArray:
        """As of other pictures."""
        return fit_pixels(_numbers(self._bytes(), self.shape, np.uint8, self.label), spec.sizes)


def _databases(path: Path) -> list[Path]:
    """The folders of databases at a path, in the order of their numbers."""
    folders = [path] if (path / "data.mdb").is_file() else sorted(path.glob("shard*"), key=_shard_order)
    return [folder for folder in folders if (folder / "data.mdb").is_file()]


def _shard_order(folder: Path) -> tuple[int, str]:
    digits = "".join(c for c in folder.name if c.isdigit())
    return int(digits or 0), folder.name  # shard_2 before shard_10


@contextmanager
def _opened(folder: Path) -> Iterator[lmdb.Transaction]:
    """A transaction on the database of a folder.

    LMDB maps the file into memory: to touch a page that a cut file no longer has would end the process (SIGBUS).
    Raises: DataError when the database is damaged or cut off.
    """
    import lmdb

    file = folder / "data.mdb"
    try:
        with _ONE_AT_A_TIME, lmdb.open(str(folder), readonly=True, lock=False, create=False) as database:
            needed = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
            if (size := file.stat().st_size) < needed:
                raise DataError(
                    f"{file} is cut off: it has {size} of at least {needed} bytes; copy it again (a database that was "
                    "always like this: rewrite it with `mdb_copy -c`)"
                )
            with database.begin() as transaction:
                yield transaction
    except (lmdb.Error, OSError) as error:
        found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
        raise DataError(f"LMDB {folder} cannot be read ({error}; data.mdb: {found})") from error


def _read(folder: Path, keys: list[str]) -> dict[str, bytes | None]:
    with _opened(folder) as transaction:
        found = {key: transaction.get(key.encode()) for key in keys}
        return {key: None if value is None else bytes(value) for key, value in found.items()}


def _inspect(folder: Path) -> _Shard:
    version, rows, latents = _read(folder, ["longtake_format", "num_rows", "latents_shape"]).values()
    if version == FORMAT_VERSION:
        return _Shard(folder, _shape(rows, f"{folder}: num_rows")[0], is_own=True, has_images=True)
    if version is not None:
        raise DataError(
            f"{folder} has longtake_format={version!r} and this version reads {FORMAT_VERSION!r}; update longtake"
        )
    last_image = _last_row(folder, "img_")
    if latents is not None:
        count, *shape = _shape(latents, f"{folder}: latents_shape")
        return _Shard(folder, count, is_own=False, has_images=last_image >= 0, latents_shape=tuple(shape))
    if last_image < 0:
        raise DataError(f"{folder} has no rows: neither longtake_format, nor latents_shape, nor img_ keys")
    # Up to the largest number, so that a row without its picture is found missing instead of shortening the set.
    count = 1 + max(last_image, _last_row(folder, "prompts_"))
    return _Shard(folder, count, is_own=False, has_images=True)


def _last_row(folder: Path, prefix: str) -> int:
    """The largest i of all keys `{prefix}{i}_data`; -1 when there is none."""
    pattern = re.compile(rf"{prefix}(\d+)_data".encode())
    last = -1
    with _opened(folder) as transaction, transaction.cursor() as cursor:
        found = cursor.set_range(prefix.encode())
        while found and bytes(cursor.key()).startswith(prefix.encode()):
            if match := pattern.fullmatch(cursor.key()):
                last = max(last, int(match[1]))
            found = cursor.next()
    return last


def _needed(raw: dict[str, bytes | None], key: str, where: str) -> bytes:
    data = raw.get(key)
    if data is None:
        raise DataError(f"{where}: key {key} is missing")
    return data


def _shape(text: bytes | None, where: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(number) for number in (text or b"").split())
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise DataError(f"{where} is {text!r}; it must be whole numbers separated by spaces")
    return shape


def _numbers(data: bytes, shape: tuple[int, ...], dtype: type[np.generic], where: str) -> NDArray:
    """The array of raw little-endian bytes."""
    stored = np.dtype(dtype).newbyteorder("<")
    needed = int(np.prod(shape)) * stored.itemsize
    if len(data) != needed:
        raise DataError(f"{where} has {len(data)} bytes; shape {shape} of {np.dtype(dtype)} needs {needed}")
    return np.frombuffer(data, stored).reshape(shape).astype(dtype)  # a writable copy
