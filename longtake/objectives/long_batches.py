"""Micro-batches for long tuning: the same ones for all iterations of a sequence, then the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class LongBatches:
    """Repeats the micro-batches of each sequence of a schedule.

    Args: `batches` (`train.loop.Batches`), which take `batch_size` samples of all ranks an update; `sequence_at`, the
    number of the sequence of an iteration. `position` counts as if each iteration took new samples, so that it names
    the iteration.
    """

    def __init__(self, batches: Any, sequence_at: Callable[[int], int], *, batch_size: int) -> None:
        self.batches, self.sequence_at, self.batch_size = batches, sequence_at, batch_size
        self._step = 0
        self._sequence: int | None = None
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
        if (sequence := self.sequence_at(self._step)) != self._sequence:
            self.batches.seek(sequence * self.batch_size)
            self._held, self._sequence = next(self.batches), sequence
        self._step += 1
        return self._held
