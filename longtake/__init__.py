"""Longtake: streaming image-to-video generators distilled from Wan video diffusion models. Public names only."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CacheError": "longtake.errors",
    "CheckpointError": "longtake.errors",
    "Condition": "longtake.condition",
    "ConfigError": "longtake.errors",
    "DataError": "longtake.errors",
    "Generator": "longtake.inference.generator",
    "LongtakeError": "longtake.errors",
    "OutputError": "longtake.errors",
    "ShapeError": "longtake.errors",
    "TrainingError": "longtake.errors",
    "StreamPlan": "longtake.plan",
    "VideoDiT": "longtake.models.dit",
    "VideoShape": "longtake.condition",
    "VideoWriter": "longtake.inference.video_io",
    "clip_size": "longtake.data.clips",
    "decode_image": "longtake.data.images",
    "load_dit": "longtake.weights.load",
    "open_dataset": "longtake.data.formats",
    "prepare_image": "longtake.encoders.condition",
    "read_clip": "longtake.data.clips",
    "read_lora": "longtake.weights.lora",
    "read_video": "longtake.inference.video_io",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported on first use: `import longtake` and `longtake --help` load no torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'longtake' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
