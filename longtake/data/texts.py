"""Prompts without pictures, for text-to-video: a text file, a JSONL file, or a folder of text files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from longtake.data.file_rows import CAPTION_SUFFIX, files_below, prompts_of, read_caption, read_jsonl, what_it_is
from longtake.data.samples import Sample
from longtake.errors import DataError

TEXT_FILE_SUFFIXES = (CAPTION_SUFFIX, ".jsonl")


class TextRows:
    """The rows of `prompts.txt` (one prompt a line), of `rows.jsonl` (`{"prompts": [...]}` or `{"text": "..."}`), or
    of a folder of text files (one row a file, several lines are several prompts).

    Lines of white space are no rows.
    Raises: DataError when there is no row, or a text file is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Where a row is, and its prompts, its problem, or the file with its prompts.
        self._rows: list[tuple[str, tuple[str, ...] | str | Path]] = []
        if path.is_dir():
            files = files_below(path, (CAPTION_SUFFIX,))
            self._rows = [(f"{path} row {k} ({file.name})", file) for k, file in enumerate(files)]
        elif path.suffix.lower() == ".jsonl":
            for where, entry, problem in read_jsonl(path, ()):
                prompts, fault = ((), problem) if entry is None else prompts_of(entry)
                self._rows.append((where, prompts or fault or ""))
        else:
            self._rows = self._lines()
        if not self._rows:
            raise DataError(f"{path} has no prompt; it needs one a line, or one text file a prompt in a folder")

    def _lines(self) -> list[tuple[str, tuple[str, ...] | str | Path]]:
        try:
            text = self.path.read_text(encoding="utf-8-sig")  # line ends of all systems become \n
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text ({error})") from error
        if what := what_it_is(self.path):
            raise DataError(f"{self.path} holds no prompts: {what}")
        numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [(f"{self.path} row {k} (line {number})", (line.strip(),)) for k, (number, line) in enumerate(numbered)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        where, found = self._rows[row]
        if isinstance(found, str):
            raise DataError(f"{where}: {found}")
        name = found.stem if isinstance(found, Path) else f"{row:06d}"
        prompts = read_caption(found, where) if isinstance(found, Path) else found
        return Sample(name=name, prompt=prompts[0], prompts=prompts, where=where)

    def pixel_size(self, row: int) -> None:
        """None: a prompt has no picture."""
        return None

    def identities(self) -> Iterable[str]:
        """The prompts, or the names of their files."""
        return (found.name if isinstance(found, Path) else repr(found) for _, found in self._rows)
