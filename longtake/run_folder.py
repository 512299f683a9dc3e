"""What a stage folder on disk looks like: checkpoints, their manifests, which one is the newest complete one.

`<logdir>/<stage>/checkpoints/step_000100/` holds `state/*.safetensors` (everything that resuming needs, sharded),
one folder per exported network (`generator/`, `generator_ema/`: `model.safetensors` + `config.json`; or
`generator_lora/`, `generator_ema_lora/`: low-rank updates and the base they belong to, and beside them `writer_lora/`,
`writer_ema_lora/`, where others write the context) and `manifest.json`, which lists
every other file with its size and SHA-256. A checkpoint is written under a `.tmp-` name and renamed when complete. No
torch here and nothing that unpickles: inference reads these folders without training.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from longtake.config.objective import KINDS
from longtake.config.stage import StageConfig
from longtake.errors import CheckpointError, ConfigError
from longtake.json_text import parse_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
BEST = "best.json"  # beside what was kept as the best: by which number
LORA = "_lora"  # end of the name of a folder with low-rank updates
WRITER = "writer"  # begins that of the updates that write the context of those of the generator
_NEEDED = {"step": int, "data_position": int, "config": dict, "files": dict}  # what every manifest holds
# Keys of objectives that are gone, as they were where they did nothing: earlier checkpoints of any training name them.
_GONE = {"data_forcing": {"share": 0.0}}
_THREADS = 8
_NAME = re.compile(r"step_(\d{6,})")
logger = logging.getLogger(__name__)


def checkpoints_folder(stage_folder: str | Path) -> Path:
    """Where the stage in `stage_folder` keeps its checkpoints."""
    return Path(stage_folder) / "checkpoints"


def best_folder(stage_folder: str | Path) -> Path:
    """Where the stage in `stage_folder` keeps the networks of its best checkpoint (`keep_best`)."""
    return Path(stage_folder) / "best"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint made after `step` iterations."""
    return f"step_{step:06d}"


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Published checkpoints in `folder`, oldest first; temporary and foreign names are left out."""
    found = [(int(match[1]), path) for path in Path(folder).glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, as manifests list it."""
    with path.open("rb") as file:
        return {"size_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def file_records(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`file_record` of several files below a folder, read side by side: hashing leaves the interpreter's lock."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: file_record(folder / name), names)))


def files_of(checkpoint: Path) -> list[str]:
    """Relative names of all files of a checkpoint except its manifest, sorted."""
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def read_manifest(checkpoint: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises: CheckpointError when it is missing, unreadable or of another format."""
    path = Path(checkpoint) / MANIFEST
    try:
        manifest = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); the checkpoint is incomplete, use another one"
        ) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version}; this version of Longtake reads {FORMAT_VERSION}. "
            "Use the version of Longtake that wrote it"
        )
    manifest.setdefault("clip_preprocess", "original")  # all there was before it became an option
    return manifest


def holds_student(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of a causal student; also of a version whose stages had a kind, and no objective."""
    config = read_manifest(checkpoint)["config"]
    return config["stage"] != "teacher" if "stage" in config else trained_config(checkpoint).objective.causal


def verify_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are exactly those listed, each with its size and checksum.

    Raises: CheckpointError naming the first file that is missing, surplus or changed.
    """
    manifest = check_listing(checkpoint)  # first: gigabytes are read only when all sizes are right
    check_contents(checkpoint, manifest, list(manifest["files"]))
    return manifest


def check_listing(checkpoint: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files have the listed names and sizes; contents are not read.

    Raises: CheckpointError as `verify_checkpoint`.
    """
    checkpoint = Path(checkpoint)
    manifest = read_manifest(checkpoint)
    if broken := [key for key, kind in _NEEDED.items() if not isinstance(manifest.get(key), kind)]:
        raise CheckpointError(f"{checkpoint / MANIFEST} has no usable {broken[0]}; the checkpoint is damaged")
    listed, present = manifest["files"], files_of(checkpoint)
    if surplus := sorted(set(present) - set(listed)):
        raise CheckpointError(f"{checkpoint} holds files that its manifest does not list: {surplus[:5]}; remove them")
    if missing := sorted(set(listed) - set(present)):
        raise CheckpointError(f"{checkpoint} lacks {missing[0]}; the checkpoint is damaged, use another one")
    for name, record in listed.items():
        if not isinstance(record, dict) or (checkpoint / name).stat().st_size != record.get("size_bytes"):
            raise _changed(checkpoint / name)
    return manifest


def check_contents(checkpoint: str | Path, manifest: dict[str, Any], names: Sequence[str]) -> None:
    """Raises CheckpointError when one of these files has another checksum than the manifest says."""
    for name, record in file_records(Path(checkpoint), names).items():
        if record != manifest["files"][name]:
            raise _changed(Path(checkpoint) / name)


def _changed(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} is not the file that was saved; use another checkpoint")


def latest_checkpoint(folder: str | Path, *, with_exports: bool = False) -> Path | None:
    """The newest complete checkpoint in `folder`, verified; None when there is none.

    A damaged newer one is passed over with a warning that names it; with `with_exports` one without whole weights too.
    """
    for path in reversed(list_checkpoints(folder)):
        if with_exports and exports_of(path) == []:
            logger.warning("%s holds no whole weights (checkpoint.export=last); looking at the one before", path)
            continue
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("PASSING OVER A DAMAGED CHECKPOINT: %s", error)
        else:
            return path
    return None


def exports_of(checkpoint: str | Path) -> list[str]:
    """Names of the folders of whole weights (or low-rank updates) in a checkpoint."""
    return sorted(path.name for path in Path(checkpoint).glob("*") if path.is_dir() and path.name != "state")


def student_stages(logdir: str | Path) -> list[Path]:
    """Folders of the stages in `logdir` that trained a student, in training order, whatever their names.

    Raises: CheckpointError as `trained_config`.
    """
    configs = {folder.name: _config_of(folder) for folder in sorted(Path(logdir).iterdir())}
    students = {name: config for name, config in configs.items() if config is not None and config.objective.causal}

    def order(name: str) -> tuple[int, int, str]:
        kind, ancestors = students[name].objective.kind, [name]
        while (before := students[ancestors[-1]].init_from) in students and before not in ancestors:
            ancestors.append(before)
        return [*KINDS, kind].index(kind), len(ancestors), name

    return [Path(logdir) / name for name in sorted(students, key=order)]


def _config_of(stage_folder: Path) -> StageConfig | None:
    """The configuration in the newest readable checkpoint of a stage; None when there is none."""
    for checkpoint in reversed(list_checkpoints(checkpoints_folder(stage_folder))):
        try:
            read_manifest(checkpoint)
        except CheckpointError as error:
            logger.warning("PASSING OVER A DAMAGED CHECKPOINT: %s", error)
        else:
            return trained_config(checkpoint)
    return None


def trained_config(checkpoint: Path) -> StageConfig:
    """The configuration of the stage that wrote a checkpoint.

    Raises: CheckpointError when the manifest cannot be read, or this version does not know its configuration.
    """
    config = read_manifest(checkpoint)["config"]
    if "objective" in config:
        objective = {key: value for key, value in config["objective"].items() if _GONE.get(key) != value}
        config = {**config, "objective": objective}
    try:
        return StageConfig.from_tree(config)
    except ConfigError as error:
        reason = "its stages had a kind, and no objective" if "stage" in config else str(error).splitlines()[0]
        raise CheckpointError(
            f"{checkpoint} was written by another version, whose configuration this one does not read ({reason}). Its "
            "weights are as ever: name the folder `generator` (or `generator_ema`) in it as init_from, or in "
            "`longtake generate --model FOLDER --config RECIPE`. The training itself goes on with `longtake train "
            "RECIPE`, where the recipe has the keys of this version"
        ) from None


def find_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint of a stage folder, of the last trained stage of a log folder, or `path` itself.

    Raises: CheckpointError.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist; give a log folder (outputs/toy) or a stage folder (outputs/toy/distill)"
        )
    if (path / MANIFEST).is_file():
        return path
    stages = [path] if checkpoints_folder(path).is_dir() else reversed(student_stages(path))
    for stage in stages:
        if (found := latest_checkpoint(checkpoints_folder(stage), with_exports=True)) is not None:
            return found
    raise CheckpointError(f"{path} holds no complete checkpoint of a student; train one first")


def best_checkpoint(path: Path) -> Path:
    """What was kept as the best of a stage folder, or of the last stage of a log folder that kept one.

    Raises: CheckpointError.
    """
    stages = [path] if checkpoints_folder(path).is_dir() else student_stages(path) if path.is_dir() else []
    for stage in reversed(stages):
        if kept := list_checkpoints(best_folder(stage)):
            verify_checkpoint(kept[-1])
            return kept[-1]
    raise CheckpointError(
        f"{path} holds no best checkpoint; train with keep_best set to a number of the validations (`longtake config "
        "stage` lists them), or take the last one"
    )


def chosen_by(checkpoint: Path) -> str | None:
    """By what a checkpoint was kept as the best of its stage, in words; None for any other. Raises: CheckpointError."""
    file = checkpoint.parent / BEST
    if checkpoint.parent != best_folder(checkpoint.parents[1]) or not file.is_file():
        return None
    try:
        kept = parse_json(file.read_bytes())
        seed = f", seed {kept['seed']}" if "seed" in kept else ""  # not in files of earlier versions
        return f"iteration {kept['step']}, by {kept['score']}={kept['value']:.4g} of the validations{seed}"
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); take the last checkpoint, without the best") from error


def exported_weights(checkpoint: str | Path, network: str = "generator") -> Path:
    """Folder of a network in a checkpoint, its EMA where there is one: whole weights or low-rank updates.

    Raises: CheckpointError when the checkpoint does not hold that network.
    """
    for name in (f"{network}_ema", network):
        for folder in (Path(checkpoint) / name, Path(checkpoint) / f"{name}{LORA}"):
            if folder.is_dir():
                return folder
    held = exports_of(checkpoint)
    why = "" if held else "; with checkpoint.export=last only the checkpoint of the last iteration holds networks"
    raise CheckpointError(f"{checkpoint} holds no exported network {network!r}; it holds {held}{why}")
