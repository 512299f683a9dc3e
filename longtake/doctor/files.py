"""Which files a stage reads, which of them are missing, and where published ones come from. Loads no weights."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from longtake.config.groups import DataConfig
from longtake.config.job import JobConfig
from longtake.config.stage import StageConfig, is_path
from longtake.data.encoded import EncodedRows
from longtake.data.formats import find_format
from longtake.doctor.estimate import Sizes
from longtake.errors import CheckpointError, LongtakeError
from longtake.models.sizes import DiTConfig
from longtake.weights.load import open_dit
from longtake.weights.locate import (
    ENCODER_PARTS,
    EncoderPart,
    encoder_files,
    find_weights,
    hub_repository,
    image_token_count,
    is_hub_name,
    tokenizer_places,
)
from longtake.weights.presets import PRESETS, model_config
from longtake.weights.students import find_student


@dataclass
class Findings:
    """What a stage reads: what is `missing`, `notes`, sizes of networks and bytes of encoders.

    `downloads`, the commands that get what is on the hub; `encoder_bytes`, those that stay beside the training, of
    files that are there; `vae`, the configuration of the VAE where a file tells it.
    """

    sizes: Sizes = field(default_factory=dict)
    encoder_bytes: int = 0
    image_tokens: int = 0
    vae: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)


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
        found.encoder_bytes = _encoders(folder, parts, found, half_text=config.model.text_precision == "bf16")
    _data(config.data, job, found)
    found.image_tokens, found.vae = image_token_count(folder), _vae(folder)
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
        reason = "does not exist" if not path.exists() else str(error)
        if repository is not None:
            found.downloads.append(f"longtake download {repository} -o {path}")
        hint = "" if is_path(source) else "; train that stage first"
        place = "" if path.as_posix() == source else f": {path}"
        found.missing.append(f"weights {key}={source}{place} {reason}{hint}")
    # A folder named like a preset, or the preset that the stage names
    preset = path.name.lower() if path.name.lower() in PRESETS else preset
    found.notes.append(f"sizes of {key}={source} are taken from the preset {preset}")
    return model_config(preset)


def _vae(folder: Path) -> dict[str, Any]:
    file = folder / "vae" / "config.json"
    if not file.is_file():
        return {}
    return {name: value for name, value in json.loads(file.read_text()).items() if not name.startswith("_")}


def _encoders(folder: Path, wanted: set[str], found: Findings, *, half_text: bool) -> int:
    """Bytes of the encoders that are there, as they are loaded; what is not there, with the commands that get it."""
    if not folder.exists() and is_hub_name(folder):
        found.notes.append(f"encoders={folder} will be fetched from the Hugging Face hub; their memory is not counted")
        return 0
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
    there = ((file, part) for part in parts for file in encoder_files(folder, part))
    return sum((2 if half_text and part.key == "text" else 4) * _elements(file, part) for file, part in there)


def _elements(file: Path, part: EncoderPart) -> int:
    """Numbers in a weight file, from its header alone (safetensors) or without reading the data (a .pth)."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return sum(tensor.numel() for name, tensor in state.items() if name.startswith(part.prefix))


def _data(data: DataConfig, job: JobConfig | None, found: Findings) -> None:
    path = Path(data.path)
    if job is not None and job.data is not None and path.is_relative_to(job.data_folder):
        return
    try:
        find_format(path, data.kind)
    except LongtakeError as error:
        found.missing.append(f"data: {error}")
