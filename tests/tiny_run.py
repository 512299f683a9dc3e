"""A tiny network of two blocks, a deterministic objective and data, and the run that tests and subprocesses share."""

from __future__ import annotations

import argparse
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from longtake.checkpoint.save import RunInfo
from longtake.config.groups import EmaConfig, OptimConfig
from longtake.config.run import CheckpointConfig, RunConfig, WatchdogConfig
from longtake.objectives.base import LossResult
from longtake.parallel.fsdp import parallelize
from longtake.parallel.mesh import Mesh, init_mesh, restarts
from longtake.train.loop import Hooks, train
from longtake.train.state import TrainState

WIDTH, BATCH = 5, 4


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all safetensors files of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@dataclass
class TinyConfig:
    width: int = WIDTH


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x.to(self.up.weight.dtype))))


class Tiny(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.config = TinyConfig()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(WIDTH, 3)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.to(self.head.weight.dtype)).float() * self.scale


class Rows:
    """Micro-batches whose sample `i` is a function of `i`; the global batch is split over the ranks."""

    def __init__(self, mesh: Mesh, accumulation: int = 1) -> None:
        self.mesh, self.position, self.accumulation = mesh, 0, accumulation
        self.per_rank = BATCH // mesh.world_size // accumulation

    def seek(self, position: int) -> None:
        self.position = position

    def __next__(self) -> list[torch.Tensor]:
        return [self._micro_batch() for _ in range(self.accumulation)]

    def _micro_batch(self) -> torch.Tensor:
        start = self.position + self.mesh.rank * self.per_rank
        self.position += self.per_rank * self.mesh.world_size
        return torch.stack(
            [torch.randn(WIDTH, generator=torch.Generator().manual_seed(start + i)) for i in range(self.per_rank)]
        )


class TwoPlayers:
    """A generator updated every second iteration (through two forwards, as a roll-out does) and a critic in all."""

    def __init__(self, networks: dict[str, nn.Module], nan_at: int = -1, nan_rank: int = 0, rank: int = 0) -> None:
        self.networks, self.nan_at, self.is_bad_rank = networks, nan_at, rank == nan_rank

    def turns(self, step: int) -> list[str]:
        return ["generator", "critic"] if step % 2 == 0 else ["critic"]

    def loss(self, turn: str, batch: torch.Tensor, step: int) -> LossResult:
        target = torch.sin(3 * batch[:, :3])
        if turn == "generator":
            first = self.networks["generator"](batch)
            second = self.networks["generator"](batch + 0.1)
            loss = (first - target).square().mean() + (second - target).square().mean()
        else:
            with torch.no_grad():
                fake = self.networks["generator"](batch)
            loss = (self.networks["critic"](batch) - fake).square().mean()
        if step == self.nan_at and self.is_bad_rank:
            loss = loss * float("nan")
        return LossResult(loss, {"batch_mean": batch.mean()})

    def discard(self) -> None:
        pass


def build(mesh: Mesh, *, seed: int = 1, nan_at: int = -1) -> tuple[TrainState, TwoPlayers]:
    networks = {name: parallelize(Tiny(i), mesh) for i, name in enumerate(("generator", "critic"))}
    optim = OptimConfig(lr=1e-2, beta1=0.5, beta2=0.9, weight_decay=0.01, warmup_steps=3, max_grad_norm=0.5)
    averages = {"generator": EmaConfig(decay=0.9, start_step=2)}
    state = TrainState.build(networks, dict.fromkeys(networks, optim), averages, max_steps=8, seed=seed)
    return state, TwoPlayers(networks, nan_at, nan_rank=mesh.world_size - 1, rank=mesh.rank)


def run(
    folder: Path, mesh: Mesh, *, steps: int = 8, save_every: int = 3, accumulation: int = 1, **options
) -> TrainState:
    hooks, loop = options.pop("hooks", Hooks()), {"watchdog": WatchdogConfig(seconds=0)} | options.pop("loop", {})
    checkpoint = CheckpointConfig(mode=options.pop("mode", "async"), export=options.pop("export", "every"))
    invariants = options.pop("invariants", {"rope": "relative", "block_plan": [1, 4], "fps": 16})
    state, objective = build(mesh, **options)
    train(
        state,
        objective,
        Rows(mesh, accumulation),
        RunConfig(
            **where_of(folder), max_steps=steps, save_every=save_every, checkpoint=checkpoint, validate_every=4, **loop
        ),
        mesh=mesh,
        info=RunInfo({"steps": steps}, invariants),
        hooks=hooks,
    )
    return state


def where_of(folder: Path) -> dict[str, str]:
    """The keys of a configuration that name its folder."""
    return {"logdir": str(folder.parent), "name": folder.name}


def kill_in_save(step: int) -> None:
    """From now on this process kills itself in the middle of the save of `step`."""
    from longtake.checkpoint import save as checkpoint

    original = checkpoint._synced_record

    def record(path: Path) -> dict:
        if f"step_{step:06d}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path)

    checkpoint._synced_record = record


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--kill-in-save", type=int)
    parser.add_argument("--nan-at", type=int, default=-1)
    parser.add_argument("--raise-on", type=int, default=-1)
    parser.add_argument("--die-once", type=int, nargs="*", default=[], help="ranks that kill themselves, one a life")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.kill_in_save is not None:
        kill_in_save(args.kill_in_save)

    with init_mesh("cpu") as mesh:

        def evaluate(step: int) -> dict[str, float]:
            if args.raise_on == mesh.rank:
                raise ValueError("this rank broke")
            life, _ = restarts()
            if step == 4 and args.die_once[life : life + 1] == [mesh.rank]:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"motion_ratio": 1.0}

        run(
            args.folder,
            mesh,
            steps=args.steps,
            accumulation=args.accumulation,
            nan_at=args.nan_at,
            hooks=Hooks(evaluate=evaluate),
        )


if __name__ == "__main__":
    main()
