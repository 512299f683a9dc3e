"""Sharded networks beside whole ones on one rank or several, for `test_sharded` and `test_nccl`: gradients, what backward
gathers and computes again, and what `auto` keeps; on a GPU with what training uses there.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from count_bytes import Held
from tiny_lora import adapted, stir
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.doctor.fused import Fused
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution, compilations
from longtake.models.recompute import ByBlock
from longtake.parallel.fsdp import gathered, parallelize
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.train.execution import quick, recomputed
from longtake.train.keeping import ROOM, Keeper, Memory, Watched, first_ways, keeps_some, tried_first

Gradients = dict[str, Tensor]

WAYS = ByBlock([False, "products", "selective", True])
# Whether updates are trained, the type of products, whether work is fused, and weights gathered once for many forwards
CASES = {
    "trained whole": (False, None, False, False),
    "gathered once": (False, None, False, True),
    "in bfloat16": (False, torch.bfloat16, False, False),
    "in bfloat16, fused, gathered once": (False, torch.bfloat16, True, True),
    "updates, fused": (True, None, True, False),
    "updates in bfloat16, gathered once": (True, torch.bfloat16, False, True),
}


class Operators(TorchDispatchMode):
    """Counts gathers, attentions and products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Functions are compiled under it."""
        return True

    def __torch_dispatch__(self, operator: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        name = str(operator)
        self.seen["gathers"] += "allgather" in name
        self.seen["attentions"] += "scaled_dot_product" in name and "backward" not in name
        self.seen["products"] += name.startswith(("aten.mm.", "aten.addmm."))
        return operator(*inputs, **(options or {}))


def network(updates: bool, dtype: torch.dtype | None, fuses: bool, *, fused_shards: bool) -> VideoDiT:
    """The same on every rank."""
    model = make_tiny_model(True, num_layers=len(WAYS.ways))
    if updates:
        model = stir(adapted(model if dtype is None else model.cast(dtype)))
    return model.executed(Fused(fuses=fuses, recompute=WAYS, fused_shards=fused_shards))


def learnt(
    model: VideoDiT, sample: int, dtype: torch.dtype | None, around: AbstractContextManager = nullcontext()
) -> tuple[Gradients, Counter[str]]:
    """Gradients of one sample by name, and the operators of backward; of the second forward inside `around`."""
    device = next(model.parameters()).device
    condition, x = make_tiny_condition(model).to(device), make_tiny_latents(5, seed=sample).to(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False), around:
        sigma = torch.tensor([0.9, 0.3], device=device)
        with torch.no_grad():
            model(x, sigma, condition)
        loss = model(x, sigma, condition).square().mean()
    model.zero_grad()
    with Operators() as counted:
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}, counted.seen


def apart(one: Gradients, other: Gradients) -> float:
    """How far one is from the other."""
    assert one.keys() == other.keys() and len(one) > 20
    return relative_error(*(torch.cat([each[name].flatten() for name in one]) for each in (one, other)))


def of_all(model: VideoDiT, mesh: Mesh, dtype: torch.dtype | None) -> Gradients:
    """The mean over the samples of all ranks, by this one alone."""
    each = [learnt(model, sample, dtype)[0] for sample in range(mesh.world_size)]
    return {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}


def units(model: VideoDiT) -> int:
    """What is gathered at once; several modules may be one."""
    return len({id(module._get_fsdp_state()) for module in model.modules() if isinstance(module, FSDPModule)})


def beside_whole(mesh: Mesh, updates: bool, dtype: torch.dtype | None, fuses: bool, once: bool) -> dict[str, Any]:
    """How far the gradient of sharded weights is from that of whole ones, and what both ran in backward."""
    whole, sharded = (network(updates, dtype, fuses, fused_shards=on) for on in (False, True))
    truth, (_, ran) = of_all(whole, mesh, dtype), learnt(whole, mesh.rank, dtype)
    sharded = parallelize(sharded, mesh, param_dtype=dtype)
    found, counted = learnt(sharded, mesh.rank, dtype, gathered(sharded) if once else nullcontext())
    return {"apart": apart(found, truth), "units": units(sharded), "sharded": counted, "whole": ran}


class Room(Held):
    """Bytes of tensors, of which `spare` are free beside the most that was held."""

    spare = 0

    def all(self) -> int:
        return int((self.highest + self.spare) / ROOM) + 1


def kept(model: VideoDiT, by_block: ByBlock, mesh: Mesh, spare: int) -> dict[str, Any]:
    """What was seen to be kept of blocks by each way, what `auto` decides, and how far gradients are from before."""
    memory = Room(model)
    watched = Watched("critic", model.blocks, by_block)
    with memory:
        before, _ = learnt(model, mesh.rank, None)  # which makes the places of gathered weights
        keeper = Keeper([watched], mesh, ["critic"], lambda step: ["critic"], 1, memory)
        learnt(model, mesh.rank, None)
        memory.spare = spare - tried_first(watched.now)  # which is free again
        keeper.passed(0)
        after, _ = learnt(model, mesh.rank, None)
    return {"seen": list(watched.most.values()), "ways": list(by_block.ways), "apart": apart(after, before)}


def decided(mesh: Mesh) -> dict[str, Any]:
    """Of a network that is sharded, where the last rank has the least to spare, and of one that each rank has whole."""
    found = {}
    most = 2**30 if mesh.rank < mesh.world_size - 1 else 40_000
    for name, ranks, spare in (("sharded", mesh, most), ("whole", Mesh(), 40_000)):
        by_block = ByBlock(first_ways(6, selective=True))
        model = make_tiny_model(True, num_layers=6).executed(Execution(fused_shards=name == "sharded"))
        model = parallelize(model, ranks, recompute=by_block)
        found[name] = kept(model, by_block, ranks, spare)
    return found


def as_trained(mesh: Mesh) -> dict[str, Any]:
    """A network that is wide enough for a GPU to fuse, sharded and whole, made as `train/networks.py` makes them."""
    dtype, device, found, gradients = torch.bfloat16, mesh.device, {}, {}
    for name, ranks in (("sharded", mesh), ("whole", Mesh(device=device))):  # the first one compiles
        model = make_tiny_model(True, num_layers=4, dim=1024, ffn_dim=4096, num_heads=8, freq_dim=64).to(device)
        how = {"sharded": name == "sharded", "compiled": False}
        model = model.executed(replace(model.execution, fused_shards=how["sharded"]))
        model = model.executed(quick(model, device, dtype, None, **how))

        def can(model: VideoDiT) -> bool:
            return all(mesh.every(lambda: keeps_some(model.execution, device, dtype, model.config.head_width)))

        by_block = recomputed(model, "auto", can, **how)
        assert isinstance(by_block, ByBlock)
        first, begun = list(by_block.ways), compilations()
        model = parallelize(model, ranks, param_dtype=dtype, recompute=by_block)
        watched = Watched("critic", model.blocks, by_block)
        keeper = Keeper([watched], ranks, ["critic"], lambda step: ["critic"], 1, Memory(device))
        mine, ran = learnt(model, mesh.rank, dtype)
        keeper.passed(0)
        found[name] = {
            "fuses": model.execution.fuses,
            "compiled": compilations().since(begun).graphs,
            "first": first,
            "decided": list(by_block.ways),
            "gathers": ran["gathers"],
            "units": units(model),
            "before and after": apart(learnt(model, mesh.rank, dtype)[0], mine),
        }
        gradients[name] = of_all(model, mesh, dtype) if name == "whole" else mine
    return found | {"apart": apart(gradients["sharded"], gradients["whole"])}


def main(folder: Path, device: str, run: Callable[[Mesh], dict[str, Any]]) -> None:
    """What `run` finds, of each rank, into `folder`."""
    torch.set_num_threads(1)
    with init_mesh(device, one_too=True) as mesh:
        (folder / f"rank{mesh.rank}.json").write_text(json.dumps(run(mesh)))


def on_cpu(mesh: Mesh) -> dict[str, Any]:
    """All that needs no GPU."""
    return {name: beside_whole(mesh, *case) for name, case in CASES.items()} | {"auto": decided(mesh)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], on_cpu if sys.argv[2] == "cpu" else as_trained)
