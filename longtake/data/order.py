"""The order of samples and the batches of every rank, as pure functions of one integer, the position.

The position counts global samples since the start of training. Sample g of the whole run is the same row whatever the
number of ranks and the micro-batch, and g is the key of every random number drawn for it. So a run can stop, change its
number of ranks and go on with the same samples. This file must know no model, no file and no process group.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from longtake.data.samples import Dataset, Sizes, nearest_size
from longtake.errors import ConfigError, DataError
from longtake.rng import KeyedRNG

_UPDATES_A_DRAW = 1024


@lru_cache(maxsize=16)
def order(seed: int, epoch: int, num_rows: int, bucket: int = 0) -> NDArray[np.int64]:
    """The order of the rows of a bucket in an epoch, a permutation of 0..num_rows-1 (read-only)."""
    generator = KeyedRNG(seed).generator(epoch, "order", bucket)
    permutation = torch.randperm(num_rows, generator=generator).numpy()
    permutation.flags.writeable = False
    return permutation


def sample_at(seed: int, num_rows: int, position: int, bucket: int = 0) -> tuple[int, int]:
    """`(epoch, row)` of sample number `position` of a bucket."""
    epoch, place = divmod(position, num_rows)
    return epoch, int(order(seed, epoch, num_rows, bucket)[place])


class Buckets:
    """The rows of a data set by the size that their pictures are brought to; an update takes rows of one bucket.

    Which bucket an update takes is drawn with the share of its rows; a bucket's rows then come in its own order, each
    once an epoch of the bucket. Without buckets there is one, of all rows.
    Args: `bucket_of_row`, the index of each row's bucket; `sizes` of the buckets, () when there is one alone.
    """

    def __init__(self, bucket_of_row: NDArray[np.int64], sizes: Sizes = ()) -> None:
        self.sizes = sizes
        self.bucket_of_row = bucket_of_row
        self.rows = [np.flatnonzero(bucket_of_row == bucket) for bucket in range(max(1, len(sizes)))]
        self._shares = np.cumsum([len(rows) for rows in self.rows]) / len(bucket_of_row)
        self._taken: dict[int, list[NDArray[np.int64]]] = {}

    @classmethod
    def whole(cls, num_rows: int) -> Buckets:
        """One bucket of all rows."""
        return cls(np.zeros(num_rows, np.int64))

    def samples(self, seed: int, position: int, batch_size: int) -> list[int]:
        """The rows of the update that starts at global sample `position`.

        Raises: ConfigError with several buckets when `position` is no multiple of `batch_size`.
        """
        bucket, first = 0, position
        if len(self.rows) > 1:
            update, rest = divmod(position, batch_size)
            if rest:
                raise ConfigError(
                    f"batch_size={batch_size} does not divide the {position} samples that were taken before; with "
                    "data.buckets a run keeps its batch size: set it back, or start another run"
                )
            bucket, before = self._bucket_at(seed, update)
            first = before * batch_size
        rows = self.rows[bucket]
        places = (sample_at(seed, len(rows), k, bucket)[1] for k in range(first, first + batch_size))
        return [int(rows[place]) for place in places]

    def following(self, row: int) -> Iterable[int]:
        """`row` and all other rows of its bucket, in the order in which they stand in for it."""
        rows = self.rows[int(self.bucket_of_row[row])]
        place = int(np.searchsorted(rows, row))
        return (int(rows[(place + offset) % len(rows)]) for offset in range(len(rows)))

    def _bucket_at(self, seed: int, update: int) -> tuple[int, int]:
        """The bucket of an update, and how many updates before it took the same one."""
        drawn = self._taken.setdefault(seed, [])
        chunk, place = divmod(update, _UPDATES_A_DRAW)
        while len(drawn) <= chunk:
            numbers = torch.rand(
                _UPDATES_A_DRAW, generator=KeyedRNG(seed).generator(len(drawn), "bucket", 0), dtype=torch.float64
            )
            drawn.append(np.array([bisect_right(self._shares, number) for number in numbers.tolist()]))
        bucket = int(drawn[chunk][place])
        before = sum(int((part == bucket).sum()) for part in drawn[:chunk])
        return bucket, before + int((drawn[chunk][:place] == bucket).sum())


def nearest_buckets(dataset: Dataset, rows: range, sizes: Sizes, threads: int = 0) -> list[int]:
    """The index of the bucket of each of `rows`; 0 for one that cannot be read, which the loader meets again.

    Raises: ConfigError when a row has no picture.
    """

    def bucket(row: int) -> int:
        try:
            size = dataset.pixel_size(row)
        except DataError:
            return 0
        if size is None:
            raise ConfigError(
                f"data.buckets={[[s.height, s.width] for s in sizes]} needs pictures, and row {row} has none; "
                "set data.buckets to null"
            )
        return nearest_size(sizes, *size)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(bucket, rows))


@dataclass(frozen=True)
class Pick:
    """One place in a batch: the global sample index (the key of its randomness) and the row to read."""

    index: int
    row: int


def batch_rows(
    seed: int,
    rows: int | Buckets,
    position: int,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    micro: int = 1,
) -> list[list[Pick]]:
    """The micro-batches of one rank for the update that starts at global sample `position`.

    `rows` are the buckets, or the number of rows of a single one. `position` is step * batch_size in a run of one batch
    size. Over the ranks together, an update always covers the samples position..position+batch_size-1.
    Raises: ConfigError when `batch_size` is no multiple of `micro` x `world_size`.
    """
    together = micro * world_size
    if batch_size % together:
        raise ConfigError(
            f"batch_size={batch_size} must be a multiple of micro_batch_size={micro} x {world_size} ranks"
        )
    buckets = Buckets.whole(rows) if isinstance(rows, int) else rows
    samples = buckets.samples(seed, position, batch_size)
    starts = range(rank * micro, batch_size, together)
    return [[Pick(position + k, samples[k]) for k in range(start, start + micro)] for start in starts]
