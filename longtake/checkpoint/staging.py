"""Copies of this rank's tensors in host memory, so that training can go on while they are written."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from longtake.devices import host_memory
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
        values = {name: local(value) for name, value in tensors.items()}
        self._on_gpu = any(value.device.type == "cuda" for value in values.values())
        thread = ThreadPoolExecutor(1, thread_name_prefix="staging")
        self._buffers = thread.submit(_claim, values, pin=self._on_gpu)
        thread.shutdown(wait=False)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The local values of `tensors`, in memory that the next `copy` overwrites."""
        buffers = self._buffers.result()
        with torch.no_grad():
            for name, value in tensors.items():
                buffers[name].copy_(local(value), non_blocking=True)
        if self._on_gpu:
            torch.cuda.synchronize()  # from here on training may change the tensors, and the writer read the copies
        return {name: buffers[name] for name in tensors}


def _claim(values: Mapping[str, Tensor], *, pin: bool) -> dict[str, Tensor]:
    """Memory for a copy of each tensor, cut from slabs: pinned one by one, each would be rounded up."""
    buffers, free = {}, torch.empty(0, dtype=torch.uint8)
    left = sum(_padded(value.nbytes) for value in values.values())
    for name, value in values.items():
        if len(free) < (size := _padded(value.nbytes)):
            free = _slab(max(size, min(left, SLAB_BYTES)), pin=pin)
        buffers[name] = free[: value.nbytes].view(value.dtype).view(value.shape)
        free, left = free[size:], left - size
    return buffers


def _slab(size: int, *, pin: bool) -> Tensor:
    if pin:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning("No pinned memory for checkpoints (%s): copies take ordinary memory and longer", error)
    return torch.empty(size, dtype=torch.uint8).fill_(0)  # written to, so that the pages exist


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def fits_in_host_memory(tensors: Mapping[str, Tensor], mesh: Mesh) -> bool:
    """True when the host of every rank has the memory for copies of the tensors of all its ranks; all ranks call it."""
    mine = sum(local(value).nbytes for value in tensors.values())
    ranks = mesh.every(lambda: (socket.gethostname(), mine))
    here = socket.gethostname()
    needed, free = sum(size for host, size in ranks if host == here), host_memory()[1]
    short = 0 < free < needed
    if short:
        logger.warning("Copies of the state would take %.1f GiB of %.1f GiB free here", needed / 2**30, free / 2**30)
    return not mesh.gather([short]).any()
