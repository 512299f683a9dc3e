"""The files of a checkpoint's state: what `torch.distributed.checkpoint` plans, written as safetensors in one pass.

torch's own safetensors writer builds each file in memory, twice, and holds the interpreter's lock while it copies:
a background save would slow the training that it runs beside. This writer streams tensor by tensor and hashes on the
way; writing and hashing both leave the lock. Its files are those that torch's `HuggingFaceStorageReader` reads (source:
torch/distributed/checkpoint/hf_storage.py `read_metadata`, filesystem.py `_write_files_from_queue`; the layout:
huggingface.co/docs/safetensors, "Format"). It must know no network and no training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from longtake.errors import CheckpointError

FILE_BYTES = 2**30  # a file of a state holds about this much; several are written side by side
_THREADS = 4
_PIECE_BYTES = 2**24
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # names that HuggingFaceStorageReader looks for
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}


@dataclass(frozen=True)
class Piece:
    """A tensor of a file before its values are read: `values` gives them, on any device."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(file: Path, pieces: Iterable[Piece], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Writes and syncs a safetensors file; the record of it for a manifest (size in bytes and SHA-256).

    One tensor is in memory at a time. Raises: OSError.
    """
    # Wide types first, so that every tensor lies at a multiple of its own size.
    ordered = sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for piece in ordered:
        start, end = end, end + piece.size_bytes
        header[piece.name] = {"dtype": _DTYPES[piece.dtype], "shape": list(piece.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with file.open("wb") as out:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            out.write(data)
            digest.update(data)
            size += len(data)

        put(len(text).to_bytes(8, "little") + text)
        for piece in ordered:
            data = _bytes_of(piece)
            for start in range(0, len(data), _PIECE_BYTES):
                put(data[start : start + _PIECE_BYTES])
        out.flush()
        os.fsync(out.fileno())
    return {"size_bytes": size, "sha256": digest.hexdigest()}


def _bytes_of(piece: Piece) -> memoryview:
    values = piece.values().detach()
    assert values.dtype == piece.dtype and values.shape == piece.shape, piece.name
    return memoryview(values.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class StagedPlanner(DefaultSavePlanner):
    """Plans over the tensors of a state (shapes and shards), and takes the values from copies of the local shards."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.values = values

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The local values of a planned item."""
        return self.values[index.fqn]


class ShardWriter(StorageWriter):
    """Writes what is planned for this rank to `rankRRRRR-NNNNN.safetensors`; `records` lists the files afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        self.records = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files = {
            f"rank{plan.storage_data:05d}-{number:05d}.safetensors": items
            for number, items in enumerate(_in_files(plan.items))
        }
        with ThreadPoolExecutor(_THREADS) as pool:
            written = pool.map(lambda name: self._write(self.folder / name, files[name], planner), files)
            self.records = dict(zip(files, written))
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, _size(item), None) for item in plan.items])
        return done

    def _write(self, file: Path, items: Sequence[WriteItem], planner: SavePlanner) -> dict[str, Any]:
        pieces, offsets = [], {}
        for item in items:
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
            chunk, name = item.tensor_data.chunk, item.index.fqn
            values = cast("Callable[[], Tensor]", partial(planner.resolve_data, item))
            pieces.append(Piece(name, item.tensor_data.properties.dtype, tuple(chunk.sizes), values))
            offsets[name] = {OFFSETS: list(chunk.offsets)}
        return write_safetensors(file, pieces, {SHARDING: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"})

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass  # each file says which part of which tensor it holds

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _size(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _in_files(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Items by file: each about FILE_BYTES, and no name twice in one."""
    files: list[list[WriteItem]] = []
    used, names = FILE_BYTES, set[str]()
    for item in items:
        if used >= FILE_BYTES or item.index.fqn in names:
            files.append([])
            used, names = 0, set()
        files[-1].append(item)
        names.add(item.index.fqn)
        used += _size(item)
    return files


class StateFiles:
    """Reads whole tensors back from the files in a state folder, one at a time; opening one parses all its names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: defaultdict[str, list[tuple[Any, tuple[slice, ...]]]] = defaultdict(list)
        for file in sorted(folder.glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            offsets = json.loads(opened.metadata()[SHARDING])
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                sizes = opened.get_slice(name).get_shape()
                starts = offsets[name][OFFSETS]
                place = tuple(slice(start, start + size) for start, size in zip(starts, sizes))
                self._parts[name].append((opened, place))

    def piece(self, name: str, stored_as: str, like: Tensor) -> Piece:
        """The whole tensor `stored_as`, to be written under `name`.

        Args: `like` has its type and whole shape. Raises: CheckpointError when a part is missing.
        """
        # Parts never overlap, since each was written by one rank: their number of values shows whether one is missing.
        held = sum(prod(along.stop - along.start for along in place) for _, place in self._parts[stored_as])
        if held != like.numel():
            raise CheckpointError(f"{self.folder} holds {held} of {like.numel()} values of {stored_as}; save again")

        def whole() -> Tensor:
            values = torch.empty(like.shape, dtype=like.dtype)
            for opened, place in self._parts[stored_as]:
                values[place] = opened.get_tensor(stored_as)
            return values

        return Piece(name, like.dtype, tuple(like.shape), whole)
