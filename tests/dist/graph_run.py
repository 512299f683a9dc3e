"""Each rank's part of the tests of what GPUs share, for `test_nccl`: passes that are recorded, roll-outs from them, and
gradients where more is kept of some blocks than of others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from tape import Tape
from tiny_models import make_tiny_condition, make_tiny_model, relative_error
from tiny_plan import tiny_plan

from longtake.config.groups import ParallelConfig
from longtake.models import execution
from longtake.models.attention import attend_fastest, choose_kernels
from longtake.models.execution import Execution
from longtake.models.recompute import ByBlock
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.parallel.ulysses import Ulysses
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.rollout.self_forcing import roll_out

SIZE = (6, 6)  # 9 tokens a frame: one rank of two has more of them


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recorder(mesh: Mesh) -> CUDAGraphRunner:
    """Of CUDA graphs; a stand-in for them where there is no GPU."""
    return CUDAGraphRunner(None if mesh.device.type == "cuda" else Tape())


def refuse(work: Callable) -> tuple:
    raise RuntimeError("nothing is recorded")


def streamed(ranks: Ulysses, mesh: Mesh) -> dict[str, object]:
    """Passes that ranks record, against those that Python starts for all of them."""
    model = make_tiny_model(True, num_heads=4).to(mesh.device).executed(Execution(ranks))
    condition = make_tiny_condition(model, size=SIZE).to(mesh.device)
    x, one = numbers(1, 2, 2, 4, *SIZE).to(mesh.device), torch.ones(2, device=mesh.device)
    denoiser, caches = Denoiser(model), []

    def stream() -> torch.Tensor:
        caches.append(model.new_cache(tiny_plan(2, 1, 5, 1), 2, SIZE))
        out = []
        with torch.no_grad():
            for block in range(16):
                out.append(denoiser(x + block, one, condition, caches[-1]))
                denoiser(out[-1], 0 * one, condition, caches[-1], commit=True)
        return torch.cat(out, 1)

    denoiser.graphs = CUDAGraphRunner(refuse)
    expected = stream()
    denoiser.graphs = recorder(mesh)
    found: dict[str, object] = {"equal": torch.equal(stream(), expected)}
    found["recorded"], found["given up"] = denoiser.graphs.captured(caches[-1]), denoiser.graphs._broken
    return found


def rolled_out(ranks: Ulysses, mesh: Mesh) -> dict[str, object]:
    """Gradients of roll-outs whose passes ranks record, all exit steps together, against one process: each time another
    one is differentiated, as in a training.
    """
    plan, found = tiny_plan(2, 1, 3, 1, sigmas=(1.0, 0.5)), []
    for split in (None, ranks):
        model = make_tiny_model(True, num_heads=4).to(mesh.device).executed(Execution(split, recompute=True))
        condition = make_tiny_condition(model, size=SIZE).to(mesh.device)
        graphs = None if split is None else recorder(mesh)
        denoiser = Denoiser(model, graphs=graphs, batched_exit_backward=split is not None)

        def noise(start: int, end: int, step: int) -> torch.Tensor:
            return numbers(10 * start + step, 2, end - start, 4, *SIZE).to(mesh.device)

        for _ in range(1 if graphs is None else 4):
            model.zero_grad()
            first = numbers(3, 2, 1, 4, *SIZE).to(mesh.device)
            made = roll_out(denoiser, condition, first, noise, plan, 7, SIZE, with_grad=True)
            made.latents.square().mean().backward()
        found.append(gradients(model, split))
        if graphs is not None:
            assert denoiser._pool is not None
            recorded = graphs.captured(denoiser._pool[1])
    return {"difference": relative_error(found[1], found[0]), "recorded": recorded}


def learnt(ranks: Ulysses, mesh: Mesh) -> float:
    """The same of a forward of which blocks keep more and less, by the fastest kernels of each rank."""
    found = []
    if mesh.device.type == "cuda":
        choose_kernels(mesh.device, torch.bfloat16, 64)
    for split in (None, ranks):
        model = make_tiny_model(True, num_heads=4, dim=256, num_layers=4).to(mesh.device)
        ways = ByBlock([False, "products", "selective", True])
        model = model.executed(Execution(split, recompute=ways, attend=attend_fastest))
        condition = make_tiny_condition(model, size=SIZE).to(mesh.device)
        x = numbers(1, 2, 7, 4, *SIZE).to(mesh.device)
        with torch.autocast(mesh.device.type, torch.bfloat16, cache_enabled=False):
            made = model(x, torch.ones(2, device=mesh.device), condition)
        made.square().mean().backward()
        found.append(gradients(model, split))
    return relative_error(found[1], found[0])


def gradients(model: torch.nn.Module, split: Ulysses | None) -> torch.Tensor:
    """All in one, of several ranks their mean."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    if split is not None:
        dist.all_reduce(flat)
        flat /= split.size
    return flat


def main() -> None:
    execution.has_triton = lambda: False  # for these sizes compiling takes longer than all else, and tells nothing
    with init_mesh(sys.argv[2]) as mesh:
        ranks = mesh.arranged(ParallelConfig(sequence=mesh.world_size)).sequence
        assert ranks is not None
        with torch.autocast(mesh.device.type, torch.bfloat16):
            found: dict[str, object] = {"streamed": streamed(ranks, mesh)}
        found |= {"rolled out": rolled_out(ranks, mesh), "learnt": learnt(ranks, mesh)}
        (Path(sys.argv[1]) / f"rank{mesh.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
