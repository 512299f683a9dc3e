"""Each rank's part of the test of passes that ranks shard and record as CUDA graphs, for `test_nccl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from longtake.models.execution import Execution
from longtake.plan import StreamPlan
from longtake.rollout.denoise import Denoiser

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny_models import make_tiny_condition, make_tiny_model

from longtake.config.groups import ParallelConfig
from longtake.parallel.mesh import init_mesh
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from tiny_plan import tiny_plan


def main() -> None:
    with init_mesh(sys.argv[2]) as mesh:
        ranks = mesh.arranged(ParallelConfig(sequence=mesh.world_size)).sequence
        model = make_tiny_model(True, num_heads=4).to(mesh.device)
        model = model.executed(Execution(ranks))
        condition = make_tiny_condition(model, size=(6, 6)).to(mesh.device)
        x = torch.randn(2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1)).to(mesh.device)
        one = torch.ones(2, device=mesh.device)
        caches = []

        denoiser = Denoiser(model)

        def streamed() -> torch.Tensor:
            caches.append(model.new_cache(tiny_plan(2, 1, 5, 1), 2, (6, 6)))
            out = []
            with torch.no_grad(), torch.autocast(mesh.device.type, torch.bfloat16):
                for block in range(16):
                    out.append(denoiser(x + block, one, condition, caches[-1]))
                    denoiser(out[-1], 0 * one, condition, caches[-1], commit=True)
            return torch.cat(out, 1)

        expected = streamed()
        denoiser.graphs = CUDAGraphRunner()
        found = {"equal": torch.equal(streamed(), expected), "recorded": denoiser.graphs.captured(caches[-1])}
        found["given up"] = denoiser.graphs._broken
        (Path(sys.argv[1]) / f"rank{mesh.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
