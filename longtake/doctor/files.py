"""Which files a stage reads, which of them are missing, and where published ones come from. Loads no weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from longtake.config.job import JobConfig
from longtake.config.stage import StageConfig, is_path
from longtake.data.encoded import EncodedRows
from longtake.data.formats import find_format
from longtake.doctor.estimate import Sizes
from longtake.errors import CheckpointError, ConfigError, LongtakeError
from longtake.models.sizes import DiTConfig
from longtake.weights.config_json import read_json
from longtake.weights.load import open_dit
from longtake.weights.locate import (
    CLIP_TOKENS,
    ENCODER_PARTS,
    encoder_files,
    find_weights,
    hub_repository,
    image_token_count,
    is_hub_name,
    tokenizer_places,
)
from longtake.weights.presets import PRESETS, model_config
from longtake.weights.read import stored_in
from longtake.weights.students import find_student


@dataclass
class Findings:
    """What a stage reads: what is `missing`, `notes`, sizes of networks and bytes of encoders.

    `downloads`, the commands that get what is on the hub; `encoder_bytes`, those that stay beside the training, of
    files that are there; `vae`, the configuration of the VAE where a file tells it.
    """

    sizes: Sizes = field(default_factory=dict)
    encoder_bytes: int = 0
    image_tokens: int = CLIP_TOKENS
    vae: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """What is wrong with files that are looked at inside is told with the rest."""
        try:
            yield
        except LongtakeError as error:
            self.missing.append(f"{what}: {error}")


def look_at(config: StageConfig, job: JobConfig | None = None) -> Findings:
    """What the stage needs on disk; what an earlier stage of the job, or the job itself, will write counts as there.

    Raises: ConfigError when `model.preset` is not known.
    """
    found = Findings()
    by_source: dict[str | None, DiTConfig] = {None: model_config(config.model.preset)}
    for wanted in config.networks.values():
        if (source := wanted.source) is not None and source not in by_source:
            where = config.source(source), config.logdir, config.model.preset
            by_source[source] = _sizes(wanted.key, source, *where, job, found)
    found.sizes = {name: by_source[wanted.source] for name, wanted in config.networks.items()}
    # Training from an encoded set loads no encoder, but those of a window's picture where the objective decodes.
    stored = EncodedRows.lies_at(Path(config.data.path))
    parts = {part.folder for part in ENCODER_PARTS} - ({"text_encoder"} if stored else set())
    if found.sizes["generator"].image_dim is None:
        parts.discard("image_encoder")
    folder = config.encoders_folder
    if not stored or config.objective.decodes:
        _look_at_encoders(folder, parts, found, half_text=config.model.text_precision == "bf16")
    written = None if job is None or job.data is None else job.data_folder
    if written is None or not Path(config.data.path).is_relative_to(written):
        with found.noting("data"):
            find_format(Path(config.data.path), config.data.kind)
    with found.noting("encoders"):
        found.image_tokens = image_token_count(folder)
        if (file := folder / "vae" / "config.json").is_file():
            found.vae = {name: value for name, value in read_json(file).items() if not name.startswith("_")}
    return found


def _sizes(
    key: str, source: str, path: Path, logdir: str, preset: str, job: JobConfig | None, found: Findings
) -> DiTConfig:
    """Sizes of the weights that a source means, at `path`; guessed where they are not there, which is noted."""
    if job is not None and source in job.stages and not path.is_dir():
        return look_at(job.stages[source], job).sizes["generator"]  # written before it is read
    repository = hub_repository(path)
    try:
        if (student := find_student(path)) is not None:
            student.check_is_one()
            if student.root is not None:
                return student.open().model.config
            name = student.student.name
            found.notes.append(f"{key}={source} is {name}: it will be fetched from the Hugging Face hub")
            return model_config(student.preset)
        weights = find_weights(path, logdir)
        if weights.path.exists():
            return open_dit(weights.path, part="reader")[1].config  # from the heads of its files
        if repository is not None and not path.as_posix().startswith(repository):
            raise CheckpointError(f"{path} does not exist")
        found.notes.append(f"{key}={source} is no local path: it will be fetched from the Hugging Face hub")
    except (LongtakeError, ValueError) as error:
        reason = str(error) if path.exists() or isinstance(error, ConfigError) else "does not exist"
        if repository is not None:
            found.downloads.append(f"longtake download {repository} -o {path}")
        hint = "" if is_path(source) else "; train that stage first"
        place = "" if path.as_posix() == source else f": {path}"
        found.missing.append(f"weights {key}={source}{place} {reason}{hint}")
    # A folder named like a preset, or the preset that the stage names
    preset = path.name.lower() if path.name.lower() in PRESETS else preset
    found.notes.append(f"sizes of {key}={source} are taken from the preset {preset}")
    return model_config(preset)


def _look_at_encoders(folder: Path, wanted: set[str], found: Findings, *, half_text: bool) -> None:
    """Finds the bytes of encoders that are there, as they are loaded; what is not there, with commands that get it."""
    if not folder.exists() and is_hub_name(folder):
        found.notes.append(f"encoders={folder} will be fetched from the Hugging Face hub; their memory is not counted")
        return
    parts = [part for part in ENCODER_PARTS if part.folder in wanted]
    if absent := [part for part in parts if not part.places(folder)]:
        found.missing.append(f"encoders: {folder} has no {', no '.join(part.name for part in absent)}")
    if texts := [place for part in parts if part.key == "text" for place in part.places(folder)]:
        places = tokenizer_places(texts[0])
        if not any((place / "tokenizer_config.json").is_file() for place in places):
            found.missing.append(f"encoders: the tokenizer: tokenizer_config.json in {' or '.join(map(str, places))}")
    if absent and (repository := hub_repository(folder)) is not None:
        found.downloads.append(f"longtake download {repository} -o {folder}")
    elif absent:  # of several repositories, each named once
        files: dict[str, list[str]] = defaultdict(list)
        for part in absent:
            choices = list(part.originals.items())
            file, repository = choices[-1 if found.sizes["generator"].out_channels == 48 else 0]
            files[repository] += [file, *part.beside]
        found.downloads += [f"hf download {name} {' '.join(f)} --local-dir {folder}" for name, f in files.items()]
    # Encoders are loaded in float32, whatever the files hold, but the text encoder where it is asked for.
    for part in parts:
        width = 2 if half_text and part.key == "text" else 4
        for weights in encoder_files(folder, part):
            prefix = part.prefix * (weights.suffix != ".safetensors")  # there CLIP has its text tower
            with found.noting("encoders"):
                numbers = (prod(row.shape) for row in stored_in(weights) if row.key.startswith(prefix))
                found.encoder_bytes += width * sum(numbers)
