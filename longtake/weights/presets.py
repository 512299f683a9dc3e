"""Sizes of transformers by name, or from the `config.json` of a folder.

Source: specification A.1 (`config.json` of the published models); Wan2.2-TI2V-5B: Wan-Video/Wan2.2
`wan/configs/wan_ti2v_5B.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from longtake.errors import ConfigError, nearest
from longtake.models.dit import VideoDiT
from longtake.models.sizes import DiTConfig
from longtake.weights.config_json import FILE, config_from_json, read_json
from longtake.weights.locate import locate

_SMALL = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_MIDDLE = DiTConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30)
_LARGE = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_I2V_LARGE = replace(_LARGE, model_type="i2v", in_channels=36, image_dim=1280)

PRESETS: dict[str, DiTConfig] = {
    "toy": DiTConfig(
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_layers=6,
        model_type="i2v",
        in_channels=36,
        out_channels=16,
        text_dim=64,
        text_len=48,
        image_dim=64,
    ),
    "wan2.1-t2v-1.3b": _SMALL,
    "wan2.1-fun-1.3b-inp": replace(_SMALL, model_type="i2v", in_channels=36, image_dim=1280),
    "wan2.1-t2v-14b": _LARGE,
    "wan2.1-i2v-14b-480p": _I2V_LARGE,
    "wan2.1-i2v-14b-720p": _I2V_LARGE,
    "wan2.1-flf2v-14b-720p": replace(_I2V_LARGE, model_type="flf2v", image_positions=514),
    # One preset for both experts; i2v has y, but neither CLIP tokens nor their branch.
    "wan2.2-t2v-a14b": _LARGE,
    "wan2.2-i2v-a14b": replace(_LARGE, model_type="i2v", in_channels=36),
    "wan2.2-ti2v-5b": replace(_MIDDLE, model_type="ti2v", in_channels=48, out_channels=48),
}


def model_config(preset: str) -> DiTConfig:
    """Sizes by name, or from the `config.json` of a folder. Raises: ConfigError listing the known names."""
    if preset in PRESETS:
        return PRESETS[preset]
    folder = Path(preset)
    file = (locate(folder) if folder.is_dir() else folder) / FILE
    if not file.is_file():
        known, near = ", ".join(sorted(PRESETS)), nearest(preset, PRESETS)
        raise ConfigError(f"preset {preset} is neither known ({known}) nor a folder with a config.json{near}")
    return config_from_json(read_json(file))


def fitting_presets(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the presets whose tensors have exactly these names and shapes (tensors of any device)."""
    patch = state.get("patch_embedding.weight")
    size = None if patch is None else tuple(patch.shape[:2])
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return [name for name, c in PRESETS.items() if size == (c.dim, c.in_channels) and shapes == shapes_of(c)]


def shapes_of(config: DiTConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a model, under original Wan names."""
    with torch.device("meta"):
        model = VideoDiT(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
