"""Caches that outlive their session: passes captured against a cache can be replayed by the next one that has it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from weakref import finalize

import torch

from longtake.models.attention import ONE_THREAD
from longtake.models.cache import KVCache
from longtake.rollout.cuda_graphs import CUDAGraphRunner


class CachePool:
    """Keeps the caches of the session that ended last, for one of the same sizes. Threads may share it."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Hashable, list[KVCache]]] = deque(maxlen=1)  # its methods are atomic
        self._at_once = False

    @contextmanager
    def captured_at_once(self) -> Iterator[None]:
        """Passes against caches that are borrowed here are captured when each comes for the first time."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def clear(self) -> None:
        """Gives back the caches that nobody has borrowed, and with them the passes that were captured against them."""
        self._kept.clear()

    def borrow(
        self, owner: object, sizes: Hashable, new: Callable[[], list[KVCache]], graphs: CUDAGraphRunner
    ) -> list[KVCache]:
        """Empty caches of these sizes, `owner`'s alone until it is gone; made by `new` where none are kept."""
        try:
            known, caches = self._kept.pop()
        except IndexError:
            known, caches = None, []
        if known != sizes:
            caches = new()
        elif caches[0].device.type == "cuda":
            with ONE_THREAD:  # while none records, which may not be waited for
                torch.cuda.synchronize(caches[0].device)  # what their owner began may still run, on another stream
        for cache in caches:
            cache.clear()
            if known == sizes or self._at_once:
                graphs.comes_again(cache, at_once=self._at_once)
        finalize(owner, self._kept.append, (sizes, caches)).atexit = False
        return caches
