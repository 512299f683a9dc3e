"""Rows that are files with captions, as `file_rows.py` finds them: pictures, clips, and prompts without pictures."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from longtake.data.file_rows import (
    CAPTION_SUFFIX,
    TABLES,
    FileRow,
    kind_of_files,
    list_files,
    names_files,
    text_rows,
    visible_files,
)
from longtake.data.rows import AS_STORED, Picture, PictureSpec, Rows
from longtake.data.samples import CLIP_SUFFIXES, IMAGE_SUFFIXES


class _FileRows(Rows):
    """What the three have in common."""

    def __init__(self, path: Path, spec: PictureSpec = AS_STORED) -> None:
        super().__init__(path, spec)
        self._rows = self._listed()

    @abstractmethod
    def _listed(self) -> list[FileRow]: ...

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, row: int) -> tuple[str, str]:
        """The name of the file as it lies on disk, and file and row in words. Raises: DataError."""
        found = self._rows[row]
        file = found.find_file() if found.file else found.caption
        from_frame = f"_{found.scene[0]}" if found.scene[0] else ""
        return f"{file.stem}{from_frame}" if file else f"{row:06d}", found.where

    def prompts(self, row: int) -> tuple[str, ...]:
        """Of the table, or of the caption file. Raises: DataError."""
        return self._rows[row].read_prompts()


class ImageFolder(_FileRows):
    """A folder or table of pictures with captions."""

    LAYOUT = f"""{" or ".join(TABLES)} beside pictures ({", ".join(IMAGE_SUFFIXES)});
              or pairs cat.png + cat.txt; or image/ + prompt/"""
    kind, word = "images", "image"

    @classmethod
    def lies_at(cls, path: Path) -> bool:
        """Whether pictures lie there, and no clips. Raises: DataError when both do."""
        return kind_of_files(path) == cls.kind

    @classmethod
    def takes_file(cls, path: Path) -> bool:
        """A table whose rows are files."""
        return names_files(path)

    def _listed(self) -> list[FileRow]:
        return list_files(self.path, self.kind)

    def identities(self) -> Iterable[str]:
        """Names of the files, and prompts that are known without reading a caption."""
        for row in self._rows:
            file = row.file or row.caption
            yield json.dumps([file and os.path.relpath(file, self.path), row.prompts])

    def picture(self, row: int) -> Picture:
        """The row's file. Raises: DataError."""
        file = self._rows[row].find_file()
        label = f"{self._rows[row].where}: {self.word} {file}"
        return Picture(file, label, is_clip=self.kind == "clips", scene=self._rows[row].scene)


class ClipFolder(ImageFolder):
    """A folder or table of videos with captions."""

    LAYOUT = f"the same with videos ({', '.join(CLIP_SUFFIXES)}); or video/ + prompt/"
    kind, word = "clips", "clip"

    def __init__(self, path: Path, spec: PictureSpec = AS_STORED) -> None:
        spec.frames_of(str(path))  # refused now, not at the first row
        super().__init__(path, spec)

    def _listed(self) -> list[FileRow]:
        return [scene for row in super()._listed() for scene in _scenes(row)]

    def identities(self) -> Iterable[str]:
        """The same, and where the prompt of a video changes, or its scene begins and ends."""
        for identity, row in zip(super().identities(), self._rows):
            scene = f" from {row.scene[0]} to {row.scene[1]}" if row.scene != (0, None) else ""
            yield f"{identity} {list(row.switch_frames)}" if row.switch_frames else identity + scene

    def switch_frames(self, row: int) -> tuple[int, ...]:
        """Of the table."""
        return self._rows[row].switch_frames


def _scenes(row: FileRow) -> list[FileRow]:
    """A row for each scene of a video: after a cut there is another picture and no past, so it is another video."""
    if not row.cut_frames or row.problem is not None:
        return [row]
    ends = [*row.cut_frames, None]
    scenes = list(zip([0, *row.cut_frames], ends))
    prompts = row.prompts if len(row.prompts) > 1 else row.prompts * len(scenes)
    return [replace(row, scene=scene, prompts=(prompt,)) for scene, prompt in zip(scenes, prompts, strict=True)]


class TextRows(_FileRows):
    """Prompts without pictures, for text-to-video: a text file, a JSONL file, or a folder of text files."""

    LAYOUT = "a file prompts.txt or rows.jsonl, or a folder of .txt files"

    def _listed(self) -> list[FileRow]:
        return text_rows(self.path)

    @classmethod
    def lies_at(cls, path: Path) -> bool:
        """Whether there are text files; asked last, since captions are such, too."""
        if path.is_file():
            return path.suffix.lower() in (CAPTION_SUFFIX, ".jsonl")
        return bool(visible_files(path, CAPTION_SUFFIX))

    @classmethod
    def takes_file(cls, path: Path) -> bool:
        """Of any name."""
        return True

    def identities(self) -> Iterable[str]:
        """The prompts, or the names of their files."""
        return (row.caption.name if row.caption else repr(row.prompts or row.problem) for row in self._rows)
