"""One command a folder: a lock that the kernel (or the file server) lets go when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from longtake.errors import ConfigError

LOCK = ".lock"  # in the folder; its text says who has it, or was killed while it had it
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, fix: str) -> Iterator[None]:
    """Inside, no other process is inside for the same `folder`, which is made; on any machine that shares it.

    Args: `fix`, what else the user may do. Raises: ConfigError naming the other process, or that the folder cannot be
    written; nothing in it is changed then.
    """
    made = not folder.exists()
    file = _taken(folder, fix)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        os.fsync(file.fileno())  # for readers on other machines
        yield
    finally:
        with suppress(OSError):  # a disk that has become read-only: what was said of it before is told
            (folder / LOCK).unlink()  # before it is let go: `_taken` looks whether its file is still there
        file.close()
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # refused before anything was written


def _taken(folder: Path, fix: str) -> TextIO:
    """The lock file, locked by a record lock (POSIX) and not by flock: network file systems have it, and no child
    inherits it and keeps it alive. Nothing else in this process may open the file: closing that lets go of the lock.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a+")
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}); make it writable, or {fix}") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise ConfigError(f"{folder} is in use already, by {holder}; wait until it ends, or {fix}") from None
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("%s has no file locks (%s): never start two runs in one folder", folder, error.strerror)
        if (folder / LOCK).exists() and os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
            return file
        file.close()  # its owner removed it just now
