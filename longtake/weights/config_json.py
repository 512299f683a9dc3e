"""`config.json` of a transformer: read in both formats, written in three.

Sources: Wan-Video/Wan2.1 `wan/modules/model.py` (what `register_to_config` stores and `ignore_for_config` leaves out);
diffusers `models/transformers/transformer_wan.py`. Must know no tensor.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.errors import CheckpointError
from longtake.json_text import parse_json
from longtake.models.sizes import DiTConfig
from longtake.weights.file_kind import POINTER

FILE = "config.json"
# Fields of DiTConfig that a format calls otherwise, and those that its config.json does not hold: Wan's takes them for
# granted, diffusers' holds other fields that they follow from.
_IN_WAN = {"in_channels": "in_dim", "out_channels": "out_dim"}
_NOT_IN_WAN = ("text_dim", "image_dim", "image_positions", "patch_size")
_IN_DIFFUSERS = {"num_heads": "num_attention_heads", "image_positions": "pos_embed_seq_len"}
_NOT_IN_DIFFUSERS = ("model_type", "dim", "text_len")
_OPTIONAL_IN_DIFFUSERS = ("image_dim", "image_positions", "patch_size", "eps")
_SIZES = [field.name for field in dataclasses.fields(DiTConfig)]


def config_from_json(data: Mapping[str, Any], file: Path | str = FILE) -> DiTConfig:
    """Model sizes from a Wan or diffusers `config.json`. Raises: CheckpointError when a size is missing or wrong."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{file} holds a {type(data).__name__}; it must be the object of a Wan transformer")
    kind = f" (it is that of a {data['_class_name']})" if "_class_name" in data else ""
    try:
        config = _from_diffusers(data) if "num_attention_heads" in data else _from_original(data)
    except KeyError as error:
        raise CheckpointError(f"{file} has no field {error}{kind}; it must be that of a Wan transformer") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file} holds a size of the wrong kind{kind}: {error}") from error
    for name, value in config.to_dict().items():
        sizes = list(value) if name == "patch_size" else [value]
        if name in ("model_type", "eps") or (value is None and name in ("image_dim", "image_positions")):
            continue
        if not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
            raise CheckpointError(f"{file} says {name}={value!r}{kind}; it must be a whole number above 0")
    if type(config.eps) not in (int, float) or not 0 < config.eps < 1:
        raise CheckpointError(f"{file} says eps={config.eps!r}{kind}; it must be a number between 0 and 1")
    return config


def _fields(data: Mapping[str, Any], names: Mapping[str, str], optional: Sequence[str]) -> dict[str, Any]:
    """The fields of DiTConfig that `data` holds under these names. Raises: KeyError for one that must be there."""
    held = {size: names.get(size, size) for size in _SIZES}
    return {size: data[name] for size, name in held.items() if name in data or size not in optional}


def _from_diffusers(data: Mapping[str, Any]) -> DiTConfig:
    found = _fields(data, _IN_DIFFUSERS, _NOT_IN_DIFFUSERS + _OPTIONAL_IN_DIFFUSERS)
    config = DiTConfig(**{**found, "dim": found["num_heads"] * data["attention_head_dim"]})
    kind = "ti2v" if config.out_channels == 48 else "t2v"  # Wan's name of the kind, which diffusers does not store
    if config.image_dim is not None or config.condition_channels > 0:
        kind = "i2v"
    return dataclasses.replace(config, model_type=kind if config.image_positions is None else "flf2v")


def _from_original(data: Mapping[str, Any]) -> DiTConfig:
    found = _fields(data, _IN_WAN, _NOT_IN_WAN)
    granted = {"image_dim": 1280} if found["model_type"] in ("i2v", "flf2v") else {}
    if found["model_type"] == "flf2v":
        granted["image_positions"] = 514
    return DiTConfig(**granted | found)


def config_to_json(config: DiTConfig) -> dict[str, Any]:
    """`config.json` with the original Wan fields, and the sizes that the original takes for granted.

    The patch is named where it is not that of every Wan model, so that files written before stay the same.
    """
    granted = {name: getattr(config, name) for name in _NOT_IN_WAN if name != "patch_size"}
    patch = {} if config.patch_size == (1, 2, 2) else {"patch_size": list(config.patch_size)}
    return _original_fields(config) | granted | patch


def _original_fields(config: DiTConfig) -> dict[str, Any]:
    stored = {_IN_WAN.get(name, name): getattr(config, name) for name in _SIZES if name not in _NOT_IN_WAN}
    return {"_class_name": "WanModel", **stored}


def config_to_original(config: DiTConfig) -> dict[str, Any]:
    """`config.json` as the original Wan code writes and reads it.

    Raises: CheckpointError naming a size that the original takes for granted and that is another one here.
    """
    fields = _original_fields(config)
    read = config_from_json(fields)
    if config.model_type == "i2v" and config.image_dim is None:  # Wan2.2's kind: its own code makes no image branch
        read = dataclasses.replace(read, image_dim=None)
    return _expressed(fields, read, config, "the original Wan format")


def config_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """`config.json` with the fields of diffusers' WanTransformer3DModel.

    Raises: CheckpointError naming a size that diffusers takes for granted and that is another one here.
    """
    stored = {_IN_DIFFUSERS.get(name, name): getattr(config, name) for name in _SIZES if name not in _NOT_IN_DIFFUSERS}
    fields = {
        "_class_name": "WanTransformer3DModel",
        **stored,
        "patch_size": list(config.patch_size),
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "attention_head_dim": config.head_width,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }
    fields = dict(sorted(fields.items()))  # as diffusers writes them
    return _expressed(fields, config_from_json(fields), config, "the diffusers format")


def _expressed(fields: dict[str, Any], read: DiTConfig, config: DiTConfig, what: str) -> dict[str, Any]:
    pairs = ((name, value, getattr(read, name)) for name, value in config.to_dict().items())
    if lost := [f"{name}={value!r} (it would be read as {other!r})" for name, value, other in pairs if other != value]:
        raise CheckpointError(f"{what} cannot say {', '.join(lost)}; convert to longtake, whose config.json can")
    return fields


def read_json(file: Path) -> Any:
    """What a JSON file holds. Raises: CheckpointError when it cannot be read."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    try:
        return parse_json(data)
    except ValueError as error:
        why = "it is a Git LFS pointer: run `git lfs pull`" if data.startswith(POINTER) else error
        raise CheckpointError(f"{file} is not valid JSON: {why}") from error


def write_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """Writes `config.json` into `folder`."""
    (folder / FILE).write_text(json.dumps(fields, indent=2) + "\n")
