"""Long tuning at the size of Wan2.1-Fun-1.3B-InP on one GPU, with random weights: memory and seconds.

    python -m benchmarks.long_tuning -o outputs/long_tuning        (in the repository; --tiny rehearses it on a CPU)

Runs `longtake train` on stage `long` once for each length of `--chunks`: chunks of 21 latents at 480x832, 20 of them
new, blocks of 4, window 13 with sink 5, one frozen base in bfloat16 with low-rank updates of rank 256 for student and
critic, AdamW, an average of the student, full activation checkpointing, batch 1. VAE and CLIP are on the GPU: a late
window's picture is decoded and encoded again. The text and image encoders have few layers.

The lengths are 2 chunks (41 latents) and 12 (241) by default: memory must not depend on them. The first run makes 10
iterations, so that the student is trained in a first chunk and in a later one; the second makes its 12. `results.json`
and `results.md` are rewritten whenever a number is new. The exit code is 1 when a run fails, a loss is not finite, or
the peaks of the updates of later chunks differ by more than 2 %.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from benchmarks.full_size import STEPS, Run, files, windows_of
from longtake.train.metrics import read_rows

RANK, TINY_RANK = 256, 4
ITERATIONS = 10  # at least
UPDATES_PER_GENERATOR = 5
BOUND = 0.02


def stage(run: Run, chunks: int, iterations: int, **data: Any) -> Path:
    """Writes the configuration of a long tuning; its path."""
    sizes, weights = run.sizes, str(run.work / "weights")
    window, sink = windows_of(sizes.windows)[0]
    lora = {"rank": RANK if run.device.type == "cuda" else TINY_RANK}
    tree = {
        "objective": {
            "kind": "long_tuning",
            "teacher": weights,
            "shared_base": True,
            "num_chunks": [chunks],
            "critic": {"lr": 4e-7, "beta1": 0.0, "updates_per_generator": UPDATES_PER_GENERATOR, "lora": lora},
        },
        "name": f"chunks{chunks}",
        "logdir": str(run.output),
        "init_from": weights,
        "encoders": str(run.work / "encoders"),
        "lora": lora,
        "model": {"image_condition": "i2v", "text_precision": "bf16"},
        "video": {"height": sizes.height, "width": sizes.width, "num_latent_frames": sizes.num_latent_frames},
        "plan": {"block_frames": 4, "window_frames": window, "sink_frames": sink},
        "flow": {"steps": STEPS},
        "data": data,
        "batch_size": 1,
        "micro_batch_size": 1,
        "max_steps": iterations,
        "optim": {"lr": 2e-6, "beta1": 0.0},
        "ema": {"start_step": 0},
        "precision": "bf16",
        "activation_checkpointing": "full",
        "save_every": 0,
        "validate_every": 0,
        "log_every": 1,
    }
    file = run.work / f"{tree['name']}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def encode(run: Run) -> dict[str, Any]:
    """Encodes the pictures and prompts; seconds with start-up."""
    start = time.perf_counter()
    config = stage(run, 2, 1, path=str(run.work / "lmdb"), kind="lmdb")
    finished = run.longtake("encode", ["encode", str(config), "-o", str(run.work / "encoded")])
    return {"finished": finished, "seconds": time.perf_counter() - start}


def train(run: Run, chunks: int) -> None:
    """Tunes; records a summary of the rows so far while it runs."""
    iterations = max(ITERATIONS, chunks)
    config = stage(run, chunks, iterations, path=str(run.work / "encoded"), kind="encoded")
    rows = run.output / f"chunks{chunks}" / "metrics.jsonl"
    rows.unlink(missing_ok=True)
    start = time.perf_counter()

    def progress() -> None:
        values = summary(read_rows(rows), chunks)
        run.record(f"{chunks} chunks", {"seconds": time.perf_counter() - start, "asked": iterations, **values})

    run.longtake(config.stem, ["train", str(config)], progress)
    found = run.results[f"{chunks} chunks"]
    if found["iterations"] == iterations and not found["finite"]:
        raise RuntimeError(f"a loss or a gradient of the run with {chunks} chunks is not finite")


def summary(rows: list[dict[str, Any]], chunks: int) -> dict[str, Any]:
    """The rows of `metrics.jsonl` in short; means are without the first iteration."""
    losses = [row[key] for row in rows for key in row if key.endswith(("_loss", "_grad_norm"))]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows):
        what = "generator and critic" if "generator_loss" in row else "critic"
        by_kind.setdefault(f"{what}, {'later' if number % chunks else 'first'} chunk", []).append(row)
    later = [row["memory_gib"] for number, row in enumerate(rows) if number % chunks and "memory_gib" in row]
    return {
        "iterations": len(rows),
        "finite": bool(losses) and None not in losses,
        "iteration seconds": mean(row["seconds"] for row in rows[1:]) if rows[1:] else None,
        "seconds by kind": {
            what: [round(row["seconds"], 2) for row in found if row is not rows[0]] for what, found in by_kind.items()
        },
        "GiB by iteration": [round(row["memory_gib"], 3) for row in rows if "memory_gib" in row],
        "peak GiB": max((row["memory_gib"] for row in rows if "memory_gib" in row), default=None),
        "peak GiB of later chunks": max(later, default=None),
    }


def compare(run: Run, lengths: list[int]) -> None:
    """Holds the peaks of the lengths against each other. Raises: RuntimeError when they differ by more than 2 %."""
    peaks = [run.results.get(f"{chunks} chunks", {}).get("peak GiB of later chunks") for chunks in lengths]
    known = [peak for peak in peaks if peak is not None]
    if len(known) < 2:
        return
    change = max(known) / min(known) - 1
    frames = [1 + chunks * (run.sizes.num_latent_frames - 1) for chunks in lengths]
    run.record("memory", {"latent frames": frames, "peak GiB of later chunks": peaks, "change": change})
    if change > BOUND:
        raise RuntimeError(f"the peaks of {frames} latent frames differ by {change:.1%}, more than {BOUND:.0%}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results and logs (small)")
    parser.add_argument("--work", type=Path, help="folder of weights and data, 4 GB (default: work/ in the output)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 12], help="lengths (default: 2 12)")
    parser.add_argument("--budget-seconds", type=float, default=420, help="wall-clock limit (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny sizes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the lengths, one after the other; the exit code."""
    args = parse(arguments)
    run = Run(args)
    name = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine()
    run.record("machine", {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")})
    return run.parts(
        {
            "files": [lambda: run.record("files", files(run, 8))],
            "encode": [lambda: run.record("encode", encode(run))],
            "train": [lambda c=c: train(run, c) for c in args.chunks],  # type: ignore[misc]
            "compare": [lambda: compare(run, args.chunks)],
        },
        ["files", "encode", "train", "compare"],
    )


if __name__ == "__main__":
    sys.exit(main())
