"""The order of samples and the batches of every rank, as pure functions of one integer, the position.

The position counts global samples since the start of training. Sample g of the whole run is row `sample_at(seed, n, g)`
whatever the number of ranks and the micro-batch, and g is the key of every random number drawn for it. So a run can
stop, change its number of ranks and go on with the same samples. This file must know no model and no process group.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtake.data.samples import Dataset, Sample
from longtake.errors import ConfigError, DataError
from longtake.randomness import Draws

if TYPE_CHECKING:
    from longtake.config import DataConfig  # pydantic is not needed to load data

logger = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """The order of the rows in an epoch, a permutation of 0..num_rows-1 (read-only)."""
    generator = Draws(seed).generator(epoch, "order", 0)
    permutation = torch.randperm(num_rows, generator=generator).numpy()
    permutation.flags.writeable = False
    return permutation


def sample_at(seed: int, num_rows: int, position: int) -> tuple[int, int]:
    """`(epoch, row)` of global sample number `position`."""
    epoch, place = divmod(position, num_rows)
    return epoch, int(order(seed, epoch, num_rows)[place])


@dataclass(frozen=True)
class Pick:
    """One place in a batch: the global sample index (the key of its randomness) and the row to read."""

    index: int
    row: int


def batch_rows(
    seed: int, num_rows: int, position: int, batch_size: int, *, rank: int = 0, world_size: int = 1, micro: int = 1
) -> list[list[Pick]]:
    """The micro-batches of one rank for the update that starts at global sample `position`.

    `position` is step * batch_size in a run of one batch size. Over the ranks together, an update always covers the
    samples position..position+batch_size-1.
    Raises: ConfigError when `batch_size` is no multiple of `micro` x `world_size`.
    """
    together = micro * world_size
    if batch_size % together:
        raise ConfigError(
            f"batch_size={batch_size} must be a multiple of micro_batch_size={micro} x {world_size} ranks"
        )
    starts = range(position + rank * micro, position + batch_size, together)
    return [[Pick(g, sample_at(seed, num_rows, g)[1]) for g in range(start, start + micro)] for start in starts]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch.

    Fields: `images` [B, 3, h, w] and `videos` [B, T, 3, h, w] float32 in [-1, 1], or None; `indices` the global sample
    indices; `rows` the rows that were read; `extras` the stored encodings [B, ...] that every sample has.
    """

    names: list[str]
    prompts: list[str]
    indices: list[int]
    rows: list[int]
    images: Tensor | None = None
    videos: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def to_signed(pixels: NDArray[np.uint8]) -> Tensor:
    """Pixels uint8 [..., h, w, 3] as float32 [..., 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pixels).movedim(-1, -3).to(torch.float32).div_(127.5).sub_(1.0)


def collate(samples: Sequence[Sample], picks: Sequence[Pick], rows: Sequence[int]) -> Batch:
    """The batch of some samples. Raises: DataError naming the samples when their shapes differ."""
    extras = {}
    for name in samples[0].extras:
        if all(name in sample.extras for sample in samples):
            arrays = [sample.extras[name] for sample in samples]
            extras[name] = torch.from_numpy(_stack(arrays, samples, name))
    images = [sample.image for sample in samples if sample.image is not None]
    videos = [sample.video for sample in samples if sample.video is not None]
    return Batch(
        names=[sample.name for sample in samples],
        prompts=[sample.prompt for sample in samples],
        indices=[pick.index for pick in picks],
        rows=list(rows),
        images=to_signed(_stack(images, samples, "image")) if images else None,
        videos=to_signed(_stack(videos, samples, "video")) if videos else None,
        extras=extras,
    )


def _stack(arrays: Sequence[NDArray], samples: Sequence[Sample], what: str) -> NDArray:
    shapes = {array.shape for array in arrays}
    if len(arrays) < len(samples) or len(shapes) > 1:
        names = ", ".join(sample.name for sample in samples)
        raise DataError(
            f"samples {names} cannot be one batch: {len(arrays)} of {len(samples)} have {what}, of shapes "
            f"{sorted(shapes)}; they must agree, set height and width to bring pictures to one size"
        )
    return np.stack(arrays)


class Loader:
    """What one rank reads: the rows of its micro-batches at a position, and the sample of a row.

    `position` is that of the next update: store it, and `seek` it to go on from there. Args: `on_bad_row`,
    `max_bad_share` as in `DataConfig`; `workers`, how many threads may call `read` at once.
    Raises: DataError for a bad row, or with `on_bad_row="skip"` for too many of them; ConfigError for the batch size.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        on_bad_row: str = "fail",
        max_bad_share: float = 0.01,
        workers: int = 0,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self.on_bad_row = on_bad_row
        self.max_bad_share = max_bad_share
        self.workers = workers
        self._bad_rows: set[int] = set()
        self._lock = threading.Lock()
        self.picks(0)  # a batch size that does not divide is refused now, not at the first batch

    @classmethod
    def from_config(
        cls,
        dataset: Dataset,
        data: DataConfig,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> Loader:
        """A loader that treats bad rows as the configuration says."""
        return cls(
            dataset,
            seed=seed,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            on_bad_row=data.on_bad_row,
            max_bad_share=data.max_bad_share,
            workers=data.num_workers,
        )

    @property
    def num_bad_rows(self) -> int:
        """Different bad rows that this rank has met so far."""
        return len(self._bad_rows)

    def seek(self, position: int) -> None:
        """Makes the update at `position` the next one."""
        self.position = position

    def picks(self, position: int) -> list[list[Pick]]:
        """Rows and global sample indices of this rank's micro-batches of the update at `position`."""
        return batch_rows(
            self.seed,
            len(self.dataset),
            position,
            self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            micro=self.micro_batch_size,
        )

    def read(self, row: int) -> tuple[int, Sample]:
        """The sample of a row, or of the next good row: which one depends on the data alone, on every rank."""
        for offset in range(len(self.dataset)):
            candidate = (row + offset) % len(self.dataset)
            try:
                return candidate, self.dataset[candidate]
            except DataError as error:
                if self.on_bad_row != "skip":
                    raise DataError(f"{error}; repair or remove the row, or set data.on_bad_row=skip") from error
                self._count_bad(candidate, error)
        raise DataError(f"none of the {len(self.dataset)} rows can be read")

    def _count_bad(self, row: int, error: DataError) -> None:
        with self._lock:
            if row in self._bad_rows:
                return
            self._bad_rows.add(row)
            number = len(self._bad_rows)
        logger.warning("row %d is skipped (%d bad rows so far): %s", row, number, error)
        if number > self.max_bad_share * len(self.dataset):
            raise DataError(
                f"{number} of {len(self.dataset)} rows are bad, more than data.max_bad_share={self.max_bad_share}; "
                f"repair the data or raise the share. The last one: {error}"
            ) from error
