"""The data of a stage: the set that its configuration names, its buckets, and the micro-batches of a rank."""

from __future__ import annotations

import logging

import numpy as np

from longtake.config.stage import StageConfig
from longtake.data.encoded import EncodedRows
from longtake.data.formats import open_dataset
from longtake.data.loader import Loader
from longtake.data.order import Buckets, nearest_buckets
from longtake.data.samples import Dataset, FileSize, Sizes
from longtake.encodings.encode import EncodedLoader, RowEncoder
from longtake.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def sizes_of(config: StageConfig) -> Sizes:
    """The sizes that pictures are brought to: the buckets, or the one size of the stage."""
    pairs = config.data.buckets or [[config.video.height, config.video.width]]
    return tuple(FileSize(height, width) for height, width in pairs)


def open_data(config: StageConfig) -> Dataset:
    """The data set of a stage. Raises: DataError, ConfigError as `open_dataset`."""
    return open_dataset(
        config.data.path,
        kind=config.data.kind,
        num_frames=config.clip_shape.num_pixel_frames,
        fps=config.video.fps,
        buckets=sizes_of(config),
    )


def find_buckets(config: StageConfig, dataset: Dataset, mesh: Mesh) -> Buckets:
    """The rows by bucket, from the sizes of their pictures; each rank looks at its share of the rows.

    Raises: ConfigError when there are buckets and rows without pictures.
    """
    if config.data.buckets is None:
        return Buckets.whole(len(dataset))
    sizes = sizes_of(config)
    step = -(-len(dataset) // mesh.world_size)
    rows = range(mesh.rank * step, min(len(dataset), (mesh.rank + 1) * step))
    parts = mesh.every(lambda: nearest_buckets(dataset, rows, sizes, config.data.num_workers))
    buckets = Buckets(np.array([bucket for part in parts for bucket in part], np.int64), sizes)
    if mesh.is_main:
        counts = [f"{len(rows)} of {size.height}x{size.width}" for rows, size in zip(buckets.rows, sizes)]
        logger.info("Rows by bucket: %s", ", ".join(counts))
    return buckets


def make_batches(config: StageConfig, dataset: Dataset, encoder: RowEncoder, mesh: Mesh) -> EncodedLoader:
    """The micro-batches of this rank. Raises: ConfigError as `find_buckets`."""
    loader = Loader(
        dataset,
        seed=config.seed,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch(mesh.world_size),
        rank=mesh.data_rank,
        world_size=mesh.num_data_ranks,
        on_bad_row=config.data.on_bad_row,
        max_bad_share=config.data.max_bad_share,
        workers=config.data.num_workers,
        buckets=find_buckets(config, dataset, mesh),
    )
    # Rows of an encoded set are read faster than they are remembered for nothing.
    return EncodedLoader(loader, encoder, **({"memory_bytes": 0} if isinstance(dataset, EncodedRows) else {}))
