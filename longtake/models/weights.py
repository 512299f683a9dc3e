"""Reading and writing transformer weights: original Wan names and diffusers names, strict, never unpickling.

Source of the name table: specification A.2, checked against diffusers' WanTransformer3DModel.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtake.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longtake.models.dit import DiTConfig, VideoDiT

# Whole modules, not substrings: `norm2` and `norm3` swap meaning between the two formats.
_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{a}": f"attn1.{b}" for a, b in _ATTENTION.items()},
    **{f"cross_attn.{a}": f"attn2.{b}" for a, b in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}


# What FSDP1, activation checkpointing and compile insert wherever they wrap a module
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# What DDP and the wrapper classes of Self-Forcing's family put before the whole model
_OWNERS = re.compile(r"((module|model)\.)+")


def clean_name(name: str) -> str:
    """A parameter's name without the parts that FSDP1, activation checkpointing and compile insert."""
    return _WRAPPERS.sub("", name)


def clean_key(key: str) -> str:
    """The model's own name of a checkpoint's key: no wrapper anywhere, no leading `module.` or `model.`."""
    key = clean_name(key)
    owner = _OWNERS.match(key)
    return key[owner.end() :] if owner else key


def _renamed(key: str, top: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    table, prefix, rest = (block, f"blocks.{match[1]}.", match[2]) if match else (top, "", key)
    if rest in table:
        return prefix + table[rest]
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{table[module]}.{leaf}" if module in table else None


def to_diffusers_key(key: str) -> str:
    """The diffusers name of an original Wan key. Raises: CheckpointError when the key is none."""
    renamed = _renamed(key, _TOP, _BLOCK)
    if renamed is None:
        raise CheckpointError(f"{key!r} is not a parameter name of the original Wan transformer")
    return renamed


def to_original_key(key: str) -> str:
    """The original Wan name of a diffusers key. Raises: CheckpointError when the key is none."""
    renamed = _renamed(key, {v: k for k, v in _TOP.items()}, {v: k for k, v in _BLOCK.items()})
    if renamed is None:
        raise CheckpointError(f"{key!r} is not a parameter name of diffusers' WanTransformer3DModel")
    return renamed


def is_diffusers(keys: Iterable[str]) -> bool:
    """True when the names are those of diffusers."""
    return any(key.startswith("condition_embedder.") for key in keys)


def config_from_json(data: Mapping[str, Any]) -> DiTConfig:
    """Model sizes from a Wan or diffusers `config.json`. Raises: CheckpointError when a size is missing."""
    from longtake.models.dit import DiTConfig

    if not isinstance(data, Mapping):
        raise CheckpointError(f"config.json holds a {type(data).__name__}; it must be the object of a Wan transformer")
    try:
        if "num_attention_heads" in data:
            heads = data["num_attention_heads"]
            image_dim = data.get("image_dim")
            return DiTConfig(
                dim=heads * data["attention_head_dim"],
                ffn_dim=data["ffn_dim"],
                num_heads=heads,
                num_layers=data["num_layers"],
                model_type="i2v" if image_dim else "t2v",
                in_channels=data["in_channels"],
                out_channels=data["out_channels"],
                text_dim=data["text_dim"],
                freq_dim=data["freq_dim"],
                image_dim=image_dim,
                image_positions=data.get("pos_embed_seq_len"),
                eps=data.get("eps", 1e-6),
            )
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
            eps=data["eps"],
        )
    except KeyError as error:
        raise CheckpointError(f"config.json has no field {error}; it must be that of a Wan transformer") from None


def config_to_json(config: DiTConfig) -> dict[str, Any]:
    """`config.json` with the original Wan fields, and the sizes that the original takes for granted."""
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
        "text_dim": config.text_dim,
        "image_dim": config.image_dim,
        "image_positions": config.image_positions,
    }


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of every shard in a folder, under original Wan names.

    Keys are cleaned of wrappers (`clean_key`) first.
    Raises: CheckpointError when a file cannot be read, or when two keys mean the same parameter.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise CheckpointError(f"{path} holds no safetensors file; give a Wan or diffusers transformer folder or file")
    state: dict[str, Tensor] = {}
    origin: dict[str, tuple[Path, str]] = {}
    for file in files:
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
        for key, tensor in tensors.items():
            name = clean_key(key)
            if name in state:
                other, first = origin[name]
                raise CheckpointError(
                    f"{name} is in {other.name} (as {first}) and in {file.name} (as {key}) of {file.parent}; "
                    "keep one of them, or give the path of one file"
                )
            state[name], origin[name] = tensor, (file, key)
    if is_diffusers(state):
        state = {to_original_key(key): tensor for key, tensor in state.items()}
    return state


def check_state(state: Mapping[str, Tensor], model: VideoDiT, source: object) -> None:
    """Raises CheckpointError that lists missing, surplus and reshaped keys."""
    own = model.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    problems = [
        f"{name} ({len(keys)}): {', '.join(keys[:12])}{', ...' if len(keys) > 12 else ''}"
        for name, keys in (("missing", missing), ("surplus", surplus), ("reshaped", reshaped))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model; " + "; ".join(problems))


def load_state(model: VideoDiT, state: Mapping[str, Tensor], source: object) -> None:
    """Copies a state dict (original names) into a model, strictly; float types are converted."""
    check_state(state, model, source)
    model.load_state_dict(dict(state), strict=True)


def load_dit(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> VideoDiT:
    """A transformer from an original Wan or diffusers folder or file (`config.json` beside the weights).

    Args: `dtype` of the matrix weights (default: float32); what Wan computes in float32 stays float32.
    Raises: CheckpointError listing missing, surplus or reshaped keys.
    """
    import torch

    from longtake.models.dit import VideoDiT

    path = Path(path)
    config_file = (path if path.is_dir() else path.parent) / "config.json"
    if not config_file.exists():
        raise CheckpointError(f"{config_file} does not exist; it must hold the sizes of the transformer")
    try:
        config = config_from_json(json.loads(config_file.read_text()))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{config_file} is not valid JSON: {error}") from error
    state = read_state(path)
    if config.image_dim is not None and not any(key.startswith("img_emb.") or ".k_img." in key for key in state):
        # Wan2.2's I2V-A14B calls itself i2v and has y, but neither CLIP tokens nor their branch.
        config = dataclasses.replace(config, image_dim=None, image_positions=None)
    with torch.device("meta"):
        model = VideoDiT(config)
    check_state(state, model, path)
    model.load_state_dict({key: tensor.to(device, torch.float32) for key, tensor in state.items()}, assign=True)
    model.requires_grad_(True)
    return model.cast(dtype) if dtype is not None else model


def save_dit(
    model_config: DiTConfig, state: Mapping[str, Tensor], folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Writes `config.json` and `diffusion_pytorch_model.safetensors` (original Wan names) into `folder`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_json(model_config), indent=2) + "\n")
