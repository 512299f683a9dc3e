"""Weights as they are published: where the tensors of a transformer lie on disk, and reading them a file at a time.

Folders of safetensors (original Wan, diffusers, a diffusers pipeline, with or without an index), single safetensors
files, and `torch.save` files, whole or in shards, told apart by their contents. Opening reads headers only; tensors are
views of the mapped file until they are used. Must know no model.
"""

from __future__ import annotations

import logging
import re
import shlex
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.errors import CheckpointError
from longtake.weights.config_json import read_json
from longtake.weights.file_kind import is_pickled, is_wan, refuse_others
from longtake.weights.locate import INDEX as _INDEX
from longtake.weights.locate import files_in, locate, pickles_in
from longtake.weights.names import clean_key, is_beside, is_diffusers, original_names
from longtake.weights.tensor_files import check_finite

logger = logging.getLogger(__name__)

INDEX = f".safetensors{_INDEX}"
# K.2: what released files call the weights of the student, the one to take first
_NETWORKS = ("generator_ema", "generator")
_NOT_MEANT = ("critic", "discriminator", "fake_score", "real_score")  # unless one of them is asked for
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: the file, its key there, its shape and type (its name, where that is not read)."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: Any

    def __str__(self) -> str:
        return f"{self.key} of {self.file}"

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class CheckpointReader:
    """The tensors of a transformer on disk, under original Wan names; `diffusers`: whether its own names are those.

    `updates` are applied to each tensor as it is read, in this order: (name, tensor) -> tensor.
    """

    path: Path
    tensors: dict[str, Stored]
    diffusers: bool
    _pickled: Mapping[Path, Mapping[str, Tensor]] = field(default_factory=dict)
    updates: Sequence[Callable[[str, Tensor], Tensor]] = ()

    def shapes(self) -> dict[str, Tensor]:
        """Every tensor on the meta device: shapes and types without data."""
        return {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in self.tensors.items()}

    def read(self, names: Iterable[str] | None = None, *, check: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of `names` (default: all), file by file. A tensor is a view of its file: copy it.

        Args: `check`, whether all of each tensor is read here, and refused unless it is finite; without, the caller
        does that. Raises: CheckpointError.
        """
        for name, tensor in self._stored(names):
            if check:
                check_finite(tensor, str(self.tensors[name]))
            for update in self.updates:
                tensor = update(name, tensor)
            yield name, tensor

    def _stored(self, names: Iterable[str] | None) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[Path, list[str]] = {}
        for name in self.tensors if names is None else names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, held in by_file.items():
            if file in self._pickled:
                yield from ((name, self._pickled[file][self.tensors[name].key].detach()) for name in held)
                continue
            with open_safetensors(file) as opened:
                for name in held:
                    yield name, opened.get_tensor(self.tensors[name].key)


def open_published(
    path: Path,
    network: str | None = None,
    *,
    updates: bool = False,
    mend: Callable[[CheckpointReader], CheckpointReader] | None = None,
) -> CheckpointReader:
    """What a local file or folder holds; only headers are read.

    Args: `network`, which one of a file that holds several (`generator`, `generator_ema`, `critic`, ...); default: the
    student, its average where there is one; `updates`, whether low-rank updates are expected; `mend` gives tensors that
    are stored otherwise the names and shapes of a transformer's, and leaves out what are none.
    Raises: CheckpointError when files are missing, damaged, contradict their index, or are no Wan transformer.
    """
    path = locate(path)
    index, files = _files(path) if path.is_dir() else (None, [path])
    rows: list[Stored] = []
    pickled: dict[Path, Mapping[str, Tensor]] = {}
    for file in files:
        if is_pickled(file):
            pickled[file] = held = pick(read_pickled(file), file, _NETWORKS, network)
            rows += _rows(file, held)
        elif network is None:
            rows += _header(file)
        else:
            raise CheckpointError(f"network={network} was given, and {path} holds one network only; leave it out")
    if index is not None:
        _check_index(index, rows)
    published = _named(path, rows, pickled)
    published = published if mend is None else mend(published)
    if not updates:
        refuse_others(published.tensors, path)
    for row in published.tensors.values():
        check_type(row.dtype, row)
    return published


def _named(path: Path, rows: list[Stored], pickled: Mapping[Path, Mapping[str, Tensor]]) -> CheckpointReader:
    """Gives the rows original names. Raises: CheckpointError when two of them mean the same parameter."""
    rows = [row for row in rows if row.shape or "." in row.key]  # a counter is no parameter
    if is_wan(clean_key(row.key) for row in rows if not is_beside(row.key)):
        if beside := [row.key for row in rows if is_beside(row.key)]:
            logger.info("%s also holds %d tensors of other networks, such as %s", path, len(beside), beside[0])
        rows = [row for row in rows if not is_beside(row.key)]
    cleaned: dict[str, Stored] = {}
    for row in rows:
        name = clean_key(row.key)
        if (other := cleaned.get(name)) is not None:
            both = f"{other.file.name} (as {other.key}) and in {row.file.name} (as {row.key})"
            raise CheckpointError(f"{name} is in {both} of {row.file.parent}; keep one, or give the path of one file")
        cleaned[name] = row
    names = original_names(cleaned)
    return CheckpointReader(path, {names[key]: row for key, row in cleaned.items()}, is_diffusers(cleaned), pickled)


# ---- folders and safetensors -----------------------------------------------------------------------------------------
def _files(folder: Path) -> tuple[Path | None, list[Path]]:
    """The index, if there is one, and the weight files of a folder. Raises: CheckpointError unless all are there."""
    found = {".safetensors": files_in(folder), ".bin": pickles_in(folder)}
    for suffix, files in found.items():
        indices = files_in(folder, (suffix + _INDEX,))
        if len(indices) > 1:
            raise CheckpointError(f"{folder} holds {len(indices)} indices, {[i.name for i in indices]}; keep one")
        if indices:
            wanted = sorted(set(_places(indices[0]).values()))
            _check_present(folder, wanted)
            if strangers := [file.name for file in files if file.name not in wanted]:
                raise CheckpointError(
                    f"{folder} holds {', '.join(strangers[:8])}, which its index does not name; remove them, or give "
                    "the path of one file"
                )
            return indices[0], [folder / name for name in wanted]
    files = found[".safetensors"] or found[".bin"]
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    for stem, _, number, suffix in {match.groups() for match in shards}:
        _check_present(folder, [f"{stem}-{n:05d}-of-{number}{suffix}" for n in range(1, int(number) + 1)])
    if not found[".safetensors"] and len(files) > 1 and len(shards) < len(files):
        raise CheckpointError(f"{folder} holds {', '.join(f.name for f in files[:8])}; give the path of one file")
    if not files:
        for file in files_in(folder, (".gguf",)):
            is_pickled(file)  # says what it is
        known = "a .safetensors, .pt, .pth, .bin or .ckpt file"
        raise CheckpointError(f"{folder} holds no safetensors file; give the folder of a transformer, or {known}")
    return None, files


def _places(index: Path) -> dict[str, str]:
    """Names of tensors and of the files that hold them, as an index says."""
    data = read_json(index)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names; download it again")
    return places


def _check_index(index: Path, rows: list[Stored]) -> None:
    places, held = _places(index), {row.key: row.file.name for row in rows}
    if wrong := sorted(key for key in places.keys() | held.keys() if places.get(key) != held.get(key)):
        first = f"{wrong[0]} is in {places.get(wrong[0])} by the index and in {held.get(wrong[0])} by the files"
        raise CheckpointError(f"{index} and its shards differ in {len(wrong)} tensors: {first}; download them again")


def _check_present(folder: Path, wanted: list[str]) -> None:
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        count, names = f"{len(missing)} of {len(wanted)}", ", ".join(missing[:8])
        raise CheckpointError(f"{folder} lacks {count} weight files: {names}; download it again")


def stored_in(file: Path) -> list[Stored]:
    """The tensors of a safetensors or torch.save file that holds nothing else; no data is read.

    Raises: CheckpointError.
    """
    return _rows(file, read_tensors(file)) if is_pickled(file) else _header(file)


def _header(file: Path) -> list[Stored]:
    with open_safetensors(file) as opened:
        views = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        types = {key: _DTYPES.get(view.get_dtype(), view.get_dtype()) for key, view in views.items()}
        return [Stored(file, key, tuple(view.get_shape()), types[key]) for key, view in views.items()]


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """The open file. Raises: CheckpointError where it, or what is read of it, is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}; download it again") from error


def check_type(dtype: object, what: object) -> None:
    """Raises CheckpointError unless weights of this type are read; `what` names the tensor and its file."""
    if dtype not in _DTYPES.values():
        known = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES.values())
        raise CheckpointError(f"{what} has type {dtype}; weights must be {known}, not quantised; take such a file")


# ---- torch.save files ------------------------------------------------------------------------------------------------
def read_pickled(file: Path) -> Mapping[Any, Any]:
    """What a `torch.save` file holds: mapped, not read; nothing in it is executed. Raises: CheckpointError."""
    try:
        # Files of before PyTorch 1.6 are no zip archives and cannot be mapped.
        with warnings.catch_warnings(action="ignore"):  # on old pickle protocols
            data = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        if code := re.search(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", str(error)):
            what = f"holds {code[1]} beside its tensors, which is not loaded since it could execute what is in the file"
            fix = "where it was made, or if you trust it, save its state dict alone, best as safetensors"
        else:
            first = " ".join(str(error).strip().splitlines()[:1]) or type(error).__name__
            what = f"cannot be read by torch.load(weights_only=True): {first}"
            fix = "download it again, or save its state dict as safetensors where it was made"
        raise CheckpointError(f"{file} {what}; {fix}") from error
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{file} holds a {type(data).__name__}; it must hold a dict of tensors")
    return data


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch.save file that holds nothing else. Raises: CheckpointError."""
    if is_pickled(file):
        held = read_pickled(file)
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()):
            raise CheckpointError(f"{file} holds something else than tensors by name; use a file of the weights alone")
        return dict(held)
    with open_safetensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def pick(data: Mapping[Any, Any], file: Path, choices: tuple[str, ...], asked: str | None) -> dict[str, Any]:
    """The state dict that is meant: `asked`, else the only one, else the first of `choices`.

    Values without a dot in their key that are no tensors (steps, settings) are left out.
    Raises: CheckpointError listing what the file holds.
    """
    try:
        held = dict(_networks(data))
    except RecursionError:
        raise CheckpointError(f"{file} holds itself; give a file with the state dict of a network") from None
    if asked is not None:
        found = [asked] if asked in held else [place for place in held if asked in place.split(".")]
    else:
        meant = [place for place in held if not set(place.split(".")) & set(_NOT_MEANT)]
        named = ([place for place in held if choice in place.split(".")] for choice in choices)
        found = list(held) if len(held) == 1 else next(filter(None, named), meant)
    told, names = f", not {asked}" if asked else "", ", ".join(sorted(held))
    if not held:
        raise CheckpointError(f"{file} holds no weights{told}; give a file with the state dict of a network")
    if len(found) != 1 and not names:
        raise CheckpointError(f"{file} holds one network without a name{told}; leave network out")
    if len(found) != 1:
        command = f"`longtake convert {shlex.quote(str(file))} FOLDER --to longtake --network NAME`, and give FOLDER"
        raise CheckpointError(f"{file} holds {names}{told}; name one of them, as in {command}")
    if len(held) > 1:
        logger.info("%s holds %s; taking %s", file, names, found[0])
    return held[found[0]]


def _networks(data: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, state dict) of each dict with tensors under dotted names, however deep; no optimizer's."""
    plain = {key: value for key, value in data.items() if isinstance(key, str) and not isinstance(value, Mapping)}
    state = {key: value for key, value in plain.items() if "." in key or isinstance(value, Tensor)}
    if any("." in key and isinstance(value, Tensor) for key, value in state.items()):
        yield place, state
    for key, value in data.items():
        if isinstance(key, str) and isinstance(value, Mapping) and "optim" not in key:
            yield from _networks(value, f"{place}.{key}" if place else key)


def _rows(file: Path, state: Mapping[str, Any]) -> list[Stored]:
    tensors = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    for key, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided or hasattr(tensor, "placements"):
            raise CheckpointError(f"{key} of {file} is a tensor without data of its own; save whole, dense tensors")
    return [Stored(file, key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
