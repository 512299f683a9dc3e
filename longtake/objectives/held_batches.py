"""The same micro-batches for several iterations, then the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class HeldBatches:
    """Repeats micro-batches for all iterations of a group: of a long video, or of one roll-out.

    Args: `batches` (`train.loop.Batches`), which take `batch_size` samples of all ranks an update; `group_at`, the
    number of the group of an iteration. `position` counts as if each iteration took new samples, so that it names the
    iteration.
    """

    def __init__(self, batches: Any, group_at: Callable[[int], int], *, batch_size: int) -> None:
        self.batches, self.group_at, self.batch_size = batches, group_at, batch_size
        self._step = 0
        self._group: int | None = None
        self._held: Sequence[Any] = []

    @property
    def position(self) -> int:
        """Iterations so far, as samples."""
        return self._step * self.batch_size

    def seek(self, position: int) -> None:
        """Makes the iteration at `position` the next one."""
        self._step = position // self.batch_size

    def __next__(self) -> Sequence[Any]:
        """The micro-batches of the next iteration."""
        if (group := self.group_at(self._step)) != self._group:
            self.batches.seek(group * self.batch_size)
            self._held, self._group = next(self.batches), group
        self._step += 1
        return self._held
