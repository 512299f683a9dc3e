"""The exceptions a user can meet. Every message says what was got, the rule, and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What torch says of a full memory, in errors of several kinds: where a GPU has no room for a context, too
_FULL = re.compile("can't allocate memory|out of memory|_ALLOC_FAILED")


class LongtakeError(Exception):
    """Base class of every error that Longtake raises on purpose."""

    def __init__(self, *words: object) -> None:
        super().__init__(*(printable(word) if isinstance(word, str) else word for word in words))


def printable(text: str) -> str:
    """The text as it can be written anywhere: what no UTF-8 is, as in some names of files, becomes `\\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode()


def nearest(wrong: str, known: Iterable[str]) -> str:
    """What an error says of a name that there is not: "; did you mean toy/i2v?", or nothing where none is like it.

    Capitals, and whether `-` or `_` joins words, do not count.
    """
    plain = {name.casefold().replace("_", "-"): name for name in known}
    near = difflib.get_close_matches(wrong.casefold().replace("_", "-"), plain, n=2)
    return f"; did you mean {' or '.join(plain[one] for one in near)}?" if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or of torch says that a memory is full."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    return isinstance(error, RuntimeError) and _FULL.search(str(error)) is not None


class ConfigError(LongtakeError, ValueError):
    """A configuration value, or a combination of values, breaks a rule.

    A ValueError, so that rules which pydantic asks may raise it: it then gets the dotted name of its key.
    """


class DataError(LongtakeError):
    """A data row, an image, a video or a dataset folder cannot be used."""


class OutputError(DataError):
    """A file or folder cannot be written where it was asked for."""


class ShapeError(LongtakeError):
    """A tensor has a shape, a dtype or a range that the callee does not accept."""


class CheckpointError(LongtakeError):
    """A checkpoint or a weight file is missing, damaged, or does not fit the model."""


class CacheError(LongtakeError):
    """A key/value cache was asked to do something that would corrupt a result."""


class TrainingError(LongtakeError):
    """Training cannot go on: a non-finite loss or gradient, ranks that disagree, a failed save."""
