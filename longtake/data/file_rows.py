"""Rows that are files with captions, in the three ways in which folders hold them, and the rows of text files.

- `metadata.jsonl` beside the files: `{"file_name": "a.png", "text": "..."}` or `"prompts": ["...", "..."]`;
- pairs of one name: `cat.png` and `cat.txt`, in sub-folders too;
- two sub-folders, e.g. `image/` and `prompt/`, whose files pair by name.

A caption file holds one prompt a line; several lines are several prompts (shots) of the row. What cannot be used stays
a row that raises when it is read. This file must know no picture and no video.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.data.samples import CLIP_SUFFIXES, IMAGE_SUFFIXES
from longtake.errors import DataError

METADATA = "metadata.jsonl"
CAPTION_SUFFIX = ".txt"
CAPTION_FOLDERS = ("prompt", "prompts", "caption", "captions")
FILE_FOLDERS = {
    "images": ("image", "images"),
    "clips": ("video", "videos", "clip", "clips"),
}
SUFFIXES = {"images": IMAGE_SUFFIXES, "clips": CLIP_SUFFIXES}


@dataclass(frozen=True)
class FileRow:
    """A file and its prompts, or the `problem` why the row cannot be used; `where` names it in errors.

    `caption` is a file that is read only when the row is; it stands in for `prompts`.
    """

    where: str
    file: Path | None = None
    prompts: tuple[str, ...] = ()
    caption: Path | None = None
    problem: str | None = None

    def check(self) -> tuple[Path, tuple[str, ...]]:
        """File and prompts. Raises: DataError when the row cannot be used."""
        if self.problem is not None or self.file is None:
            raise DataError(f"{self.where}: {self.problem}")
        return self.file, self.prompts or read_caption(self.caption, self.where)


def list_files(folder: Path, kind: str) -> list[FileRow]:
    """The rows of a folder of `kind` images or clips, unusable ones included.

    Raises: DataError when the folder holds none of the three ways, or no row.
    """
    if (folder / METADATA).is_file():
        rows = list(read_metadata(folder))
        if not rows:
            raise DataError(
                f'{folder / METADATA} is empty; it needs one line a file: {{"file_name": "a.png", "text": "a prompt"}}'
            )
    elif (parts := caption_folders(folder, kind)) is not None:
        rows = _pair(
            files_below(parts[0], SUFFIXES[kind]), parts[0], files_below(parts[1], (CAPTION_SUFFIX,)), parts[1]
        )
    else:
        rows = _pair(files_below(folder, SUFFIXES[kind]), folder, files_below(folder, (CAPTION_SUFFIX,)), folder)
    if not rows:
        raise DataError(
            f"{folder} has no rows of kind {kind}: it needs {METADATA} with a line a file, pairs such as "
            f"cat{SUFFIXES[kind][0]} and cat{CAPTION_SUFFIX}, or sub-folders such as {FILE_FOLDERS[kind][0]}/ and "
            f"{CAPTION_FOLDERS[0]}/"
        )
    return rows


def identities(rows: Iterable[FileRow], folder: Path) -> Iterator[str]:
    """Yields the name of each row's file in `folder`, and the prompts that are known without reading a caption."""
    for row in rows:
        file = row.file or row.caption
        yield json.dumps([file and os.path.relpath(file, folder), row.prompts])


def caption_folders(folder: Path, kind: str) -> tuple[Path, Path] | None:
    """The sub-folders of files and of captions, where there are such."""
    files = [folder / name for name in FILE_FOLDERS[kind] if (folder / name).is_dir()]
    captions = [folder / name for name in CAPTION_FOLDERS if (folder / name).is_dir()]
    return (files[0], captions[0]) if files and captions else None


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """All files with one of `suffixes` in a folder and below it, hidden ones left out, sorted by relative path."""
    wanted = tuple(suffixes)
    found = (path for path in folder.rglob("*") if path.suffix.lower() in wanted and path.is_file())
    visible = (path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def _pair(files: list[Path], file_root: Path, captions: list[Path], caption_root: Path) -> list[FileRow]:
    """One row a name that has a file or a caption, in the order of names."""
    by_name: dict[str, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for place, (root, paths) in enumerate(((file_root, files), (caption_root, captions))):
        for path in paths:
            by_name[path.relative_to(root).with_suffix("").as_posix()][place].append(path)
    rows = []
    for number, (name, (named, texts)) in enumerate(sorted(by_name.items())):
        where = f"{file_root} row {number} ({(named or texts)[0].name})"
        problem = None
        if len(named) != 1:
            problem = (
                f"the files {', '.join(path.name for path in named)} share one name; keep one"
                if named
                else f"caption {texts[0]} has no file of its name; add the file or remove the caption"
            )
        elif not texts:
            problem = f"caption {caption_root / (name + CAPTION_SUFFIX)} is missing; every file needs one"
        rows.append(FileRow(where, named[0] if named else None, caption=texts[0] if texts else None, problem=problem))
    return rows


def read_caption(file: Path | None, where: str) -> tuple[str, ...]:
    """The prompts in a caption file, one a line. Raises: DataError naming `where` when there is none."""
    assert file is not None
    try:
        return split_caption(file.read_bytes(), f"{where}: caption {file}")
    except OSError as error:
        raise DataError(f"{where}: caption {file} cannot be read ({error.strerror})") from error


def split_caption(data: bytes, where: str) -> tuple[str, ...]:
    """The prompts in the bytes of a caption. Raises: DataError naming `where` when they are no text or empty."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text ({error})") from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise DataError(f"{where} is empty; every row needs a prompt")
    return prompts


def read_metadata(folder: Path) -> Iterator[FileRow]:
    """Yields the rows of a folder's `metadata.jsonl`; unusable lines are rows with a problem, empty ones none."""
    for where, entry, problem in read_jsonl(folder / METADATA):
        if entry is None:
            yield FileRow(where, problem=problem)
            continue
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            yield FileRow(where, problem="file_name is missing or no text")
            continue
        prompts, fault = prompts_of(entry)
        yield FileRow(where, folder / name, prompts, problem=fault)


def read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
    """Yields (where, object, problem) of each line that is not empty; a line that is no object has a problem."""
    row = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where, row = f"{file} row {row} (line {number})", row + 1
            try:
                entry = json.loads(line)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both of this kind
                yield where, None, f"is not valid JSON ({error})"
                continue
            is_object = isinstance(entry, dict)
            yield where, entry if is_object else None, "" if is_object else "must be a JSON object"


def prompts_of(entry: dict[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """The prompts of a JSON object (`prompts`, a list, or `text`, `prompt`, `caption`), or the problem with them."""
    key = next((key for key in ("prompts", "text", "prompt", "caption") if key in entry), "text")
    value = entry.get(key)
    values = value if key == "prompts" and isinstance(value, list) else [value]
    prompts = tuple(text.strip() for text in values if isinstance(text, str))
    if not prompts or len(prompts) < len(values) or not all(prompts):
        return (), f"{key} is missing or empty; every row needs a prompt"
    return prompts, None
