"""A distillation at full size with random weights, its files, and results on disk: what `save_stall` trains.

Wan2.1-Fun-1.3B-InP's transformer and VAE at their published sizes, 480x832, 21 latents in blocks [1, 4, 4, 4, 4, 4];
all weights are random, and the text and image encoders have few layers, since only the shapes of their results count.
`results.json` and `results.md` in the output folder are rewritten whenever a number is new, so that a run that is
killed leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.random_files import FULL, TINY, write_encoders, write_lmdb, write_weights
from longtake.rng import KeyedRNG

ROOT = Path(__file__).resolve().parents[1]
STEPS = [1.0, 0.75, 0.5, 0.25]
GENERATOR_EVERY = 5


class Run:
    """The folders of a run, and its results on disk."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.sizes = TINY if args.tiny else FULL
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.output, self.work = args.output.resolve(), (args.work or args.output / "work").resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        file = self.output / "results.json"
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def record(self, part: str, values: Mapping[str, Any]) -> None:
        """Keeps the numbers of a part and writes all results again."""
        self.results[part] = dict(values)
        (self.output / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.output / "results.md").write_text(table(self.results))


# ---- files -----------------------------------------------------------------------------------------------------------
def files(run: Run, num_rows: int) -> None:
    """Writes weights, encoders and pictures."""
    write_weights(run.sizes, run.work / "weights", run.device)
    write_encoders(run.sizes, run.work / "encoders")
    write_lmdb(run.work / "lmdb", num_rows)


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


def encode(run: Run) -> None:
    """Encodes the LMDB."""
    window, sink = windows_of(run.sizes.windows)[0]
    config = stage(run, window, sink, 1, path=str(run.work / "lmdb"), kind="lmdb")
    command = [sys.executable, "-m", "longtake", "encode", str(config), "-o", str(run.work / "encoded")]
    subprocess.run(command, cwd=ROOT, check=True)


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
