"""Writes safetensors files that others may read, as any other new file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from longtake.outputs import writing


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous CPU tensors to `path` with the permissions that a new file gets here.

    `safetensors.torch.save_file` alone leaves a file that only its owner may read (seen with version 0.8).
    """
    from safetensors.torch import save_file

    with writing(path):
        path.touch()
        mode = path.stat().st_mode
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
        path.chmod(mode)
