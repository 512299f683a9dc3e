"""Stages on meshes of ranks, for `test_meshes`: trains each run of a list and streams a video from what it trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file
from tiny_stage import stage_config

from longtake.config.stage import StageConfig
from longtake.toy.world import sample_world
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.inference.generator import Generator, Source
from longtake.inference.sampling import student_latents
from longtake.train.stage import run_stage

STEPS, FRAMES, WORLD = 5, 9, sample_world(3, 0)
STAGES: dict[str, dict[str, Any]] = {
    # Window 3 of 5 frames: frames are evicted, in training too.
    "causal": {"caption_dropout": 0.5, "plan": {"block_frames": 2, "window_frames": 3, "sink_frames": 1}},
    "distill": {"plan": {"block_frames": 2, "window_frames": 3, "sink_frames": 1}, "activation_checkpointing": True},
    "long": {"num_chunks": [3], "new_frames": 2, "plan": {"block_frames": 2, "window_frames": 5, "sink_frames": 1}, "activation_checkpointing": True},
}


def config_of(workshop: Path, logdir: Path, stage: str, **changes: Any) -> StageConfig:
    return stage_config(workshop, logdir, stage, **{"max_steps": STEPS} | STAGES[stage] | changes)


def run(workshop: Path, logdir: Path, mesh: Mesh, stage: str, **changes: Any) -> Path:
    """Trains a stage, then streams 9 latent frames with the mesh's sequence groups; the stage's folder.

    Rank 0 writes the latents beside the checkpoints.
    """
    config = config_of(workshop, logdir, stage, **changes)
    run_stage(config, mesh)
    generator = Generator.build(Source.of_run(config.folder), "cpu", split=mesh.arranged(config.parallel).sequence)
    condition, first = generator.condition(generator.prepare(WORLD.render(1)[0]), WORLD.caption)
    size = (first.shape[3], first.shape[4])
    latents = student_latents(generator.denoiser, condition, first, generator.plan, FRAMES, size, seed=3, videos=[0])
    if mesh.is_main:
        save_file({"latents": latents.contiguous()}, config.folder / "latents.safetensors")
    return config.folder


def main() -> None:
    torch.set_num_threads(1)
    workshop, runs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with init_mesh("cpu") as mesh:
        for entry in runs:
            run(workshop, Path(entry.pop("logdir")), mesh, entry.pop("stage"), **entry)


if __name__ == "__main__":
    main()
