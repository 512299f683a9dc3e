"""Each rank's part of the test of passes that ranks share and record as CUDA graphs, for `test_nccl`."""

from __future__ import annotations

from longtake.plan import StreamPlan
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny_models import make_tiny_condition, make_tiny_model

from longtake.config_groups import ParallelConfig
from longtake.distributed.mesh import init_mesh
from longtake.models.pass_graph import PassGraphs


def main() -> None:
    with init_mesh(sys.argv[2]) as mesh:
        ranks = mesh.arranged(ParallelConfig(sequence=mesh.world_size)).sequence
        model = make_tiny_model(True, num_heads=4).to(mesh.device)
        model.set_token_split(ranks)
        condition = make_tiny_condition(model, size=(6, 6)).to(mesh.device)
        x = torch.randn(2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1)).to(mesh.device)
        one = torch.ones(2, device=mesh.device)
        caches = []

        def streamed() -> torch.Tensor:
            caches.append(model.new_cache(StreamPlan(2, 1, 5, 1), 2, (6, 6)))
            out = []
            with torch.no_grad(), torch.autocast(mesh.device.type, torch.bfloat16):
                for block in range(16):
                    out.append(model(x + block, one, condition, cache=caches[-1]))
                    model(out[-1], 0 * one, condition, cache=caches[-1], commit=True)
            return torch.cat(out, 1)

        expected = streamed()
        model.graphs = PassGraphs()
        found = {"equal": torch.equal(streamed(), expected), "recorded": len(caches[-1].passes.recorded)}
        found["given up"] = model.graphs._broken
        (Path(sys.argv[1]) / f"rank{mesh.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
