"""Which files a stage reads, which of them are missing, and where published ones come from. Loads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from longtake.config.stage import JobConfig, StageConfig, is_path
from longtake.data.encoded import EncodedRows
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
    critic = config.critic.init_from if config.critic is not None else None
    sources = {"init_from": config.init_from, "teacher": config.teacher, "critic.init_from": critic}
    sizes: dict[str, DiTConfig] = {}
    for key, source in sources.items():
        if source is not None:
            found = _weights(key, source, config, job, missing, notes)
            if found is None:  # a folder named like a preset, or the preset that the stage names
                name = Path(source).name.lower()
                preset = name if name in PRESETS else config.model.preset
                notes.append(f"sizes of {key}={source} are taken from the preset {preset}")
            sizes[key] = found or model_config(preset)
    generator = sizes.get("init_from") or model_config(config.model.preset)
    teacher = sizes.get("teacher")
    networks = {"generator": generator}
    if teacher is not None:
        networks |= {"critic": sizes.get("critic.init_from") or teacher, "teacher": teacher}
    # Training from an encoded set loads no encoder, but for long tuning those of a window's picture.
    stored = EncodedRows.lies_at(Path(config.data.path))
    wanted = {part.folder for part in ENCODER_PARTS} - ({"text_encoder"} if stored else set())
    if generator.image_dim is None:
        wanted.discard("image_encoder")
    encoder_bytes = 0 if stored and config.stage != "long" else _encoders(config, wanted, missing)
    _data(config, job, missing)
    tokens = image_token_count(config.encoders_folder)
    return Findings(networks, encoder_bytes, tokens, _vae(config.encoders_folder), missing, notes)


def _weights(
    key: str, source: str, config: StageConfig, job: JobConfig | None, missing: list[str], notes: list[str]
) -> DiTConfig | None:
    """Sizes of the weights that a source means; None, and a line in `missing` or `notes`, where they are not there."""
    path = config.source(source)
    if job is not None and source in job.stages and not path.is_dir():
        return look_at(job.stages[source], job).sizes["generator"]  # written before it is read
    repository = hub_repository(path)
    try:
        found = find_weights(path, config.logdir)
        if found.path.exists():
            return open_dit(found.path)[1].config  # from the heads of its files
        if repository is None or path.as_posix().startswith(repository):
            notes.append(f"{key}={source} is no local path: it will be fetched from the Hugging Face hub")
            return None
        raise CheckpointError(f"{path} does not exist")
    except (LongtakeError, ValueError) as error:
        reason = "does not exist" if not path.exists() else str(error)
        published = hub_repository(path)
        hint = f"; get it with `hf download {published} --local-dir {path}`" if published else ""
        hint = hint if is_path(source) else "; train that stage first"
        missing.append(f"weights {key}={source}: {path} {reason}{hint}")
        return None


def _vae(folder: Path) -> dict[str, Any]:
    file = folder / "vae" / "config.json"
    if not file.is_file():
        return {}
    return {name: value for name, value in json.loads(file.read_text()).items() if not name.startswith("_")}


def _encoders(config: StageConfig, wanted: set[str], missing: list[str]) -> int:
    folder = config.encoders_folder
    absent = missing_encoders(folder, with_image="image_encoder" in wanted)
    missing += [f"encoders: {what}" for what in absent]
    # Encoders are loaded in float32, whatever the files hold, but the text encoder where it is asked for.
    half = {"text_encoder"} if config.model.text_precision == "bf16" else set()
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


def _data(config: StageConfig, job: JobConfig | None, missing: list[str]) -> None:
    path = Path(config.data.path)
    if job is not None and job.data is not None and path.is_relative_to(job.data_folder):
        return
    if not path.exists():
        missing.append(f"data: {path} does not exist; set data.path to your data set (docs/formats.md)")
    elif config.data.kind == "auto":
        try:
            detect_kind(path)
        except LongtakeError as error:
            missing.append(f"data: {error}")
