"""Two GPUs beside one, at full size with random weights: samples a second in distillation, and sequence parallelism.

    python -m benchmarks.two_gpus -o outputs/two_gpus           (in the repository; --tiny rehearses it on a CPU)

One command on a machine with two GPUs; it starts torchrun itself. Sizes and random weights are those of
`benchmarks/runs.py`: Wan2.1-Fun-1.3B-InP, 480x832, 21 latents. Parts, in this order (`--parts` takes some):

- files: weights, encoders, pictures, and their encodings (`longtake encode`);
- train: `longtake train`, stage distill (float32 master weights of student and critic with AdamW
  and an average, bfloat16 autocast, activation checkpointing), from the encodings, with one seed and so the same exit
  steps each time: one GPU with batch 1; two GPUs with batch 1 a GPU; two GPUs that compute one sample together
  (`parallel.sequence=2`), both with whole weights on each (`parallel.data_parallel=ddp`); batch 1 a GPU once more with
  sharded weights; and one sample together once more without activation checkpointing, for which two GPUs of 141 GB have
  the memory (121 GiB each) and one has not (190 GiB). The first iterations, in which passes are recorded as CUDA graphs
  (`--warm-up`: with the second update of the student all are), are not counted;
- passes: one pass of the transformer in bfloat16 on each GPU alone and then by both together, in turns: streaming (a
  block of 4 frames at a full window, without and with its commit, replayed as CUDA graphs), the whole clip, and forward
  and backward of it; the exchanges of one layer by themselves; and what the GPU does in a streaming pass, by kernel
  (torch's profiler);
- generate: a video with decoding, by one process that decodes where it computes, by one that decodes on the other GPU,
  and by two that compute each pass together and decode alike.

`results.json` and `results.md` in the output folder are rewritten whenever a number is new. Past `--budget-seconds` no
part begins and training is stopped. A part that fails is recorded and the others run; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.random_files import FULL, TINY, Sizes
from benchmarks.runs import GIB, STEPS, Run, files, stage, summary, synchronize, windows_of
from longtake.condition import Condition
from longtake.config.groups import ParallelConfig
from longtake.inference.generator import Generator
from longtake.inference.source import Source
from longtake.models.cache import KVCache
from longtake.models.execution import Execution
from longtake.models.sequence_parallel import SequenceParallel
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.plan import StreamPlan
from longtake.rollout.cuda_graphs import EAGER_PASSES, CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.toy.world import sample_world
from longtake.train.metrics import read_rows
from longtake.weights.load import load_dit

PARTS = ("files", "train", "passes", "generate")
BLOCK = 4
# Name of a training: ranks, and what is changed in the configuration
TRAININGS: dict[str, tuple[int, list[str]]] = {
    "one GPU": (1, []),
    "two GPUs, a sample each": (2, ["batch_size=2", "parallel.data_parallel=ddp"]),
    "two GPUs, one sample together": (2, ["parallel.sequence=2", "parallel.data_parallel=ddp"]),
    "two GPUs, a sample each, sharded": (2, ["batch_size=2"]),
    "two GPUs, one sample together, nothing recomputed": (
        2,
        ["parallel.sequence=2", "parallel.data_parallel=ddp", "activation_checkpointing=none"],
    ),
}


# ---- training --------------------------------------------------------------------------------------------------------
def prepare(run: Run, rows: int) -> dict[str, Any]:
    """Writes and encodes the files."""
    made = files(run, rows)
    window, sink = windows_of(run.sizes.windows)[0]
    config = stage(run, window, sink, 1, path=str(run.work / "lmdb"), kind="lmdb")
    if not run.longtake("encode", ["encode", str(config), "-o", str(run.work / "encoded")]):
        raise RuntimeError("the budget ended before the pictures were encoded")
    return made


def train(run: Run, name: str, iterations: int, warm_up: int) -> None:
    """Distils on one mesh, `warm_up` iterations before those that count; records a summary of the rows so far while it
    runs.
    """
    ranks, changes = TRAININGS[name]
    window, sink = windows_of(run.sizes.windows)[0]
    config = stage(run, window, sink, warm_up + iterations - 1, path=str(run.work / "encoded"), kind="encoded")
    folder = name.replace(",", "").replace(" ", "_")
    rows = run.output / folder / "metrics.jsonl"
    rows.unlink(missing_ok=True)

    def progress() -> None:
        found = read_rows(rows)
        counted = {
            "rows": [row["seconds"] for row in found[warm_up:]],
            "ranks": ranks,
            "batch": 2 if "batch_size=2" in changes else 1,
        }
        run.record(f"train, {name}", {**counted, **summary(found, iterations, warm_up)})
        run.record("train", compare(run.results))

    run.python(folder, ["longtake", "train", str(config), f"name={folder}", *changes], progress, ranks=ranks)


def compare(results: Mapping[str, Any]) -> dict[str, Any]:
    """Samples a second of each training, over the iterations that all of them made, and ratios to one GPU."""
    stated = {name: results.get(f"train, {name}", {}) for name in TRAININGS}
    found = {name: values for name, values in stated.items() if values.get("rows")}
    count = min((len(values["rows"]) for values in found.values()), default=0)
    if count == 0:
        return {}
    rates = {name: values["batch"] * count / sum(values["rows"][:count]) for name, values in found.items()}
    alone = rates.get("one GPU")
    result: dict[str, Any] = {"iterations compared": count}
    for name, rate in rates.items():
        result[f"samples/s, {name}"] = rate
        if alone and name != "one GPU":
            result[f"times one GPU, {name}"] = rate / alone
    return result


# ---- passes ----------------------------------------------------------------------------------------------------------
def measure_passes(sizes: Sizes, weights: Path, mesh: Mesh, rounds: int, repeats: int) -> dict[str, Any]:
    """Seconds of each pass alone on a rank and by all ranks together: medians over rounds that take turns."""
    device = mesh.device
    split = mesh.arranged(ParallelConfig(sequence=mesh.world_size)).sequence
    assert split is not None
    model = load_dit(weights, device, torch.bfloat16).eval().requires_grad_(False)
    # as `longtake generate` has it
    graphs = CUDAGraphRunner() if device.type == "cuda" else None
    torch.manual_seed(0)
    clip = torch.randn(1, sizes.num_latent_frames, sizes.dit.out_channels, sizes.height // 8, sizes.width // 8).to(
        device
    )
    condition = Condition(
        torch.randn(1, sizes.dit.text_len, sizes.dit.text_dim).to(device),
        torch.randn(1, 257 if sizes is FULL else 5, sizes.dit.image_dim or 0).to(device),
        torch.randn(1, sizes.num_latent_frames, sizes.dit.condition_channels, *clip.shape[3:]).to(device),
    )
    seconds: dict[str, dict[str, list[float]]] = {}
    outputs: dict[str, dict[str, Tensor]] = {"alone": {}, "together": {}}
    for _ in range(rounds):
        for how, group in (("alone", None), ("together", split)):
            denoiser = Denoiser(model.executed(Execution(group)), graphs=graphs)
            for name, work in passes(denoiser, clip, condition, windows_of(sizes.windows)[0]).items():
                outputs[how][name] = work().float()
                taken = timed_together(work, mesh, repeats)
                seconds.setdefault(name, {}).setdefault(how, []).append(taken)
    result: dict[str, Any] = {}
    for name, by in seconds.items():
        alone, together = median(by["alone"]), median(by["together"])
        a, b = outputs["alone"][name], outputs["together"][name]
        result[name] = {
            "ms alone": 1000 * alone,
            "ms together": 1000 * together,
            "times faster": alone / together,
            "relative difference": float((a - b).norm() / a.norm()),
        }
    result |= exchanges(sizes, split, mesh, repeats)
    for how, group in (("alone", None), ("together", split)):
        denoiser = Denoiser(model.executed(Execution(group)), graphs=graphs)
        streamed = passes(denoiser, clip, condition, windows_of(sizes.windows)[0])
        work = next(iter(streamed.values()))
        work()
        result[f"kernels of a streaming pass {how}, ms"] = kernels(work, mesh)
    if device.type == "cuda":
        result["peak GiB"] = torch.cuda.max_memory_allocated(device) / GIB
    return result


def passes(
    denoiser: Denoiser, clip: Tensor, condition: Condition, window: tuple[int, int]
) -> dict[str, Callable[[], Tensor]]:
    """The passes that are measured, of a model as it is split now."""
    model, size, window_frames = denoiser.model, (clip.shape[3], clip.shape[4]), window[0]
    block, one = clip[:, :BLOCK], torch.ones(1, device=clip.device)
    cache = model.new_cache(StreamPlan(block_frames=BLOCK, window_frames=window[0], sink_frames=window[1]), 1, size)
    with torch.no_grad():
        while cache.position < window_frames + BLOCK:
            denoiser(block, 0 * one, condition, cache, commit=True)

    def streamed() -> Tensor:
        with torch.no_grad():
            return denoiser(block, one, condition, cache)

    def committed() -> Tensor:
        with torch.no_grad():
            return denoiser(block, 0 * one, condition, cache, commit=True)

    def whole() -> Tensor:
        with torch.no_grad():
            return model(clip, one, condition)

    recomputed = model.executed(replace(model.execution, recompute=True))

    def trained() -> Tensor:
        model.requires_grad_(True)
        out = recomputed(clip, one, condition)
        out.square().mean().backward()
        model.requires_grad_(False).zero_grad(set_to_none=True)
        return out.detach()

    held = f"{BLOCK} frames, window {window_frames}"
    again = _fresh(cache, committed)
    for _ in range(EAGER_PASSES + 1 if denoiser.graphs is not None else 0):  # until they are replayed
        streamed()
        again()
    return {
        f"streaming pass, {held}": streamed,
        f"streaming pass with commit, {held}": again,
        f"whole clip, {clip.shape[1]} frames": whole,
        f"forward and backward, {clip.shape[1]} frames": trained,
    }


def _fresh(cache: KVCache, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`work` at the same position each time, so that its result does not depend on how often it ran."""
    position = cache.position

    def again() -> Tensor:
        cache.position = position
        return work()

    return again


def exchanges(sizes: Sizes, split: SequenceParallel, mesh: Mesh, repeats: int) -> dict[str, Any]:
    """Milliseconds of both exchanges of all layers, nothing else, for a block and for a clip."""
    shard = split.shard(sizes.tokens)
    result = {}
    for frames in (BLOCK, sizes.num_latent_frames):
        shape = (1, frames, sizes.tokens, sizes.dit.num_heads, sizes.dit.head_width)
        q = shard.shard(torch.randn(shape, device=mesh.device).bfloat16())

        def work(q: Tensor = q) -> Tensor:
            return shard.to_tokens(shard.to_heads(q, q, q)[0])

        seconds = timed_together(work, mesh, repeats)
        result[f"exchanges of {sizes.dit.num_layers} layers, {frames} frames, ms"] = (
            1000 * seconds * sizes.dit.num_layers
        )
    return result


def kernels(work: Callable[[], Any], mesh: Mesh, most: int = 12) -> dict[str, float]:
    """Milliseconds that this rank's GPU (a CPU in a rehearsal) spends on each kind of kernel, the longest first."""
    on_gpu = mesh.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    mesh.every(lambda: None)
    with profile(activities=[activity]) as seen:
        work()
        synchronize(mesh.device)
    found = {e.key[:60]: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in seen.key_averages()}
    ordered = sorted(found.items(), key=lambda pair: -pair[1])
    return {"sum": sum(found.values()) / 1000, **{name: time / 1000 for name, time in ordered[:most]}}


def timed_together(work: Callable[[], Any], mesh: Mesh, repeats: int) -> float:
    """Seconds of one call, begun by all ranks at once, of the slowest rank; after one that is not counted."""
    work()
    synchronize(mesh.device)
    mesh.every(lambda: None)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(mesh.device)
    return float(mesh.gather([(time.perf_counter() - start) / repeats]).max())


WAYS = ("alone", "decoding beside", "together")


def generate(sizes: Sizes, work: Path, mesh: Mesh, way: str, seconds: float) -> dict[str, Any]:
    """Seconds a block of a video in bfloat16, with decoding, from the fifth block on; this process's part of it."""
    window, sink = windows_of(sizes.windows)[0]
    plan = {"block_frames": BLOCK, "window_frames": window, "sink_frames": sink}
    rules = {"height": sizes.height, "width": sizes.width, "steps": STEPS, "plan": plan, "precision": "bf16"}
    other = f"cuda:{1 - (mesh.device.index or 0)}" if mesh.device.type == "cuda" else "cpu"
    split = mesh.arranged(ParallelConfig(sequence=mesh.world_size)).sequence
    source = Source.of_model(work / "weights", work / "encoders", None, rules)
    beside = other if way == "decoding beside" else None
    generator = Generator.build(source, mesh.device, split=split, decode_device=beside)
    picture = np.random.default_rng(1).integers(0, 256, (sizes.height, sizes.width, 3), dtype=np.uint8)
    frames = 1 + 4 * BLOCK * (4 + max(1, round(seconds * generator.fps / (4 * BLOCK))))
    times = [time.perf_counter()]
    chunks = generator.stream(picture, sample_world(0, 0).caption, num_frames=frames, ahead=generator.is_ahead)
    for _ in chunks:
        times.append(time.perf_counter())
    # The last is fetched without another block beside it.
    taken = [after - before for before, after in zip(times, times[1:])][5:-1]
    middle = sum(taken) / max(1, len(taken))
    return {"seconds a block": middle, "frames/s": 4 * BLOCK / middle if taken else None, "frames": frames}


def generate_in_ranks(run: Run, args: argparse.Namespace, way: str) -> None:
    """A video in one way, by its processes."""
    file = run.output / "generate.json"
    file.unlink(missing_ok=True)
    arguments = ["-o", str(run.output), "--worker", str(run.work), "--way", way, "--device", run.device.type]
    arguments += ["--seconds", str(args.seconds), *(["--tiny"] if args.tiny else [])]
    if run.python("generate", ["benchmarks.two_gpus", *arguments], ranks=2 if way == "together" else 1):
        run.record("generate", {**run.results.get("generate", {}), way: json.loads(file.read_text())})


def worker(args: argparse.Namespace) -> None:
    """What each rank of the parts `passes` and `generate` does."""
    with init_mesh(args.device) as mesh:
        if args.way:
            made = generate(TINY if args.tiny else FULL, args.worker, mesh, args.way, args.seconds)
            if mesh.is_main:
                (args.output / "generate.json").write_text(json.dumps(made))
            return
        found = measure_passes(TINY if args.tiny else FULL, args.worker, mesh, args.rounds, args.repeats)
        if mesh.is_main:
            (args.output / "passes.json").write_text(json.dumps(found))


def measure_in_ranks(run: Run, args: argparse.Namespace) -> None:
    """The part `passes`, in two processes."""
    arguments = ["-o", str(run.output), "--worker", str(run.work / "weights"), "--device", run.device.type]
    arguments += ["--rounds", str(args.rounds), "--repeats", str(args.repeats), *(["--tiny"] if args.tiny else [])]
    file = run.output / "passes.json"
    file.unlink(missing_ok=True)
    if run.python("passes", ["benchmarks.two_gpus", *arguments], ranks=2):
        run.record("passes", json.loads(file.read_text()))
    else:
        run.record("passes", {"stopped": "the budget ended"})


# ---- the command -----------------------------------------------------------------------------------------------------
def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results and logs (small)")
    parser.add_argument("--work", type=Path, help="folder of weights and data, 4 GB (default: work/ in the output)")
    names = "; ".join(f"{number} {name}" for number, name in enumerate(TRAININGS))
    parser.add_argument("--trainings", default="0,1,2,3", help=f"of: {names} (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, with commas (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=10, help="iterations that count (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=6, help="iterations before them (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="pictures in the data set (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of alone and together (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="calls of a pass in a turn (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=12, help="length of the videos (default: %(default)s)")
    parser.add_argument("--budget-seconds", type=float, default=560, help="wall-clock limit (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: GPUs if there are any)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny sizes")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts, in their order; the exit code."""
    args = parse(arguments)
    if args.worker is not None:
        worker(args)
        return 0
    run = Run(args)
    is_cuda = run.device.type == "cuda"
    if is_cuda and torch.cuda.device_count() < 2:
        print(f"two GPUs are needed and {torch.cuda.device_count()} is visible; --device cpu --tiny rehearses it")
        return 1
    name = ", ".join(torch.cuda.get_device_name(k) for k in range(2)) if is_cuda else platform.machine()
    run.record("machine", {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")})
    trainings = [name for number, name in enumerate(TRAININGS) if str(number) in args.trainings.split(",")]
    work: dict[str, list[Callable[[], None]]] = {
        "files": [lambda: run.record("files", prepare(run, args.rows))],
        "train": [lambda n=n: train(run, n, args.iterations, args.warm_up) for n in trainings],  # type: ignore[misc]
        "passes": [lambda: measure_in_ranks(run, args)],
        "generate": [lambda w=w: generate_in_ranks(run, args, w) for w in WAYS],  # type: ignore[misc]
    }
    return run.parts(work, args.parts.split(","))


if __name__ == "__main__":
    sys.exit(main())
