"""Weights as they are published: where the tensors of a transformer lie on disk, and reading them a file at a time.

Folders of safetensors (original Wan, diffusers, a diffusers pipeline, with or without an index), single safetensors
files, `torch.save` files of Self-Forcing's family, and names of repositories on the Hugging Face hub. Opening reads
headers only; tensors are views of the mapped file until they are used. Must know no model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import CheckpointError
from longtake.models.folders import PICKLED, locate
from longtake.models.model_json import read_json
from longtake.models.names import clean_key, is_diffusers, original_names

logger = logging.getLogger(__name__)

INDEX = ".safetensors.index.json"
# K.2: what released files call the weights of the student, the one to take first
_NETWORKS = ("generator_ema", "generator", "model")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: the file, its key there, its shape and type."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Published:
    """The tensors of a transformer on disk, under original Wan names; `diffusers`: whether its own names are those.

    `updates` are applied to each tensor as it is read, in this order: (name, tensor) -> tensor.
    """

    path: Path
    tensors: dict[str, Stored]
    diffusers: bool
    _pickled: Mapping[str, Tensor] = field(default_factory=dict)
    updates: Sequence[Callable[[str, Tensor], Tensor]] = ()

    def shapes(self) -> dict[str, Tensor]:
        """Every tensor on the meta device: shapes and types without data."""
        return {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in self.tensors.items()}

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of `names` (default: all), file by file. A tensor is a view of its file: copy it."""
        for name, tensor in self._stored(names):
            for update in self.updates:
                tensor = update(name, tensor)
            yield name, tensor

    def _stored(self, names: Iterable[str] | None) -> Iterator[tuple[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        by_file: dict[Path, list[str]] = {}
        for name in self.tensors if names is None else names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, held in by_file.items():
            if self._pickled:
                yield from ((name, self._pickled[self.tensors[name].key]) for name in held)
                continue
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in held:
                        yield name, opened.get_tensor(self.tensors[name].key)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def open_published(path: Path, network: str | None = None) -> Published:
    """What a local file or folder holds; only headers are read.

    Args: `network`, which one of a file that holds several (`generator`, `generator_ema`, `critic`, ...); default: the
    student, its average where there is one.
    Raises: CheckpointError when files are missing, damaged or contradict their index.
    """
    path = locate(path)
    if path.suffix in PICKLED and not path.is_dir():
        return _open_pickled(path, network)
    if network is not None:
        raise CheckpointError(f"network={network} was given, and {path} holds one network only; leave it out")
    files = _shards(path) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise CheckpointError(
            f"{path} holds no safetensors file; give a Wan or diffusers transformer folder, or a .safetensors, .pt or "
            ".pth file"
        )
    return _named(path, [row for file in files for row in _header(file)])


def _named(path: Path, rows: list[Stored], pickled: Mapping[str, Tensor] | None = None) -> Published:
    """Gives the rows original names. Raises: CheckpointError when two of them mean the same parameter."""
    cleaned: dict[str, Stored] = {}
    for row in rows:
        name = clean_key(row.key)
        if (other := cleaned.get(name)) is not None:
            raise CheckpointError(
                f"{name} is in {other.file.name} (as {other.key}) and in {row.file.name} (as {row.key}) of "
                f"{row.file.parent}; keep one of them, or give the path of one file"
            )
        cleaned[name] = row
    names = original_names(cleaned)
    return Published(path, {names[key]: row for key, row in cleaned.items()}, is_diffusers(cleaned), pickled or {})


# ---- safetensors -----------------------------------------------------------------------------------------------------
def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder, all there. Raises: CheckpointError on missing shards or a wrong index."""
    files = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob(f"*{INDEX}"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder} holds {len(indices)} indices, {[i.name for i in indices]}; keep one of them")
    if indices:
        return _indexed(indices[0], files)
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            wanted = [f"{match[1]}-{n:05d}-of-{match[3]}.safetensors" for n in range(1, int(match[3]) + 1)]
            _check_present(folder, wanted)
    return files


def _indexed(index: Path, files: list[Path]) -> list[Path]:
    data = read_json(index)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names; download it again")
    wanted = sorted(set(places.values()))
    _check_present(index.parent, wanted)
    if strangers := [file.name for file in files if file.name not in wanted]:
        raise CheckpointError(
            f"{index.parent} holds {', '.join(strangers[:8])}, which its index does not name; remove them, or give the "
            "path of one file"
        )
    shards = [index.parent / name for name in wanted]
    held = {row.key: row.file.name for file in shards for row in _header(file)}
    if wrong := sorted(key for key in places.keys() | held.keys() if places.get(key) != held.get(key)):
        key = wrong[0]
        raise CheckpointError(
            f"{index} and its shards differ in {len(wrong)} tensors: {key} is in {places.get(key)} by the index and in "
            f"{held.get(key)} by the files; download them again"
        )
    return shards


def _check_present(folder: Path, wanted: list[str]) -> None:
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(wanted)} weight files: {', '.join(missing[:8])}; download it again"
        )


def _header(file: Path) -> list[Stored]:
    from safetensors import SafetensorError, safe_open

    rows = []
    try:
        with safe_open(file, framework="pt") as opened:
            for key in list(opened.keys()):
                view = opened.get_slice(key)
                rows.append((key, tuple(view.get_shape()), view.get_dtype()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    return [Stored(file, key, shape, _type(_DTYPES.get(dtype, dtype), key, file)) for key, shape, dtype in rows]


def _type(dtype: torch.dtype | str, key: str, file: Path) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    known = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES.values())
    raise CheckpointError(f"{key} of {file} has type {dtype}; weights must be {known}, not quantised")


# ---- torch.save files ------------------------------------------------------------------------------------------------
def read_pickled(file: Path) -> Mapping[str, Any]:
    """What a `torch.save` file holds: mapped, not read; nothing in it is executed. Raises: CheckpointError."""
    import pickle

    try:
        data = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(
            f"{file} cannot be read by torch.load(weights_only=True, mmap=True): {' '.join(first)}; it must hold "
            "tensors only and be saved by torch 1.6 or newer; convert it to safetensors where it was made"
        ) from error
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{file} holds a {type(data).__name__}; it must hold a dict of tensors")
    return data


def pick(data: Mapping[str, Any], file: Path, choices: tuple[str, ...], asked: str | None) -> Mapping[str, Tensor]:
    """The state dict that is meant: `asked`, else the first of `choices`, else the dict itself when it is bare.

    Raises: CheckpointError listing what the file holds.
    """
    held = sorted(key for key, value in data.items() if isinstance(value, Mapping) and _is_state(value))
    name = asked or next((choice for choice in choices if choice in held), None)
    if name is None and _is_state(data):
        return data
    if name is None or name not in held:
        raise CheckpointError(
            f"{file} holds {', '.join(held) or 'no weights'}, not {asked or ' or '.join(choices)}; "
            "name one of them as network"
        )
    if len(held) > 1:
        logger.info("%s holds %s; taking %s", file, ", ".join(held), name)
    return data[name]


def _is_state(data: Mapping[str, Any]) -> bool:
    return bool(data) and all(isinstance(value, Tensor) for value in data.values())


def _open_pickled(file: Path, network: str | None) -> Published:
    state = pick(read_pickled(file), file, _NETWORKS, network)
    if any(".lora_A." in key for key in state):
        raise CheckpointError(
            f"{file} holds low-rank updates, not weights; give the base as the source and it as the updates (lora)"
        )
    rows = [Stored(file, key, tuple(t.shape), _type(t.dtype, key, file)) for key, t in state.items()]
    return _named(file, rows, state)
