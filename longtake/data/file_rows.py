"""Rows that are files with captions, in the three ways in which folders hold them, and the rows of text files.

- a table, `metadata.jsonl` or `metadata.csv` beside the files: `{"file_name": "a.png", "text": "..."}` or `"prompts":
  ["...", "..."]`; the names of musubi-tuner (`image_path`, `video_path`, `caption`) and some others are known too;
- pairs of one name: `cat.png` and `cat.txt`, in sub-folders too;
- two sub-folders, e.g. `image/` and `prompt/`, whose files pair by name.

A caption file holds one prompt a line; several lines are several prompts (shots) of the row. What cannot be used stays
a row that raises when it is read. This file must know no picture and no video.
"""

from __future__ import annotations

import csv
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from longtake.data.samples import CLIP_SUFFIXES, IMAGE_SUFFIXES
from longtake.errors import DataError
from longtake.json_text import parse_json

logger = logging.getLogger(__name__)

TABLES = ("metadata.jsonl", "metadata.csv")
TABLE_SUFFIXES = (".jsonl", ".csv")
FILE_KEYS = ("file_name", "image_path", "video_path", "image", "video")
PROMPT_KEYS = ("prompts", "text", "prompt", "caption")
CAPTION_SUFFIX = ".txt"
CAPTION_FOLDERS = ("prompt", "prompts", "caption", "captions")
FILE_FOLDERS = {
    "images": ("image", "images"),
    "clips": ("video", "videos", "clip", "clips"),
}
SUFFIXES = {"images": IMAGE_SUFFIXES, "clips": CLIP_SUFFIXES}
# What stands where a picture or video should, by its first bytes.
_NOT_THE_FILE = {
    b"version https://git-lfs": "it is a Git LFS pointer; get the file itself with `git lfs pull`",
    b"\x00\x05\x16\x07": "it is the AppleDouble companion that macOS puts beside a file; remove it",
    b"<!DOCTYPE": "it is a web page",
    b"<html": "it is a web page",
}


@dataclass(frozen=True)
class FileRow:
    """A file and its prompts, or the `problem` why the row cannot be used; `where` names it in errors.

    `caption` is a file that is read only when the row is; it stands in for `prompts`. `switch_frames` as in `Sample`.
    `cut_frames`, the frames of a video at which a further scene begins; `scene`, the frames [start, end) that the row
    is of. `values` are those of the keys that a reader of a table asked for besides.
    """

    where: str
    file: Path | None = None
    prompts: tuple[str, ...] = ()
    caption: Path | None = None
    problem: str | None = None
    switch_frames: tuple[int, ...] = ()
    cut_frames: tuple[int, ...] = ()
    scene: tuple[int, int | None] = (0, None)
    values: Mapping[str, Any] = field(default_factory=dict)

    def find_file(self) -> Path:
        """The file, under the name that it has on disk. Raises: DataError when the row cannot be used."""
        if self.problem is not None or self.file is None:
            raise DataError(f"{self.where}: {self.problem}")
        return _as_it_lies(self.file)

    def read_prompts(self) -> tuple[str, ...]:
        """The prompts. Raises: DataError when the row, or its caption, cannot be used."""
        if self.problem is not None:
            raise DataError(f"{self.where}: {self.problem}")
        return self.prompts or _read_caption(self.caption, self.where)


def list_files(path: Path, kind: str, also: Collection[str] | None = None) -> list[FileRow]:
    """The rows of a folder of `kind` images or clips, or of a table of such files, unusable ones included.

    Args: `also` as in `read_table`. Raises: DataError when the folder holds none of the three ways, or no row.
    """
    if (table := table_of(path)) is not None:
        rows = list(read_table(path, also))
        if not rows:
            raise DataError(f'{table} is empty; it needs one line a file: {{"file_name": "a.png", "text": "a prompt"}}')
        return rows
    rows = _pair(*(caption_folders(path, kind) or (path, path)), kind)
    if not rows:
        raise DataError(
            f"{path} has no rows of kind {kind}: it needs {TABLES[0]} with a line a file, pairs such as "
            f"cat{SUFFIXES[kind][0]} and cat{CAPTION_SUFFIX}, or sub-folders such as {FILE_FOLDERS[kind][0]}/ and "
            f"{CAPTION_FOLDERS[0]}/"
        )
    return rows


def table_of(path: Path) -> Path | None:
    """The table of files that a path is or holds, if any. Raises: DataError when there are two."""
    if path.is_file():
        return path
    found = [path / name for name in TABLES if (path / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{path} holds {' and '.join(TABLES)}; keep one of them")
    return found[0] if found else None


def caption_folders(folder: Path, kind: str) -> tuple[Path, Path] | None:
    """The sub-folders of files and of captions, where there are such."""
    files = [folder / name for name in FILE_FOLDERS[kind] if (folder / name).is_dir()]
    captions = [folder / name for name in CAPTION_FOLDERS if (folder / name).is_dir()]
    return (files[0], captions[0]) if files and captions else None


def files_below(folder: Path, suffixes: Iterable[str] = ()) -> list[Path]:
    """All files (with one of `suffixes`) in a folder and below it, sorted by relative path.

    Links are followed, also to folders; hidden files, such as the `._` files of macOS, are left out.
    Raises: DataError when a folder cannot be read.
    """
    wanted = tuple(suffixes)
    found = (path for path in _walk(folder, ()) if not wanted or path.suffix.lower() in wanted)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def visible_files(folder: Path, suffix: str) -> list[Path]:
    """The files with a suffix in a folder itself, sorted by name, hidden ones left out."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == suffix and path.name[0] != ".")


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    try:
        about = folder.stat()
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read ({error.strerror})") from error
    here = (about.st_dev, about.st_ino)
    if here in above:  # a link back to a folder that it lies in
        return
    for entry in entries:
        if entry.is_dir():
            yield from _walk(folder / entry.name, (*above, here))
        elif entry.is_file() or entry.is_symlink():  # a link to nothing is a row that cannot be read
            yield folder / entry.name


def same_name(name: str) -> str:
    """A name in one Unicode form: macOS writes accents apart from their letters, others join them."""
    return unicodedata.normalize("NFC", name)


def _as_it_lies(file: Path) -> Path:
    """The path under which a file of a table exists; as it is written where there is none."""
    if not os.path.exists(file):  # not `file.exists()`, which raises for names that are too long
        file = Path(str(file).replace("\\", "/"))  # written on Windows
        if not os.path.exists(file) and os.path.isdir(file.parent):
            name = same_name(file.name)
            file = next((path for path in file.parent.iterdir() if same_name(path.name) == name), file)
    return file


def _pair(file_root: Path, caption_root: Path, kind: str) -> list[FileRow]:
    """One row a name that has a file or a caption, in the order of names."""
    present = files_below(file_root)
    files = _by_name(file_root, (path for path in present if path.suffix.lower() in SUFFIXES[kind]))
    captions = _by_name(caption_root, files_below(caption_root, (CAPTION_SUFFIX,)))
    others = _by_name(file_root, (p for p in present if p.suffix.lower() not in (*SUFFIXES[kind], CAPTION_SUFFIX)))
    rows = []
    for number, name in enumerate(sorted({*files, *captions})):
        named, texts = files.get(name, []), captions.get(name, [])
        problem = None
        if len(named) > 1 or len(texts) > 1:
            names = ", ".join(path.name for path in (named if len(named) > 1 else texts))
            problem = f"the files {names} share one name; keep one"
        elif not named and name in others:
            problem = (
                f"{others[name][0].name} beside caption {texts[0]} is of no kind that {kind} are read from "
                f"({', '.join(SUFFIXES[kind])}); convert it"
            )
        elif not named:
            problem = f"caption {texts[0]} has no file of its name; add the file or remove the caption"
        elif not texts:
            problem = f"caption {caption_root / (name + CAPTION_SUFFIX)} is missing; every file needs one"
        where = f"{file_root} row {number} ({(named or texts)[0].name})"
        rows.append(FileRow(where, named[0] if named else None, caption=texts[0] if texts else None, problem=problem))
    return rows


def _by_name(root: Path, paths: Iterable[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        found[same_name(path.relative_to(root).with_suffix("").as_posix())].append(path)
    return found


def _read_caption(file: Path | None, where: str) -> tuple[str, ...]:
    assert file is not None
    try:
        return split_caption(file.read_bytes(), f"{where}: caption {file}")
    except OSError as error:
        raise DataError(f"{where}: caption {file} cannot be read ({error.strerror})") from error


def split_caption(data: bytes, where: str, *, lines: bool = True) -> tuple[str, ...]:
    """The prompts in the bytes of a caption, one for each of its `lines` or one in all.

    Raises: DataError naming `where` when they are no text or empty.
    """
    text = _decoded(data, where)
    parts = _lines(text) if lines else [text]
    if not (prompts := tuple(part.strip() for part in parts if part.strip())):
        raise DataError(f"{where} is empty; every row needs a prompt")
    return prompts


def _decoded(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text ({error})") from error
    if what := what_it_is(data):
        raise DataError(f"{where} is no caption: {what}")
    return text


def _lines(text: str) -> list[str]:
    # `splitlines` would also cut at characters that nobody sees as an end.
    return re.split(r"\r\n|\r|\n", text)


def what_it_is(source: Path | bytes) -> str | None:
    """What bytes that are no picture or video are instead, in words, if their beginning tells."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            source = file.read(64)
    return next((words for head, words in _NOT_THE_FILE.items() if source.startswith(head)), None)


def read_table(path: Path, also: Collection[str] | None = None) -> Iterator[FileRow]:
    """Yields the rows of a table of files, or of that of a folder; unusable lines are rows with a problem.

    `metadata.*` of a folder is Hugging Face's layout (`file_name`); a table that is named itself may have other keys.
    Args: `also`, keys whose values a row brings along; with them, a key that nobody reads is an error (DataError).
    """
    file = table_of(path)
    assert file is not None
    known = FILE_KEYS if file == path else FILE_KEYS[:1]
    keys_read = (*known, "switch_frames", "cut_frames", *(also or ()))
    for where, entry, problem in read_objects(file, keys_read, strict=also is not None):
        keys = [key for key in known if key in entry]
        name = entry[keys[0]] if keys else None
        if problem:
            yield FileRow(where, problem=problem)
        elif len(keys) != 1 or not isinstance(name, str) or not name:
            yield FileRow(where, problem=_key_problem(keys, [key for key in FILE_KEYS if key in entry], file))
        else:
            prompts, fault = prompts_of(entry)
            switches, no_switch = _frames_of(entry, "switch_frames", len(prompts))
            cuts, no_cut = _frames_of(entry, "cut_frames", len(prompts))
            named = file.parent / name
            if keys[0].endswith("_path") and not os.path.exists(named) and os.path.exists(name):
                named = Path(name)  # musubi-tuner takes them from where it is started
            values = _values(entry, also)
            yield FileRow(where, named, prompts, None, fault or no_switch or no_cut, switches, cuts, values=values)


def _frames_of(entry: Mapping[str, Any], key: str, num_prompts: int) -> tuple[tuple[int, ...], str | None]:
    """The frames at which the prompt, or the scene, of a row's video changes, and what is wrong with them."""
    frames, one_for_all = entry.get(key, []), key == "cut_frames" and num_prompts == 1
    whole = isinstance(frames, list) and all(isinstance(frame, int) and frame > 0 for frame in frames)
    if not whole or sorted(set(frames)) != frames or (frames and len(frames) + 1 != num_prompts and not one_for_all):
        return (), (
            f"{key}={frames!r} must be ascending pixel frames above 0, one less than prompts ({num_prompts}): the "
            "first frame of each further prompt"
        )
    if frames and "switch_frames" in entry and "cut_frames" in entry:
        return (), "has switch_frames and cut_frames; give each scene a file and a row of its own"
    return tuple(frames), None


def _values(entry: Mapping[str, Any], keys: Collection[str] | None) -> dict[str, Any]:
    return {key: entry[key] for key in keys or () if key in entry}


def _key_problem(keys: list[str], present: list[str], file: Path) -> str:
    if len(keys) > 1:
        return f"{' and '.join(keys)} both name a file; keep one"
    if present and not keys:
        return f"file_name is missing; to read {' or '.join(present)} instead, name the table itself: data.path={file}"
    return f"{(*keys, 'file_name')[0]} is missing or no text; it names the row's file"


def names_files(file: Path) -> bool:
    """Whether this is a `.jsonl` or `.csv` file whose rows are files with captions, by its first object."""
    if file.suffix.lower() not in TABLE_SUFFIXES:
        return False
    entry = next((entry for _, entry, problem in read_objects(file) if not problem), {})
    return any(key in entry for key in FILE_KEYS)


def kind_of_files(path: Path) -> str | None:
    """Whether a folder or table holds `images` or `clips` with captions; None: neither.

    Raises: DataError when a folder holds both, or a table none.
    """
    if path.is_file() and not names_files(path):
        return None
    if table_of(path) is not None:
        return _kind_of_table(path)
    kinds = [kind for kind in SUFFIXES if caption_folders(path, kind) is not None]
    if not kinds:
        present = {file.suffix.lower() for file in files_below(path)}
        kinds = [kind for kind, suffixes in SUFFIXES.items() if present & set(suffixes)]
    if len(kinds) > 1:
        raise DataError(f"{path} holds both pictures and clips ({contents(path)}); set data.kind to one of them")
    return kinds[0] if kinds else None


def _kind_of_table(table: Path) -> str:
    problem = ""
    for row in read_table(table):
        for kind, suffixes in SUFFIXES.items():
            if row.file is not None and row.file.suffix.lower() in suffixes:
                return kind
        problem = problem or (f"; {row.where}: {row.problem}" if row.problem else "")
    known = ", ".join((*SUFFIXES["images"], *SUFFIXES["clips"]))
    raise DataError(f"{table} names no picture and no video ({known}){problem}")


def contents(path: Path) -> str:
    """What a folder holds, in words: how many files of each suffix, and its sub-folders."""
    entries = sorted(path.iterdir())
    folders = [entry.name + "/" for entry in entries if entry.is_dir()]
    files = Counter(entry.suffix or entry.name for entry in entries if not entry.is_dir())
    parts = [f"{number} x {suffix}" for suffix, number in sorted(files.items())[:12]]
    return ", ".join([*parts, *folders[:12], *(["..."] if len(folders) > 12 or len(files) > 12 else [])]) or "nothing"


def text_rows(path: Path, also: Collection[str] | None = None) -> list[FileRow]:
    """The rows of `prompts.txt` (one prompt a line), of `rows.jsonl` (`{"prompts": [...]}` or `{"text": "..."}`), or
    of a folder of text files (one row a file, several lines are several prompts).

    Lines of white space are no rows. Args: `also` as in `read_table`.
    Raises: DataError when there is no row, or a text file is not UTF-8.
    """
    if path.is_dir():
        files = enumerate(files_below(path, (CAPTION_SUFFIX,)))
        rows = [FileRow(f"{path} row {row} ({file.name})", caption=file) for row, file in files]
    elif path.suffix.lower() == ".jsonl":
        rows = []
        for where, entry, problem in read_objects(path, also or (), strict=also is not None):
            prompts, fault = ((), problem) if problem else prompts_of(entry)
            rows.append(FileRow(where, prompts=prompts, problem=fault, values=_values(entry, also)))
    else:
        lines = enumerate(_lines(_decoded(path.read_bytes(), str(path))), start=1)
        kept = enumerate((number, line.strip()) for number, line in lines if line.strip())
        rows = [FileRow(f"{path} row {row} (line {number})", prompts=(line,)) for row, (number, line) in kept]
    if not rows:
        raise DataError(f"{path} has no prompt; it needs one a line, or one text file a prompt in a folder")
    return rows


def read_objects(
    file: Path, known: Iterable[str] | None = None, *, strict: bool = False
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields (where, object, problem) of each line of a `.jsonl` or `.csv` file that is not empty; an object with a
    problem is empty.

    Args: `known`, the keys that the caller reads beside the prompts'; others are named in one warning, or refused
    (`strict`). Raises: DataError when a CSV file is no text, or no table, and for a key that is refused.
    """
    if what := what_it_is(file):
        raise DataError(f"{file} is no table: {what}")
    unread: set[str] = set()
    lines = _csv_lines(file) if file.suffix.lower() == ".csv" else _json_lines(file)
    for row, (number, entry) in enumerate(lines):
        where = f"{file} row {row} (line {number})"
        if isinstance(entry, str):
            yield where, {}, entry
            continue
        if known is not None:
            unread |= entry.keys() - set(known) - set([key for key in PROMPT_KEYS if key in entry][:1])
            if unread and strict:
                raise DataError(f"{where}: {_unknown(sorted(unread)[0], (*known, *PROMPT_KEYS))}")
        yield where, entry, ""
    if unread:
        logger.warning("%s: the values of %s are not read", file, ", ".join(sorted(unread)))


def _unknown(key: str, known: Sequence[str]) -> str:
    close = get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key {key}; {hint}The keys are {', '.join(known)}; rename it, or take it out"


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields line number and object, or what is wrong with the line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    entry = parse_json(line)
                except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both of this kind
                    yield number, f"is not valid JSON ({error})"
                    continue
                yield number, entry if isinstance(entry, dict) else "must be a JSON object, one a line"


def _csv_lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The same of a CSV file with a line of column names; empty values are none."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            names = reader.fieldnames or ()
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{file} has the column {twice[0]!r} twice; keep one")
            for values in reader:
                surplus = "has more values than there are columns; quote those that hold commas"
                entry = {key: value for key, value in values.items() if value}
                yield reader.line_num, surplus if None in values else entry
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is no CSV file in UTF-8 ({error})") from error


def prompts_of(entry: dict[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """The prompts of a JSON object (`prompts`, a list, or `text`, `prompt`, `caption`), or the problem with them."""
    key = next((key for key in PROMPT_KEYS if key in entry), "text")
    value = entry.get(key)
    values = value if key == "prompts" and isinstance(value, list) else [value]
    prompts = tuple(text.strip() for text in values if isinstance(text, str))
    if not prompts or len(prompts) < len(values) or not all(prompts):
        return (), f"{key} is missing or empty; every row needs a prompt"
    if any("\ud800" <= character <= "\udfff" for text in prompts for character in text):
        return (), f"{key} holds half a character (a lone surrogate, such as half an emoji); write the text again"
    return prompts, None
