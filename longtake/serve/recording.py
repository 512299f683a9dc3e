"""What a session has shown, on the disk while it goes on: fragments that were encoded for its viewers anyway.

Each fragment is whole when the next one begins, so a server that is killed leaves files that play. A rewind cuts the
file; beyond a number of bytes the oldest part goes. What the disk refuses ends the recording and nothing else.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from longtake.serve.mp4 import fragment, moved, span

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fragment:
    first: int
    count: int
    offset: int
    size: int


@dataclass
class _Part:
    path: Path
    size: int
    fragments: list[_Fragment] = field(default_factory=list)


class Recording:
    """The frames of one session from the first that is kept; used by one thread at a time, read by any.

    Args: `folder`, its own; `head`, the init segment; `most_bytes`, the size of all its files together, 0: none is
    written. What another one has left in the folder is gone on with, as far as it is whole. `is_over`: the disk has
    refused to go on; what is there stays, and no frame is added to it, as there would be a gap.
    """

    def __init__(self, folder: Path, head: bytes, most_bytes: int) -> None:
        self._folder, self._head, self._most = folder, head, most_bytes
        numbers = sorted(int(path.stem.split("-")[1]) for path in folder.glob("recording-*.mp4"))
        self._parts = [_read_part(self._path(number), head) for number in numbers]
        self._made = numbers[-1] + 1 if numbers else 0
        self.is_over = most_bytes == 0
        if not self._parts:
            with self._as_long_as_it_goes():
                self._begin()

    def _path(self, number: int) -> Path:
        return self._folder / f"recording-{number}.mp4"

    @property
    def first(self) -> int:
        """The first frame that is kept."""
        return next((one.first for part in self._parts for one in part.fragments), 0)

    @property
    def end(self) -> int:
        """The frame behind the last one."""
        return next((one.first + one.count for part in self._parts[::-1] for one in part.fragments[-1:]), 0)

    @contextmanager
    def _as_long_as_it_goes(self) -> Iterator[None]:
        """Ends the recording when the disk refuses what is done below."""
        try:
            yield
        except OSError as error:
            self.is_over = True
            logger.warning("a recording has ended: %s", error.strerror)

    def _begin(self) -> None:
        path = self._path(self._made)
        self._made += 1
        path.write_bytes(self._head)
        self._parts.append(_Part(path, len(self._head)))

    def append(self, units: Sequence[bytes], first: int) -> bytes:
        """Writes access units, the pictures from number `first` on. Returns: the fragment."""
        data = fragment(units, first)
        if not self.is_over:
            with self._as_long_as_it_goes():
                self._write(data, first, len(units))
        return data

    def _write(self, data: bytes, first: int, count: int) -> None:
        part = self._parts[-1]
        with part.path.open("r+b") as file:
            file.seek(part.size)
            file.write(data)
        part.fragments.append(_Fragment(first, count, part.size, len(data)))
        part.size += len(data)
        if part.size > self._most // 2:
            self._begin()
            for old in self._parts[:-2]:
                old.path.unlink(missing_ok=True)
            self._parts = self._parts[-2:]

    def cut(self, frame: int) -> None:
        """Takes back what begins at `frame` or later."""
        for part in self._parts:
            kept = [one for one in part.fragments if one.first < frame]
            if len(kept) < len(part.fragments):
                part.size = part.fragments[len(kept)].offset
                part.fragments = kept
                with self._as_long_as_it_goes(), part.path.open("r+b") as file:
                    file.truncate(part.size)

    def copy(self, folder: Path) -> Recording:
        """The same frames in files of another folder, for a branch."""
        for part in self._parts:
            os.truncate(shutil.copyfile(part.path, folder / part.path.name), part.size)
        other = Recording(folder, self._head, self._most)
        other.is_over = self.is_over
        return other

    def read(self) -> Iterator[bytes]:
        """The mp4 of all frames that are kept, beginning at time 0."""
        found = [(part.path, one) for part in self._parts for one in part.fragments]
        yield self._head
        for path, one in found:
            try:
                with path.open("rb") as file:
                    file.seek(one.offset)
                    data = file.read(one.size)
            except OSError:  # somebody has removed it
                return
            if span(data, 0) != (one.first, one.count, one.size):  # it was rewound meanwhile, and written anew
                return
            yield moved(data, one.first - found[0][1].first)


def _read_part(path: Path, head: bytes) -> _Part:
    """A file of fragments, of which the last may not be whole. Of each its head alone is read."""
    part = _Part(path, len(head))
    if path.stat().st_size <= part.size:  # of an empty file there is no map
        return part
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while (found := span(data, part.size)) is not None:
            part.fragments.append(_Fragment(*found[:2], part.size, found[2]))
            part.size += found[2]
    return part
