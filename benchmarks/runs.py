"""Runs of Longtake's commands at full size with random weights, with a clock, a budget and results on disk: what the
benchmarks of two GPUs and of saving share. `longtake bench` measures one GPU.

Wan2.1-Fun-1.3B-InP's transformer and VAE at their published sizes, 480x832, 21 latents in blocks [1, 4, 4, 4, 4, 4];
all weights are random, and the text and image encoders have few layers, since only the shapes of their results count.
`results.json` and `results.md` in the output folder are rewritten whenever a number is new, so that a run that is
killed leaves what it had. Past `--budget-seconds` no part begins and training is stopped. A part that fails is recorded
and the others run; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from benchmarks.random_files import FULL, TINY, write_encoders, write_lmdb, write_weights
from longtake.errors import LongtakeError
from longtake.rng import KeyedRNG

ROOT = Path(__file__).resolve().parents[1]
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
        "objective": {
            "kind": "dmd",
            "teacher": weights,
            "critic": {"lr": 4e-7, "updates_per_generator": GENERATOR_EVERY},
        },
        "name": f"window{window}_sink{sink}",
        "logdir": str(run.output),
        "seed": telling_seed(iterations),
        "init_from": weights,
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
