"""The data of a stage: the set that its configuration names, its buckets, and the micro-batches of a rank."""

from __future__ import annotations

import logging

import numpy as np

from longtake.condition import VideoShape
from longtake.config.groups import DataConfig, VideoConfig
from longtake.config.stage import StageConfig
from longtake.data.encoded import EncodedRows
from longtake.data.formats import open_dataset
from longtake.data.loader import Loader
from longtake.data.order import Buckets, nearest_buckets
from longtake.data.samples import Dataset, FileSize, Sizes
from longtake.encodings.encode import EncodedLoader, RowEncoder
from longtake.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def sizes_of(data: DataConfig, video: VideoConfig) -> Sizes:
    """The sizes that pictures are brought to: the buckets, or the one size of the stage."""
    return tuple(FileSize(height, width) for height, width in data.buckets or [[video.height, video.width]])


def open_data(data: DataConfig, video: VideoConfig, clip: VideoShape) -> Dataset:
    """The data set of a stage, with clips of that shape. Raises: DataError, ConfigError as `open_dataset`."""
    return open_dataset(
        data.path, kind=data.kind, num_frames=clip.num_pixel_frames, fps=video.fps, buckets=sizes_of(data, video)
    )


def find_buckets(data: DataConfig, sizes: Sizes, dataset: Dataset, mesh: Mesh) -> Buckets:
    """The rows by bucket, from the sizes of their pictures; each rank looks at its share of the rows.

    Raises: ConfigError when there are buckets and rows without pictures.
    """
    if data.buckets is None:
        return Buckets.whole(len(dataset))
    step = -(-len(dataset) // mesh.world_size)
    rows = range(mesh.rank * step, min(len(dataset), (mesh.rank + 1) * step))
    parts = mesh.every(lambda: nearest_buckets(dataset, rows, sizes, data.num_workers))
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
        buckets=find_buckets(config.data, sizes_of(config.data, config.video), dataset, mesh),
    )
    # Rows of an encoded set are read faster than they are remembered for nothing.
    return EncodedLoader(loader, encoder, **({"memory_bytes": 0} if isinstance(dataset, EncodedRows) else {}))
