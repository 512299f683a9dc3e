"""The rows of an evaluation as a model takes them: opened from any format, encoded once, the encoders let go.

Of an encoded set nothing is encoded, and of the encoders the VAE alone is loaded, to decode.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from longtake.condition import VideoShape, pixel_frames
from longtake.data.encoded import EncodedRows
from longtake.data.formats import open_dataset
from longtake.data.loader import to_signed
from longtake.data.samples import Dataset, Sample
from longtake.encoders.clip import ImageEncoder
from longtake.encoders.decoders import load_decoder
from longtake.encoders.sessions import Decoder
from longtake.encoders.vae import VideoVAE
from longtake.encodings.encode import BatchEncoder, RowEncoder, StoredEncoder
from longtake.errors import ConfigError, DataError
from longtake.evaluation.row_videos import VideoRow, read_rows
from longtake.inference.beginning import Beginning
from longtake.inference.pipeline import load_encoders
from longtake.inference.source import Source
from longtake.models.sizes import DiTConfig
from longtake.parallel.mesh import Mesh
from longtake.weights.locate import encoder_paths

# Rules that say how a row is encoded
_RULES = {"height", "width", "fps", "plan", "picture", "precision", "vae_precision", "text_precision"}
_RULES |= {"clip_preprocess", "decoder", "decoder_weights"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Reading:
    """This rank's rows, encoded, with what makes pixels of latents and looks at them (`image` None: there is no CLIP).

    `beginning` says what videos of the weights begin with, `given` that it is a picture.
    """

    rows: list[VideoRow]
    samples: list[Sample]
    decoder: Decoder
    image: ImageEncoder | None
    beginning: Beginning
    given: bool


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
        sizes, rules = source.open().model.config, source.settings.model_dump(include=_RULES)
        key = str(
            (source.encoders, sizes.model_type, sizes.condition_channels, sizes.image_dim, _empty_prompt(source), rules)
        )
        if key not in self._readings:
            self._readings[key] = self._read(source, sizes)
        return self._readings[key]

    def _read(self, source: Source, sizes: DiTConfig) -> Reading:
        settings = source.settings
        dataset = open_dataset(self.path, num_frames=1, height=settings.height, width=settings.width, fps=settings.fps)
        if self.num_rows > len(dataset):
            logger.warning("%s has %d rows, fewer than the %d asked for", self.path, len(dataset), self.num_rows)
        beginning, given = Beginning.of(sizes, settings), _has_pictures(dataset)
        beginning.check(given=given)
        if said := beginning.zero_shot(given=given):
            logger.info("%s: %s", source.weights, said)
        numbers = range(min(self.num_rows, len(dataset)))[self.mesh.data_rank :: self.mesh.num_data_ranks]
        samples = [dataset[number] for number in numbers]
        encoder, vae, image = self._encoder(source, sizes, dataset, _contents(sizes, given=given))
        rows = read_rows(dataset, encoder, numbers)
        if given and beginning.picture == "still":
            frames = beginning.plan_of(given=True).first_frames
            rows = [_standing(row, sample, vae, frames) for row, sample in zip(rows, samples)]
        return Reading(rows, samples, _decoder(source, vae), image, beginning, given)

    def _encoder(
        self, source: Source, sizes: DiTConfig, dataset: Dataset, contents: list[str]
    ) -> tuple[RowEncoder, VideoVAE, ImageEncoder | None]:
        settings, device = source.settings, self.mesh.device
        dtype = torch.bfloat16 if settings.is_half else torch.float32
        vae_dtype = torch.bfloat16 if settings.has_half_vae else torch.float32
        if isinstance(dataset, EncodedRows):
            vae = VideoVAE.load(encoder_paths(source.encoders, with_image=False).vae, device, vae_dtype)
            shape = source.settings.shape(vae.temporal_stride, vae.spatial_stride)
            _check_encoded(dataset, contents, shape, sizes, source)
            return StoredEncoder(dataset, shape, contents, device=device), vae, None
        with_image = "clip" in contents
        encoders = load_encoders(source.encoders, settings, device, dtype, vae_dtype, with_image=with_image)
        shape = source.settings.shape(encoders.vae.temporal_stride, encoders.vae.spatial_stride)
        empty = _empty_prompt(source)
        encoder = BatchEncoder(encoders, shape, contents, device=device, empty_prompt=empty)
        return encoder, encoders.vae, encoders.image


def _empty_prompt(source: Source) -> str:
    """The text of the unconditional side."""
    return "" if source.config is None else source.config.objective.empty_prompt


def _has_pictures(dataset: Dataset) -> bool:
    if isinstance(dataset, EncodedRows):
        return not {"y", "first"}.isdisjoint(dataset.key["contents"])
    return dataset.pixel_size(0) is not None


def _contents(sizes: DiTConfig, *, given: bool) -> list[str]:
    """What weights of these sizes are given of a row beside its text, where it has a picture (`given`) or not."""
    if not given:
        return []
    clip = ["clip"] if sizes.image_dim is not None else []
    return [*clip, "y"] if sizes.condition_channels else ["first"]


def _standing(row: VideoRow, sample: Sample, vae: VideoVAE, num_frames: int) -> VideoRow:
    """The row with its picture as `num_frames` latent frames of a video that stands still. Raises: ConfigError."""
    if sample.image is None:
        raise ConfigError("picture=still needs the pictures, which an encoded set has not; give the set it was made of")
    picture = to_signed(sample.image)[None, None].to(vae.device)
    pixels = picture.expand(-1, pixel_frames(num_frames, vae.temporal_stride), -1, -1, -1)
    return replace(row, first_latent=vae.encode(pixels))


def _decoder(source: Source, vae: VideoVAE) -> Decoder:
    """What the rules make pixels with. Raises: ConfigError, CheckpointError as `load_decoder`."""
    settings = source.settings
    if settings.decoder == "exact":
        return vae
    given = settings.decoder, settings.decoder_weights, source.encoders, vae
    return load_decoder(*given, vae.device, vae.dtype)


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
