"""Several GPUs beside one, in one run: a training and a stream, what they make, and the memory that was foreseen.

    torchrun --nproc-per-node 2 -m benchmarks.side_by_side wan/i2v_1_3b/distill validate_every=0 --json FILE
    torchrun --nproc-per-node 2 -m benchmarks.side_by_side --random wan2.1-fun-1.3b-inp --json FILE

(in the repository, on a machine of so many GPUs; `--device cpu` rehearses it). It calls what `longtake bench` calls,
one way after the other in the same processes, so that all ways meet the same machine and what one compiled serves the
next:

- of a training: one GPU (the others begin the same, to compile what they will need); a sample on each with whole
  weights (`parallel.data_parallel=ddp`); one sample by all together (`parallel.sequence`), with whole weights; and a
  sample on each with sharded ones. Losses and gradients of the first iteration tell whether one sample is
  learnt from alike, and `longtake doctor`, which runs beside on the CPU, what memory it foresaw for that iteration;
- of a stream: one GPU; the same with another GPU that decodes; and each pass by all GPUs together. The frames of the
  first block tell whether they make the same video.

One GPU alone shows what sharding costs but for the transfer, its weights in one shard beside whole ones:

    torchrun --nproc-per-node 1 -m benchmarks.side_by_side wan/i2v_1_3b/distill validate_every=0 --ways one,sharded

Weights are random where there are none. `--ways` takes some, by their beginnings. `--json FILE` is written anew after
each way; one that fails is recorded and the others run, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.bench.random_models import random_generator, random_settings
from longtake.bench.report import machine, text
from longtake.bench.streaming import peak_gib
from longtake.bench.training import bench_training
from longtake.bench.watched import PROMPT, picture_of, settled
from longtake.config.generation import changes_of
from longtake.config.groups import ParallelConfig
from longtake.errors import LongtakeError
from longtake.evaluation.report import write_json
from longtake.inference.cache_pool import CachePool
from longtake.inference.generator import Generator
from longtake.models.execution import Execution
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.parallel.together import RanksApart, Together
from longtake.rollout.cuda_graphs import CUDAGraphRunner, forget_all
from longtake.rollout.denoise import Denoiser

ALONE = "one GPU"
WHOLE = ["parallel.data_parallel=ddp", "parallel.fused_shards=false"]
# What is changed in the configuration, for N ranks and batches of B
TRAININGS = {
    ALONE: ["batch_size=B"],
    "a sample each": ["batch_size=NB", *WHOLE],
    "together, one sample": ["batch_size=B", *WHOLE, "parallel.sequence=N"],
    "sharded, a sample each": ["batch_size=NB", "parallel.data_parallel=fsdp"],
}
STREAMS = (ALONE, "decoding beside", "together")
GIB = 2**30


class Record:
    """What was found of each way, printed and written by the first rank."""

    def __init__(self, mesh: Mesh, file: Path | None) -> None:
        self.mesh, self.file, self.failed = mesh, file, False
        self.found: dict[str, Any] = machine(mesh.device) | {"ranks": mesh.world_size}
        self._together = Together(mesh)

    def add(self, way: str, work: Callable[[], Mapping[str, Any] | None]) -> None:
        """What `work` finds, which all ranks call; of the first rank's numbers, how many times those of one GPU."""
        try:
            values = dict(self._together.every(work)[0] or {})
        except RanksApart:
            raise
        except (LongtakeError, RuntimeError) as error:  # out of memory is one
            values, self.failed = {"failed": f"{type(error).__name__}: {error}"[:2000]}, True
        alone = self.found.get(ALONE, {})
        for name in ("samples_per_s", "frames_per_s"):
            if way != ALONE and name in values and name in alone:
                values["times one GPU"] = values[name] / alone[name]
        self.tell({way: values})

    def tell(self, values: Mapping[str, Any]) -> None:
        """Adds and shows values."""
        self.found |= values
        if self.mesh.is_main:
            print(text(values), flush=True)
            if self.file is not None:
                write_json(self.file, self.found)


def released(device: torch.device) -> None:
    """Gives back what a training has left."""
    forget_all()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- a training ------------------------------------------------------------------------------------------------------
def changed(args: argparse.Namespace, way: str, ranks: int) -> list[str]:
    """The overrides of one way."""
    words = {"NB": ranks * args.batch, "B": args.batch, "N": ranks}
    told = (key.partition("=") for key in TRAININGS[way])
    return [*args.overrides, *(f"{key}={words.get(value, value)}" for key, _, value in told)]


def train(args: argparse.Namespace, mesh: Mesh, record: Record) -> None:
    """Each way of a training, and what the doctor said of it."""
    ways = chosen(args, list(TRAININGS))
    # Of one shard it would say what it says of whole weights.
    asked = [way for way in ways if mesh.is_main and (way == ALONE or mesh.world_size > 1)]
    doctors = {way: doctor(args, way, mesh.world_size) for way in asked}
    try:
        for way in ways:
            overrides = changed(args, way, mesh.world_size)

            def measured(way: str = way, overrides: list[str] = overrides) -> Mapping[str, Any] | None:
                if way != ALONE:
                    return numbers(args.config, overrides, mesh, args.steps)
                # The other ranks compile what they will need, and stop after an iteration.
                return numbers(args.config, overrides, Mesh(device=mesh.device), args.steps if mesh.is_main else 1)

            record.add(way, measured)
            released(mesh.device)
        record.tell({"doctor": {way: foreseen(doctors[way], record.found[way]) for way in doctors}})
    finally:
        for process in doctors.values():
            process.kill()


def numbers(config: Path, overrides: list[str], mesh: Mesh, steps: int) -> Mapping[str, Any]:
    """What is measured of a training, without what its kernels could do."""
    found: dict[str, Any] = {}
    with closing(bench_training(config, overrides, mesh, steps=steps)) as parts:
        for part in islice(parts, 2):
            found |= part
    return {name: value for name, value in found.items() if name not in ("device", "versions", "ranks")}


def doctor(args: argparse.Namespace, way: str, ranks: int) -> subprocess.Popen[str]:
    """`longtake doctor` for GPUs, on this machine's CPU and seeing none of its GPUs."""
    words = [str(args.config), *changed(args, way, ranks), "--gpus", str(1 if way == ALONE else ranks)]
    command = [sys.executable, "-m", "longtake", "doctor", *words, "--device", "H200", "--json"]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    alone |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=alone, stdout=subprocess.PIPE, text=True)


def foreseen(process: subprocess.Popen[str], measured: Mapping[str, Any]) -> dict[str, Any]:
    """GiB that a rank needs, without encoders, beside the most of the first iteration, which is what is traced."""
    said = process.communicate(timeout=300)[0]
    if process.returncode not in (0, 1):  # 1: files are missing, or it does not fit
        return {"failed": process.returncode}
    need = json.loads(said)["stages"][0]["need_bytes"]
    total, most = (sum(need.values()) - need["encoders"]) / GIB, measured.get("first_peak_gib")
    return {"gib": total, "measured_gib": most, "measured / foreseen": None if most is None else most / total}


# ---- a stream --------------------------------------------------------------------------------------------------------
def stream(args: argparse.Namespace, mesh: Mesh, record: Record) -> None:
    """Each way of a stream, of the same weights."""
    half = {"precision": "bf16"} if mesh.device.type == "cuda" else {}
    settings = random_settings(args.random, {**half, **changes_of(*args.overrides)})
    generator = random_generator(args.random, settings, mesh.device, small_text=True)
    expected: list[np.ndarray] = []

    def measured(way: str) -> Mapping[str, Any] | None:
        if way != "together" and not mesh.is_main:
            return None
        made = as_asked(generator, way, mesh)
        found = {"warm_up_blocks": made.warm_up(), **streamed(made, args.blocks)}
        if way == "together":
            found["rank_peak_gib"] = mesh.every(lambda: found["peak_gib"])
        frames = first_block(made)
        if way == ALONE:
            expected.append(frames)
        elif mesh.is_main and expected:
            apart = np.abs(frames.astype(float) - expected[0])
            found |= {"differs_by": {"mean": float(apart.mean()), "most": float(apart.max()), "of": 255}}
        return found

    for way in chosen(args, list(STREAMS)):
        record.add(way, lambda way=way: measured(way))


def as_asked(generator: Generator, way: str, mesh: Mesh) -> Generator:
    """The generator in one way."""
    if way == "decoding beside":
        on_cpu = mesh.device.type == "cpu"
        return replace(generator, decoder=generator.encoders.vae.copy_to("cpu" if on_cpu else "cuda:1"))
    if way == "together":
        split = mesh.arranged(ParallelConfig(sequence=mesh.world_size)).sequence
        graphs = None if mesh.device.type == "cpu" else CUDAGraphRunner()
        denoiser = Denoiser(generator.model.executed(Execution(split)), graphs=graphs)
        return replace(generator, denoiser=denoiser, caches=CachePool())
    return generator


def streamed(generator: Generator, blocks: int) -> dict[str, Any]:
    """Frames a second of a warm generator, and milliseconds of the parts of a block."""
    if generator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(generator.device)
    found = settled(generator, blocks)
    return {
        "frames_per_s": found.frames / found.block_seconds,
        "block_ms": 1000 * found.block_seconds,
        "ms": {name: 1000 * seconds for name, seconds in found.parts.items()},
        "peak_gib": peak_gib(generator.device),
        "decoding_peak_gib": peak_gib(generator.decoding_device),
    }


def first_block(generator: Generator) -> np.ndarray:
    """The frames of the first block of a video."""
    length = generator.first_pixels(given=True) + generator.plan.block_frames * generator.encoders.vae.temporal_stride
    return np.concatenate(list(generator.stream(picture_of(generator), PROMPT, num_frames=length)))


# ---- the command -----------------------------------------------------------------------------------------------------
def chosen(args: argparse.Namespace, ways: list[str]) -> list[str]:
    """Those that are asked for."""
    return [way for way in ways if args.ways is None or way.startswith(tuple(args.ways.split(",")))]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="[CONFIG] [KEY=VALUE]", help="a stage and values, or a stream's")
    parser.add_argument("--random", metavar="PRESET", help="in place of CONFIG: a stream of random weights")
    parser.add_argument("--ways", help="of the ways, with commas, by their beginnings (default: all)")
    parser.add_argument("--batch", type=int, default=1, help="samples of one GPU (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="iterations that count (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=6, help="blocks that count (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: GPUs if there are any)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    args = parser.parse_args(arguments)
    is_stage = bool(args.words) and "=" not in args.words[0]
    if is_stage == (args.random is not None):
        parser.error("give either CONFIG, for a training, or --random PRESET, for a stream")
    args.config = Path(args.words[0]) if is_stage else None
    args.overrides = args.words[is_stage:]
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measures on the ranks of torchrun; the exit code."""
    args = parse(arguments)
    with init_mesh(args.device, one_too=True) as mesh:
        if not mesh.is_distributed:
            print(
                "one process has nothing beside it; start it with torchrun --nproc-per-node 2 -m ... (or 1: its help)"
            )
            return 1
        record = Record(mesh, args.json)
        (stream if args.config is None else train)(args, mesh, record)
        return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
