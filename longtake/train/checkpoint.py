"""Saves and resumes training: sharded safetensors through torch.distributed.checkpoint, published atomically.

The storage is torch's safetensors reader and writer, so that a checkpoint holds no pickle at all (the default storage
of torch.distributed.checkpoint unpickles its `.metadata`, and its planner unpickles everything that is no tensor).
The layout on disk belongs to `longtake.runs`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from longtake import runs
from longtake.distributed.mesh import Mesh
from longtake.errors import CheckpointError
from longtake.models.dit import DiTConfig
from longtake.models.lora import factors
from longtake.models.lora_files import Adapter, write_adapter
from longtake.models.weights import clean_name, config_to_json
from longtake.runs import latest_checkpoint
from longtake.train.ema import EMA
from longtake.train.state import TrainState

__all__ = ["export_weights", "latest_checkpoint", "load_checkpoint", "resume", "save_checkpoint"]

# Facts that cannot simply be set back, and what to do about them
_FIXES = {
    "base": "name the weights that it was trained on in init_from (and critic.init_from)",
    "lora": "set rank, alpha and targets back",
}
BUCKET_BYTES = 2**31  # a file holds about this much: the writer keeps a whole file in memory, twice
logger = logging.getLogger(__name__)


def save_checkpoint(
    state: TrainState,
    folder: Path,
    *,
    mesh: Mesh,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    keep: int,
    export: tuple[str, ...] = (),
) -> Path:
    """The published checkpoint of `state` in `folder`; all ranks call it.

    Args: `config`, the resolved configuration; `facts`, what must be equal when the run is resumed (rope, block plan,
    fps); `keep`, how many checkpoints stay; `export`, networks whose weights (and EMA) are also written whole.
    Raises: CheckpointError on every rank when a file cannot be written; older checkpoints stay as they were.
    """
    final = folder / runs.checkpoint_name(state.step)
    temporary = folder / (runs.TEMPORARY + final.name)
    mesh.on_main(lambda: _make_empty(temporary))
    _write_state(state.tensors(), temporary / "state", mesh)
    for name in export:
        adapter = state.adapters.get(name)
        end = runs.LORA if adapter else ""
        export_weights(state.networks[name], temporary / f"{name}{end}", mesh=mesh, adapter=adapter)
        if (ema := state.ema.get(name)) is not None:
            folder = temporary / f"{name}_ema{end}"
            export_weights(state.networks[name], folder, mesh=mesh, ema=ema, adapter=adapter)
    names = mesh.on_main(lambda: runs.files_of(temporary))
    mine = names[mesh.rank :: mesh.world_size]
    parts = mesh.every(lambda: runs.file_records(temporary, mine, _synced_record))
    manifest = {
        "format_version": runs.FORMAT_VERSION,
        "step": state.step,
        "data_position": state.data_position,
        "seed": state.seed,
        **{key: facts[key] for key in sorted(facts)},
        "world_size": mesh.world_size,
        "torch_version": torch.__version__,
        "config": dict(config),
        "files": {name: record for part in parts for name, record in part.items()},
    }
    mesh.on_main(lambda: _publish(temporary, final, manifest, keep))
    return final


def resume(
    state: TrainState, folder: Path, *, mesh: Mesh, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> Path | None:
    """The checkpoint that `state` continues from, or None for a fresh run; all ranks call it.

    Takes everything: weights, optimizers, averages, step, data position. What a killed run left half-written is
    removed; a damaged newest checkpoint is set aside under `damaged-...` with a warning.
    Raises: CheckpointError when the checkpoint does not fit `state`, or was trained with another seed or other `facts`.
    """
    path = mesh.on_main(lambda: _clean_and_find(folder))
    if path is None:
        return None
    manifest = load_checkpoint(state, path, mesh=mesh, verify=False, facts=facts)
    changed = sorted(key for key, value in _flat(config).items() if _flat(manifest["config"]).get(key, value) != value)
    if changed and mesh.is_main:
        logger.warning("Resuming %s with changed options: %s", path, ", ".join(changed))
    return path


def load_checkpoint(
    state: TrainState, path: Path, *, mesh: Mesh, verify: bool = True, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, after `state` took all of it.

    Args: `verify` checks every file's checksum first; `facts`, values that the manifest must hold.
    Raises: CheckpointError on every rank; then `state` is as it was, unless a file broke while it was read.
    """
    manifest = mesh.on_main(lambda: runs.verify_checkpoint(path) if verify else runs.read_manifest(path))
    for key, value in {"seed": state.seed, **(facts or {})}.items():
        if (saved := manifest.get(key)) != json.loads(json.dumps(value)):
            fix = _FIXES.get(key, "set it back")
            raise CheckpointError(
                f"{path} was trained with {key}={saved!r} and this run has {value!r}; {fix}, "
                "or start in another log directory and initialise from the checkpoint"
            )
    reader = dcp.HuggingFaceStorageReader(str(path / "state"))
    tensors = state.tensors()
    mesh.every(lambda: _check_keys(tensors, reader, path))
    _with_errors(f"reading {path}", lambda: dcp.load(tensors, storage_reader=reader, no_dist=not mesh.is_distributed))
    state.step, state.data_position = manifest["step"], manifest["data_position"]
    return manifest


def export_weights(
    network: nn.Module, folder: Path, *, mesh: Mesh, ema: EMA | None = None, adapter: Adapter | None = None
) -> None:
    """Writes `model.safetensors` (whole tensors, the module's own names) and `config.json` from `network.config`.

    All ranks call it; rank 0 holds the gathered tensors on the CPU and writes. With `ema`, its averages stand in for
    the trained parameters. With `adapter`, the low-rank updates alone are written, as `write_adapter` does.
    """
    source = {clean_name(key): value for key, value in network.state_dict().items()} | (ema.tensors() if ema else {})
    source = factors(source) if adapter is not None else source
    whole: dict[str, Tensor] = {}
    for key, value in source.items():
        value = value.detach()
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if mesh.is_main:
            whole[key] = full.to("cpu", copy=True).contiguous()
    mesh.on_main(lambda: _write_weights(whole, getattr(network, "config", None), folder, adapter))


def _write_weights(weights: dict[str, Tensor], config: Any, folder: Path, adapter: Adapter | None) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if adapter is not None:
        write_adapter(folder, weights, adapter)
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if isinstance(config, DiTConfig):
        (folder / "config.json").write_text(json.dumps(config_to_json(config), indent=2) + "\n")
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def _write_state(tensors: dict[str, Tensor], folder: Path, mesh: Mesh) -> None:
    """Each rank writes its shards, in files of about BUCKET_BYTES."""
    bucket_of, used = {}, 0
    for name, tensor in tensors.items():
        bucket_of[name] = 1 + used // BUCKET_BYTES
        used += tensor.numel() * tensor.element_size() // mesh.world_size
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=bucket_of, save_distributed=True)
    _with_errors(f"writing {folder}", lambda: dcp.save(tensors, storage_writer=writer, no_dist=not mesh.is_distributed))


def _with_errors(doing: str, work: Callable[[], Any]) -> None:
    """Runs a collective of torch.distributed.checkpoint, whose exception is no Exception, and speaks our language."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            work()
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in error.failures.items())
        raise CheckpointError(f"{doing} failed: {reasons}; check the disk and the folder's permissions") from error


def _check_keys(tensors: dict[str, Tensor], reader: dcp.HuggingFaceStorageReader, path: Path) -> None:
    from safetensors import SafetensorError

    try:
        saved = reader.read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}; use another checkpoint") from error
    expected = {key: tuple(value.shape) for key, value in tensors.items()}
    _raise_on_difference(expected, {key: tuple(meta.size) for key, meta in saved.items()}, path)  # type: ignore[union-attr]


def _raise_on_difference(expected: dict[str, tuple], found: dict[str, tuple], path: Path) -> None:
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    reshaped = sorted(
        f"{key} {found[key]} instead of {expected[key]}"
        for key in set(found) & set(expected)
        if found[key] != expected[key]
    )
    if missing or surplus or reshaped:
        lists = (("missing", missing), ("surplus", surplus), ("reshaped", reshaped))
        text = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:20])}" for kind, keys in lists if keys)
        raise CheckpointError(f"{path} does not fit the model: {text}. Use the configuration that it was trained with")


def _clean_and_find(folder: Path) -> Path | None:
    for leftover in folder.glob(runs.TEMPORARY + "*"):
        logger.warning("Removing %s, which an interrupted run left behind", leftover)
        shutil.rmtree(leftover)
    published = runs.list_checkpoints(folder)
    newest = latest_checkpoint(folder)
    if newest is None:
        if published:
            raise CheckpointError(
                f"none of the {len(published)} checkpoints in {folder} can be used (see the warnings above); "
                "restore one, or remove them all to start from the beginning"
            )
        return None
    for path in published[published.index(newest) + 1 :]:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("Set the damaged checkpoint %s aside as %s; resuming %s", path, aside.name, newest)
    return newest


def _publish(temporary: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    """Makes a complete checkpoint visible in one rename, then drops the oldest beyond `keep`."""
    (temporary / runs.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _sync(temporary / runs.MANIFEST)
    for path in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        _sync(path)
    os.rename(temporary, final)
    _sync(final.parent)
    for old in runs.list_checkpoints(final.parent)[:-keep]:
        doomed = old.with_name(runs.TEMPORARY + "deleted-" + old.name)  # renamed first: never half a checkpoint
        old.rename(doomed)
        shutil.rmtree(doomed)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _synced_record(path: Path) -> dict[str, Any]:
    _sync(path)
    return runs.file_record(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted key, in JSON's types."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat
