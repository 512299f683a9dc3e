"""The thread that owns a device: the sessions on it, what is asked of them, and whose block is made next.

Nothing else calls a session. Whoever asks gets a future; blocks come out through a function, in the order in which they
were made, from a second thread, so that a GPU is never waited for before its next block has begun. Must know no
network and no file format.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longtake.devices import num_cores
from longtake.errors import ConfigError, LongtakeError, OutputError
from longtake.inference.frames import Piece
from longtake.inference.generator import Generator
from longtake.inference.session import Session
from longtake.serve.capacity import Capacity, Memory, measure, trim
from longtake.serve.lanes import Block, Lane, next_lane

logger = logging.getLogger(__name__)

_TEXT_LOG = logging.getLogger("longtake.encoders.text")
_HISTORY_CACHES = 2  # of changes that can be taken back: who changes with every block would fill the memory
_ENDED = "the server is ending, or its device has failed; come back when it has started again"
_STOP_SECONDS = 60  # in which a thread ends its block; one that hangs must not keep the process
_AT_ONCE = 2  # blocks that are begun and have not come out: a GPU has the next one while this one is fetched


@dataclass(frozen=True)
class Made:
    """Frames of a session: `frames` uint8 [T, h, w, 3] from number `first` on, all of `block` or, of the first one that
    is generated or follows a change, a part; `rewindable` blocks can be taken back; `seconds` since the block was begun
    and the one before it had come out.
    """

    session: str
    block: Block
    first: int
    frames: NDArray[np.uint8]
    rewindable: int
    seconds: float


@dataclass(frozen=True)
class Lost:
    """A session that could not go on and is no more."""

    session: str
    error: Exception


@dataclass(frozen=True)
class Turned:
    """Where among its blocks a session was changed, rewound, forked or saved; `result`, what was answered."""

    session: str
    result: Any


Output = Made | Lost | Turned


@dataclass(frozen=True)
class _Begun:
    """Pieces of a block begun at `began`, from frame `first` on; `is_whole`: no more of it come."""

    lane: Lane
    block: Block
    pieces: Sequence[Piece]
    began: float
    first: int
    is_whole: bool = False


@dataclass(frozen=True)
class _Asked:
    """What somebody waits for: a method of `Engine` without its `do_`, and its arguments."""

    future: Future[Any]
    operation: str
    args: tuple[Any, ...]
    values: dict[str, Any]

    def drops_of(self, name: str) -> bool:
        """Whether it is a change of this session that takes back what was not shown yet."""
        return self.operation == "change" and self.args[0] == name and bool(self.args[-1])


class _Dropped(Exception):
    """The block in the making would be taken back before anybody saw it."""


@dataclass(frozen=True)
class Model:
    """What a generator, called `name`, makes: size and rate of its pictures, pixel frames of a block, what it takes
    (`picture`: needed, optional or none; `target`), and the rules that a client may want to know.
    """

    name: str
    height: int
    width: int
    fps: int
    block_frames: int
    picture: str
    target: bool
    guidance: float
    history_blocks: int

    @classmethod
    def of(cls, generator: Generator, history_blocks: int) -> Model:
        rules, begin = generator.settings, generator.beginning
        return cls(
            "student" if generator.source is None else generator.source.name,
            rules.height,
            rules.width,
            rules.fps,
            generator.plan.block_frames * generator.encoders.vae.temporal_stride,
            "needed" if begin.needed else "none" if begin.picture == "none" else "optional",
            generator.model.config.image_dim is not None,
            rules.guidance,
            history_blocks,
        )


class Engine:
    """Sessions of one generator, in a thread of its own; make it, `start` it, `stop` it.

    Args: `build` makes the generator, in that thread; `emit` is called with what comes out, from another thread;
    `blocks_ahead`, the most that are made beyond what was shown; `history`, blocks
    that can be taken back.
    """

    def __init__(
        self, build: Callable[[], Generator], emit: Callable[[Output], None], blocks_ahead: int, history: int
    ) -> None:
        self._build, self._emit, self._blocks_ahead, self._history = build, emit, blocks_ahead, history
        # What a change drops is taken back at once: whoever waits for it has little left to see.
        ready = {"history_blocks": history, "ready_blocks": blocks_ahead + 1}
        self._kept: dict[str, Any] = {**ready, "history_caches": _HISTORY_CACHES}
        self._lanes: dict[str, Lane] = {}
        self._asked: deque[_Asked] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._on_their_way: queue.Queue[_Begun | None] = queue.Queue()
        self._room = threading.Semaphore(_AT_ONCE)
        self._threads = [
            threading.Thread(target=one, name=one.__name__, daemon=True) for one in (self._own, self._fetch)
        ]
        self.ready: Future[Model] = Future()
        self.ready.set_running_or_notify_cancel()  # who stops waiting for it does not cancel it

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads after the block in the making; what was asked for by then is done first."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_STOP_SECONDS)
            if thread.is_alive():
                logger.error("%s has not ended in %d s and is left behind", thread.name, _STOP_SECONDS)

    def call(self, operation: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Asks for a method of `Engine` whose name begins with `do_`, between two blocks."""
        future: Future[Any] = Future()
        with self._wake:
            if self._stopping:
                future.set_exception(ConfigError(_ENDED))
                return future
            self._asked.append(_Asked(future, operation, args, kwargs))
            self._wake.notify()
        return future

    # ---- the thread that owns the device ----------------------------------------------------------------------------
    def _own(self) -> None:
        quiet = _Private()
        _TEXT_LOG.addFilter(quiet)
        try:
            self._serve()
        except BaseException as error:  # of whatever kind: whoever waits would wait for ever
            told = not self.ready.done() and isinstance(error, LongtakeError)  # to who waits for it, in words
            if not told:
                logger.exception("the device cannot go on")
            if not self.ready.done():
                self.ready.set_exception(_plain(error))
        finally:
            self._end()
            _TEXT_LOG.removeFilter(quiet)

    def _end(self) -> None:
        """Nothing is done any more: all that was asked for is refused, and sessions that are left are lost."""
        with self._wake:
            self._stopping = True
            asked, self._asked = self._asked, deque()
        self._on_their_way.put(None)
        for one in asked:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(ConfigError(_ENDED))
        for name in list(self._lanes):
            del self._lanes[name]
            self._emit(Lost(name, ConfigError(_ENDED)))

    def _serve(self) -> None:
        self._generator = self._build()
        self._cpu_threads = [max(1, min(torch.get_num_threads(), num_cores() - less)) for less in (1, 0)]
        self.model = Model.of(self._generator, self._history)
        self.ready.set_result(self.model)
        while True:
            with self._wake:
                while not (self._asked or self._stopping or self._next()):
                    self._wake.wait()
                asked, self._asked = self._asked, deque()
            for one in asked:
                self._answer(one)
            if self._stopping and not asked:
                break
            if not self._asked and (lane := self._next()):
                self._make(lane)
        self._lanes.clear()

    def _next(self) -> Lane | None:
        return next_lane(self._lanes.values())

    def _answer(self, asked: _Asked) -> None:
        future = asked.future
        if not future.set_running_or_notify_cancel():  # nobody waits for it any more
            return
        try:
            result = getattr(self, f"do_{asked.operation}")(*asked.args, **asked.values)
        except BaseException as error:
            _free_memory(error)
            future.set_exception(_plain(error))
            expected = isinstance(error, LongtakeError | MemoryError | torch.OutOfMemoryError)
            if not expected or isinstance(error, OutputError):
                logger.exception("a request failed")
        else:
            future.set_result(result)

    def _make(self, lane: Lane) -> None:
        """Begins the next block of a session; one that cannot is closed, and the others go on."""
        while not self._room.acquire(timeout=1.0):
            self._check_fetching()
        began, first, sent = monotonic(), lane.session.num_frames, list[Piece]()
        if self._generator.device.type == "cpu":  # a core encodes and sends, unless all wait for what follows a change
            torch.set_num_threads(self._cpu_threads[lane.is_changing])

        def early(piece: Piece, count: int) -> None:
            sent.append(piece)
            self._on_their_way.put(_Begun(lane, Block(first, count, lane.number), sent[:], began, first))

        try:
            frames = lane.session.begin(lambda: self._let_go(lane), early)
            block = Block(first, len(frames), lane.number)
            lane.began(block, monotonic())
        except _Dropped:
            self._room.release()
            return
        except BaseException as error:
            self._room.release()
            logger.exception("session %s cannot go on", lane.name)
            self._lose(lane, _plain(error))
            return
        rest, first = frames.pieces[len(sent) :], first + sum(map(len, sent))
        self._on_their_way.put(_Begun(lane, block, rest, began, first, is_whole=True))

    def _let_go(self, lane: Lane) -> None:
        """Called between the steps of a block. Raises: _Dropped when a change waits that would take it back."""
        with self._wake:
            drops = any(one.drops_of(lane.name) for one in self._asked)
        if drops and lane.can_drop(monotonic(), self._others(lane)):
            raise _Dropped

    def _others(self, lane: Lane) -> float:
        """Seconds of another session's block that may come before the next one of this."""
        rest = (one.block_seconds for one in self._lanes.values() if one is not lane and not one.paused)
        return max(rest, default=0.0)

    def _lose(self, lane: Lane, error: Exception) -> None:
        if self._lanes.pop(lane.name, None) is not None:
            _free_memory(error)
            self._emit(Lost(lane.name, error))

    def _settle(self) -> None:
        """Returns when all blocks that were begun have come out."""
        with self._on_their_way.all_tasks_done:
            while self._on_their_way.unfinished_tasks:
                self._on_their_way.all_tasks_done.wait(1.0)
                self._check_fetching()

    def _check_fetching(self) -> None:
        """Raises RuntimeError when nobody fetches blocks any more: to wait for them would be for ever."""
        if not self._threads[1].is_alive():
            raise RuntimeError("the thread that fetches frames has ended")

    # ---- the thread that waits for frames ---------------------------------------------------------------------------
    def _fetch(self) -> None:
        before = now = 0.0  # when the block before has come out: until then the device was busy with it
        smooth, lost = 0.0, ""  # since when a viewer can watch a block without a wait; whose rest does not come
        while (item := self._on_their_way.get()) is not None:
            lane, block, first = item.lane, item.block, item.first
            if first == block.first:
                before, smooth, lost = now, 0.0, ""
            try:
                for piece in () if lane.name == lost else item.pieces:
                    array = piece.array()
                    now = monotonic()
                    self._emit(Made(lane.name, block, first, array, lane.rewindable, now - max(item.began, before)))
                    smooth = max(smooth, now - (first - block.first) / lane.session.generator.fps)
                    first += len(array)
                if item.is_whole:
                    lane.came(block, now - item.began, smooth)
            except BaseException as error:
                logger.exception("session %s cannot go on", lane.name)
                lost = lane.name
                self.call("lose", lane.name, _plain(error))
            finally:
                if item.is_whole:
                    self._room.release()
                self._on_their_way.task_done()

    # ---- what can be asked for --------------------------------------------------------------------------------------
    def do_lose(self, name: str, error: Exception) -> None:
        if (lane := self._lanes.get(name)) is not None:
            self._lose(lane, error)

    def do_open(self, name: str, picture: NDArray[np.uint8] | None, prompt: str, **values: Any) -> None:
        """A new session; `values` as those of `Generator.open`."""
        self._add(name, self._generator.open(picture, prompt, **self._kept, **values))

    def do_restore(self, name: str, path: Path, number: int, past: int) -> int:
        """The session of a file, which will follow change `number` and has followed `past`. Returns: its frame."""
        session = self._generator.resume(path, **self._kept)
        self._add(name, session, number, past)
        return session.num_frames

    def _add(self, name: str, session: Session, number: int = 0, past: int = 0) -> None:
        ahead = self._blocks_ahead * self.model.block_frames
        lane = Lane(name, session, number, past, ahead, dry_at=monotonic())
        lane.shown = session.num_frames
        self._lanes[name] = lane

    def do_close(self, name: str) -> None:
        self._lanes.pop(name, None)

    def do_hold(self, name: str, paused: bool) -> None:
        """Makes no more blocks of a session, or goes on."""
        lane = self._lane(name)
        self._settle()
        lane.hold(paused, monotonic())
        self._turned(name, None)

    def do_shown(self, name: str, frame: int, at: float) -> None:
        """So many frames of a session had been shown at that time, by the clock of `monotonic`."""
        if (lane := self._lanes.get(name)) is not None:
            lane.saw(frame, at)

    def do_change(self, name: str, kind: str, value: Any, number: int, asked: float, drop: bool) -> tuple[int, bool]:
        """Another `prompt`, `image` or `target` (the kind), `asked` for at that time, by the clock of `monotonic`; with
        `drop` in the place of what was not shown yet.

        Returns: the frame from which on it holds, and whether frames were taken back for it.
        """
        lane = self._lane(name)
        self._settle()
        dropped = lane.change(kind, value, number, asked, monotonic(), drop=drop, others=self._others(lane))
        return self._turned(name, (lane.session.num_frames, dropped))

    def do_rewind(self, name: str, blocks: int | None, to_frame: int | None) -> tuple[int, int]:
        """Takes back so many blocks, or those that begin at `to_frame` or later.

        Returns: the frame where it stands then, and the number of the change it follows.
        """
        lane = self._lane(name)
        self._settle()
        lane.rewind(lane.blocks_from(to_frame) if blocks is None else blocks)
        return self._turned(name, (lane.session.num_frames, lane.number))

    def do_fork(self, name: str, branch: str) -> int:
        """Another session at the same place. Returns: its frame."""
        lane = self._lane(name)
        self._settle()
        self._lanes[branch] = lane.fork(branch)
        return self._turned(name, lane.session.num_frames)

    def do_save(self, name: str, path: Path) -> tuple[int, int, int]:
        """Writes a session down. Returns: its frame, and `number` and `past` for `do_restore`."""
        lane = self._lane(name)
        self._settle()
        lane.session.save(path)
        past = lane.blocks[-1].number if lane.blocks else lane.past
        return self._turned(name, (lane.session.num_frames, lane.number, past))

    def _turned(self, name: str, result: Any) -> Any:
        self._emit(Turned(name, result))  # before the next block can come out
        return result

    def do_measure(self, most: int | None) -> Capacity:
        """How many sessions may play at once. Before the first one."""
        return measure(self._generator, most, self._kept)

    def do_memory(self) -> Memory:
        """Of the device; what nobody uses of a CPU's is given back first."""
        if self._generator.device.type == "cpu":
            trim()
        pool = self._generator.copies.pool
        return replace(Memory.of(self._generator.device), host=pool.size_bytes, host_seconds=round(pool.seconds, 3))

    def _lane(self, name: str) -> Lane:
        if name not in self._lanes:
            raise ConfigError("the session has ended; open another one")
        return self._lanes[name]


class _Private(logging.Filter):
    """Leaves out what the text encoder says of prompts in the thread that made this: they are somebody's."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread


def _plain(error: BaseException) -> Exception:
    """An error that ends a request or a session and nothing else: libraries in Rust panic with other kinds."""
    return error if isinstance(error, Exception) else RuntimeError(type(error).__name__)


def _free_memory(error: BaseException) -> None:
    """After a full memory what nobody needs is given back, so that the next session finds it."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
