"""Copies of this rank's tensors in host memory, so that training can go on while they are written."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longtake.parallel.materialize import local
from longtake.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

SLAB_BYTES = 2**28  # a power of two: torch rounds pinned allocations up to one
_ALIGNMENT = 64


class Staging:
    """Memory for one copy of the local shards, kept from save to save; pinned where the tensors are on a GPU.

    The memory is claimed in a thread from the start on, beside the first iterations: pages that are touched (or pinned)
    for the first time cost more than the copy.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._free: Tensor | None = None
        self._cuda = self._pin = any(local(value).device.type == "cuda" for value in tensors.values())
        wanted = {name: (local(value).dtype, local(value).shape) for name, value in tensors.items()}
        self._claiming = threading.Thread(target=self._claim, args=(wanted,), name="staging", daemon=True)
        self._claiming.start()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The local values of `tensors`, in memory that the next `copy` overwrites."""
        self._claiming.join()
        self._claim({name: (local(value).dtype, local(value).shape) for name, value in tensors.items()})
        with torch.no_grad():
            for name, value in tensors.items():
                self._buffers[name].copy_(local(value), non_blocking=True)
        if self._cuda:
            torch.cuda.synchronize()
        return {name: self._buffers[name] for name in tensors}

    def _claim(self, wanted: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
        new = {
            name: (dtype, shape)
            for name, (dtype, shape) in wanted.items()
            if (held := self._buffers.get(name)) is None or (held.dtype, held.shape) != (dtype, shape)
        }
        left = sum(_padded(shape.numel() * dtype.itemsize) for dtype, shape in new.values())
        for name, (dtype, shape) in new.items():
            size = shape.numel() * dtype.itemsize
            if self._free is None or len(self._free) < _padded(size):
                self._free = self._slab(max(_padded(size), min(left, SLAB_BYTES)))
            self._buffers[name] = self._free[:size].view(dtype).view(shape)
            self._free = self._free[_padded(size) :]
            left -= _padded(size)

    def _slab(self, size: int) -> Tensor:
        if self._pin:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pin = False
                logger.warning("No pinned memory for checkpoints (%s): copies take ordinary memory and longer", error)
        return torch.empty(size, dtype=torch.uint8).fill_(0)  # written to, so that the pages exist


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def fits_in_host_memory(tensors: Mapping[str, Tensor], mesh: Mesh) -> bool:
    """True when the host of every rank has the memory for copies of the tensors of all its ranks; all ranks call it."""
    mine = sum(local(value).nbytes for value in tensors.values())
    ranks = mesh.every(lambda: (socket.gethostname(), mine))
    here = socket.gethostname()
    needed, free = sum(size for host, size in ranks if host == here), available_bytes()
    short = free is not None and needed > free
    if short:
        logger.warning("Copies of the state would take %.1f GiB of %.1f GiB free here", needed / 2**30, free / 2**30)  # type: ignore[operator]
    return not mesh.any(short)


def available_bytes() -> int | None:
    """Host memory that this process may still take: of the machine and of its control group; None if not known."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            cache = [
                line for line in (group / "memory.stat").read_text().splitlines() if line.startswith("inactive_file ")
            ]
            used = int((group / "memory.current").read_text()) - sum(int(line.split()[1]) for line in cache)
            found.append(int(limit) - used)
    except (OSError, ValueError, IndexError):
        pass  # not Linux, or no such control group
    return min(found) if found else None
