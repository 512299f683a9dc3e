"""Ranks as threads of one process: what a mesh exchanges, without a process group. For code that only gathers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from longtake.parallel.mesh import Mesh

T = TypeVar("T")


@dataclass
class _Meeting:
    barrier: threading.Barrier
    values: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class FakeMesh(Mesh):
    """One of `world_size` threads; `every` waits for the others and gives them its value."""

    meeting: _Meeting | None = None

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def every(self, work: Callable[[], T]) -> list[T]:
        assert self.meeting is not None
        self.meeting.values[self.rank] = work()
        self.meeting.barrier.wait(60)
        values = list(self.meeting.values)
        self.meeting.barrier.wait(60)
        return values


def on_ranks(work: Callable[[FakeMesh], T], world_size: int = 2) -> list[T]:
    """What `work` returns on each of `world_size` ranks."""
    meeting = _Meeting(threading.Barrier(world_size), [None] * world_size)

    def run(rank: int) -> T:
        try:
            return work(FakeMesh(rank, world_size, meeting=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
