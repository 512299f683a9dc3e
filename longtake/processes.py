"""Processes beside this one, and what is said when one of them dies."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from longtake.errors import LongtakeError


@contextmanager
def spawned(number: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes; spawned, not forked: this one may have threads and a GPU. An error is not kept waiting."""
    pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def answered(work: str) -> Iterator[None]:
    """Around what gives them work and takes their answers. Raises: LongtakeError where one of them has died."""
    try:
        yield
    except BrokenProcessPool as error:
        raise LongtakeError(
            f"a process for {work} was ended before it had answered: by the system where memory is short (`dmesg` "
            'tells), by hand, or since a script of your own calls this outside of `if __name__ == "__main__":`; mend '
            "that and start again"
        ) from error
