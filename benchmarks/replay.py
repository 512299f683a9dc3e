"""Ways to give a roll-out its gradient, at 1.3B on one GPU with random weights: time and memory of a student's update.

    python -m benchmarks.replay -o outputs/replay            (in the repository; --tiny rehearses it on a CPU)

480x832, 21 latents in blocks [1, 4, 4, 4, 4, 4], window 13, sink 5, bfloat16 autocast over float32 weights, three
networks (student, critic, teacher), the loss and its backward; no optimizer. Ways:

- blockwise: each block's exit step carries its own graph, recomputed in backward;
- joined: exit steps run without gradient and leave what each layer made; one graph over all of them in the end;
- packed: one forward over [context | noisy], whose context carries gradient too (Self-Gradient Forcing).

A fourth way, exit steps once more in one call against the cache, was slower and larger (docs/log.md, 2026-11-29) and is
gone. All ways of an exit step begin from the same clips; gradients of the first two are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.random_files import FULL, TINY
from longtake.condition import Condition
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.objectives.base import Parts
from longtake.objectives.batch import EncodedBatch
from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.plan import StreamPlan
from longtake.rng import KeyedRNG
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser

SIGMAS = (1.0, 0.9375, 0.8333, 0.625)
WAYS = ("blockwise", "joined", "packed")


def update(objective: Dmd, batch: EncodedBatch, step: int, device: torch.device) -> tuple[float, float]:
    """Seconds and loss of one student's update, without the optimizer."""
    model = objective.generator.model
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        loss = objective.loss("generator", batch, step).loss
    loss.backward()
    value = loss.item()
    return time.perf_counter() - start, value


def main() -> None:
    """Measures each way for the first and the last exit step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ways", default=";".join(WAYS))
    parser.add_argument("--exits", default="0,3")
    parser.add_argument("--repeats", type=int, default=4)
    given = parser.parse_args()
    sizes = TINY if given.tiny else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    given.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with device:
        student, critic, teacher = (VideoDiT(sizes.dit) for _ in range(3))
    for model in (student, critic, teacher):
        torch.nn.init.normal_(model.head.head.weight, std=0.02)  # Wan's initial head is zero
    student, critic = (model.executed(Execution(recompute=True)) for model in (student, critic))
    teacher.cast(torch.bfloat16)
    frames, size = sizes.num_latent_frames, (sizes.height // 8, sizes.width // 8)
    graphs = CUDAGraphRunner() if is_cuda else None
    config = sizes.dit
    condition = Condition(
        torch.randn(1, 20, config.text_dim, device=device),
        torch.randn(1, 257, config.image_dim, device=device),
        torch.randn(1, frames, config.condition_channels, *size, device=device),
    )
    batch = EncodedBatch(
        [0],
        condition,
        torch.randn(1, 20, config.text_dim, device=device),
        size,
        first_latent=torch.randn(1, 1, config.out_channels, *size, device=device),
    )
    plan = StreamPlan(block_frames=4, window_frames=13, sink_frames=5, sigmas=SIGMAS)
    seeds = {}
    for wanted in map(int, given.exits.split(",")):
        draws = next(seed for seed in range(99) if KeyedRNG(seed).integer(0, "exit_step", 0, 4) == wanted)
        seeds[wanted] = draws
    results = []
    gradients = {}
    for name in given.ways.split(";"):
        for exit_step, seed in seeds.items():
            denoiser = Denoiser(
                student, graphs=graphs, batched_exit_backward=name == "joined", replays=name == "packed"
            )
            networks = {"generator": student, "critic": critic}, {"teacher": teacher}
            parts = Parts(denoiser, *networks, KeyedRNG(seed), plan, shift=5.0, num_frames=frames)
            objective = Dmd(parts, DmdConfig(teacher="toy", guidance=3.0))
            times = []
            for repeat in range(given.repeats + 2):
                if is_cuda and repeat == 2:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                seconds, loss = update(objective, batch, 0, device)
                objective._clips.clear()
                if repeat >= 2:
                    times.append(seconds)
            peak = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None
            own = {n: p.grad.detach().float().cpu() for n, p in student.named_parameters() if "blocks.1." in n}
            first = gradients.setdefault(exit_step, own)
            error = max(float((own[n] - first[n]).norm() / (first[n].norm() + 1e-30)) for n in own)
            row = {"way": name, "exit step": exit_step, "seconds": sorted(times)[len(times) // 2], "least": min(times)}
            row |= {"peak GiB": peak, "loss": loss, "largest relative difference of gradients": error}
            results.append(row)
            print(json.dumps(row), flush=True)
            (given.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            student.zero_grad(set_to_none=True)
            if is_cuda:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
