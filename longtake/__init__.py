"""Longtake: streaming image-to-video generators distilled from Wan video diffusion models. Public names only."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["BlockPlan", "Condition", "Generator", "VideoDiT", "VideoShape", "load_dit"]

_HOMES = {
    "BlockPlan": "longtake.structs",
    "Condition": "longtake.structs",
    "VideoShape": "longtake.structs",
    "Generator": "longtake.inference.generator",
    "VideoDiT": "longtake.models.dit",
    "load_dit": "longtake.models.weights",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `import longtake` and `longtake --help` load no torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'longtake' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
