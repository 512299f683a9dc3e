"""`longtake train`: one stage, or a job: train the stages in order, around them write the toy world and measure."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from longtake.checkpoint.invariants import flat
from longtake.config.groups import EvaluationConfig
from longtake.config.job import JobConfig
from longtake.config.stage import StageConfig, dump
from longtake.encoders.bundle import import_libraries
from longtake.errors import CheckpointError, ConfigError
from longtake.evaluation.run import evaluate
from longtake.json_text import parse_json
from longtake.outputs import check_output_folder, write_whole
from longtake.parallel.mesh import Mesh, init_mesh, let_segments_grow, restarts
from longtake.run_folder import checkpoint_name, checkpoints_folder, latest_checkpoint, read_manifest
from longtake.toy.files import write_world
from longtake.train.keeping import told_to_keep_less
from longtake.train.lock import only_run
from longtake.train.networks import Builder
from longtake.train.pace import JobPace, StagePlan, in_words
from longtake.train.planned import planned_operations
from longtake.train.stage import run_stage

# What a finished stage cannot have learnt from after all
_SOURCES = ("init_from", "objective.teacher", "objective.critic.init_from", "data.path")

logger = logging.getLogger(__name__)


def run(config: StageConfig | JobConfig) -> None:
    """Trains what `config` says, on all ranks that torchrun started (or in this process alone)."""
    let_segments_grow()
    with init_mesh() as mesh:
        _log_on_main(mesh)
        mesh.on_main(lambda: check_output_folder(config.logdir))
        done, allowed = restarts()
        if done and mesh.is_main:
            logger.warning("A rank failed: all were started anew, restart %d of %d", done, allowed)
        if isinstance(config, JobConfig):
            return run_job(config, mesh)
        values, folder = config.model_dump(), config.folder
        mesh.on_main(lambda: _refuse_other_sources(folder, config.max_steps, values))
        if not mesh.on_main(partial(_is_done, folder, config.max_steps, values)):
            with told_to_keep_less(config.lighter):
                run_stage(config, mesh)
        elif mesh.is_main:
            more = f"  longtake train RECIPE max_steps={2 * config.max_steps}     # trains on"
            steps = _next_steps(folder, with_picture=config.model.image_condition == "i2v")
            _say(f"{folder} is complete: {config.max_steps} iterations.\n{steps}\n{more}")


def run_job(config: JobConfig, mesh: Mesh) -> None:
    """The whole way; what an earlier run of the same job completed is not done again.

    Raises: ConfigError before any work where a stage was completed from other weights or data than it is now asked for.
    """
    for stage in config.stages.values():
        stage.accumulation(mesh.world_size)  # refused now rather than after an earlier stage

    def check() -> None:
        for stage in config.stages.values():
            _refuse_other_sources(stage.folder, stage.max_steps, stage.model_dump())

    mesh.on_main(check)
    with only_run(Path(config.logdir), mesh, "set another logdir"):
        _run_job(config, mesh)


def _run_job(config: JobConfig, mesh: Mesh) -> None:
    logdir, is_new = Path(config.logdir), False

    def prepare() -> None:
        write_whole(logdir / "job.yaml", dump(config))
        if config.data is not None:
            write_world(config.data_folder, config.data)

    with _imports_meanwhile(config):
        mesh.on_main(prepare)
    plans = {}
    for name, stage in config.stages.items():
        work = planned_operations(Builder(stage, mesh)) if mesh.is_main else None  # who tells it
        plans[name] = StagePlan(stage.max_steps, in_words(stage.validation, stage.validate_every), work)
    pace = JobPace(plans)
    for name, stage in config.stages.items():
        values, folder = stage.model_dump(), stage.folder
        if mesh.on_main(partial(_is_done, folder, stage.max_steps, values)):
            logger.info("Stage %s is complete", name)
            continue
        pace.begin(name)
        newest = latest_checkpoint(checkpoints_folder(folder))
        trained = 0 if newest is None else read_manifest(newest)["step"]  # now: it may be gone when the stage ends
        with told_to_keep_less(stage.lighter):
            run_stage(stage, mesh, passed=pace.update if mesh.is_main else None)
        pace.end(name, stage.max_steps - trained)
        is_new = True
    settings, folders = config.evaluation, [stage.folder for stage in config.stages.values()]
    if settings is not None and (is_new or not mesh.on_main(lambda: _is_measured(logdir, settings, folders))):
        logger.info("Evaluation over %d held-out worlds", settings.num_worlds)
        evaluate(logdir, mesh=mesh, settings=settings)
        is_new = True
    if not mesh.is_main:
        return
    if settings is not None:
        table = (logdir / "evaluation.md").read_text(encoding="utf-8").strip()
        _say(f"\n{table}\n\nIn {logdir}: contact_sheet.png, samples/, evaluation.{{md,json,png}}")
    again = "" if settings is None else f"\n  longtake evaluate --run {shlex.quote(str(logdir))}     # measures again"
    state = "is complete" if is_new else "was complete, and nothing was done anew"
    *_, last = config.stages.values()
    _say(f"{logdir} {state}.\n{_next_steps(logdir, with_picture=last.model.image_condition == 'i2v')}{again}")


@contextmanager
def _imports_meanwhile(config: JobConfig) -> Iterator[None]:
    """Around the writing of a toy world, which other processes do: meanwhile its encoders' libraries are imported."""
    if config.data is None or config.data_folder.exists():
        yield
        return
    thread = Thread(target=import_libraries, daemon=True)
    thread.start()
    yield
    thread.join()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _next_steps(run: Path, *, with_picture: bool) -> str:
    """Commands that use what was trained."""
    name, picture = shlex.quote(str(run)), "--image photo.jpg " * with_picture
    return (
        f'Next:\n  longtake generate --run {name} {picture}--prompt "..." -o out.mp4\n'
        f"  longtake export {name} FOLDER     # to share it\n"
        "  longtake train RECIPE logdir=OTHER     # trains anew, beside it"
    )


def _is_measured(logdir: Path, settings: EvaluationConfig, folders: Sequence[Path]) -> bool:
    """Whether an evaluation with these settings was completed after the newest checkpoint of the stages."""
    file, last = logdir / "evaluation.json", logdir / "contact_sheet.png"
    if not file.is_file() or not last.is_file():
        return False
    newest = max(path.stat().st_mtime_ns for folder in folders for path in checkpoints_folder(folder).glob("*/*.json"))
    try:
        before = parse_json(file.read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # it is made again
    same = before == json.loads(json.dumps(settings.model_dump()))
    return same and newest < file.stat().st_mtime_ns <= last.stat().st_mtime_ns


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Values of now that are others than before, by dotted key; a log folder that was moved changes none."""
    old, new = (
        {key: _below(value, config["logdir"]) for key, value in flat(config).items() if key != "logdir"}
        for config in (before, now)
    )
    return {key: (old.get(key), value) for key, value in new.items() if old.get(key) != value}


def _below(value: Any, logdir: str) -> Any:
    return f"{{logdir}}{value.removeprefix(logdir)}" if isinstance(value, str) and value.startswith(logdir) else value


def _refuse_other_sources(folder: Path, max_steps: int, values: Mapping[str, Any]) -> None:
    """Raises ConfigError when the stage in `folder` was completed from other weights, teacher or data than `values`
    say: it would not be trained again, and what is there would be taken for what was asked for. Reads a manifest.
    """
    try:
        before = read_manifest(checkpoints_folder(folder) / checkpoint_name(max_steps))["config"]
    except CheckpointError:
        return  # not completed
    changed = {key: both for key, both in _changed(before, values).items() if key in _SOURCES}
    if changed:
        said = "; ".join(f"{key}={old}, and {new} is asked for now" for key, (old, new) in changed.items())
        raise ConfigError(
            f"{folder} was completed with {said}. It is not trained again: name another folder, logdir=OTHER, or set "
            "back what was changed"
        )


def _is_done(folder: Path, max_steps: int, values: Mapping[str, Any]) -> bool:
    if not (checkpoints_folder(folder) / checkpoint_name(max_steps)).is_dir():
        return False
    newest = latest_checkpoint(checkpoints_folder(folder))
    if newest is None:
        return False
    manifest = read_manifest(newest)
    if changed := sorted(_changed(manifest["config"], values)):
        logger.warning(
            "Stage %s was completed with other values of %s and is not trained again; to do so, name another folder: "
            "logdir=OTHER",
            folder.name,
            ", ".join(changed),
        )
    return bool(manifest["step"] >= max_steps)


def _log_on_main(mesh: Mesh) -> None:
    logging.basicConfig(
        level=logging.INFO if mesh.is_main else logging.WARNING,
        format=f"%(asctime)s {'' if mesh.is_main else f'rank {mesh.rank} '}%(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    # What is in progress is a line now and then, not a bar: that of the iterations is tqdm's.
    logging.getLogger("longtake").setLevel(logging.INFO if mesh.is_main else logging.WARNING)
    for noisy in ("httpx", "matplotlib", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
