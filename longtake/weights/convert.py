"""Rewrites transformer weights in another layout, bit for bit, a shard at a time. Source of the layouts: A.2, K.3."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from longtake.config.generation import RULES_FILE, write_rules
from longtake.errors import ConfigError
from longtake.outputs import check_new_folder, new_folder
from longtake.progress import track
from longtake.weights.config_json import config_to_diffusers, config_to_json, config_to_original, write_config
from longtake.weights.hub import local_path
from longtake.weights.load import open_dit
from longtake.weights.locate import file_beside
from longtake.weights.lora import check_scale, updates_file
from longtake.weights.names import to_diffusers_key
from longtake.weights.read import INDEX, CheckpointReader
from longtake.weights.students import find_student, read_table
from longtake.weights.tensor_files import check_finite, save_tensors

Layout = Literal["original", "diffusers", "longtake"]
SHARD_BYTES = 5 << 30
_STEM = "diffusion_pytorch_model"
# That are written here
WEIGHT_FILES = (f"{_STEM}*.safetensors", f"{_STEM}.safetensors.index.json", "config.json", RULES_FILE)
_CONFIGS = {"original": config_to_original, "diffusers": config_to_diffusers, "longtake": config_to_json}


def convert(
    source: str | Path,
    target: str | Path,
    to: Layout,
    *,
    network: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float | None = None,
    unmerge: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> list[Path]:
    """Writes the folder `target` with the weights of `source` in the layout `to`; returns the weight files.

    The rules that lie beside the weights (`generation.yaml`), or those of a published student, go along. Types stay as
    they are stored; tensors with a low-rank update are merged in float32 and rounded once. `target` appears whole or
    not at all.
    Args: `source`, `network`, `lora`, `lora_scale` as `load_dit`; `unmerge` takes the update out of weights that it was
    merged into (equal to what they were up to rounding); `shard_bytes`, most bytes of tensors in a file (a
    larger single tensor has a file of its own); `overwrite` lets `target` replace a folder of weights.
    Raises: ConfigError when `target` exists, OutputError when it cannot be written; CheckpointError when `source` is
    not whole or `to` cannot say its sizes.
    """
    target = check_new_folder(target, own=WEIGHT_FILES, inputs=[source, lora], overwrite=overwrite)
    if shard_bytes < 1:
        raise ConfigError(f"a shard of {shard_bytes} bytes holds nothing; give a size above 0")
    if unmerge and lora is None:
        raise ConfigError("unmerge takes a low-rank update out of the weights; name its file (lora)")
    check_scale(lora_scale, lora)
    if lora is not None:
        _check_updates(lora, target, to)
    student = find_student(source) if network is None and lora is None else None
    if student is None:
        here = local_path(source)
        rules = file_beside(here, RULES_FILE)
        published, model = open_dit(here, network, lora, lora_scale, unmerge=unmerge)
    else:
        student.check_is_one()
        published, model = student.read()
    fields = _CONFIGS[to](model.config)
    with new_folder(target, overwrite=overwrite) as folder:
        names = {name: to_diffusers_key(name) if to == "diffusers" else name for name in published.tensors}
        written = _write(published, names, folder, shard_bytes)
        write_config(folder, fields)
        if student is not None:
            write_rules(folder, student.rules)
        elif rules.is_file():
            shutil.copyfile(rules, folder / RULES_FILE)
    return [target / name for name in written]


def _check_updates(lora: str | Path, target: Path, to: Layout) -> None:
    """Before anything is fetched. Raises: CheckpointError for no file; ConfigError for a published student's name."""
    students = () if Path(lora).expanduser().exists() else read_table()[0]
    for student in students:
        if os.fspath(lora).lower() in (student.name.lower(), student.repository.lower()):
            command = shlex.join(["longtake", "convert", student.name, os.fspath(target), "--to", to])
            raise ConfigError(
                f"lora is a file of low-rank updates, and {lora} names a published student, which is written with what "
                f"updates it has by `{command}`"
            )
    updates_file(Path(lora).expanduser())


def _write(published: CheckpointReader, names: Mapping[str, str], folder: Path, shard_bytes: int) -> list[str]:
    """Writes the shards, and their index when there are several; returns the file names."""
    shards = list(_plan(published, shard_bytes))
    files = [f"{_STEM}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{_STEM}.safetensors"]
    for file, shard in zip(files, shards):
        tensors: dict[str, Tensor] = {}
        for name, tensor in track(published.read(shard), f"writing {file}", "tensors", len(shard)):
            rounded = tensor.to(published.tensors[name].dtype)
            if published.updates:
                check_finite(rounded, f"{name} with its update, as {rounded.dtype},")
            # Tensors of one torch.save file may lie in one storage, which safetensors refuses.
            tensors[names[name]] = rounded.clone(memory_format=torch.contiguous_format)
        save_tensors(tensors, folder / file, {"format": "pt"})
    if len(shards) > 1:
        places = {names[name]: file for file, shard in zip(files, shards) for name in shard}
        total = sum(stored.size_bytes for stored in published.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / f"{_STEM}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")
    return files


def _plan(published: CheckpointReader, shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each shard, in the order in which they are stored."""
    shard: list[str] = []
    used = 0
    for name, stored in published.tensors.items():
        if shard and used + stored.size_bytes > shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += stored.size_bytes
    yield shard
