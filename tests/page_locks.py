"""A lock for the pages of `HostCopies` that needs no GPU, and counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray


class PageLocks:
    """`made`, sizes of the pieces that were locked, in their order; `held`, addresses that are; `refuses`: no more are,
    as beyond `most`.
    """

    def __init__(self) -> None:
        self.made: list[int] = []
        self.held: set[int] = set()
        self.refuses = False
        self.most = 10**9

    def __call__(self, memory: NDArray[np.uint8], device: torch.device) -> Callable[[], object]:
        if self.refuses or len(self.made) >= self.most:
            raise MemoryError("no more pages can be locked")
        self.made.append(memory.nbytes)
        address = memory.ctypes.data
        self.held.add(address)
        return lambda: self.held.remove(address)
