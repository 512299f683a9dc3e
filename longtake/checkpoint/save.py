"""Saves and resumes training: sharded safetensors through torch.distributed.checkpoint, published atomically.

Reading uses torch's safetensors reader and writing `longtake.checkpoint.shards`, so that a checkpoint holds no pickle
at all (the default storage of torch.distributed.checkpoint unpickles its `.metadata`, and its planner unpickles
everything that is no tensor). Whole weights for inference are put together from the shards that were just written: no
rank gathers anything. The layout on disk belongs to `longtake.run_folder`, saving beside training to `async_save.py`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from longtake import run_folder
from longtake.checkpoint.invariants import compare_facts, flat
from longtake.checkpoint.shards import ShardWriter, StagedPlanner, StateFiles, write_safetensors
from longtake.errors import CheckpointError
from longtake.models.lora import DEFAULT, WRITER
from longtake.models.sizes import DiTConfig
from longtake.outputs import sync
from longtake.parallel.materialize import local
from longtake.parallel.mesh import Mesh
from longtake.train.state import TrainState
from longtake.weights.config_json import config_to_json
from longtake.weights.lora import Adapter, write_adapter
from longtake.weights.tensor_files import misfits, shapes_in

SPARE_BYTES = 2**26  # manifests, headers, and what the file system takes for itself
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """What is written beside the weights: the resolved `config`, and the `invariants` that a resumed run must share."""

    config: Mapping[str, Any] = field(default_factory=dict)
    invariants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Export:
    """A network to write whole: its `keys` by the name in the file, the value the name in the state."""

    folder: str
    keys: Mapping[str, str]
    config: Mapping[str, Any] | None
    adapter: Adapter | None


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds.

    Fields: `tensors` of the state, of which only names, shapes and shards are read; `values`, what this rank writes of
    them; `exports`, networks that are also written whole; `entries` of the manifest.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    exports: tuple[Export, ...]
    entries: Mapping[str, Any]
    step: int

    @classmethod
    def of(cls, state: TrainState, export: tuple[str, ...]) -> Snapshot:
        """The state as it is, which must not change until the snapshot is written (or has copies as `values`)."""
        tensors = state.tensors()
        return cls(
            tensors,
            {name: local(tensor) for name, tensor in tensors.items()},
            tuple(one for name in export for one in _exports(state, name, tensors)),
            {name: getattr(state, name) for name in ("step", "data_position", "skipped", "seed")},
            state.step,
        )

    @property
    def size_bytes(self) -> int:
        """About the size of the checkpoint on disk, all ranks together."""
        exported = [self.tensors[name] for export in self.exports for name in export.keys.values()]
        return sum(tensor.nbytes for tensor in [*self.tensors.values(), *exported]) + SPARE_BYTES


def _exports(state: TrainState, name: str, tensors: Mapping[str, Tensor]) -> list[Export]:
    """A network and, where there is one, its average, which lacks what is not trained and takes it from the network.

    Low-rank updates that write its context have folders of their own.
    """
    prefix, adapter = f"networks.{name}.", state.adapters.get(name)
    own = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    end, config = run_folder.LORA if adapter else "", _config_json(getattr(state.networks[name], "config", None))
    found = []
    for folder, keys in _roles(name, own).items():
        found.append(Export(f"{folder}{end}", keys, config, adapter))
        if name in state.ema:
            averages = {key: value.replace(prefix, f"ema.{name}.", 1) for key, value in keys.items()}
            average = {key: value for key, value in averages.items() if value in tensors}
            found.append(Export(f"{folder}_ema{end}", keys | average, config, adapter))
    return found


def _roles(name: str, own: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """By folder, the tensors in `own` that are written there, under the names of a network of its own."""
    reads = {key: value for key, value in own.items() if f".{WRITER}." not in key}
    writes = {key.replace(f".{WRITER}.", f".{DEFAULT}."): value for key, value in own.items() if key not in reads}
    return {name: reads} | ({run_folder.WRITER: writes} if writes else {})


def _config_json(config: Any) -> dict[str, Any] | None:
    if isinstance(config, DiTConfig):
        return config_to_json(config)
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else None


def save_checkpoint(snapshot: Snapshot, folder: Path, *, mesh: Mesh, info: RunInfo, keep: int) -> Path:
    """The published checkpoint of `snapshot` in `folder`; all ranks call it and wait until it is there.

    Also in a thread, on a `mesh` whose collectives are that thread's own. Args: `keep`, how many checkpoints stay.
    Raises: CheckpointError on every rank when a file cannot be written; older checkpoints stay as they were.
    """
    final = folder / run_folder.checkpoint_name(snapshot.step)
    temporary = folder / (run_folder.TEMPORARY + final.name)
    mesh.on_main(lambda: _make_empty(temporary))
    try:
        records = _write_state(snapshot, temporary / "state", mesh)  # until the shards of all ranks are there
        parts = mesh.every(lambda: _write_exports(snapshot, temporary, mesh))
        files = {f"state/{name}": record for name, record in records.items()}
        files |= {name: record for part in parts for name, record in part.items()}
        manifest = {
            "format_version": run_folder.FORMAT_VERSION,
            **snapshot.entries,
            **{key: info.invariants[key] for key in sorted(info.invariants)},
            "world_size": mesh.world_size,
            "torch_version": torch.__version__,
            "config": dict(info.config),
            "files": dict(sorted(files.items())),
        }
        mesh.on_main(lambda: _publish(temporary, final, manifest, keep))
    except Exception:
        if mesh.is_main:  # what cannot be finished must not fill the disk
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def check_space(snapshot: Snapshot, folder: Path, mesh: Mesh) -> None:
    """Raises CheckpointError on every rank when the disk has no room for the checkpoint; nothing is written then."""

    def check() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = snapshot.size_bytes / 2**30, shutil.disk_usage(folder).free / 2**30
        if needed <= free:
            return
        name, kept = run_folder.checkpoint_name(snapshot.step), len(run_folder.list_checkpoints(folder))
        raise CheckpointError(
            f"{name} needs {needed:.2f} GiB in {folder} and {free:.2f} GiB are free; "
            f"nothing was written and the {kept} checkpoints there are intact. Free space, or lower keep_checkpoints "
            "(the new one is written before the oldest is removed), and start the same command again"
        )

    mesh.on_main(check)


def resume(state: TrainState, folder: Path, *, mesh: Mesh, info: RunInfo) -> Path | None:
    """The checkpoint that `state` continues from, or None for a fresh run; all ranks call it.

    Takes everything: weights, optimizers, averages, step, data position. What a killed run left half-written is
    removed; a damaged newest checkpoint is set aside under `damaged-...` with a warning.
    Raises: CheckpointError when the checkpoint does not fit `state`, or was trained with another seed or other
    invariants.
    """
    path = _clean_and_find(folder, mesh)
    if path is None:
        return None
    manifest = load_checkpoint(state, path, mesh=mesh, invariants=info.invariants)
    now, before = flat(info.config), flat(manifest["config"])
    changed = sorted(key for key, value in now.items() if before.get(key, value) != value)
    if mesh.is_main:
        if changed:
            logger.warning("Resuming %s with changed options: %s", path, ", ".join(changed))
        else:
            logger.info("Resuming %s", path)
    return path


def refuse_other_invariants(folder: Path, invariants: Mapping[str, Any], mesh: Mesh) -> None:
    """Raises what `resume` will of `invariants`, before anything is built; the checkpoint is read later or not."""

    def compare() -> None:
        newest = run_folder.list_checkpoints(folder)[-1:]
        if newest and (newest[0] / run_folder.MANIFEST).is_file():
            compare_facts(run_folder.read_manifest(newest[0]), invariants, newest[0])

    mesh.on_main(compare)


def load_checkpoint(state: TrainState, path: Path, *, mesh: Mesh, invariants: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`, whose files were verified, after `state` took all of it.

    Args: `invariants`, values that the manifest must hold.
    Raises: CheckpointError on every rank; then `state` is as it was, unless a file broke while it was read.
    """
    manifest = mesh.on_main(lambda: run_folder.read_manifest(path))
    unknown = compare_facts(manifest, {"seed": state.seed, **invariants}, path)
    if unknown and mesh.is_main:
        logger.warning("%s is of an earlier version and does not say, so not compared: %s", path, ", ".join(unknown))
    reader = dcp.HuggingFaceStorageReader(str(path / "state"))
    tensors = state.tensors()  # dcp.load writes into them: into the parameters themselves
    mesh.every(lambda: _check_fit(tensors, reader, path))
    _with_errors(f"reading {path}", lambda: dcp.load(tensors, storage_reader=reader, no_dist=not mesh.is_distributed))
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not local(value).isfinite().all()]
    if bad := sorted({name for part in mesh.every(lambda: bad) for name in part}):
        raise CheckpointError(
            f"{path} holds values that are not finite in {len(bad)} tensors, e.g. {bad[0]}; use an older checkpoint"
        )
    for optimizer in state.optimizers.values():
        optimizer.restored()
    state.step, state.data_position = manifest["step"], manifest["data_position"]
    state.skipped = manifest.get("skipped", 0)  # there was no such count in the first manifests
    return manifest


def verify_together(path: Path, mesh: Mesh) -> dict[str, Any]:
    """As `run_folder.verify_checkpoint`, the ranks reading a share of the files each; all ranks call it."""
    manifest = mesh.on_main(lambda: run_folder.check_listing(path))
    # The largest first, so that the shares are about equal.
    names = sorted(manifest["files"], key=lambda name: (-manifest["files"][name]["size_bytes"], name))
    mesh.every(lambda: run_folder.check_contents(path, manifest, names[mesh.rank :: mesh.world_size]))
    return manifest


def _write_exports(snapshot: Snapshot, checkpoint: Path, mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Writes this rank's share of the exports from the shards of all ranks; records by name of the file."""
    records = {}
    for export in snapshot.exports[mesh.rank :: mesh.world_size]:
        folder = checkpoint / export.folder
        folder.mkdir(parents=True)
        state = StateFiles(checkpoint / "state")
        pieces = [state.piece(name, key, snapshot.tensors[key]) for name, key in export.keys.items()]
        if export.adapter is not None:
            write_adapter(folder, {piece.name: piece.values() for piece in pieces}, export.adapter)
        else:
            name = f"{export.folder}/model.safetensors"
            records[name] = write_safetensors(checkpoint / name, pieces, {"format": "pt"})
        if export.config is not None:
            (folder / "config.json").write_text(json.dumps(export.config, indent=2) + "\n")
        for file in folder.iterdir():
            if (name := f"{export.folder}/{file.name}") not in records:
                records[name] = _synced_record(file)
    return records


def written_here(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """What this rank writes of a state: its shards of all tensors, or some of those that every rank has whole.

    The latter are shared out by their sizes alone, the same on every rank without asking: each tensor is written once,
    and a rank keeps host memory for copies of its part only.
    """
    if not mesh.whole_weights:
        return dict(tensors)
    mine, sizes = {}, [0] * mesh.world_size
    for name, tensor in sorted(tensors.items(), key=lambda pair: (-pair[1].nbytes, pair[0])):
        rank = sizes.index(min(sizes))
        sizes[rank] += tensor.nbytes
        if rank == mesh.rank:
            mine[name] = tensor
    return mine


def _write_state(snapshot: Snapshot, folder: Path, mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Each rank writes its part; the records of the files of all ranks."""
    writer, planner = ShardWriter(folder), StagedPlanner(snapshot.values)
    tensors: dict[str, Any] = written_here(snapshot.tensors, mesh)
    alone = not mesh.is_distributed
    _with_errors(
        f"writing {folder}",
        lambda: dcp.save(tensors, storage_writer=writer, planner=planner, process_group=mesh.group, no_dist=alone),
    )
    return {name: record for part in mesh.every(lambda: writer.records) for name, record in part.items()}


def _with_errors(doing: str, work: Callable[[], Any]) -> None:
    """Runs a collective of torch.distributed.checkpoint, whose exception is no Exception, and speaks our language."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            work()
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in sorted(error.failures.items()))
        raise CheckpointError(f"{doing} failed: {reasons}; check the disk and the folder's permissions") from error


def _check_fit(tensors: Mapping[str, Tensor], reader: dcp.HuggingFaceStorageReader, path: Path) -> None:
    """Raises CheckpointError that names what is missing, surplus or of another shape in the files."""
    try:
        saved = reader.read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}; use another checkpoint") from error
    # First moments of another beta1, or of versions that kept them with beta1 0 too, are not read.
    left = {key for key in saved.keys() - tensors.keys() if key.startswith("optimizers.") and key.endswith(".exp_avg")}
    found = {key: tuple(meta.size) for key, meta in saved.items() if key not in left}  # type: ignore[union-attr]
    if groups := misfits(shapes_in(tensors), found):
        text = "; ".join(f"{len(keys)} {group}: {', '.join(keys[:20])}" for group, keys in groups.items())
        raise CheckpointError(f"{path} does not fit the model: {text}. Use the configuration that it was trained with")


def _clean_and_find(folder: Path, mesh: Mesh) -> Path | None:
    """The newest checkpoint that is as it was saved, after what is of no use was removed; all ranks call it."""

    def clean() -> list[Path]:
        for leftover in folder.glob(run_folder.TEMPORARY + "*"):
            logger.warning("Removing %s, which an interrupted run left behind", leftover)
            shutil.rmtree(leftover)
        return run_folder.list_checkpoints(folder)

    published = mesh.on_main(clean)
    damaged: list[Path] = []
    for path in reversed(published):
        try:
            verify_together(path, mesh)
        except CheckpointError as error:  # the same on every rank
            if mesh.is_main:
                logger.warning("PASSING OVER A DAMAGED CHECKPOINT: %s", error)
            damaged.append(path)
            continue
        mesh.on_main(lambda path=path: _set_aside(damaged, path))  # type: ignore[misc]
        return path
    if published:
        raise CheckpointError(
            f"none of the {len(published)} checkpoints in {folder} can be used (see the warnings above); "
            "restore one, or remove them all to start from the beginning"
        )
    return None


def _set_aside(damaged: list[Path], newest: Path) -> None:
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("Set the damaged checkpoint %s aside as %s; resuming %s", path, aside.name, newest)


def _publish(temporary: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    """Makes a complete checkpoint visible in one rename, then drops the oldest beyond `keep`.

    What the rename shows must be on the disk before it: the files (synced as they were written), then the folders that
    name them. Otherwise a power cut could leave a published checkpoint with empty files.
    """
    (temporary / run_folder.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    sync(temporary / run_folder.MANIFEST)
    for path in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        sync(path)
    os.rename(temporary, final)
    sync(final.parent)
    for old in run_folder.list_checkpoints(final.parent)[:-keep]:
        doomed = old.with_name(run_folder.TEMPORARY + "deleted-" + old.name)  # renamed first: never half a checkpoint
        old.rename(doomed)
        shutil.rmtree(doomed)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _synced_record(path: Path) -> dict[str, Any]:
    sync(path)
    return run_folder.file_record(path)
