"""The rows of an evaluation as a model takes them: opened from any format, encoded once, the encoders let go.

Of an encoded set nothing is encoded, and of the encoders the VAE alone is loaded, to decode.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from longtake.condition import VideoShape
from longtake.data.encoded import EncodedRows
from longtake.data.formats import open_dataset
from longtake.data.samples import Dataset, Sample
from longtake.encoders.clip import ImageEncoder
from longtake.encoders.vae import VideoVAE
from longtake.encodings.encode import BatchEncoder, RowEncoder, StoredEncoder
from longtake.errors import ConfigError, DataError
from longtake.evaluation.row_videos import VideoRow, read_rows
from longtake.inference.pipeline import load_encoders
from longtake.inference.source import Source
from longtake.models.sizes import DiTConfig
from longtake.parallel.mesh import Mesh
from longtake.weights.locate import encoder_paths
from longtake.weights.presets import model_config

# Rules that say how a row is encoded
_RULES = {"height", "width", "fps", "precision", "vae_precision", "text_precision", "clip_preprocess"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Reading:
    """This rank's rows, encoded, with what decodes and looks at their videos (`image` None: there is no CLIP)."""

    rows: list[VideoRow]
    samples: list[Sample]
    vae: VideoVAE
    image: ImageEncoder | None
    condition_channels: int


@dataclass
class RowReader:
    """Reads the first `num_rows` rows at `path`, each rank its share; models that take rows alike share a reading."""

    path: Path
    num_rows: int
    mesh: Mesh

    def __post_init__(self) -> None:
        self._readings: dict[str, Reading] = {}

    def read(self, source: Source) -> Reading:
        """The rows as the weights and the rules of `source` take them. Raises: ConfigError, DataError."""
        sizes, rules = model_config(str(source.weights)), source.settings.model_dump(include=_RULES)
        key = str((source.encoders, sizes.condition_channels, sizes.image_dim, _empty_prompt(source), rules))
        if key not in self._readings:
            self._readings[key] = self._read(source, sizes)
        return self._readings[key]

    def _read(self, source: Source, sizes: DiTConfig) -> Reading:
        settings = source.settings
        dataset = open_dataset(self.path, num_frames=1, height=settings.height, width=settings.width, fps=settings.fps)
        if self.num_rows > len(dataset):
            logger.warning("%s has %d rows, fewer than the %d asked for", self.path, len(dataset), self.num_rows)
        numbers = range(min(self.num_rows, len(dataset)))[self.mesh.data_rank :: self.mesh.num_data_ranks]
        samples = [dataset[number] for number in numbers]
        encoder, vae, image = self._encoder(source, sizes, dataset)
        rows = read_rows(dataset, encoder, numbers)
        return Reading(rows, samples, vae, image, sizes.condition_channels)

    def _encoder(
        self, source: Source, sizes: DiTConfig, dataset: Dataset
    ) -> tuple[RowEncoder, VideoVAE, ImageEncoder | None]:
        settings, device = source.settings, self.mesh.device
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        vae_dtype = torch.bfloat16 if (settings.vae_precision or settings.precision) == "bf16" else torch.float32
        contents = _contents(sizes, dataset)
        if isinstance(dataset, EncodedRows):
            vae = VideoVAE.load(encoder_paths(source.encoders, with_image=False).vae, device, vae_dtype)
            shape = _shape(source, vae)
            _check_encoded(dataset, contents, shape, sizes, source)
            return StoredEncoder(dataset, shape, contents, device=device), vae, None
        with_image = "clip" in contents
        encoders = load_encoders(source.encoders, settings, device, dtype, vae_dtype, with_image=with_image)
        shape, empty = _shape(source, encoders.vae), _empty_prompt(source)
        encoder = BatchEncoder(encoders, shape, contents, device=device, empty_prompt=empty)
        return encoder, encoders.vae, encoders.image


def _empty_prompt(source: Source) -> str:
    """The text of the unconditional side."""
    return "" if source.config is None else source.config.objective.empty_prompt


def _contents(sizes: DiTConfig, dataset: Dataset) -> list[str]:
    """What weights of these sizes are given of a row beside its text."""
    if isinstance(dataset, EncodedRows):
        pictures = not {"y", "first"}.isdisjoint(dataset.key["contents"])
    else:
        pictures = dataset.pixel_size(0) is not None
    if not pictures and sizes.condition_channels == 0:
        return []
    if not pictures:
        raise ConfigError("the rows have no pictures and the model starts from one; give rows with pictures")
    clip = ["clip"] if sizes.image_dim is not None else []
    return [*clip, "y"] if sizes.condition_channels else ["first"]


def _shape(source: Source, vae: VideoVAE) -> VideoShape:
    settings = source.settings
    sizes = settings.height, settings.width, settings.num_latent_frames
    return VideoShape(*sizes, vae.temporal_stride, vae.spatial_stride)


def _check_encoded(
    dataset: EncodedRows, contents: list[str], shape: VideoShape, sizes: DiTConfig, source: Source
) -> None:
    """Raises DataError unless the set holds what the weights read, at their size."""
    key = dataset.key
    problems = [f"it lacks {name}" for name in contents if name not in key["contents"]]
    if (width := dataset.empty_text.shape[1]) != sizes.text_dim:
        problems.append(f"its text has the width {width}, wanted {sizes.text_dim}")
    if contents:
        strides = {"temporal": shape.temporal_stride, "spatial": shape.spatial_stride}
        if key["strides"] != strides:
            problems.append(f"its strides are {key['strides']}, those of the VAE in {source.encoders} {strides}")
        if [shape.height, shape.width] not in key["sizes"]:
            there = ", ".join(f"{height}x{width}" for height, width in key["sizes"])
            problems.append(f"its pictures are {there}, wanted {shape.height}x{shape.width}")
    if problems:
        raise DataError(f"the encoded set {dataset.path} does not fit {source.weights}: {'; '.join(problems)}")
