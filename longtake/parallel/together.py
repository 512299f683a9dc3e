"""Work whose ranks wait for each other inside, and what becomes of it when one of them fails there alone.

A rank that fails between two collectives must not ask the others for agreement: they sit in the next one, for as long
as its time-out is. What each rank says to the store of the run needs nobody's answer: the rank that failed sees there
whether the others have left the work as well, or wait for it and will for ever. Must know no model and no training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from longtake.errors import TrainingError
from longtake.parallel.mesh import Mesh

T = TypeVar("T")

# Ranks that compute together leave within one layer of each other, or not at all
GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.05


class RanksApart(TrainingError):
    """A rank failed where others wait for it: nothing that they share can be used again."""


@dataclass
class Together:
    """Runs work that all ranks call alike; every rank makes one, and the same calls of it."""

    mesh: Mesh
    grace_seconds: float = GRACE_SECONDS
    _number: int = 0

    def every(self, work: Callable[[], T]) -> list[T]:
        """As `Mesh.every`, for work with collectives inside.

        Raises: as `Mesh.every` where all ranks came out of it, RanksApart on the rank that failed where one did not:
        its process must end, and with it, by the launcher, the others.
        """
        if not self.mesh.is_distributed:
            return self.mesh.every(work)
        self._number += 1
        store = self.mesh.store(f"together/{self._number}")
        assert store is not None
        value, error = None, None
        try:
            value = work()
            if self.mesh.device.type == "cuda":  # what was only queued waits for the others as well
                torch.cuda.synchronize(self.mesh.device)
        except Exception as caught:  # noqa: BLE001 (raised again below)
            error = caught
        store.set(str(self.mesh.rank), "left")
        if error is not None:
            end = time.monotonic() + self.grace_seconds
            while waiting := [rank for rank in range(self.mesh.world_size) if not store.check([str(rank)])]:
                if time.monotonic() > end:
                    ranks = ", ".join(map(str, waiting))
                    raise RanksApart(
                        f"rank {self.mesh.rank} failed with {type(error).__name__}: {error}; rank {ranks} waited "
                        "for it inside the same call and cannot be told, so the run ends; started again, it goes on "
                        "from its newest checkpoint"
                    ) from error
                time.sleep(_POLL_SECONDS)

        def outcome() -> T:
            if error is not None:
                raise error
            return value  # type: ignore[return-value]

        return self.mesh.every(outcome)
