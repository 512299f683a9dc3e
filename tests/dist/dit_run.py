"""Real transformers under FSDP2: what one process or each of several ranks computes and sees, for `test_dit_ranks`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from longtake.plan import StreamPlan
from longtake.rollout.denoise import Denoiser

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file
from tiny_batches import make_batch
from tiny_objectives import parts_of, teacher_forcing
from tiny_models import make_tiny_model
from tiny_run import where_of
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.data.order import batch_rows
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.parallel.fsdp import gathered, parallelize
from longtake.models import dit
from longtake.models.dit import VideoDiT
from longtake.models.layers import sinusoid
from longtake.objectives.base import LossResult, Objective
from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.objectives.batch import EncodedBatch
from longtake.rng import KeyedRNG
from longtake.rollout.self_forcing import roll_out
from longtake.checkpoint.save import RunInfo
from longtake.config.groups import OptimConfig
from longtake.config.run import RunConfig
from longtake.train.loop import train
from longtake.train.state import TrainState
from tiny_plan import tiny_plan

FRAMES, BATCH, MICRO, ROWS = 7, 4, 2, 5
# Window 5 of 7 frames: the last block evicts frames 1 and 2, and recomputation in backward still reads them.
RULES = tiny_plan(2, 1, 5, 1, sigmas=(1.0, 0.9375, 0.8333333, 0.625))
SIGMAS = [0.9375, 0.8333333, 0.0173, 0.9999]  # none of 1000 sigma survives bfloat16
Seen = list[dict[str, Any]]


def make_dit(seed: int) -> VideoDiT:
    """36 channels in, 16 out, CLIP tokens; two blocks of width 24."""
    return make_tiny_model(True, seed, dim=24, in_channels=36, out_channels=16)


class Batches:
    """Micro-batches of this rank, whose every sample is a function of its global index."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.position = mesh, 0

    def seek(self, position: int) -> None:
        self.position = position

    def __next__(self) -> list[EncodedBatch]:
        mesh = self.mesh
        groups = batch_rows(1, ROWS, self.position, BATCH, rank=mesh.rank, world_size=mesh.world_size, micro=MICRO)
        self.position += BATCH
        return [make_batch(make_dit(0), [pick.index for pick in group], FRAMES) for group in groups]


class Watched:
    """An objective, and for each of its losses what it saw: exit step, and the first noisy input of each sample."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.networks, self.seen = objective, objective.networks, []
        self.networks["generator"].register_forward_pre_hook(self._look)

    def turns(self, step: int) -> list[str]:
        return self.objective.turns(step)

    def loss(self, turn: str, batch: EncodedBatch, step: int) -> LossResult:
        self.seen.append({"turn": turn, "step": step, "indices": list(batch.indices), "inputs": None, "calls": 0})
        result = self.objective.loss(turn, batch, step)
        self.seen[-1]["exit_step"] = result.metrics.get("exit_step")
        return result

    def discard(self) -> None:
        self.objective.discard()

    def _look(self, module: object, arguments: tuple) -> None:
        x, sigma = arguments[:2]
        self.seen[-1]["calls"] += 1
        if self.seen[-1]["inputs"] is None and sigma.max() > 0:
            self.seen[-1]["inputs"] = x[:, -1].flatten(1)[:, :4].tolist()


def objective_of(kind: str, mesh: Mesh, checkpointing: bool) -> Objective:
    networks = [make_dit(seed) for seed in range(3 if kind == "dmd" else 1)]
    if kind == "dmd":
        networks[2].requires_grad_(False)
    networks = [parallelize(network, mesh, recompute=checkpointing) for network in networks]
    if kind == "dmd":
        return Dmd(parts_of(*networks, plan=RULES, num_frames=FRAMES), DmdConfig(teacher="toy"))
    return teacher_forcing(networks[0], plan=RULES, caption_dropout=0.5)


def train_two_updates(folder: Path, kind: str, mesh: Mesh, *, checkpointing: bool = False) -> Seen:
    """Two iterations by the real loop: one update of a DMD generator and two of its critic, or two of the student."""
    objective = Watched(objective_of(kind, mesh, checkpointing))
    optimizers = dict.fromkeys(objective.networks, OptimConfig(lr=1e-3, beta1=0.9, max_grad_norm=0.5))
    train(
        TrainState.build(objective.networks, optimizers, max_steps=2),
        objective,
        Batches(mesh),
        RunConfig(**where_of(folder), max_steps=2),
        mesh=mesh,
        info=RunInfo(),
    )
    return objective.seen


@contextmanager
def counted_projections():
    """How often each module projected a condition to keys and values."""
    counts: Counter[str] = Counter()
    project = dit.CrossAttention.project

    def spy(self, text, image):
        counts[str(id(self))] += 1
        return project(self, text, image)

    with patch.object(dit.CrossAttention, "project", spy):
        yield counts


def stream(mesh: Mesh) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Latents of two roll-outs without gradient by sample index; projections of each layer in each roll-out."""
    model, draws = parallelize(make_dit(4), mesh), KeyedRNG(5)
    latents, projections = {}, []
    for group in batch_rows(1, ROWS, 0, BATCH, rank=mesh.rank, world_size=mesh.world_size, micro=MICRO):
        batch = make_batch(make_dit(0), [pick.index for pick in group], FRAMES)

        def noise(start: int, end: int, step: int, indices=batch.indices) -> torch.Tensor:
            return draws.noise(start, "stream", indices, (end - start, 16, *batch.latent_size), part=step)  # noqa: B023

        with torch.no_grad(), counted_projections() as counts:
            made = roll_out(
                Denoiser(model), batch.condition, batch.first_latent, noise, RULES, FRAMES, batch.latent_size
            ).latents
        latents |= {str(index): made[k].clone() for k, index in enumerate(batch.indices)}
        projections += counts.values()
    return latents, projections


def clocks(mesh: Mesh) -> Seen:
    """What reaches the timestep embedding of a model that computes in bfloat16, for [B] and for [B, F] levels, and the
    type in which the matrices of a block are gathered.
    """
    model = parallelize(make_dit(4), mesh, param_dtype=torch.bfloat16)
    batch = make_batch(make_dit(0), [0, 1], 4)
    seen: Seen = []

    def spy(timestep: torch.Tensor, width: int) -> torch.Tensor:
        seen.append({"dtype": str(timestep.dtype), "clock": timestep.tolist()})
        return sinusoid(timestep, width)

    def look(module: torch.nn.Module, arguments: tuple) -> None:
        seen[-1]["matrices"] = str(module[0].weight.dtype)

    model.blocks[1].ffn.register_forward_pre_hook(look)
    whole = make_dit(4)
    with patch.object(dit, "sinusoid", spy), torch.no_grad():
        for sigma in (torch.tensor(SIGMAS[:2]), torch.tensor([SIGMAS, SIGMAS[::-1]])):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                out = model(batch.latents, sigma, batch.condition)
            seen[-1]["sigma"], seen[-1]["out"] = sigma.tolist(), str(out.dtype)
            with patch.object(dit, "sinusoid", sinusoid):
                wanted = whole(batch.latents, sigma, batch.condition)
            seen[-1]["error"] = float((out - wanted).norm() / wanted.norm())
    return seen


class Gathers(TorchDispatchMode):
    """Counts the collectives that gather."""

    number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.number += "allgather" in str(function)
        return function(*arguments, **(options or {}))


def gathers(mesh: Mesh) -> dict[str, list[int]]:
    """Collectives of two roll-outs without gradient, the weights changed between them, and how far each is from a
    process of its own: with weights gathered once a roll-out, and with weights gathered for each pass.
    """
    found: dict[str, list[int]] = {}
    batch = make_batch(make_dit(0), [0, 1], FRAMES)

    def noise(start: int, end: int, step: int) -> torch.Tensor:
        return KeyedRNG(5).noise(start, "stream", batch.indices, (end - start, 16, *batch.latent_size), part=step)

    def unrolled(student: Denoiser) -> torch.Tensor:
        return roll_out(student, batch.condition, batch.first_latent, noise, RULES, FRAMES, batch.latent_size).latents

    for name, once in (("once", True), ("each pass", False)):
        model, whole = parallelize(make_dit(4), mesh), make_dit(4)
        student = Denoiser(model, gathering=partial(gathered, model) if once else nullcontext)
        found[name] = []
        for _ in range(2):
            with torch.no_grad(), Gathers() as counted:
                latents = unrolled(student)
            found[name].append(counted.number)
            with torch.no_grad():
                assert torch.allclose(latents, unrolled(Denoiser(whole)), rtol=0, atol=1e-6)
                for parameter in (*model.parameters(), *whole.parameters()):
                    parameter.mul_(0.9)  # shards, as an optimizer sees them
    return found


def run(folder: Path, mesh: Mesh) -> None:
    """Everything, into `folder`: training runs, and `rank<r>.json` and `rank<r>.safetensors` of what was seen."""
    seen = {
        "dmd": train_two_updates(folder / "dmd", "dmd", mesh),
        "causal": train_two_updates(folder / "causal", "causal", mesh),
    }
    if mesh.is_distributed:
        seen["dmd_recomputed"] = train_two_updates(folder / "dmd_recomputed", "dmd", mesh, checkpointing=True)
        seen["causal_recomputed"] = train_two_updates(folder / "causal_recomputed", "causal", mesh, checkpointing=True)
        seen["clocks"] = clocks(mesh)
        seen["gathers"] = gathers(mesh)
    latents, projections = stream(mesh)
    save_file(latents, folder / f"rank{mesh.rank}.safetensors")
    (folder / f"rank{mesh.rank}.json").write_text(json.dumps(seen | {"projections": projections}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_mesh("cpu") as mesh:
        run(Path(sys.argv[1]), mesh)
