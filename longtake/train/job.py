"""`longtake train`: one stage, or a job: train the stages in order, around them write the toy world and measure."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from longtake.config.job import JobConfig
from longtake.config.stage import StageConfig, dump
from longtake.evaluation.run import evaluate
from longtake.outputs import check_output_folder
from longtake.parallel.mesh import Mesh, init_mesh, restarts
from longtake.run_folder import checkpoint_name, checkpoints_folder, latest_checkpoint, read_manifest
from longtake.toy.files import write_world
from longtake.train.lock import only_run
from longtake.train.pace import JobPace, in_words
from longtake.train.stage import run_stage

logger = logging.getLogger(__name__)


def run(config: StageConfig | JobConfig) -> None:
    """Trains what `config` says, on all ranks that torchrun started (or in this process alone)."""
    with init_mesh() as mesh:
        _log_on_main(mesh)
        mesh.on_main(lambda: check_output_folder(config.logdir))
        done, allowed = restarts()
        if done and mesh.is_main:
            logger.warning("A rank failed: all were started anew, restart %d of %d", done, allowed)
        if isinstance(config, StageConfig):
            run_stage(config, mesh)
        else:
            run_job(config, mesh)


def run_job(config: JobConfig, mesh: Mesh) -> None:
    """The whole way; what an earlier run of the same job completed is not done again."""
    with only_run(Path(config.logdir), mesh, "set another logdir"):
        _run_job(config, mesh)


def _run_job(config: JobConfig, mesh: Mesh) -> None:
    logdir = Path(config.logdir)

    def prepare() -> None:
        (logdir / "job.yaml").write_text(dump(config))
        if config.data is not None:
            write_world(config.data_folder, config.data)

    mesh.on_main(prepare)
    stages = config.stages.items()
    pace = JobPace({name: (s.max_steps, in_words(s.validation, s.validate_every)) for name, s in stages})
    for name, stage in config.stages.items():
        stage.accumulation(mesh.world_size)  # refused now rather than after an earlier stage
        values, folder = stage.model_dump(), stage.folder
        if mesh.on_main(partial(_is_done, folder, stage.max_steps, values)):
            logger.info("Stage %s is complete", name)
            continue
        pace.begin(name)
        before = latest_checkpoint(checkpoints_folder(folder))
        run_stage(stage, mesh)
        pace.end(name, stage.max_steps - (0 if before is None else read_manifest(before)["step"]))
    if config.evaluation is None:
        return
    logger.info("Evaluation over %d held-out worlds", config.evaluation.num_worlds)
    result = evaluate(logdir, mesh=mesh, settings=config.evaluation)
    if mesh.is_main:
        sys.stdout.write(
            f"\n{result}\n\nWritten to {logdir}: contact_sheet.png, samples/, evaluation.{{md,json,png}}\n"
        )
        sys.stdout.flush()


def _is_done(folder: Path, max_steps: int, values: dict[str, Any]) -> bool:
    if not (checkpoints_folder(folder) / checkpoint_name(max_steps)).is_dir():
        return False
    newest = latest_checkpoint(checkpoints_folder(folder))
    if newest is None:
        return False
    manifest = read_manifest(newest)
    before, now = (json.loads(json.dumps(config)) for config in (manifest["config"], values))
    if changed := sorted(key for key in now if key != "logdir" and now[key] != before.get(key)):
        logger.warning(
            "Stage %s was completed with other values of %s and is not trained again; remove %s to do so",
            folder.name,
            ", ".join(changed),
            folder,
        )
    return manifest["step"] >= max_steps


def _log_on_main(mesh: Mesh) -> None:
    logging.basicConfig(
        level=logging.INFO if mesh.is_main else logging.WARNING,
        format=f"%(asctime)s {'' if mesh.is_main else f'rank {mesh.rank} '}%(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("httpx", "matplotlib", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
