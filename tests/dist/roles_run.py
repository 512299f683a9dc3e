"""Stages with shared and with separate roles, on one process or on each of several ranks, for `test_roles`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny_stage import make_workshop, stage_config

from longtake.config.stage import StageConfig
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.train.stage import run_stage

LORA = {"rank": 2, "alpha": 4}
CRITIC = {"lr": 1e-3, "updates_per_generator": 2}


def config_of(workshop: Path, logdir: Path, stage: str, **changes) -> StageConfig:
    tree = {"lora": LORA, "critic": CRITIC | {"lora": {"rank": 3}}, "max_steps": 5, "save_every": 5}
    if stage == "long":
        tree["num_chunks"] = [2]
    return stage_config(workshop, logdir, stage, **(tree | changes))


VARIANTS = {
    "plain": {},
    "recomputed": {"activation_checkpointing": "full"},
    "bf16": {"precision": "bf16", "activation_checkpointing": "selective"},
    "student_whole": {"lora": None},
    "critic_whole": {"critic": CRITIC},
}


def run(workshop: Path, folder: Path, mesh: Mesh, stage: str, variant: str) -> None:
    """The same stage twice, into `<folder>/separate/<stage>` and `<folder>/shared/<stage>`."""
    for name in ("separate", "shared"):
        run_stage(config_of(workshop, folder / name, stage, shared_base=name == "shared", **VARIANTS[variant]), mesh)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_mesh("cpu") as mesh:
        for pair in sys.argv[3:]:
            stage, variant = pair.split(":")
            run(Path(sys.argv[1]), Path(sys.argv[2]) / variant, mesh, stage, variant)
