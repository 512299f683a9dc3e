"""What ranks hold and compute under the options of `parallel`, for `test_memory_ranks`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file
from tiny_stage import stage_config

from longtake.parallel.materialize import materialize
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.parallel.fsdp import parallelize
from longtake.errors import CheckpointError
from longtake.weights.load import open_weights
from longtake.train.networks import Builder
from longtake.train.stage import run_stage

LORA = {"rank": 2, "alpha": 4}
VARIANTS = {
    "whole": {},
    "lora": {"lora": LORA, "precision": "bf16"},
    "widened": {"init_from": "narrow", "model": {"preset": "sizes", "widen": True}},
    "merged": {"init_from": "updates"},
    "shared": {"shared_base": True, "lora": LORA, "critic": {"lora": {"rank": 3, "targets": ["ffn.0"]}}},
}


def config_of(workshop: Path, logdir: Path, variant: str, **changes):
    """Stage distill, or causal where student weights of another kind are read."""
    tree = {key: value for key, value in VARIANTS[variant].items() if key != "init_from"}
    stage = "causal" if "init_from" in VARIANTS[variant] else "distill"
    if "init_from" in VARIANTS[variant]:
        tree["init_from"] = str(workshop / VARIANTS[variant]["init_from"])
    if "model" in tree:
        tree["model"] = tree["model"] | {"preset": str(workshop / tree["model"]["preset"])}
    return stage_config(workshop, logdir, stage, **(tree | changes))


def loaded(workshop: Path, folder: Path, mesh: Mesh) -> None:
    """The tensors of every network of every variant, gathered, into `<variant>.safetensors`."""
    for variant in VARIANTS:
        built = Builder(config_of(workshop, folder, variant), mesh).build()
        state = {}
        for name, network in (built.trained | built.frozen).items():
            for key, value in network.state_dict().items():
                whole = value.full_tensor() if mesh.is_distributed else value
                state[f"{name}.{key}"] = whole.clone().contiguous()
        if mesh.is_main:
            save_file(state, folder / f"{variant}.safetensors")


def refused(workshop: Path, folder: Path, mesh: Mesh) -> str:
    """What is said of weights of which one rank's part is not finite."""
    try:
        Builder(stage_config(workshop, folder, "causal", init_from=str(workshop / "broken")), mesh).build()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def large(weights: Path, mesh: Mesh) -> dict[str, int]:
    """Most anonymous memory while a large model is read into shards, sampled after every tensor."""
    opened = open_weights(weights)
    whole = sum(p.numel() * 4 for p in opened.model.parameters())
    biggest = max(p.numel() * 4 for p in opened.model.parameters())
    parallelize(opened.model, mesh)
    start, most = anonymous_bytes(), 0

    def values():
        nonlocal most
        for pair in opened.read(None):
            yield pair
            most = max(most, anonymous_bytes() - start)

    materialize(opened.model, mesh.device, values())
    shards = sum(p.to_local().numel() * 4 for p in opened.model.parameters()) if mesh.is_distributed else whole
    return {"whole": whole, "biggest": biggest, "shards": shards, "most": most}


TRAININGS = {
    "plain": {},
    "selective": {"activation_checkpointing": "selective"},
}


def trained(workshop: Path, folder: Path, mesh: Mesh, names: list[str]) -> None:
    """Three iterations of distillation with two micro-batches an update on each rank, for each option."""
    for name in names:
        changes = {"batch_size": 4, "micro_batch_size": 1} | TRAININGS[name]
        run_stage(config_of(workshop, folder / name, "whole", **changes), mesh)


if __name__ == "__main__":
    torch.set_num_threads(1)
    workshop, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with init_mesh("cpu") as mesh:
        if sys.argv[3] == "load":
            loaded(workshop, folder, mesh)
            held = large(workshop / "large", mesh)
            (folder / f"held{mesh.rank}.json").write_text(json.dumps(held))
            (folder / f"refused{mesh.rank}.txt").write_text(refused(workshop, folder, mesh))
        else:
            trained(workshop, folder, mesh, sys.argv[4:])
