"""The loader: what one rank reads for an update, as a batch; which rows are bad, and what stands in for them.

The order of samples is `order.py`'s. This file must know no model and no process group.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtake.data.order import Buckets, Pick, batch_rows
from longtake.data.samples import Dataset, FileSize, Sample
from longtake.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch.

    Fields: `images` [B, 3, h, w] and `videos` [B, T, 3, h, w] float32 in [-1, 1], or None; `indices` the global sample
    indices; `rows` the rows that were read; `later_prompts` the second prompt of each row, "" where there is none;
    `switch_frames` as those of its sample; `extras` the stored encodings [B, ...] that every sample has, and where some
    have a second prompt alone, the first in its place.
    """

    names: list[str]
    prompts: list[str]
    indices: list[int]
    rows: list[int]
    images: Tensor | None = None
    videos: Tensor | None = None
    later_prompts: list[str] = field(default_factory=list)
    switch_frames: list[tuple[int, ...]] = field(default_factory=list)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


def to_signed(pixels: NDArray[np.uint8]) -> Tensor:
    """Pixels uint8 [..., h, w, 3] as float32 [..., 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pixels).movedim(-1, -3).to(torch.float32).div_(127.5).sub_(1.0)


def collate(samples: Sequence[Sample], picks: Sequence[Pick], rows: Sequence[int]) -> Batch:
    """The batch of some samples. Raises: DataError naming the samples when their shapes differ."""
    extras = {}
    for name in dict.fromkeys(name for sample in samples for name in sample.extras):
        other = "text" if name == "text_1" else name
        found = [sample.extras.get(name, sample.extras.get(other)) for sample in samples]
        arrays = [array for array in found if array is not None]
        if len(arrays) == len(samples):
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
        later_prompts=[(*sample.prompts, "")[1] for sample in samples],
        switch_frames=[sample.switch_frames for sample in samples],
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


class BadRows:
    """The bad rows that were met, each once; `on_bad_row` and `max_bad_share` are those of `DataConfig`."""

    def __init__(self, num_rows: int, on_bad_row: str, max_bad_share: float) -> None:
        self.num_rows, self.on_bad_row, self.max_bad_share = num_rows, on_bad_row, max_bad_share
        self._rows: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def met(self, row: int, error: DataError) -> None:
        """Counts a row. Raises: DataError unless bad rows are skipped, or when there are too many of them."""
        if self.on_bad_row != "skip":
            raise DataError(f"{error}; repair or remove the row, or set data.on_bad_row=skip") from error
        with self._lock:
            if row in self._rows:
                return
            self._rows.add(row)
            number = len(self._rows)
        logger.warning("row %d is skipped (%d bad rows so far): %s", row, number, error)
        if number > self.max_bad_share * self.num_rows:
            raise DataError(
                f"{number} of {self.num_rows} rows are bad, more than data.max_bad_share={self.max_bad_share}; "
                f"repair the data or raise the share. The last one: {error}"
            ) from error


@dataclass(kw_only=True, eq=False)
class Loader:
    """What one rank reads: the rows of its micro-batches at a position, and the sample of a row.

    `position` is that of the next update: store it, and `seek` it to go on from there. Args: `on_bad_row`,
    `max_bad_share` as in `DataConfig`; `workers`, how many threads may call `read` at once; `buckets` of the rows, by
    default one of all. Fields: `bad` rows that this rank has met so far.
    Raises: DataError for a bad row, or with `on_bad_row="skip"` for too many of them; ConfigError for the batch size.
    """

    dataset: Dataset = field(kw_only=False)
    seed: int
    batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    on_bad_row: str = "fail"
    max_bad_share: float = 0.01
    workers: int = 0
    buckets: Buckets = None  # type: ignore[assignment]  # one of all rows
    position: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.buckets = self.buckets or Buckets.whole(len(self.dataset))
        self.bad = BadRows(len(self.dataset), self.on_bad_row, self.max_bad_share)
        self.picks(0)  # a batch size that does not divide is refused now, not at the first batch

    def seek(self, position: int) -> None:
        """Makes the update at `position` the next one."""
        self.position = position

    def picks(self, position: int) -> list[list[Pick]]:
        """Rows and global sample indices of this rank's micro-batches of the update at `position`."""
        share = {"rank": self.rank, "world_size": self.world_size, "micro": self.micro_batch_size}
        return batch_rows(self.seed, self.buckets, position, self.batch_size, **share)

    def size_of(self, row: int) -> FileSize | None:
        """The size that the pictures of a row's bucket are brought to; None without buckets."""
        sizes = self.buckets.sizes
        return sizes[int(self.buckets.bucket_of_row[row])] if sizes else None

    def read(self, row: int, check: Callable[[Sample], None] | None = None) -> tuple[int, Sample]:
        """The sample of a row, or of the next good row of its bucket: which one depends on the data alone.

        Args: `check` raises DataError for a sample that the stage cannot use, which is a bad row then.
        """
        for candidate in self.buckets.following(row):
            try:
                sample = self.dataset[candidate]
                if check is not None:
                    check(sample)
                return candidate, sample
            except DataError as error:
                self.bad.met(candidate, error)
        number = len(list(self.buckets.following(row)))
        raise DataError(f"none of the {number} rows{' of the bucket' if self.buckets.sizes else ''} can be read")
