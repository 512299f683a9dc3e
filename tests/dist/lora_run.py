"""Low-rank updates under FSDP2: what one process or each of several ranks trains, for `test_lora_ranks`."""

from __future__ import annotations

import sys
from pathlib import Path

from longtake.models.execution import Execution

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from dit_run import BATCH, FRAMES, MICRO, RULES, Batches, make_dit
from safetensors.torch import save_file
from tiny_objectives import parts_of
from tiny_lora import adapted, adapter_of
from tiny_run import where_of

from longtake.parallel.mesh import Mesh, init_mesh
from longtake.parallel.fsdp import parallelize
from longtake.models.lora import factors
from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser
from longtake.checkpoint.save import RunInfo
from longtake.config.groups import EmaConfig, OptimConfig
from longtake.config.run import RunConfig
from longtake.train.loop import train
from longtake.train.stage import InPrecision
from longtake.train.state import TrainState


def train_updates(folder: Path, mesh: Mesh, *, bf16: bool, checkpointing: bool, steps: int = 2) -> None:
    """Iterations of distribution matching with updates on student and critic; first and frozen values to `folder`."""
    execution = Execution(recompute=checkpointing)
    networks = {name: make_dit(seed).executed(execution) for seed, name in enumerate(("generator", "critic"))}
    frozen = {}
    for name, network in networks.items():
        torch.manual_seed(100 + mesh.rank)  # what ranks seed differently must not reach A
        adapted(network.cast(torch.bfloat16) if bf16 else network)
        frozen[name] = {key: value.clone() for key, value in network.state_dict().items()}
        networks[name] = parallelize(network, mesh)
    real = parallelize(make_dit(2).requires_grad_(False), mesh)
    parts = parts_of(networks["generator"], networks["critic"], real, plan=RULES, num_frames=FRAMES)
    objective = Dmd(parts, DmdConfig(teacher="toy"))
    adapters = {name: adapter_of(network) for name, network in networks.items()}
    optimizers = dict.fromkeys(networks, OptimConfig(lr=1e-3, beta1=0.9, max_grad_norm=0.5))
    averages = {"generator": EmaConfig(decay=0.5, start_step=0)}
    state = TrainState.build(networks, optimizers, averages, max_steps=steps, adapters=adapters)
    folder.mkdir(parents=True, exist_ok=True)
    starts = {f"{name}.{key}": value for name, values in frozen.items() for key, value in factors(values).items()}
    save_file(starts, folder / f"start{mesh.rank}.safetensors")
    train(
        state,
        InPrecision(objective, mesh, bf16=bf16),
        Batches(mesh),
        RunConfig(**where_of(folder), max_steps=steps),
        mesh=mesh,
        info=RunInfo(),
    )
    trained = {}
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            whole = value.full_tensor() if mesh.is_distributed else value
            if ".lora_" in key:
                trained[f"{name}.{key}"] = whole.clone()
            else:
                assert torch.equal(whole, frozen[name][key]), key
    if mesh.is_main:
        save_file(trained, folder / "trained.safetensors")


def run(folder: Path, mesh: Mesh) -> None:
    """All variants."""
    train_updates(folder / "plain", mesh, bf16=False, checkpointing=False)
    train_updates(folder / "bf16", mesh, bf16=True, checkpointing=True)
    if mesh.is_distributed:
        train_updates(folder / "recomputed", mesh, bf16=False, checkpointing=True)
        train_updates(folder / "resumed", mesh, bf16=False, checkpointing=False, steps=1)
        train_updates(folder / "resumed", mesh, bf16=False, checkpointing=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_mesh("cpu") as mesh:
        run(Path(sys.argv[1]), mesh)
