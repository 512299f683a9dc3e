"""What a command says while it works: through logging, so that a library is silent unless it is asked.

On a terminal a bar that changes (`Terminal`), in a pipe or a log a line now and then. Nothing of it goes to stdout,
which scripts read. Must know no command and nothing of what is done.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

_T = TypeVar("_T")

BAR = logging.INFO - 5  # records that only a bar shows
_BAR_SECONDS, _LINE_SECONDS = 0.2, 10.0
_LATEST = 20  # the pace is over so many of the latest updates
_FORMAT = "%(levelname)s %(name)s: %(message)s"

logger = logging.getLogger(__name__)


class Progress:
    """How far something is: tell it with `update`; `total` None: nobody knows how much there will be; `unit` "bytes" is
    told as sizes.

    A line comes after ten seconds at the earliest, and then every ten: what is done sooner says nothing.
    """

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        now = time.monotonic()
        self._shown, self._told = 0.0, now
        self._times: deque[tuple[float, int]] = deque([(now, 0)], maxlen=_LATEST)

    def update(self, done: int) -> None:
        """So many of all are done."""
        now = time.monotonic()
        self.done = done
        self._times.append((now, done))
        if now - self._shown >= _BAR_SECONDS or done == self.total:
            self._shown = now
            logger.log(BAR, "%s", self, extra={"progress": self})
        if now - self._told >= _LINE_SECONDS:
            self._told = now
            logger.info("%s", self, extra={"progress": self})

    def finish(self) -> None:
        """Nothing more will come; a bar goes."""
        logger.log(BAR, "%s", self, extra={"progress": self, "is_last": True})

    @property
    def rate(self) -> float:
        """Units a second over the latest updates."""
        (begin, before), (end, after) = self._times[0], self._times[-1]
        return (after - before) / (end - begin) if end > begin else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds until all is done at this pace; None when nobody knows."""
        return (self.total - self.done) / self.rate if self.total is not None and self.rate > 0 else None

    @property
    def state(self) -> str:
        """How much is done, how fast, and what is left."""
        done, unit = (as_size(self.done), "") if self.unit == "bytes" else (str(self.done), f" {self.unit}")
        of, share = "", ""
        if self.total:
            of = f" of {as_size(self.total)}" if self.unit == "bytes" else f"/{self.total}"
            share = f" ({self.done / self.total:.0%})"
        left = "" if self.remaining is None or self.done == self.total else f", {duration(self.remaining)} left"
        return f"{done}{of}{unit}{share}{self._pace}{left}"

    @property
    def _pace(self) -> str:
        if self.rate <= 0:
            return ""
        if self.unit == "bytes":
            return f", {as_size(round(self.rate))}/s"
        return f", {self.rate:.1f} {self.unit}/s" if self.rate >= 1 else f", {1 / self.rate:.1f} s each"

    def __str__(self) -> str:
        return f"{self.what}: {self.state}"


def track(
    items: Iterable[_T],
    what: str,
    unit: str,
    total: int | None = None,
    *,
    size: Callable[[_T], int] = lambda _: 1,
) -> Iterator[_T]:
    """Yields the items and says how far they are; `total`, default: their number where they have one; `size`, of `unit`
    in an item.
    """
    progress = Progress(what, len(items) if total is None and isinstance(items, Sized) else total, unit)
    try:
        for item in items:
            yield item
            progress.update(progress.done + size(item))
    finally:
        progress.finish()


def duration(seconds: float) -> str:
    """Seconds as people say them: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def as_size(size_bytes: int) -> str:
    """In GB or MB of 1000."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"


class Terminal(logging.Handler):
    """Lines, and below them a bar for each thing in progress, with rich."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._stream = stream
        self._bars: Any = None
        self._tasks: dict[int, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a record: what is in progress as a bar, the rest as a line above."""
        try:
            progress = getattr(record, "progress", None)
            if progress is None:
                self._line(record)
            elif record.levelno == BAR:
                self._bar(progress, is_last=getattr(record, "is_last", False))
        except OSError:
            self.handleError(record)  # the terminal went away

    def close(self) -> None:
        """Takes the bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        super().close()

    def _line(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        text = text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
        if self._bars is None:
            self._stream.write(f"{text}\n")
            self._stream.flush()
        else:
            self._bars.console.print(text, markup=False, highlight=False)

    def _bar(self, progress: Progress, *, is_last: bool) -> None:
        if self._bars is None and not is_last:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars

            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")
            # Else what commands write to stdout would end up here.
            how: dict[str, Any] = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
            self._bars = Bars(*columns, console=Console(file=self._stream), **how)
            self._bars.start()
        key = id(progress)
        if is_last:
            if (task := self._tasks.pop(key, None)) is not None:
                self._bars.remove_task(task)
            if not self._tasks and self._bars is not None:
                self._bars.stop()
                self._bars = None
            return
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(progress.what, total=progress.total, state="")
        told = {"description": progress.what, "completed": progress.done, "state": progress.state}
        self._bars.update(self._tasks[key], **told)


@contextmanager
def shown(*, quiet: bool = False) -> Iterator[None]:
    """What is said inside goes to stderr: all that a user wants to know, or (`quiet`) warnings alone."""
    stream, root, own = sys.stderr, logging.getLogger(), logging.getLogger("longtake")
    handler: logging.Handler
    if stream.isatty() and not quiet:
        handler = Terminal(stream)
        level = BAR
    else:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(_FORMAT))
        level = logging.WARNING if quiet else logging.INFO
    is_ours = not root.handlers  # else somebody listens already
    if is_ours:
        root.addHandler(handler)
    own.setLevel(level)  # of other libraries warnings alone
    try:
        yield
    finally:
        handler.close()
        if is_ours and handler in root.handlers:
            root.removeHandler(handler)
