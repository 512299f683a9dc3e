"""An engine in a process of its own: one for each of several devices. Looks from here like `Engine`.

Requests and what comes out travel through a pipe, in the order in which they were made.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from longtake.errors import ConfigError, LongtakeError
from longtake.inference.generator import Generator
from longtake.serve.engine import Engine, Lost, Model, Output

logger = logging.getLogger(__name__)

_GONE = "the worker of this session's device has ended; open a saved session, or another one"
_STOP_SECONDS = 60  # in which a worker ends what it does
_KNOWN = (LongtakeError, MemoryError)


class WorkerEngine:
    """Arguments and methods as those of `Engine`; `build` must be one that another process can import."""

    def __init__(
        self, build: Callable[[], Generator], emit: Callable[[Output], None], blocks_ahead: int, history: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(build, there, blocks_ahead, history), daemon=True)
        self._there, self._emit = there, emit
        self._asked: dict[int, Future[Any]] = {}
        self._sessions: set[str] = set()
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="worker", daemon=True)
        self.ready: Future[Model] = Future()
        self.ready.set_running_or_notify_cancel()  # who stops waiting for it does not cancel it

    def start(self) -> None:
        self._process.start()
        self._there.close()  # so that its end is seen here
        self._reader.start()

    def stop(self) -> None:
        if not self._reader.is_alive():  # never started, or its process has ended
            return
        with self._sending, suppress(OSError):
            if not self._ended:
                self._pipe.send(None)
        self._process.join(timeout=_STOP_SECONDS)
        if self._process.is_alive():
            logger.error("a worker has not ended in %d s and is killed", _STOP_SECONDS)
            self._process.kill()
            self._process.join(timeout=5)
        self._reader.join(timeout=5)

    def call(self, operation: str, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # so that nobody cancels it while its answer is on the way
        with self._sending:
            if self._ended:
                future.set_exception(ConfigError(_GONE))
                return future
            number = next(self._numbers)
            self._asked[number] = future
            if operation in ("open", "restore"):
                self._sessions.add(args[0])
            elif operation == "fork":
                self._sessions.add(args[1])
            elif operation == "close":
                self._sessions.discard(args[0])
            try:
                self._pipe.send((number, operation, args, kwargs))
            except OSError:  # it has just died, which the reader tells everybody else
                del self._asked[number]
                future.set_exception(ConfigError(_GONE))
        return future

    def _read(self) -> None:
        try:
            while True:
                number, value, error = self._pipe.recv()
                if number is None:
                    self._emit(value)
                else:
                    _settle(self.ready if number < 0 else self._asked.pop(number), value, error)
        except (EOFError, OSError):
            logger.warning("a worker has ended")
        except Exception:
            logger.exception("a worker cannot be understood")
        finally:  # whatever ended it: nobody else reads what others wait for
            self._end()

    def _end(self) -> None:
        """The process is no more, whatever ended it."""
        with self._sending:
            self._ended = True
            asked, self._asked = list(self._asked.values()), {}
        for future in [*asked, *([] if self.ready.done() else [self.ready])]:
            _settle(future, None, ConfigError(_GONE))
        for name in self._sessions:
            self._emit(Lost(name, ConfigError(_GONE)))


def _settle(future: Future[Any], value: Any, error: Exception | None) -> None:
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _work(build: Callable[[], Generator], pipe: Connection, blocks_ahead: int, history: int) -> None:
    """The process: an engine, and the other end of the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):  # who started it ends it, when its sessions are saved
        signal.signal(number, signal.SIG_IGN)
    sending = threading.Lock()

    def send(number: int | None, value: Any, error: Exception | None = None) -> None:
        with sending:
            pipe.send((number, value, error))

    def answer(number: int, future: Future[Any]) -> None:
        error = future.exception()
        send(number, None, _portable(error)) if error is not None else send(number, future.result())

    engine = Engine(build, lambda output: send(None, _sent(output)), blocks_ahead, history)
    engine.ready.add_done_callback(partial(answer, -1))
    engine.start()
    try:
        while (asked := pipe.recv()) is not None:
            number, operation, args, kwargs = asked
            future = engine.call(operation, *args, **kwargs)
            future.add_done_callback(partial(answer, number))
    except (EOFError, OSError):  # who started it is gone
        pass
    engine.stop()
    pipe.close()


def _sent(output: Output) -> Output:
    return Lost(output.session, _portable(output.error)) if isinstance(output, Lost) else output


def _portable(error: BaseException) -> Exception:
    """An error that another process can make of what it reads."""
    if type(error).__name__ == "OutOfMemoryError":
        return MemoryError("the memory of the device is full")
    if isinstance(error, _KNOWN):
        try:
            return pickle.loads(pickle.dumps(error))
        except (TypeError, pickle.PicklingError):
            return LongtakeError(str(error))
    return RuntimeError(type(error).__name__)
