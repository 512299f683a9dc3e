"""WebDataset shards: tar files whose members of one name are a row, in whatever order they lie.

The shards are indexed first, from the headers alone, so that every row has a number and can be read by itself: order
and position are as exact as with any other format.
Source: webdataset/webdataset `tariterators.py` (`base_plus_ext`): the name of a row is the member's path up to the
first dot of its file name; what follows is the field.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from longtake.data.file_rows import prompts_of, same_name, split_caption, visible_files, what_it_is
from longtake.data.rows import AS_STORED, Picture, PictureSpec, Rows
from longtake.data.samples import CLIP_SUFFIXES, IMAGE_SUFFIXES
from longtake.errors import DataError
from longtake.json_text import parse_json

CAPTION_FIELDS = ("txt", "caption", "json")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_INDEXING_THREADS = 8  # headers are small and far apart: the time is the disk's


@dataclass(frozen=True)
class _TarRow:
    """One row: its shard, its name, and where each field's bytes lie."""

    shard: Path
    name: str
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)  # field -> (offset, size)
    twice: set[str] = field(default_factory=set)  # fields of which the shard has several


class TarShards(Rows):
    """The rows of one tar file or of all `*.tar` in a folder, in the order of names and of their first members.

    A row holds one picture or one video (by its suffix) and `txt` (one prompt a line) or `json` (`prompts`, `text`,
    `prompt` or `caption`). Other fields are left alone.
    Raises: DataError when there is no row, or a shard is no whole uncompressed tar file.
    """

    LAYOUT = "*.tar, or one .tar file"

    def __init__(self, path: Path, spec: PictureSpec = AS_STORED) -> None:
        super().__init__(path, spec)
        shards = [path] if path.is_file() else visible_files(path, ".tar")
        with ThreadPoolExecutor(_INDEXING_THREADS) as pool:
            self._rows = [row for rows in pool.map(_index, shards) for row in rows]
        if not self._rows:
            raise DataError(f"{path} has no rows: it needs *.tar with members such as 0001.jpg and 0001.txt")

    @classmethod
    def lies_at(cls, path: Path) -> bool:
        """Whether there are tar files."""
        return path.suffix.lower() == ".tar" if path.is_file() else bool(visible_files(path, ".tar"))

    @classmethod
    def takes_file(cls, path: Path) -> bool:
        """Of any name."""
        return True

    def __len__(self) -> int:
        return len(self._rows)

    def identities(self) -> Iterable[str]:
        """Shard and name of each row, and its fields with their sizes."""
        for row in self._rows:
            yield f"{row.shard.name} {row.name} {[(name, size) for name, (_, size) in row.fields.items()]}"

    def place(self, row: int) -> tuple[str, str]:
        """The name without folders, and shard and row in words."""
        found = self._rows[row]
        return found.name.replace("/", "_"), f"{found.shard} row {row} ({found.name})"

    def picture(self, row: int) -> Picture:
        """The row's one picture or video. Raises: DataError."""
        fields, (_, where) = self._rows[row].fields, self.place(row)
        found = [name for name in fields if _suffix(name) in IMAGE_SUFFIXES + CLIP_SUFFIXES]
        if len(found) != 1:
            raise DataError(
                f"{where}: has the fields {', '.join(fields)}; it needs exactly one picture or video "
                f"({', '.join(IMAGE_SUFFIXES + CLIP_SUFFIXES)})"
            )
        (name,) = found
        return Picture(self._bytes(row, name), f"{where}: {name}", is_clip=_suffix(name) in CLIP_SUFFIXES)

    def prompts(self, row: int) -> tuple[str, ...]:
        """Of the first caption field. Raises: DataError."""
        found, (_, where) = self._rows[row], self.place(row)
        if found.twice:
            raise DataError(f"{where}: has {', '.join(sorted(found.twice))} twice; give each row a name of its own")
        name = next((name for name in CAPTION_FIELDS if name in found.fields), None)
        if name is None:
            raise DataError(f"{where}: has no caption; it needs one of the fields {', '.join(CAPTION_FIELDS)}")
        data = self._bytes(row, name)
        if name != "json":
            return split_caption(data, f"{where}: {name}")
        try:
            entry = parse_json(data)
        except ValueError as error:
            raise DataError(f"{where}: json is not valid JSON ({error})") from error
        prompts, problem = prompts_of(entry) if isinstance(entry, dict) else ((), "must be a JSON object")
        if problem is not None:
            raise DataError(f"{where}: json: {problem}")
        return prompts

    def _bytes(self, row: int, name: str) -> bytes:
        found, (_, where) = self._rows[row], self.place(row)
        offset, size = found.fields[name]
        try:
            # Opened anew: no file position is shared by threads or forked workers.
            with found.shard.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{where}: {found.shard} cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise DataError(f"{where}: {name} is cut off ({len(data)} of {size} bytes); the shard has changed")
        return data


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _index(shard: Path) -> list[_TarRow]:
    rows: dict[str, _TarRow] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                match = _NAME.fullmatch(member.name) if member.isreg() else None
                if match is None:
                    continue  # folders, links, hidden files, and names without a suffix hold no field
                name, suffix = match[1], match[2].lower()
                row = rows.setdefault(same_name(name), _TarRow(shard, name))
                if suffix in row.fields:
                    row.twice.add(suffix)
                row.fields[suffix] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        what = what_it_is(shard) if shard.is_file() else None
        raise DataError(
            f"{shard} cannot be read as an uncompressed tar file ({what or error}); unpack or write it again"
        ) from error
    return list(rows.values())
