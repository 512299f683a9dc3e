"""Which encoders made an encoding: a digest of the files of each, and cheap stamps to see that they are still those.

Must know no torch: a machine that trains from stored encodings need not have the encoders at all.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from longtake.run_folder import file_records
from longtake.weights.locate import ENCODER_PARTS, TOKENIZER_FOLDER

# The tokenizer is part of the text encoder, wherever it lies.
_MORE = {"text": ("tokenizer", TOKENIZER_FOLDER.as_posix())}
_SUFFIXES = (".json", ".safetensors", ".pth", ".bin", ".model", ".txt")


def encoder_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each encoder in a folder, relative to it and sorted; an encoder without files is left out."""
    found = {}
    for part in ENCODER_PARTS:
        paths: set[Path] = set()
        for place in (folder / name for name in (part.folder, *part.originals, *_MORE.get(part.key, ()))):
            paths |= {place} if place.is_file() else set(place.glob("*"))
        own = (path for path in paths if path.is_file() and path.suffix in _SUFFIXES and not path.name.startswith("."))
        files = sorted(path.relative_to(folder) for path in own)
        if files:
            found[part.key] = files
    return found


def stamps(folder: Path, files: list[Path]) -> dict[str, Any]:
    """Size and time of change of each file: equal stamps mean equal files, other stamps mean nothing."""
    stats = {file.as_posix(): (folder / file).stat() for file in files}
    return {name: {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats.items()}


def digest(folder: Path, files: list[Path]) -> str:
    """SHA-256 over names and contents of the files."""
    records = file_records(folder, [file.as_posix() for file in files])
    lines = "".join(f"{name} {record['sha256']}\n" for name, record in records.items())
    return hashlib.sha256(lines.encode()).hexdigest()
