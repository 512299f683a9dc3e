"""Copies of a device's tensors in the host's memory, made beside what the device computes.

Those of a GPU lie in page-locked memory, which it writes and reads without the processor. To lock pages takes about a
second a GB, in which their thread does nothing else. torch (2.13, `ATen/core/CachingHostAllocator.h`) rounds what it
locks up to a power of two, uses a piece again only when its streams have done all that they had been given when it
became free, and unlocks all free ones whenever a CUDA graph is recorded (`torch.cuda.graph`). Here pieces are locked
one by one at their size, and stay. On a CPU copies are plain tensors, made at once. Must know nothing of what is
copied.
"""

from __future__ import annotations

import logging
import mmap
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import prod
from threading import Lock
from time import perf_counter
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtake.models.attention import ONE_THREAD
from longtake.rollout.cuda_graphs import while_none_records

logger = logging.getLogger(__name__)

# page_lock(memory, device) -> what unlocks it again
PageLock = Callable[[NDArray[np.uint8], torch.device], Callable[[], object]]

_PORTABLE = 1  # of cudaHostRegister: locked for all devices


class HostPool:
    """Page-locked memory in pieces, each of which is used again when no tensor lies in it any more.

    Threads may share it. What a device has been given to do may still read or write a piece then: who fills one comes
    behind that.
    """

    def __init__(self, page_lock: PageLock) -> None:
        self._page_lock, self._counting = page_lock, Lock()
        self._free: dict[
            tuple[torch.device, int], deque[_Piece]
        ] = {}  # by device and size; a deque's methods are atomic
        self._made: Counter[tuple[torch.device, int]] = Counter()
        self._is_ready = False  # nobody should have to wait for a piece from here on
        self.seconds = 0.0

    @property
    def size_bytes(self) -> int:
        """What all pieces take."""
        return sum(count * size for (_, size), count in list(self._made.items()))

    def take(self, num_bytes: int, device: torch.device) -> Tensor:
        """So many bytes for copies of a device, uint8, whatever lies in them.

        Raises: MemoryError when there is no free piece, and no more memory that could be locked.
        """
        size = max(1, -(-num_bytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        free = self._free.setdefault((device, size), deque())
        try:
            piece = free.pop()
        except IndexError:
            if self._is_ready:
                self._is_ready = False  # told once
                logger.warning(
                    "the history needs more page-locked memory of the host than the %.2f GB that were made ready: a "
                    "block waits while it is made",
                    self.size_bytes / 1e9,
                )
            piece = self._new(size, device)
        array = np.frombuffer(piece.memory, np.uint8, num_bytes)
        # The array lives as long as any tensor in it, views included.
        finalize(array, free.append, piece).atexit = False
        return torch.from_numpy(array)

    def make_ready(self, times: int) -> int:
        """Has `times` as many pieces as there are now, or as many times as the system allows, which is told. If more
        are needed later, that is told too. Returns: how many times.
        """
        once, ready = list(self._made.items()), 1
        try:
            for _ in range(times - 1):
                for (device, size), count in once:
                    for _ in range(count):
                        self._free[device, size].append(self._new(size, device))
                ready += 1
        except MemoryError as error:
            logger.warning("%s", error)
        self._is_ready = True
        return ready

    def _new(self, size: int, device: torch.device) -> _Piece:
        began = perf_counter()
        piece = _Piece(size, device, self._page_lock)
        with self._counting:
            self._made[device, size] += 1
            self.seconds += perf_counter() - began
        return piece


class _Piece:
    """Pages of this process alone, locked until this is gone; at the end of the process the system unlocks them."""

    def __init__(self, size: int, device: torch.device, page_lock: PageLock) -> None:
        try:
            self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"the host's memory has no {size / 1e9:.2f} GB for a session's history") from error
        # The last who needs it may be gone in the middle of a recording, and by garbage collection in its thread.
        unlock = page_lock(np.frombuffer(self.memory, np.uint8), device)
        finalize(self, while_none_records, unlock).atexit = False


def cuda_page_lock(memory: NDArray[np.uint8], device: torch.device) -> Callable[[], object]:
    """Locks pages for a GPU's copies. What it returns waits for the device, which a recording of CUDA graphs does not
    survive (`while_none_records`). Raises: MemoryError when the system refuses.
    """

    def unlock() -> None:
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)  # what it was given may still be copying
            torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)

    with ONE_THREAD, torch.cuda.device(device):  # while none records, which may not be waited for
        refused = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE))
    if refused:
        with suppress(RuntimeError):  # CUDA remembers it, and whatever is started next would fail for it
            torch.zeros(1, device=device)
        raise MemoryError(
            f"{memory.nbytes / 1e9:.2f} GB of the host's memory could not be page-locked (CUDA error {refused}); ask "
            "for fewer blocks of history or fewer sessions, or allow more (`ulimit -l`)"
        )
    return unlock


class HostCopies:
    """Copies of tensors in the host's memory; `wait` before what they were made of is overwritten, and `read` behind
    reading them. The sessions of a generator share one: all copies of a device follow each other on one stream, so that
    none is written over a piece before another one in it was made.

    Args: `page_lock`, which locks the memory of all copies; None: that of copies of a GPU is, by CUDA.
    """

    def __init__(self, page_lock: PageLock | None = None) -> None:
        self.pool = HostPool(page_lock or cuda_page_lock)
        self._locks_all = page_lock is not None
        self._beside: dict[torch.device, torch.cuda.Stream] = {}

    def empty(self, shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for a copy of a tensor on `device`. Raises: as `HostPool.take`."""
        shape = tuple(shape)
        if not self._locks_all and device.type != "cuda":
            return torch.empty(shape, dtype=dtype)
        return self.pool.take(prod(shape) * dtype.itemsize, device).view(dtype).view(shape)

    def fill(self, pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> None:
        """Copies from the second of each pair, which is on `device`, to the first, in one piece, behind what the device
        has been given to do so far.
        """
        if device.type != "cuda":
            for target, source in pairs:
                target.copy_(source)
            return
        beside = self._beside.get(device) or self._beside.setdefault(device, torch.cuda.Stream(device))
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                source.record_stream(beside)

    def of(self, source: Tensor) -> Tensor:
        """A copy of a tensor."""
        made = self.empty(source.shape, source.dtype, source.device)
        self.fill([(made, source)], source.device)
        return made

    def wait(self) -> None:
        """What devices are given to do from now on comes behind the copies."""
        for device, beside in list(self._beside.items()):
            torch.cuda.current_stream(device).wait_stream(beside)

    def read(self) -> None:
        """Copies from now on come behind what devices have been given to do so far: they still read older ones."""
        for device, beside in list(self._beside.items()):
            beside.wait_stream(torch.cuda.current_stream(device))
