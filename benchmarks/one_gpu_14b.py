"""Distillation of the 14B image-to-video model on one GPU, with random weights: memory and seconds.

    python -m benchmarks.one_gpu_14b -o outputs/one_gpu_14b        (in the repository; --tiny rehearses it on a CPU)

Wan2.1-I2V-14B-480P as teacher, critic and student at once: one frozen base in bfloat16 (`shared_base`) with low-rank
updates on every linear layer of the blocks for student and critic, AdamW and an average of the student's updates in
float32. 480x832, 21 latents in blocks [1, 4, 4, 4, 4, 4], window 13 with sink 5, full activation checkpointing, batch
of 1. Beside it, the 1.3B model of that kind, and the same trained whole (three networks, float32 master weights).

Iteration 0 is one update of the student and one of the critic on the same clips; iteration 1 is one of the critic with
a roll-out of its own. Both exit after the last of four denoising steps, the longest way. The networks, the objective,
the optimizers and the loop are those of `longtake train`; weights and encodings are drawn on the GPU, and nothing is
read or saved. Each case is a process of its own; `results.json` and `results.md` in the output folder are rewritten
after each. A case that fails or misses its limit is recorded, the others run, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_files import FULL, TINY, Sizes
from longtake.checkpoint.save import RunInfo
from longtake.condition import Condition
from longtake.config.stage import StageConfig
from longtake.models.dit import VideoDiT
from longtake.objectives.base import LossResult, Objective
from longtake.objectives.batch import EncodedBatch
from longtake.parallel.mesh import Mesh
from longtake.rng import KeyedRNG
from longtake.train import stage as stages
from longtake.train.loop import train
from longtake.train.metrics import PhaseTimer, read_rows
from longtake.train.networks import Builder
from longtake.weights.load import Opened
from longtake.weights.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
STEPS = [1.0, 0.75, 0.5, 0.25]
ITERATIONS = 2
IMAGE_TOKENS = 257
_FACTOR = "lora_B.default.weight"  # 0 before the first update
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One measurement: sizes, rank of the updates (None: trained whole) and the most GiB that it may take."""

    sizes: Sizes
    rank: int | None
    limit_gib: float | None = None


CASES = {
    "14b": Case(replace(FULL, dit=PRESETS["wan2.1-i2v-14b-480p"]), 128, 132),
    "1.3b": Case(FULL, 256, 31),
    "1.3b-whole": Case(FULL, None),
}
_TINY_CASES = {"14b": Case(TINY, 4), "1.3b": Case(TINY, 4), "1.3b-whole": Case(TINY, None)}


# ---- one case --------------------------------------------------------------------------------------------------------
def stage(case: Case, name: str, folder: Path) -> StageConfig:
    """The configuration of a case; the paths in it are never opened."""
    sizes, window = case.sizes, case.sizes.windows.split(",")[0].split(":")
    critic: dict[str, Any] = {"lr": 4e-7, "beta1": 0.0}
    objective: dict[str, Any] = {"kind": "dmd", "teacher": "./random", "critic": critic}
    tree: dict[str, Any] = {
        "objective": objective,
        "name": name,
        "logdir": str(folder),
        "seed": last_exit_seed(),
        "init_from": "./random",
        "video": {"height": sizes.height, "width": sizes.width, "num_latent_frames": sizes.num_latent_frames},
        "plan": {"block_frames": 4, "window_frames": int(window[0]), "sink_frames": int(window[1])},
        "flow": {"steps": STEPS},
        "data": {"path": "./random", "kind": "encoded"},
        "batch_size": 1,
        "micro_batch_size": 1,
        "max_steps": ITERATIONS,
        "optim": {"lr": 2e-6, "beta1": 0.0},
        "precision": "bf16",
        "activation_checkpointing": "full",
        "save_every": 0,
        "validate_every": 0,
    }
    if case.rank is not None:
        tree["lora"], objective["shared_base"] = {"rank": case.rank}, True
        critic["lora"] = {"rank": case.rank}
    return StageConfig.from_tree(tree)


def last_exit_seed() -> int:
    """A seed with which every iteration stops at the last denoising step."""
    last = len(STEPS) - 1
    exits = (
        (seed, {KeyedRNG(seed).integer(step, "exit_step", 0, len(STEPS)) for step in range(ITERATIONS)})
        for seed in range(10**4)
    )
    return next(seed for seed, found in exits if found == {last})


def random_weights(case: Case, device: torch.device, seed: int) -> Opened:
    """Random weights of the sizes of a case, drawn where they are wanted, one after the other."""
    with torch.device("meta"):
        model = VideoDiT(case.sizes.dit)

    def read(names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = None if names is None else set(names)
        for number, (name, parameter) in enumerate(shapes.items()):
            if wanted is None or name in wanted:
                generator = torch.Generator(device).manual_seed(1000 * seed + number)
                value = torch.randn(parameter.shape, device=device, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    yield name, value.mul_(0.1).add_(1)
                elif parameter.ndim > 1 and "modulation" not in name:
                    yield name, value.div_(parameter[0].numel() ** 0.5)
                else:
                    yield name, value.mul_(0.1)

    shapes = dict(model.state_dict())
    return Opened(model, read, str)


@dataclass(kw_only=True)
class RandomWeights(Builder):
    """The networks of a stage as a training builds them, from random weights instead of files."""

    case: Case

    def check_start(self) -> None:
        """There are no files that could be of another stage."""

    def weights(self, name: str) -> Path:
        """A name for the weights of a network; one for all that share a base."""
        return Path("generator" if self.case.rank is not None else name)

    def open(self, source: Path) -> Opened:
        """Weights of that name."""
        return random_weights(self.case, self.mesh.device, ("generator", "critic", "teacher").index(source.name))

    def identity(self, source: Path) -> str:
        """The name."""
        return source.name


class Batches:
    """The same random encodings for ever."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.position = 0
        dit, height, width = sizes.dit, sizes.height // 8, sizes.width // 8

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(len(shape)))

        frames = random(1, sizes.num_latent_frames, dit.condition_channels, height, width)
        frames[:, :, :4] = 0
        frames[:, 0, :4] = 1
        tokens = random(1, IMAGE_TOKENS, dit.image_dim or 1)
        condition = Condition(random(1, dit.text_len, dit.text_dim), tokens, frames)
        empty = torch.zeros(1, 1, dit.text_dim, device=device)
        self.batch = EncodedBatch([0], condition, empty, (height, width), first_latent=frames[:, :1, 4:])

    def seek(self, position: int) -> None:
        """Nothing to do: all micro-batches are equal."""
        self.position = position

    def __next__(self) -> list[EncodedBatch]:
        self.position += 1
        return [self.batch]


class Watched(Objective):
    """An objective, and the most memory that was taken during each update: from its loss to the next one's."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective, self.networks, self.device = objective, objective.networks, device
        self.peaks: dict[str, float] = {}
        self._now: str | None = None

    def turns(self, step: int) -> list[str]:
        """As the objective's."""
        return self.objective.turns(step)

    def loss(self, turn: str, batch: Any, step: int) -> LossResult:
        """As the objective's."""
        self.finish()
        self._now = f"{turn} update, iteration {step}"
        return self.objective.loss(turn, batch, step)

    def finish(self) -> None:
        """Ends the update that runs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            if self._now is not None:
                self.peaks[self._now] = torch.cuda.max_memory_allocated(self.device) / GIB
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self._now is not None:
            self.peaks[self._now] = 0.0


def held(networks: Mapping[str, torch.nn.Module], real: VideoDiT, state: Any) -> dict[str, float]:
    """GiB of what stays from one iteration to the next, by what it is."""
    kinds: dict[str, dict[int, int]] = {"frozen weights": {}, "trained weights": {}, "optimizer": {}, "average": {}}

    def add(kind: str, tensors: Iterable[Tensor]) -> None:
        kinds[kind] |= {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}

    for network in (*networks.values(), real):
        for parameter in network.parameters():
            add("trained weights" if parameter.requires_grad else "frozen weights", [parameter])
    for optimizer in state.optimizers.values():
        add("optimizer", optimizer.tensors().values())
    for average in state.ema.values():
        add("average", average.tensors().values())
    return {kind: sum(sizes.values()) / GIB for kind, sizes in kinds.items()}


def run_case(name: str, case: Case, folder: Path, device: torch.device) -> dict[str, Any]:
    """Trains two iterations; what it took."""
    start = time.perf_counter()
    mesh, config = Mesh(device=device), stage(case, name, folder)
    builder = RandomWeights(config, mesh, case=case)
    networks = builder.build()
    trained, real = networks.trained, networks.frozen["teacher"]
    phases = PhaseTimer()
    watched = Watched(builder.objective(networks, None, phases), device)
    state = builder.state(watched)
    objective = stages.InPrecision(watched, mesh, bf16=True)
    # On the host: copies on the GPU would count as memory of the training.
    before = {key: value.cpu().clone() for key, value in state.tensors().items() if key.endswith(_FACTOR)}
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in real.parameters()),
        "trained parameters": {
            key: sum(p.numel() for p in o.parameters.values()) for key, o in state.optimizers.items()
        },
        "held GiB": held(trained, real, state),
        "set-up seconds": time.perf_counter() - start,
    }
    batches = Batches(case.sizes, device)
    train(
        state,
        objective,
        batches,
        config,
        mesh=mesh,
        info=RunInfo(),
        phases=phases,
    )
    watched.finish()
    rows = read_rows(config.folder / "metrics.jsonl")
    losses = {f"{key}, iteration {row['step']}": row[key] for row in rows for key in row if key.endswith("_loss")}
    after = state.tensors()
    result["losses"] = losses
    result["finite"] = bool(losses) and None not in losses.values()
    result["updates that moved"] = sum(not torch.equal(after[key].cpu(), value) for key, value in before.items())
    result["updates"] = len(before)
    result["seconds"] = {
        f"{key.rpartition('/')[2]}, iteration {row['step']}": row[key]
        for row in rows
        for key in ("seconds", "seconds_of/generator", "seconds_of/critic", "seconds/rollout", "seconds/scores")
        if key in row
    }
    if device.type == "cuda":
        # The loop reads and resets the peak at the end of an iteration: that of its last update, the critic's.
        ends = {f"critic update, iteration {row['step']}": row["memory_gib"] for row in rows}
        result["peak GiB"] = {key: max(peak, ends.get(key, 0.0)) for key, peak in watched.peaks.items()}
        result["most GiB"] = max(result["peak GiB"].values())
        result["reserved GiB"] = torch.cuda.max_memory_reserved(device) / GIB
    result["limit GiB"] = case.limit_gib
    result["case seconds"] = time.perf_counter() - start
    return result


# ---- all cases -------------------------------------------------------------------------------------------------------
def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: a row a number, a column a case."""
    flat = {case: dict(_flat(values)) for case, values in results.items()}
    names = list(dict.fromkeys(name for values in flat.values() for name in values))
    lines = ["| | " + " | ".join(flat) + " |", "|---" * (len(flat) + 1) + "|"]
    for name in names:
        cells = [values.get(name, "") for values in flat.values()]
        lines.append(f"| {name} | " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            yield prefix + name, value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results and logs (small)")
    parser.add_argument("--cases", default=",".join(CASES), help="cases to run, with commas (default: %(default)s)")
    parser.add_argument("--budget-seconds", type=float, default=540, help="wall-clock limit (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny sizes")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one case, in this process
    args = parser.parse_args(arguments)
    if unknown := set(args.cases.split(",")) - set(CASES):
        parser.error(f"--cases {', '.join(sorted(unknown))}: the cases are {', '.join(CASES)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases, each in a process; the exit code."""
    args = parse(arguments)
    started, output = time.monotonic(), args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if args.only:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        result = run_case(args.only, (_TINY_CASES if args.tiny else CASES)[args.only], output, device)
        (output / f"{args.only}.json").write_text(json.dumps(result, indent=1) + "\n")
        return 0
    results: dict[str, Any] = {}
    failed = False
    for name in args.cases.split(","):
        results[name] = outcome = _run_process(name, args, output, args.budget_seconds - (time.monotonic() - started))
        over = outcome.get("limit GiB") is not None and outcome.get("most GiB", 0.0) > outcome["limit GiB"]
        failed |= over or "error" in outcome or not outcome.get("finite")
        (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (output / "results.md").write_text(table(results))
        print(f"{name}: {time.monotonic() - started:.0f} s in all{' OVER ITS LIMIT' if over else ''}", flush=True)
    print(table(results))
    return int(failed)


def _run_process(name: str, args: argparse.Namespace, output: Path, seconds: float) -> dict[str, Any]:
    if seconds <= 0:
        return {"error": "no time is left"}
    command = [sys.executable, "-m", "benchmarks.one_gpu_14b", "-o", str(output), "--only", name]
    command += ["--tiny"] * args.tiny + (["--device", args.device] if args.device else [])
    # Segments that grow leave no holes between the sizes of the two updates.
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    file, log = output / f"{name}.json", output / f"{name}.log"
    file.unlink(missing_ok=True)
    with log.open("w") as out:
        try:
            subprocess.run(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=seconds, check=True
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {seconds:.0f} s"}
        except subprocess.CalledProcessError:
            return {"error": log.read_text()[-2000:].replace("\n", " ")}
    return json.loads(file.read_text())


if __name__ == "__main__":
    sys.exit(main())
