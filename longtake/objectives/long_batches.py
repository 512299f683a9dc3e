"""Micro-batches for long tuning: the same ones for all iterations of a sequence, then the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class LongBatches:
    """Repeats the micro-batches of each sequence of a schedule.

    Args: `batches` (`train.loop.Batches`), which take `batch_size` samples of all ranks an iteration in `accumulation`
    micro-batches; `sequence_at`, the number of the sequence of an iteration. `position` counts as if each iteration
    took new samples, so that it names the iteration.
    """

    def __init__(self, batches: Any, sequence_at: Callable[[int], int], *, batch_size: int, accumulation: int) -> None:
        self.batches, self.sequence_at = batches, sequence_at
        self.batch_size, self.accumulation = batch_size, accumulation
        self._step, self._given = 0, 0
        self._sequence: int | None = None
        self._held: list[Any] = []

    @property
    def position(self) -> int:
        """Iterations so far, as samples."""
        return self._step * self.batch_size

    def seek(self, position: int) -> None:
        """Makes the next micro-batch the first one of the iteration at `position`."""
        self._step, self._given = position // self.batch_size, 0

    def __next__(self) -> Any:
        """The next micro-batch of the iteration; after the last one `position` moves on."""
        if (sequence := self.sequence_at(self._step)) != self._sequence:
            self.batches.seek(sequence * self.batch_size)
            self._held = [next(self.batches) for _ in range(self.accumulation)]
            self._sequence = sequence
        batch = self._held[self._given]
        self._given += 1
        if self._given == self.accumulation:
            self._step, self._given = self._step + 1, 0
        return batch
