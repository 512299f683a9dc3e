"""Sizes of transformers by name, or from the `config.json` of a folder."""

from __future__ import annotations

import json
from pathlib import Path

from longtake.errors import ConfigError
from longtake.models.dit import DiTConfig
from longtake.models.toy import IMAGE_WIDTH, TEXT_LEN, TEXT_WIDTH
from longtake.models.weights import config_from_json

PRESETS: dict[str, DiTConfig] = {
    "toy": DiTConfig(
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_layers=6,
        model_type="i2v",
        in_channels=36,
        out_channels=16,
        text_dim=TEXT_WIDTH,
        text_len=TEXT_LEN,
        image_dim=IMAGE_WIDTH,
    ),
}


def model_config(preset: str) -> DiTConfig:
    """Sizes by name, or from the `config.json` of a folder. Raises: ConfigError listing the known names."""
    if preset in PRESETS:
        return PRESETS[preset]
    file = Path(preset) / "config.json"
    if not file.is_file():
        known = ", ".join(sorted(PRESETS))
        raise ConfigError(f"model.preset={preset} is neither known ({known}) nor a folder with a config.json")
    return config_from_json(json.loads(file.read_text()))
