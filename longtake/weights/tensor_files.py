"""Tensors on their way from and to files: refused when not finite, written so that others may read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from longtake.errors import CheckpointError
from longtake.outputs import whole_file


def is_finite(tensor: Tensor) -> bool:
    """False when a value is nan or infinite. One pass without a copy: some 10 GB/s on a CPU core."""
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def not_finite(what: str) -> CheckpointError:
    """The error about values that are nan or infinite; `what` names the tensor and its file."""
    return CheckpointError(
        f"{what} holds values that are not finite (nan or inf): training diverged or the file is damaged; use another"
    )


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises CheckpointError (`not_finite`) unless all values are finite."""
    if not is_finite(tensor):
        raise not_finite(what)


Shapes = Mapping[str, tuple[int, ...]]


def shapes_in(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def misfits(expected: Shapes, got: Shapes, shown: Callable[[str], str] = str) -> dict[str, list[str]]:
    """Names that are missing, surplus or reshaped in `got`, as `shown`, sorted; a group without any is left out."""
    both = expected.keys() & got.keys()
    other = [f"{shown(key)} {got[key]} instead of {expected[key]}" for key in both if got[key] != expected[key]]
    missing, surplus = (map(shown, a.keys() - b.keys()) for a, b in ((expected, got), (got, expected)))
    groups = {"missing": sorted(missing), "surplus": sorted(surplus), "reshaped": sorted(other)}
    return {group: keys for group, keys in groups.items() if keys}


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None, *, synced: bool = False
) -> None:
    """Writes contiguous CPU tensors to `path`, whole or not at all, with the permissions that a new file gets here.

    `safetensors.torch.save_file` alone leaves a file that only its owner may read (seen with version 0.8).
    Args: `synced` as that of `whole_file`. Raises: OutputError.
    """
    from safetensors.torch import save_file

    with whole_file(path, synced=synced) as file:
        file.touch()
        mode = file.stat().st_mode
        save_file(dict(tensors), file, None if metadata is None else dict(metadata))
        file.chmod(mode)
