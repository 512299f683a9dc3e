"""The data of a stage: the set that its configuration names, its buckets, and the micro-batches of a rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.condition import VideoShape
from longtake.config.groups import DataConfig
from longtake.config.stage import StageConfig
from longtake.config.validation import ValidationConfig
from longtake.data.encoded import EncodedRows
from longtake.data.formats import open_dataset
from longtake.data.loader import Loader
from longtake.data.order import Buckets, nearest_buckets
from longtake.data.samples import Dataset, FileSize, FirstRows, Sizes
from longtake.encoders.bundle import Encoders
from longtake.encoders.clip import ImageEncoder
from longtake.encoders.vae import VideoVAE
from longtake.encodings.encode import BatchEncoder, EncodedLoader, RowEncoder, StoredEncoder
from longtake.encodings.key import check_encoded, needed_contents
from longtake.errors import ConfigError, DataError
from longtake.evaluation.row_videos import VideoRow, read_rows
from longtake.inference.pipeline import load_encoders
from longtake.parallel.mesh import Mesh
from longtake.train.window_codec import EncoderCodec
from longtake.weights.hub import local_encoders
from longtake.weights.locate import encoder_paths

logger = logging.getLogger(__name__)


def sizes_of(data: DataConfig, video: VideoShape) -> Sizes:
    """The sizes that pictures are brought to: the buckets, or the one size of the stage."""
    return tuple(FileSize(height, width) for height, width in data.buckets or [[video.height, video.width]])


def open_data(data: DataConfig, clip: VideoShape) -> Dataset:
    """The data set of a stage, with clips of that shape. Raises: DataError, ConfigError as `open_dataset`."""
    return open_dataset(
        data.path, kind=data.kind, num_frames=clip.num_pixel_frames, fps=clip.fps, buckets=sizes_of(data, clip)
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


def check_strides(vae: VideoVAE, video: VideoShape, folder: Path) -> None:
    """Raises ConfigError when the VAE in `folder` has other strides than the configuration says."""
    for name in ("temporal_stride", "spatial_stride"):
        if (there := getattr(vae, name)) != (said := getattr(video, name)):
            raise ConfigError(f"video.{name}={said} is not that of the VAE in {folder}, {there}; set it to {there}")


@dataclass
class DataBuilder:
    """Builds what a stage reads its rows with. Args: `dataset`, all rows, of which the last may be validated and not
    learnt from; `with_tokens`, whether its models take CLIP tokens.
    """

    config: StageConfig
    mesh: Mesh
    dataset: Dataset
    with_tokens: bool

    @property
    def learnt(self) -> Dataset:
        """The rows that are learnt from."""
        return learnt_rows(self.dataset, self.config.validation)

    def encoder(self) -> BatchEncoder | StoredEncoder:
        """Where the encodings of rows come from. Raises: CheckpointError, ConfigError, DataError."""
        config, objective, device = self.config, self.config.objective, self.mesh.device
        needed = needed_contents(config.model, objective, with_tokens=self.with_tokens)
        contents = needed + ["text_1"] * objective.second_prompts
        if isinstance(self.dataset, EncodedRows):
            check_encoded(config, self.dataset, self.mesh, needed)
            switches = objective.takes_switches
            return StoredEncoder(self.dataset, config.clip_shape, contents, device=device, switches=switches)
        if objective.paths is not None:
            raise ConfigError(
                f"data.path={config.data.path} holds no paths of a teacher, which {objective.kind} learns from; give "
                "the folder that `longtake teacher-data` writes with this configuration"
            )
        return self.batch_encoder(contents)

    def batch_encoder(self, contents: Sequence[str]) -> BatchEncoder:
        """What encodes rows with the encoders of the stage. Raises: CheckpointError, ConfigError."""
        config, device, folder = self.config, self.mesh.device, self.config.encoders_folder
        encoders = load_encoders(folder, config.model, device, with_image=self.with_tokens)
        check_strides(encoders.vae, config.video, folder)
        objective = config.objective
        rules: dict[str, Any] = {"empty_prompt": objective.empty_prompt, "switches": objective.takes_switches}
        return BatchEncoder(encoders, config.clip_shape, contents, device=device, **rules)

    def codec(self, encoders: Encoders | None) -> EncoderCodec:
        """For objectives that decode and encode: of these encoders, or (None) of VAE and image encoder alone. Raises:
        CheckpointError.
        """
        model, frames, device = self.config.model, self.config.video.num_latent_frames, self.mesh.device
        if encoders is not None:
            return EncoderCodec(encoders.vae, encoders.image, with_y=model.with_y, num_latent_frames=frames)
        folder, image = local_encoders(self.config.encoders_folder, with_image=self.with_tokens), None
        paths = encoder_paths(folder, with_image=self.with_tokens)
        if paths.image is not None:
            image = ImageEncoder.load(paths.image, device, preprocess=model.clip_preprocess)
        vae = VideoVAE.load(paths.vae, device)
        return EncoderCodec(vae, image, with_y=model.with_y, num_latent_frames=frames)

    @contextmanager
    def decoder(self, encoder: RowEncoder, codec: EncoderCodec | None) -> Iterator[VideoVAE]:
        """A VAE to decode with: the one that is resident, or one that is loaded for the time of the context."""
        if codec is not None:
            yield codec.vae
            return
        if (encoders := getattr(encoder, "encoders", None)) is not None:  # not released
            yield encoders.vae
            return
        half = self.config.precision == "bf16"
        paths = encoder_paths(local_encoders(self.config.encoders_folder, with_image=False), with_image=False)
        yield VideoVAE.load(paths.vae, self.mesh.device, torch.bfloat16 if half else torch.float32)

    def validated(self, encoder: RowEncoder) -> list[VideoRow]:
        """This rank's share of the rows that are validated, encoded; as many on every data rank, by repeats. All ranks
        call it. Raises: DataError, ConfigError.
        """
        settings = self.config.validation
        if settings.data is None:
            dataset, first = self.dataset, len(self.learnt)
            numbers = range(first, len(dataset))
        else:
            data = DataConfig(path=settings.data, num_workers=self.config.data.num_workers)  # of the stage's own size
            other = replace(self, config=self.config.model_copy(update={"data": data}))
            dataset = open_data(other.config.data, self.config.clip_shape)
            other = replace(other, dataset=dataset)
            numbers = range(min(settings.num_rows, len(dataset)))
            # Rows of a set need no encoders, and pictures those that training has or, beside a set, some for now.
            if isinstance(dataset, EncodedRows) or encoder.encoders is None:
                encoder = other.encoder()
        if not numbers:
            raise DataError(f"{settings.data} has no rows to validate; name another set in validation.data")
        ranks, rank = self.mesh.num_data_ranks, self.mesh.data_rank
        places = range(rank, ranks * -(-len(numbers) // ranks), ranks)
        return read_rows(dataset, encoder, [numbers[place % len(numbers)] for place in places])

    def batches(self, encoder: RowEncoder) -> EncodedLoader:
        """The micro-batches of this rank. Raises: ConfigError as `find_buckets`."""
        config, mesh, dataset = self.config, self.mesh, self.learnt
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
            buckets=find_buckets(config.data, sizes_of(config.data, config.video), dataset, mesh),
        )
        # Rows of an encoded set are read faster than they are remembered for nothing.
        stored = isinstance(self.dataset, EncodedRows)
        return EncodedLoader(loader, encoder, **({"memory_bytes": 0} if stored else {}))


def learnt_rows(dataset: Dataset, settings: ValidationConfig) -> Dataset:
    """The rows that are learnt from: all, or those before the ones that are kept for validation."""
    held = settings.held_rows(len(dataset))
    return FirstRows(dataset, len(dataset) - held) if held else dataset
