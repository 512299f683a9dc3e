"""A video in the making, in a terminal: prompts are typed while it is written. No network, no threads but one that
reads the keyboard; frames are made in the thread that calls `play`.
"""

from __future__ import annotations

import codecs
import io
import os
import queue
import re
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from longtake.errors import ConfigError, LongtakeError
from longtake.inference.generator import GenerationReport, Generator, write_chunks
from longtake.inference.record import PLAIN, Asked, Writing
from longtake.outputs import check_output_file

if TYPE_CHECKING:
    from rich.console import Console

    from longtake.inference.session import Session

HELP = "a new prompt, or /image FILE (a cut), /target FILE, /save FILE, /quit"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]")  # arrow keys and their like
_RATE_CHUNKS = 20  # frames/s is over so many of the latest blocks


class Lines(Protocol):
    """Lines that were typed; `draft` is the one that is being typed, `ended` says that no more will come."""

    draft: str
    ended: bool

    def take(self) -> list[str]:
        """The lines since the last call."""
        ...


@dataclass
class Player:
    """A session, the lines that steer it, and what the view shows; `output`, the file that the frames go to;
    `pictured`, whether a scene began with a picture; `asked` notes what is told.
    """

    session: Session
    lines: Lines
    num_frames: int | None = None
    message: str = HELP
    quitting: bool = False
    written: int = 0
    output: Path | None = None
    pictured: bool = False
    asked: Asked | None = None
    _saved: set[Path] = field(default_factory=set)
    _times: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RATE_CHUNKS))

    def frames(self) -> Iterator[Any]:
        """Yields uint8 [T, h, w, 3] until it is told to quit, `num_frames` are made, or nothing can tell it to."""
        self._times.append((perf_counter(), 0))
        while True:
            chunk = self.session.next()
            if self.num_frames is not None:
                chunk = chunk[: self.num_frames - self.written]
            self.written += len(chunk)
            self._times.append((perf_counter(), self.written))
            yield chunk
            ended = self.lines.ended and self.num_frames is None  # asked first: lines may come before their end
            for line in self.lines.take():
                self.obey(line.strip())
            if self.quitting or ended or self.written == self.num_frames:
                return

    def quit(self) -> None:
        """Ends the video after the block in the making."""
        self.quitting = True

    def obey(self, line: str) -> None:
        """Does what a typed line says; a mistake becomes the message and stops nothing."""
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                self.quit()
            elif command == "/image":
                self.session.image = rest.strip() or None
                self._note(**{"image": rest.strip()} if rest.strip() else {"alone": True})
                self.pictured = self.pictured or bool(rest.strip())
                self.message = f"cut to {rest.strip() or 'a scene of the prompt alone'}"
            elif command == "/target":
                self.session.image_target = rest.strip()
                self._note(target=rest.strip())
                self.message = f"moving towards {rest.strip()}"
            elif command == "/save":
                path = Path(rest.strip())
                check_output_file(path, inputs=[self.output], overwrite=path in self._saved)
                self.session.save(path)
                self._saved.add(path)
                self.message = f"saved as {path}"
            elif line.startswith("/"):
                raise ConfigError(f"{command} is no command; type {HELP}")
            elif line:
                self.session.prompt = line
                self._note(prompt=line)
                self.message = HELP
        except LongtakeError as error:
            self.message = str(error)

    def _note(self, **what: Any) -> None:
        if self.asked is not None:
            self.asked.change(self.session.num_frames, **what)

    @property
    def rate(self) -> float:
        """Frames a second over the latest blocks."""
        if not self._times:
            return 0.0
        (start, before), (end, after) = self._times[0], self._times[-1]
        return (after - before) / (end - start) if end > start else 0.0

    def view(self) -> Any:
        """What the terminal shows now."""
        from rich.table import Table
        from rich.text import Text

        fps = self.session.generator.fps
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        position = f"{self.written} frames, {self.written / fps:.1f} s; latent {self.session.position}"
        table.add_row("video", Text(f"{position} of scene {max(0, self.session.scene)}"))
        table.add_row("speed", Text(f"{self.rate:.1f} frames/s, played at {fps}"))
        table.add_row("prompt", Text(self.session.prompt))
        table.add_row("", Text(self.message, style="italic"))
        table.add_row(">", Text(self.lines.draft + "_"))
        return table


def play(
    generator: Generator,
    image: str | Path | None,
    prompt: str,
    output: str | Path,
    *,
    seed: int = 0,
    num_frames: int | None = None,
    lines: Lines | None = None,
    console: Console | None = None,
    writing: Writing = PLAIN,
) -> GenerationReport:
    """Writes a video while lines typed at the keyboard change what it shows; Ctrl-C and `/quit` end it, complete.

    Args: `image` as in `Generator.stream`; `num_frames` pixel frames at most; None = until it is told to quit or the
    input ends. `lines`, default: those of the standard input; `writing`, how the video is written.
    Raises: LongtakeError before any frame for a bad picture, prompt or output.
    """
    from rich.console import Console
    from rich.live import Live

    most = num_frames if generator.plan.window_frames is None else None
    session = generator.open(image, prompt, seed=seed, history_blocks=0, max_frames=most)
    typed = sys.stdin if sys.stdin is not None and not sys.stdin.closed else io.StringIO()
    with Keyboard.reading(typed) if lines is None else nullcontext(lines) as source:
        asked = Asked(prompt, seed, image)
        player = Player(session, source, num_frames, output=Path(output), pictured=image is not None, asked=asked)
        view = Live(get_renderable=player.view, console=console or Console(stderr=True), refresh_per_second=8)
        with view, _on_interrupt(player.quit):
            how: dict[str, Any] = {"given": image is not None, "finish": True, "asked": asked, "writing": writing}
            report = write_chunks(generator, player.frames(), output, **how)
            return replace(report, note=generator.beginning.zero_shot(given=player.pictured))


@contextmanager
def _on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C calls `act` once; a second one interrupts as usual. Only the main thread can be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        act()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Keyboard:
    """Lines of a terminal, or of a pipe or file. A thread reads them, so that frames never wait for a key.

    A terminal gives each key at once and shows none (the view shows the draft); backspace takes a character back,
    Ctrl-D ends the input.
    """

    def __init__(self, stream: TextIO) -> None:
        self.draft, self.ended = "", False
        self._stream = stream
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stop = threading.Event()

    @classmethod
    @contextmanager
    def reading(cls, stream: TextIO) -> Iterator[Keyboard]:
        """Reads from `stream` until the end of the context; a terminal is left as it was."""
        keyboard = cls(stream)
        with _key_by_key(stream):
            thread = threading.Thread(target=keyboard._read, name="keyboard", daemon=True)
            thread.start()
            try:
                yield keyboard
            finally:
                keyboard._stop.set()
                thread.join()

    def take(self) -> list[str]:
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return lines

    def _read(self) -> None:
        try:
            handle = self._stream.fileno()
        except OSError:  # in memory: nothing to wait for
            for key in self._stream.read():
                self._press(key)
        else:
            self._read_from(handle)
        if self.draft:
            self._press("\n")
        self.ended = True

    def _read_from(self, handle: int) -> None:
        # Not the buffered stream: its lock, held while waiting for a key, would hang the end of the program.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while not self._stop.is_set() and not self.ended:
            try:
                if not select.select([handle], [], [], 0.1)[0]:
                    continue
                data = os.read(handle, 1024)
            except OSError:  # closed, a folder, a terminal that went away: an input that has ended
                return
            if not data:
                return
            for key in _ESCAPES.sub("", decoder.decode(data)):
                self._press(key)

    def _press(self, key: str) -> None:
        if key in "\r\n":
            self._lines.put(self.draft)
            self.draft = ""
        elif key in "\x7f\b":
            self.draft = self.draft[:-1]
        elif key == "\x04":
            self.ended = True
        elif key.isprintable():
            self.draft += key


@contextmanager
def _key_by_key(stream: TextIO) -> Iterator[None]:
    """A terminal gives keys at once and does not show them; anything else stays as it is."""
    if not stream.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(stream)
    tty.setcbreak(stream)
    try:
        yield
    finally:
        termios.tcsetattr(stream, termios.TCSADRAIN, before)
