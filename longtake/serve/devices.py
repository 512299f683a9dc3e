"""The devices of a server: an engine each, how many sessions it carries, and which session is on which."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from longtake.errors import LongtakeError
from longtake.serve.capacity import Capacity, Memory
from longtake.serve.engine import Engine, Model, Output
from longtake.serve.workers import WorkerEngine

logger = logging.getLogger(__name__)

_MEMORY_SECONDS = 10.0  # for which an answer is waited for


@dataclass
class Device:
    """An engine, its capacity, and the names of the sessions on it."""

    engine: Engine | WorkerEngine
    capacity: Capacity = Capacity(0)
    names: set[str] = field(default_factory=set)
    memory: Memory = Memory()

    @property
    def free(self) -> int:
        return self.capacity.sessions - len(self.names)


class Devices:
    """One device is driven by a thread of this process, several by a process each.

    Args: `builds` make the generators; `emit`, `blocks_ahead` and `history` as those of `Engine`; `most`, sessions on
    each, None: as measured.
    """

    def __init__(
        self,
        builds: Sequence[Callable[[], Any]],
        emit: Callable[[Output], None],
        blocks_ahead: int,
        history: int,
        most: int | None,
    ) -> None:
        kind = Engine if len(builds) == 1 else WorkerEngine
        self._all = [Device(kind(build, emit, blocks_ahead, history)) for build in builds]
        self._most = most

    async def start(self) -> Model:
        """Returns what they serve, when all are ready."""
        for device in self._all:
            device.engine.start()
        models = [await asyncio.wrap_future(device.engine.ready) for device in self._all]
        for device in self._all:  # after another: devices may share what they are measured on
            device.capacity = await asyncio.wrap_future(device.engine.call("measure", self._most))
        return models[0]

    async def stop(self) -> None:
        await asyncio.gather(*(asyncio.to_thread(device.engine.stop) for device in self._all))

    async def measure_memory(self) -> Memory:
        """That of all devices together."""
        for device in self._all:
            try:
                async with asyncio.timeout(_MEMORY_SECONDS):
                    device.memory = await asyncio.wrap_future(device.engine.call("memory"))
            except LongtakeError:  # its worker has ended
                device.memory, device.capacity = Memory(), Capacity(0)
            except TimeoutError:  # it is busy, or hangs, and the others must not wait for it
                logger.warning("a device does not answer")
        return sum((device.memory for device in self._all), Memory())

    @property
    def most(self) -> int:
        """Sessions that may play at once."""
        return sum(device.capacity.sessions for device in self._all)

    @property
    def playing(self) -> int:
        """Sessions that have a place."""
        return sum(len(device.names) for device in self._all)

    @property
    def measured(self) -> dict[str, float | None]:
        """What was measured of a session on the first of them."""
        capacity = self._all[0].capacity
        return {
            "frames_per_second": capacity.frames_per_second,
            "session_bytes": capacity.session_bytes,
            "session_host_bytes": capacity.host_bytes,
        }

    def roomiest(self) -> Device | None:
        """The one with most places left; None: there is none."""
        best = max(self._all, key=lambda device: device.free)
        return best if best.free > 0 else None

    def of(self, name: str) -> Device | None:
        """Where a session is."""
        return next((device for device in self._all if name in device.names), None)
