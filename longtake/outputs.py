"""Where commands write: what is checked before any work, and what is said when a disk refuses.

Nothing is overwritten unless it was asked for, an input never. Must know no command and no kind of file.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from itertools import chain, count
from pathlib import Path

from longtake.errors import ConfigError, OutputError

# What a user's disk, its limits and its permissions answer; other errors are bugs and keep their traceback.
_FIXES = {
    errno.ENOSPC: "free some space, or name another disk",
    errno.EDQUOT: "free some of your quota, or name another disk",
    errno.EFBIG: "files are limited in size here (ulimit -f, or the file system); name another disk",
    errno.EIO: "the disk reports an error; name another one",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "name one that you may use",
    errno.EPERM: "name one that you may use",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a part of it is a file; name a folder",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENOENT: "its folder does not exist; create it first",
    errno.ELOOP: "its links lead in a circle",
    errno.ENOTEMPTY: "name a new folder",
    errno.ESTALE: "the disk went away",
}
# Libraries that raise errors of their own say these in words, as the system does.
_SAID_BY_LIBRARIES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)
_TRIAL_BYTES = 4096


def refusal(error: BaseException) -> str | None:
    """What the disk answered and how to go on, as half a sentence; None for any other error."""
    number = error.errno if isinstance(error, OSError) else getattr(error, "errno", None)
    if number is None:
        number = next((n for n in _SAID_BY_LIBRARIES if os.strerror(n) in str(error)), None)
    return f"{os.strerror(number)}; {_FIXES[number]}" if number in _FIXES else None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the disk refuses below, in whatever words of whichever library, becomes an OutputError that names `path`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if (said := refusal(error)) is None:
            raise
        raise OutputError(f"{path} cannot be written: {said}") from None


def partial_name(path: Path) -> Path:
    """A name beside `path`, of this process alone, for what is not complete yet."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def whole_file(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` when all is written: who reads sees a whole file or the one
    before, and what fails leaves nothing behind. Args: `synced`, whether it is on the disk by then.

    Raises: OutputError, as `writing`.
    """
    partial = partial_name(path)
    try:
        with writing(path):
            yield partial
            if synced:
                sync(partial)
            partial.replace(path)
    finally:
        with suppress(OSError):  # a disk that refused to write refuses this, too: what it said first is told
            partial.unlink()


def write_whole(path: Path, text: str, *, synced: bool = False) -> None:
    """A text in UTF-8, as `whole_file` writes. Raises: OutputError."""
    with whole_file(path, synced=synced) as file:
        file.write_text(text, encoding="utf-8")


def free_name(path: Path) -> Path:
    """`path`, or where it exists the first of NAME-2, NAME-3, ... that does not."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(name for name in chain([path], names) if not os.path.lexists(name))


def check_output_file(
    path: str | Path, *, suffixes: Sequence[str] = (), inputs: Sequence[str | Path | None] = (), overwrite: bool = False
) -> Path:
    """The path of a file that will be written, when it can be.

    Args: `suffixes` that its name may have, any when there are none; `inputs`, files in use of which it must be
    none, also through links; `overwrite` lets it replace another file.
    Raises: ConfigError when it has another suffix, is an input or exists; OutputError when it cannot be written.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        fix = path.with_suffix(suffixes[0]) if path.name else path / f"video{suffixes[0]}"
        raise ConfigError(f"{path} must end in {' or '.join(suffixes)}, which is what is written; call it {fix}")
    for given in inputs:
        if given is not None and _same(path, given):
            raise ConfigError(f"{path} is in use ({given}) and would be lost; give the output another name")
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder; name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(f"{path} exists already; name another file, or give --overwrite to replace it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"{path} is no file that can be replaced; name another one")
    _try_to_write(path)
    return path


def check_output_folder(path: str | Path) -> Path:
    """The path of a folder that will be written into, made where it is missing, when that can be.

    Nothing is left behind. Raises: OutputError.
    """
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        _try_to_write(path / "trial", path)
    except FileExistsError:
        raise OutputError(f"{path} is a file; name a folder") from None
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
    return path


def check_new_folder(
    path: str | Path, *, own: Sequence[str], inputs: Sequence[str | Path | None] = (), overwrite: bool = False
) -> Path:
    """The path of a folder that will appear as a whole. `overwrite` lets it replace one that holds only what the same
    command wrote, of names like `own`: nobody's home folder is taken for one. None of `inputs` may lie in it.

    Raises: ConfigError when it exists or holds an input, OutputError when it cannot be written.
    """
    path = Path(path)
    for given in inputs:
        if given is not None and Path(os.path.realpath(given)).is_relative_to(os.path.realpath(path)):
            raise ConfigError(f"{path} is in use ({given}) and would be lost; give the output another name")
    if os.path.lexists(path):
        if not overwrite:
            raise ConfigError(f"{path} exists already; give the name of a new folder, or --overwrite to replace it")
        if not os.path.isdir(path):
            raise ConfigError(f"{path} is a file; give the name of a folder")
        check_own(path, own)
    check_output_folder(path.absolute().parent)
    _try_to_write(path)
    return path


def check_own(folder: Path, own: Sequence[str]) -> None:
    """Raises ConfigError when `folder` holds something else than names like `own`, which replacing it would lose.

    A pattern such as `images/*.png` is compared with paths in the folder, part by part.
    """
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    known = [(name, like) for name in names for like in own if name.count("/") == like.count("/")]
    foreign = sorted(set(names) - {name for name, like in known if fnmatch(name, like)})
    if foreign:
        raise ConfigError(f"{folder} also holds {', '.join(foreign[:3])}, which would be lost; name another folder")


def free_disk(path: str | Path) -> int:
    """Free bytes on the disk that will hold `path`, whose last parts need not exist yet."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def check_space(path: str | Path, needed: float) -> None:
    """Raises OutputError when the disk of a file that will be written has no room for `needed` bytes."""
    if needed > (free := free_disk(Path(path).absolute().parent)):
        raise OutputError(
            f"{path} will take about {needed / 1e9:.1f} GB while it is made, and its disk has {free / 1e9:.1f} GB; "
            "name another disk, or make it shorter or smaller"
        )


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into: it gets the name `folder` when all of it is on the disk, and goes when something fails.
    What commands that were killed on this machine left of it goes, too.

    Args: `overwrite`: a folder of this name makes way and is removed.
    """
    own = f".tmp-{folder.name}-{socket.gethostname()}-"
    partial, old = (folder.with_name(f"{own}{os.getpid()}{end}") for end in ("", ".old"))
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in folder.parent.iterdir():
            process = path.name.removeprefix(own)
            if path.name.startswith(own) and process.isdigit() and not _is_alive(int(process)):
                shutil.rmtree(path, ignore_errors=True)
        partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        with writing(folder):
            if replaces := overwrite and folder.exists():
                os.rename(folder, old)
            os.rename(partial, folder)
            if replaces:
                shutil.rmtree(old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()  # a command before this one had the same number


def _same(path: str | Path, other: str | Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # one of them is not there
        return os.path.abspath(path) == os.path.abspath(other)


def _try_to_write(path: Path, shown: Path | None = None) -> None:
    trial = partial_name(path)
    with writing(shown or path):
        handle = os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            os.write(handle, bytes(_TRIAL_BYTES))
        finally:
            os.close(handle)
            os.unlink(trial)
