"""Opens a data set of any format and recognises which one a path holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from longtake.data.file_rows import (
    CAPTION_SUFFIX,
    SUFFIXES,
    TABLES,
    caption_folders,
    files_below,
    names_files,
    read_table,
    table_of,
    visible_files,
)
from longtake.data.samples import CLIP_SUFFIXES, IMAGE_SUFFIXES, Dataset, FileSize, Sizes
from longtake.errors import ConfigError, DataError

LAYOUTS = f"""\
  images      {" or ".join(TABLES)} beside pictures ({", ".join(IMAGE_SUFFIXES)});
              or pairs cat.png + cat.txt; or image/ + prompt/
  clips       the same with videos ({", ".join(CLIP_SUFFIXES)}); or video/ + prompt/
  texts       a file prompts.txt or rows.jsonl, or a folder of .txt files
  webdataset  *.tar, or one .tar file
  lmdb        data.mdb, or shard*/data.mdb
  encoded     what `longtake encode` wrote: index.json and shard_*.safetensors"""


def open_dataset(
    path: str | Path,
    *,
    kind: str = "auto",
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    buckets: Sizes = (),
) -> Dataset:
    """The data set at a path.

    Args: `kind` is `images`, `clips`, `texts`, `webdataset`, `lmdb`, `encoded`, or `auto` to look; `num_frames` is
    needed for clips; `height` and `width` in pixels, both or none; `buckets`, sizes of which each picture takes the
    nearest in aspect, in place of the one; `fps` at which clips are sampled, None = every stored frame.
    Raises: DataError when the path is missing, empty or of no known format.
    """
    path = Path(path)
    if (height is None) != (width is None):
        raise ConfigError(f"height={height} and width={width} must be given together")
    sizes = buckets or (() if height is None or width is None else (FileSize(height, width),))
    if not path.exists():
        raise DataError(f"data folder {path} does not exist; write it (`longtake world`) or set data.path")
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is a pipe or a device, which is read once; write what it gives to a file first")
    kind = detect_kind(path) if kind == "auto" else kind
    openers: dict[str, Callable[[], Dataset]] = {
        "images": lambda: _open_images(path, sizes),
        "clips": lambda: _open_clips(path, num_frames, sizes, fps),
        "texts": lambda: _open_texts(path),
        "webdataset": lambda: _open_tars(path, num_frames, sizes, fps),
        "lmdb": lambda: _open_lmdb(path, sizes),
        "encoded": lambda: _open_encoded(path),
    }
    if kind not in openers:
        raise ConfigError(f"data.kind={kind} must be auto or one of {', '.join(openers)}")
    if path.is_file() and kind not in ("texts", "webdataset") and not (kind in SUFFIXES and names_files(path)):
        raise DataError(f"data.path={path} is a file, and data.kind={kind} needs a folder")
    return openers[kind]()


def detect_kind(path: Path) -> str:
    """The format at a path. Raises: DataError that lists what was found and the known layouts."""
    if path.is_file():
        kinds = {".tar": "webdataset", CAPTION_SUFFIX: "texts", ".jsonl": "texts"}
        if names_files(path):
            return _table_kind(path)
        if (suffix := path.suffix.lower()) not in kinds:
            raise DataError(f"{path} is a file of no known data format; known are\n{LAYOUTS}")
        return kinds[suffix]
    from longtake.data.encoded import is_encoded

    if is_encoded(path):
        return "encoded"
    if (path / "data.mdb").is_file() or any(path.glob("shard*/data.mdb")):
        return "lmdb"
    if visible_files(path, ".tar"):
        return "webdataset"
    kinds_found = _file_kinds(path)
    if len(kinds_found) > 1:
        raise DataError(f"{path} holds both pictures and clips ({_contents(path)}); set data.kind to one of them")
    if kinds_found:
        return kinds_found[0]
    if visible_files(path, CAPTION_SUFFIX):
        return "texts"
    raise DataError(f"{path} is no data set; it holds {_contents(path)}. Known layouts are\n{LAYOUTS}")


def _file_kinds(path: Path) -> list[str]:
    """Which of images and clips a folder holds with captions."""
    if table_of(path) is not None:
        return [_table_kind(path)]
    split = [kind for kind in SUFFIXES if caption_folders(path, kind) is not None]
    return split or [kind for kind, suffixes in SUFFIXES.items() if files_below(path, suffixes)]


def _table_kind(table: Path) -> str:
    suffixes = (row.file.suffix.lower() for row in read_table(table) if row.file is not None)
    found = (kind for suffix in suffixes for kind, known in SUFFIXES.items() if suffix in known)
    if (kind := next(found, None)) is None:
        problem = next((f"; {row.where}: {row.problem}" for row in read_table(table) if row.problem), "")
        known = ", ".join((*SUFFIXES["images"], *SUFFIXES["clips"]))
        raise DataError(f"{table} names no picture and no video ({known}){problem}")
    return kind


def _contents(path: Path) -> str:
    """What a folder holds, in words: how many files of each suffix, and its sub-folders."""
    entries = sorted(path.iterdir())
    folders = [entry.name + "/" for entry in entries if entry.is_dir()]
    files = Counter(entry.suffix or entry.name for entry in entries if not entry.is_dir())
    parts = [f"{number} x {suffix}" for suffix, number in sorted(files.items())[:12]]
    return ", ".join([*parts, *folders[:12], *(["..."] if len(folders) > 12 or len(files) > 12 else [])]) or "nothing"


def _open_images(path: Path, sizes: Sizes) -> Dataset:
    from longtake.data.images import ImageFolder

    return ImageFolder(path, sizes)


def _frames_needed(path: Path, num_frames: int | None) -> int:
    if num_frames is None:
        raise ConfigError(f"{path} holds clips; say how many frames to read with num_frames")
    return num_frames


def _open_clips(path: Path, num_frames: int | None, sizes: Sizes, fps: float | None) -> Dataset:
    from longtake.data.clips import ClipFolder

    return ClipFolder(path, _frames_needed(path, num_frames), sizes, fps)


def _open_texts(path: Path) -> Dataset:
    from longtake.data.texts import TextRows

    return TextRows(path)


def _open_tars(path: Path, num_frames: int | None, sizes: Sizes, fps: float | None) -> Dataset:
    from longtake.data.tar import TarShards

    return TarShards(path, num_frames, sizes, fps)


def _open_lmdb(path: Path, sizes: Sizes) -> Dataset:
    from longtake.data.lmdb import LmdbShards

    return LmdbShards(path, sizes)


def _open_encoded(path: Path) -> Dataset:
    from longtake.data.encoded import EncodedRows

    return EncodedRows(path)
