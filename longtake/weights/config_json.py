"""`config.json` of a transformer: read in both formats, written in three.

Sources: Wan-Video/Wan2.1 `wan/modules/model.py` (what `register_to_config` stores and `ignore_for_config` leaves out);
diffusers `models/transformers/transformer_wan.py`. Must know no tensor.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtake.errors import CheckpointError
from longtake.json_text import parse_json
from longtake.models.sizes import DiTConfig
from longtake.weights.file_kind import is_pointer

FILE = "config.json"


def config_from_json(data: Mapping[str, Any], file: Path | str = "config.json") -> DiTConfig:
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


def _from_diffusers(data: Mapping[str, Any]) -> DiTConfig:
    heads = data["num_attention_heads"]
    config = DiTConfig(
        dim=heads * data["attention_head_dim"],
        ffn_dim=data["ffn_dim"],
        num_heads=heads,
        num_layers=data["num_layers"],
        in_channels=data["in_channels"],
        out_channels=data["out_channels"],
        text_dim=data["text_dim"],
        freq_dim=data["freq_dim"],
        image_dim=data.get("image_dim"),
        image_positions=data.get("pos_embed_seq_len"),
        patch_size=tuple(data.get("patch_size", (1, 2, 2))),
        eps=data.get("eps", 1e-6),
    )
    return dataclasses.replace(config, model_type=_type_of(config))


def _type_of(config: DiTConfig) -> str:
    """Wan's name of the kind of model, which diffusers does not store."""
    if config.image_positions is not None:
        return "flf2v"
    if config.image_dim is not None or config.condition_channels > 0:
        return "i2v"
    return "ti2v" if config.out_channels == 48 else "t2v"


def _from_original(data: Mapping[str, Any]) -> DiTConfig:
    model_type = data["model_type"]
    has_image = model_type in ("i2v", "flf2v")
    return DiTConfig(
        dim=data["dim"],
        ffn_dim=data["ffn_dim"],
        num_heads=data["num_heads"],
        num_layers=data["num_layers"],
        model_type=model_type,
        in_channels=data["in_dim"],
        out_channels=data["out_dim"],
        text_dim=data.get("text_dim", 4096),
        text_len=data["text_len"],
        freq_dim=data["freq_dim"],
        image_dim=data.get("image_dim", 1280 if has_image else None),
        image_positions=data.get("image_positions", 514 if model_type == "flf2v" else None),
        patch_size=tuple(data.get("patch_size", (1, 2, 2))),
        eps=data["eps"],
    )


def config_to_json(config: DiTConfig) -> dict[str, Any]:
    """`config.json` with the original Wan fields, and the sizes that the original takes for granted.

    The patch is named where it is not that of every Wan model, so that files written before stay the same.
    """
    return {
        **_original_fields(config),
        "text_dim": config.text_dim,
        "image_dim": config.image_dim,
        "image_positions": config.image_positions,
        **({} if config.patch_size == (1, 2, 2) else {"patch_size": list(config.patch_size)}),
    }


def _original_fields(config: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "WanModel",
        "model_type": config.model_type,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "text_len": config.text_len,
        "eps": config.eps,
    }


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
    fields = {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "attention_head_dim": config.head_width,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": config.image_dim,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": config.image_positions,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }
    return _expressed(fields, config_from_json(fields), config, "the diffusers format")


def _expressed(fields: dict[str, Any], read: DiTConfig, config: DiTConfig, what: str) -> dict[str, Any]:
    lost = [
        f"{name}={value!r} (it would be read as {getattr(read, name)!r})"
        for name, value in config.to_dict().items()
        if getattr(read, name) != value
    ]
    if lost:
        raise CheckpointError(f"{what} cannot say {', '.join(lost)}; convert to longtake, whose config.json can")
    return fields


def read_json(file: Path) -> Any:
    """What a JSON file holds. Raises: CheckpointError when it cannot be read."""
    try:
        return parse_json(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        why = "it is a Git LFS pointer: run `git lfs pull`" if is_pointer(file) else error
        raise CheckpointError(f"{file} is not valid JSON: {why}") from error


def write_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """Writes `config.json` into `folder`."""
    (folder / FILE).write_text(json.dumps(fields, indent=2) + "\n")
