"""Distillation and streaming at full size on one GPU, with random weights: memory and seconds.

    python -m benchmarks.full_size -o outputs/full_size            (in the repository; --tiny rehearses it on a CPU)

Wan2.1-Fun-1.3B-InP's transformer and VAE at their published sizes, 480x832, 21 latents in blocks [1, 4, 4, 4, 4, 4];
all weights are random, and the text and image encoders have few layers, since only the shapes of their results count.
Parts, in this order (`--parts` takes some of them; later ones find what earlier ones wrote under `--work`):

- rates: what this machine does in bfloat16 matrix products and in attention, at the shapes of the roll-out;
- files: weights, encoders, and pictures with prompts in the published LMDB layout;
- encode: `longtake encode` of that LMDB;
- train: `longtake train`, stage distill, from the encodings, once for each of `--windows`: float32 master weights of
  student and critic with AdamW and an average, bfloat16 autocast, activation checkpointing, batch 1, nothing saved.
  The first iteration is a warm-up and is not counted;
- generate: one long video in bfloat16, decoded as it streams.

`results.json` and `results.md` in the output folder are rewritten whenever a number is new, so that a run that is
killed leaves what it had. Past `--budget-seconds` no part begins, training is stopped and the video ends. A part that
fails is recorded and the others run; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.random_files import FULL, TINY, write_encoders, write_lmdb, write_weights
from longtake.encoders.vae import VideoVAE
from longtake.errors import LongtakeError
from longtake.inference.generator import Generator
from longtake.models.attention import attend, backends
from longtake.rng import KeyedRNG
from longtake.toy.world import sample_world
from longtake.train.metrics import read_rows

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("rates", "files", "encode", "train", "generate")
STEPS = [1.0, 0.75, 0.5, 0.25]
GENERATOR_EVERY = 5
GIB = 2**30


class Run:
    """The folders of a run, its clock, and its results on disk."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.started, self.budget = time.monotonic(), args.budget_seconds
        self.sizes = TINY if args.tiny else FULL
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.output, self.work = args.output.resolve(), (args.work or args.output / "work").resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        file = self.output / "results.json"
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    @property
    def remaining(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def record(self, part: str, values: Mapping[str, Any]) -> None:
        """Keeps the numbers of a part and writes all results again."""
        self.results[part] = dict(values)
        (self.output / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.output / "results.md").write_text(table(self.results))

    def longtake(self, name: str, arguments: list[str], progress: Callable[[], None] = lambda: None) -> bool:
        """Runs a command of Longtake, as `python` does."""
        return self.python(name, ["longtake", *arguments], progress)

    def python(
        self, name: str, arguments: list[str], progress: Callable[[], None] = lambda: None, *, ranks: int = 1
    ) -> bool:
        """Runs a module, under torchrun with several `ranks`; `progress` is called every few seconds.

        False when the budget stopped it. Raises: RuntimeError with the end of its log when it fails.
        """
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "--"]
        log = self.output / f"{name}.log"
        with log.open("w") as out:
            launched = [*(torchrun if ranks > 1 else []), *arguments]
            process = subprocess.Popen(
                [sys.executable, "-m", *launched], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
            )
            try:
                while process.poll() is None and self.remaining > 0:
                    try:
                        process.wait(min(5, max(0.1, self.remaining)))
                    except subprocess.TimeoutExpired:
                        progress()
            finally:
                stopped = process.poll() is None
                if stopped:
                    process.kill()  # nothing is lost: it saves no checkpoint, and its numbers are on disk
                    process.wait()
        progress()
        if not stopped and process.returncode:
            raise RuntimeError(f"{' '.join(arguments[:2])} failed; the end of {log}:\n{log.read_text()[-3000:]}")
        return not stopped

    def parts(self, work: Mapping[str, list[Callable[[], None]]], asked: list[str]) -> int:
        """Does the work of each part that is asked for, in order, and prints the table; the exit code."""
        failed = False
        for part, step in ((part, step) for part, steps in work.items() if part in asked for step in steps):
            if self.remaining <= 0:
                print(f"no time is left for {part}", flush=True)
                continue
            start = time.monotonic()
            try:
                step()
            except (RuntimeError, LongtakeError) as error:  # out of memory is a RuntimeError
                failed = True
                self.record(f"{part} failed", {"error": str(error)[-1000:]})
                print(f"{part} FAILED: {error}", flush=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the next part may be another process
            print(f"{part}: {time.monotonic() - start:.1f} s, {self.remaining:.0f} s left", flush=True)
        print(table(self.results))
        return int(failed)


# ---- rates -----------------------------------------------------------------------------------------------------------
def rates(run: Run) -> dict[str, Any]:
    """Operations a second of matrix products and attention in bfloat16; and a check of autocast."""
    sizes, device = run.sizes, run.device
    n = sizes.matmul
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    result: dict[str, Any] = {f"matmul {n}^3, TFLOP/s": 2 * n**3 / timed(lambda: a @ b, device) / 1e12}
    heads, width, clip = sizes.dit.num_heads, sizes.dit.head_width, sizes.num_latent_frames
    windows = [int(text.split(":")[0]) for text in sizes.windows.split(",")]
    for queries, keys in [*((4, window) for window in windows), (clip, clip)]:
        q, k = (torch.randn(1, f * sizes.tokens, heads, width, device=device).bfloat16() for f in (queries, keys))
        operations = 4 * q.shape[1] * k.shape[1] * heads * width
        seconds = timed(lambda q=q, k=k: attend(q, k, k), device)  # type: ignore[misc]
        result[f"attention, {queries} frames to {keys}, TFLOP/s"] = operations / seconds / 1e12
    if device.type == "cuda":
        result["attention kernels"] = [kernel.name for kernel in backends(device, torch.bfloat16, width)]
    result["autocast keeps gradients after no_grad"] = autocast_keeps_gradients(device)
    return result


def timed(work: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Seconds of one call, after three others."""
    for _ in range(3):
        work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def autocast_keeps_gradients(device: torch.device) -> bool:
    """False on versions of torch whose autocast remembers weights cast under no_grad: a roll-out would not learn.

    Source: pytorch/pytorch pull request 165068.
    """
    layer, x = torch.nn.Linear(8, 8, device=device), torch.randn(2, 8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            layer(x)
        return bool(layer(x).requires_grad)


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- files -----------------------------------------------------------------------------------------------------------
def files(run: Run, num_rows: int) -> dict[str, Any]:
    """Writes weights, encoders and pictures; bytes and seconds."""
    start = time.perf_counter()
    parameters = write_weights(run.sizes, run.work / "weights", run.device)
    write_encoders(run.sizes, run.work / "encoders")
    write_lmdb(run.work / "lmdb", num_rows)
    return {"parameters": parameters, "rows": num_rows, "seconds": time.perf_counter() - start}


# ---- training --------------------------------------------------------------------------------------------------------
def stage(run: Run, window: int, sink: int, iterations: int, **data: Any) -> Path:
    """Writes the configuration of a distillation stage; its path."""
    sizes, weights = run.sizes, str(run.work / "weights")
    tree = {
        "stage": "distill",
        "name": f"window{window}_sink{sink}",
        "logdir": str(run.output),
        "seed": telling_seed(iterations),
        "init_from": weights,
        "teacher": weights,
        "encoders": str(run.work / "encoders"),
        "model": {"image_condition": "i2v", "text_precision": "bf16"},
        "video": {"height": sizes.height, "width": sizes.width, "num_latent_frames": sizes.num_latent_frames},
        "plan": {"block_frames": 4, "window_frames": window, "sink_frames": sink},
        "flow": {"steps": STEPS},
        "data": data,
        "batch_size": 1,
        "micro_batch_size": 1,
        "max_steps": iterations + 1,
        "optim": {"lr": 2e-6},
        "critic": {"lr": 4e-7, "updates_per_generator": GENERATOR_EVERY},
        "precision": "bf16",
        "activation_checkpointing": True,
        "save_every": 0,
        "validate_every": 0,
        "log_every": 1,
    }
    file = run.work / f"{tree['name']}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def telling_seed(iterations: int) -> int:
    """A seed with which generator updates, and critic updates alone, stop at as many different steps as possible."""

    def told(seed: int) -> int:
        exits = {step: KeyedRNG(seed).integer(step, "exit_step", 0, len(STEPS)) for step in range(1, iterations + 1)}
        return len({(step % GENERATOR_EVERY == 0, exit_step) for step, exit_step in exits.items()})

    return max(range(200), key=told)


def encode(run: Run) -> dict[str, Any]:
    """Encodes the LMDB; seconds with start-up."""
    start = time.perf_counter()
    window, sink = windows_of(run.sizes.windows)[0]
    config = stage(run, window, sink, 1, path=str(run.work / "lmdb"), kind="lmdb")
    finished = run.longtake("encode", ["encode", str(config), "-o", str(run.work / "encoded")])
    return {"finished": finished, "seconds": time.perf_counter() - start}


def train(run: Run, window: int, sink: int, iterations: int) -> None:
    """Distils; records a summary of the rows so far while it runs."""
    config = stage(run, window, sink, iterations, path=str(run.work / "encoded"), kind="encoded")
    rows = run.output / f"window{window}_sink{sink}" / "metrics.jsonl"
    rows.unlink(missing_ok=True)
    name = f"train, window {window}, sink {sink}"
    what = {"config": yaml.safe_load(config.read_text()), "network": run.sizes.dit.to_dict()}
    start = time.perf_counter()

    def progress() -> None:
        run.record(name, {"seconds": time.perf_counter() - start, **summary(read_rows(rows), iterations), **what})

    run.longtake(config.stem, ["train", str(config)], progress)


def summary(rows: list[dict[str, Any]], iterations: int, warm_up: int = 1) -> dict[str, Any]:
    """The rows of `metrics.jsonl` in short; seconds without the first `warm_up` iterations."""
    losses = [row[key] for row in rows for key in row if key.endswith(("_loss", "_grad_norm"))]
    seconds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    counted = rows[warm_up:]
    for row in counted:
        exit_step = int(row["exit_step"])
        if "generator_loss" in row:
            seconds["generator update"][exit_step].append(row["seconds_of/generator"])
            seconds["critic update on the same clips"][exit_step].append(row["seconds_of/critic"])
        else:
            seconds["critic update"][exit_step].append(row["seconds_of/critic"])
    return {
        "iterations": len(counted),
        "asked": iterations,
        "first iteration seconds": rows[0]["seconds"] if rows else None,
        "iteration seconds": mean(row["seconds"] for row in counted) if counted else None,
        "finite": bool(losses) and None not in losses,
        "peak GiB": max((row["memory_gib"] for row in rows if "memory_gib" in row), default=None),
        "seconds by exit step": {
            what: {str(step): round(mean(values), 3) for step, values in sorted(found.items())}
            for what, found in seconds.items()
        },
    }


# ---- generation ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def generate(run: Run, seconds: float) -> None:
    """Streams a video in bfloat16; records seconds and allocated bytes of each block."""
    sizes, (window, sink) = run.sizes, windows_of(run.sizes.windows)[0]
    plan = {"block_frames": 4, "window_frames": window, "sink_frames": sink}
    rules = {"height": sizes.height, "width": sizes.width, "steps": STEPS, "plan": plan, "precision": "bf16"}
    generator = Generator.from_model(run.work / "weights", run.device, encoders=run.work / "encoders", changes=rules)
    picture = np.random.default_rng(1).integers(0, 256, (sizes.height, sizes.width, 3), dtype=np.uint8)
    num_frames = round(seconds * generator.fps)
    is_cuda = run.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    allocated: list[int | None] = []
    result: dict[str, Any] = {"asked frames": num_frames, "frames": 0}
    start = time.perf_counter()
    for chunk in generator.stream(picture, sample_world(0, 0).caption, num_frames=num_frames):
        synchronize(run.device)
        now = time.perf_counter()
        times.append(now - start)
        allocated.append(torch.cuda.memory_allocated() if is_cuda else None)
        start = now
        result["frames"] += len(chunk)
        result["peak GiB"] = torch.cuda.max_memory_allocated() / GIB if is_cuda else None
        if len(times) % 10 == 0 or result["frames"] == num_frames:
            run.record("generate", {**result, **block_summary(times, allocated)})
        if run.remaining <= 0:
            break
    run.record("generate", {**result, **block_summary(times, allocated)})
    run.record("generate", {**run.results["generate"], "seconds to decode a block": decoding(run, generator)})


def decoding(run: Run, generator: Generator) -> dict[str, float]:
    """Seconds to decode a block, by the type of the VAE and the latents that go through it at once."""
    sizes, vae = run.sizes, generator.encoders.vae
    size = (sizes.height // 8, sizes.width // 8)
    latents = torch.randn(1, 4, sizes.dit.out_channels, *size, device=run.device)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        vae.module.to(dtype)
        for count in (1, 4):
            decoder = VideoVAE(vae.module, latents_per_call=count).decoder_session()
            decoder.decode(latents[:, :1])
            seconds = timed(lambda decoder=decoder: decoder.decode(latents), run.device, repeats=2)  # type: ignore[misc]
            found[f"{str(dtype).removeprefix('torch.')}, {count} at once"] = seconds
    return found


def block_summary(times: list[float], allocated: list[int | None], first: int = 10) -> dict[str, Any]:
    """What blocks took; `times[0]` is the given picture with its encoding, block 1 the first generated one."""
    late, held = times[first:], [size for size in allocated[first:] if size is not None]
    result: dict[str, Any] = {"blocks": len(times) - 1, "picture seconds": times[0], "block seconds": times[1:]}
    result["allocated bytes"] = allocated[1:]
    if late:
        result[f"seconds a block from {first} on: least, median, most"] = [min(late), median(late), max(late)]
    if held:
        result[f"allocated GiB from block {first} on: least, most"] = [min(held) / GIB, max(held) / GIB]
    return result


# ---- report ----------------------------------------------------------------------------------------------------------
def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown; long lists, configurations and sizes stay in the JSON file."""
    lines = ["| part | what | value |", "|---|---|---|"]
    for part, values in results.items():
        for name, value in values.items():
            if name in ("config", "network"):
                continue
            if isinstance(value, Mapping):
                lines += [f"| {part} | {name}: {key} | {show(inner)} |" for key, inner in value.items()]
            elif not (isinstance(value, list) and len(value) > 4):
                lines.append(f"| {part} | {name} | {show(value)} |")
    return "\n".join(lines) + "\n"


def show(value: Any) -> str:
    """A value in a cell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {show(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(show, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def windows_of(text: str) -> list[tuple[int, int]]:
    """`13:5,12:0` as pairs of window and sink."""
    return [(int(window), int(sink)) for window, sink in (pair.split(":") for pair in text.split(","))]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results and logs (small)")
    parser.add_argument("--work", type=Path, help="folder of weights and data, 4 GB (default: work/ in the output)")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, with commas (default: %(default)s)")
    parser.add_argument("--windows", help=f"WINDOW:SINK of the trainings (default: {FULL.windows})")
    parser.add_argument("--iterations", type=int, default=20, help="iterations after the first (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="pictures in the data set (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="length of the video (default: %(default)s)")
    parser.add_argument("--budget-seconds", type=float, default=420, help="wall-clock limit (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny sizes")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts, in their order; the exit code."""
    args = parse(arguments)
    run = Run(args)
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine()
    run.record("machine", {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")})
    asked = args.parts.split(",")
    windows = windows_of(args.windows or run.sizes.windows)
    work: dict[str, list[Callable[[], None]]] = {
        "rates": [lambda: run.record("rates", rates(run))],
        "files": [lambda: run.record("files", files(run, args.rows))],
        "encode": [lambda: run.record("encode", encode(run))],
        "train": [lambda w=w, s=s: train(run, w, s, args.iterations) for w, s in windows],  # type: ignore[misc]
        "generate": [lambda: generate(run, args.seconds)],
    }
    return run.parts(work, asked)


if __name__ == "__main__":
    sys.exit(main())
