"""What tells weights from other weights: a digest of every stored tensor, whatever layout and shards they lie in."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from longtake.errors import CheckpointError
from longtake.weights.hub import local_path
from longtake.weights.locate import locate
from longtake.weights.lora import Base, is_adapter, read_base, scale_text
from longtake.weights.read import CheckpointReader, open_published

_THREADS = 8  # hashing leaves the interpreter's lock


def weights_identity(source: str | Path) -> str:
    """SHA-256 over name (original), type, shape and bytes of every tensor; `source` as that of `load_dit`.

    A folder of updates counts with its scale and the identity of its base, which loading compares (`check_base`).
    All data is read once. Raises: CheckpointError.
    """
    path = locate(local_path(source))
    updates = is_adapter(path)
    head = f"{read_base(path).identity} {scale_text(path)}\n" if updates else ""
    return hashlib.sha256((head + _lines(open_published(path, updates=updates))).encode()).hexdigest()


def check_base(folder: Path, base: Base) -> Path:
    """Where the base of a folder of updates lies. Raises: CheckpointError when other weights are there now."""
    path = base.path(folder)
    if (found := weights_identity(path)) != base.identity:
        fix = f"put the former back, or merge by hand: longtake convert {path} TARGET --to longtake --lora {folder}"
        raise CheckpointError(
            f"the updates in {folder} were trained on weights with the SHA-256 {base.identity[:16]}, and those at "
            f"{path} have {found[:16]}; {fix}"
        )
    return path


def _lines(published: CheckpointReader) -> str:
    names = sorted(published.tensors)

    def digests(part: int) -> dict[str, str]:
        found = {}
        for name, tensor in published.read(names[part::_THREADS], check=False):
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            shape = "x".join(map(str, tensor.shape))
            digest = hashlib.sha256(flat.numpy().data).hexdigest()
            found[name] = f"{name} {tensor.dtype} {shape} {digest}\n"
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        lines = {name: line for part in pool.map(digests, range(_THREADS)) for name, line in part.items()}
    return "".join(lines[name] for name in names)
