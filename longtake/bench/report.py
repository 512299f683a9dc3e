"""What a bench found, as JSON and as text, and the machine it was found on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longtake.devices import num_cores
from longtake.doctor.machine import versions

_PACKAGES = ("python", "torch", "CUDA of torch", "cuDNN", "triton", "diffusers", "transformers")


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions that numbers depend on."""
    name = f"CPU, {num_cores()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    found = versions()
    return {"device": name, "versions": {name: found[name] for name in _PACKAGES}}


def text(found: Mapping[str, Any]) -> str:
    """One number a line, groups by their names."""
    rows = list(_rows(found))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _rows(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{name}: ")
        else:
            yield prefix + name, _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)
