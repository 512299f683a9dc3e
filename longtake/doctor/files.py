"""Which files a stage reads, which of them are missing, and where published ones come from. Loads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from longtake.config.groups import DataConfig
from longtake.config.job import JobConfig
from longtake.config.stage import StageConfig, is_path
from longtake.data.encoded import is_encoded
from longtake.data.formats import detect_kind
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
    missing_encoders,
)
from longtake.weights.presets import PRESETS, model_config


@dataclass
class Findings:
    """What a stage reads: `missing` with the way to get it, `notes`, sizes of networks and bytes of encoders.

    `encoder_bytes` are those that stay beside the training, of files that are there; `vae`, the VAE's configuration
    where a file tells it.
    """

    sizes: Sizes
    encoder_bytes: int
    image_tokens: int
    vae: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look_at(config: StageConfig, job: JobConfig | None = None) -> Findings:
    """What the stage needs on disk; what an earlier stage of the job, or the job itself, will write counts as there.

    Raises: ConfigError when `model.preset` is not known.
    """
    missing: list[str] = []
    notes: list[str] = []
    written = {} if job is None else job.stages
    by_source: dict[str | None, DiTConfig] = {None: model_config(config.model.preset)}
    for wanted in config.networks.values():
        if (source := wanted.source) is None or source in by_source:
            continue
        if source in written and not config.source(source).is_dir():
            found: DiTConfig | None = look_at(written[source], job).sizes["generator"]  # written before it is read
        else:
            found = _weights(f"{wanted.key}={source}", source, config.source(source), config.logdir, missing, notes)
        if found is None:  # a folder named like a preset, or the preset that the stage names
            name = Path(source).name.lower()
            preset = name if name in PRESETS else config.model.preset
            notes.append(f"sizes of {wanted.key}={source} are taken from the preset {preset}")
            found = model_config(preset)
        by_source[source] = found
    sizes = {name: by_source[wanted.source] for name, wanted in config.networks.items()}
    # Training from an encoded set loads no encoder, but those of a window's picture where the objective decodes.
    stored = is_encoded(Path(config.data.path))
    wanted_parts = {part.folder for part in ENCODER_PARTS} - ({"text_encoder"} if stored else set())
    if sizes["generator"].image_dim is None:
        wanted_parts.discard("image_encoder")
    folder, encoder_bytes = config.encoders_folder, 0
    if not stored or config.objective.decodes:
        encoder_bytes = _encoders(folder, wanted_parts, missing, half_text=config.model.text_precision == "bf16")
    _data(config.data, job, missing)
    return Findings(sizes, encoder_bytes, image_token_count(folder), _vae(folder), missing, notes)


def _weights(told: str, source: str, path: Path, logdir: str, missing: list[str], notes: list[str]) -> DiTConfig | None:
    """Sizes of the weights at `path`; None, and a line in `missing` or `notes` that begins with `told`, where they are
    not there.
    """
    repository = hub_repository(path)
    try:
        found = find_weights(path, logdir)
        if found.path.exists():
            return open_dit(found.path)[1].config  # from the heads of its files
        if repository is None or path.as_posix().startswith(repository):
            notes.append(f"{told} is no local path: it will be fetched from the Hugging Face hub")
            return None
        raise CheckpointError(f"{path} does not exist")
    except (LongtakeError, ValueError) as error:
        reason = "does not exist" if not path.exists() else str(error)
        published = hub_repository(path)
        hint = f"; get it with `hf download {published} --local-dir {path}`" if published else ""
        hint = hint if is_path(source) else "; train that stage first"
        missing.append(f"weights {told}: {path} {reason}{hint}")
        return None


def _vae(folder: Path) -> dict[str, Any]:
    file = folder / "vae" / "config.json"
    if not file.is_file():
        return {}
    return {name: value for name, value in json.loads(file.read_text()).items() if not name.startswith("_")}


def _encoders(folder: Path, wanted: set[str], missing: list[str], *, half_text: bool) -> int:
    absent = missing_encoders(folder, with_image="image_encoder" in wanted)
    missing += [f"encoders: {what}" for what in absent]
    # Encoders are loaded in float32, whatever the files hold, but the text encoder where it is asked for.
    half = {"text_encoder"} if half_text else set()
    parts = [part for part in ENCODER_PARTS if part.folder in wanted]
    files = ((file, part) for part in parts for file in encoder_files(folder, part))
    return sum((2 if part.folder in half else 4) * _elements(file, part) for file, part in files)


def _elements(file: Path, part: EncoderPart) -> int:
    """Numbers in a weight file, from its header alone (safetensors) or without reading the data (a .pth)."""
    if file.suffix == ".safetensors":
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    import torch

    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return sum(tensor.numel() for name, tensor in state.items() if name.startswith(part.prefix))


def _data(data: DataConfig, job: JobConfig | None, missing: list[str]) -> None:
    path = Path(data.path)
    if job is not None and job.data is not None and path.is_relative_to(job.data_folder):
        return
    if not path.exists():
        missing.append(f"data: {path} does not exist; set data.path to your data set (docs/formats.md)")
    elif data.kind == "auto":
        try:
            detect_kind(path)
        except LongtakeError as error:
            missing.append(f"data: {error}")
