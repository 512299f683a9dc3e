"""Opens a data set of any format and recognises which one a path holds."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from longtake.config.formats import FORMATS, check_format
from longtake.data.file_rows import contents
from longtake.data.rows import Format, PictureSpec
from longtake.data.samples import FileSize, Sizes
from longtake.errors import ConfigError, DataError


def open_dataset(
    path: str | Path,
    *,
    kind: str = "auto",
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    buckets: Sizes = (),
) -> Format:
    """The data set at a path.

    Args: `kind` is one of `FORMATS`, or `auto` to look; `num_frames` is needed for clips; `height` and `width` in
    pixels, both or none; `buckets`, sizes of which each picture takes the nearest in aspect, in place of the one; `fps`
    at which clips are sampled, None = every stored frame.
    Raises: DataError when the path is missing, empty or of no known format.
    """
    path = Path(path)
    if (height is None) != (width is None):
        raise ConfigError(f"height={height} and width={width} must be given together")
    sizes = buckets or (() if height is None or width is None else (FileSize(height, width),))
    return find_format(path, kind)(path, PictureSpec(sizes, num_frames, fps))


def find_format(path: Path, kind: str = "auto") -> type[Format]:
    """The class that opens what lies at a path. Raises: DataError, ConfigError as `open_dataset`."""
    if not path.exists():
        ways = "`longtake encode` writes an encoded set, `longtake world` that of the toy"
        raise DataError(f"data folder {path} does not exist; set data.path, or write it ({ways})")
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is a pipe or a device, which is read once; write what it gives to a file first")
    found = _format(detect_kind(path) if check_format(kind) == "auto" else kind)
    if path.is_file() and not found.takes_file(path):
        raise DataError(f"data.path={path} is a file, and data.kind={kind} needs a folder")
    if kind not in ("auto", "encoded") and _format("encoded").lies_at(path):
        raise DataError(f"data.path={path} is an encoded set, and data.kind={kind}; set data.kind=encoded")
    return found


def detect_kind(path: Path) -> str:
    """The format at a path. Raises: DataError that lists what was found and the known layouts."""
    for kind in FORMATS:
        if _format(kind).lies_at(path):
            return kind
    layouts = "\n".join(f"  {kind:<11} {_format(kind).LAYOUT}" for kind in FORMATS)
    if path.is_file():
        raise DataError(f"{path} is a file of no known data format; known are\n{layouts}")
    raise DataError(f"{path} is no data set; it holds {contents(path)}. Known layouts are\n{layouts}")


def _format(kind: str) -> type[Format]:
    module, _, name = FORMATS[kind].partition(":")
    return getattr(import_module(module), name)
