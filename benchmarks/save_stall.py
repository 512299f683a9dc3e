"""What saving costs a long run: losses, memory and the stall, from the run's own timeline.

    python -m benchmarks.save_stall -o outputs/save_stall --segment-seconds 540     (run it again: the next segment)

Distillation at the sizes and with the data of `benchmarks.runs` (Wan2.1-Fun-1.3B-InP's transformer, random
weights; `--tiny` rehearses it on a CPU), saved every `--save-every` iterations, one kept. A call is a segment:
it trains for `--segment-seconds`, and past a save, stops the run with SIGTERM as a scheduler does (its last checkpoint
is complete then) and adds to the results; the next call resumes from there. Two segments of 8 minutes make a run of 16.

Student and critic are trained whole, and a checkpoint of both with AdamW and the average is 44 GB, twice that on the
disk when a new one replaces the old. `--lora-rank` trains low-rank updates on one frozen base instead: a few GB.

`saves.jsonl` and `metrics.jsonl` of the stage are the timeline. The stall of a segment is what the loop spent in the
phase `save`, the wait for the save before it included; the share is of the time from the first iteration to the last.
`results.json`, `results.md` and `save_stall.png` (losses, memory, seconds an iteration, saves) are in the output.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks import runs
from longtake.run_folder import checkpoints_folder, list_checkpoints, verify_checkpoint
from longtake.train.metrics import read_rows

NAME = "save_stall"


def prepare(run: runs.Run, args: argparse.Namespace) -> Path:
    """Writes weights and encodings unless they are there; the configuration of the stage."""
    if not (run.work / "encoded" / "index.json").is_file():
        runs.files(run, args.rows)
        runs.encode(run)
    window, sink = runs.windows_of(run.sizes.windows)[0]
    file = runs.stage(run, window, sink, 20, path=str(run.work / "encoded"), kind="encoded")
    tree = yaml.safe_load(file.read_text())
    tree |= {"name": NAME, "max_steps": args.max_steps, "save_every": args.save_every, "keep_checkpoints": 1}
    tree["checkpoint"] = {"mode": args.mode}
    if args.lora_rank:
        tree["lora"] = {"rank": args.lora_rank}
        tree["objective"]["critic"]["lora"] = {"rank": args.lora_rank}
        tree["objective"]["shared_base"] = True
    file = run.work / f"{NAME}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def train(run: runs.Run, config: Path, seconds: float, save_every: int) -> dict[str, Any]:
    """Trains for `seconds` after the first iteration of this segment, and past a save, whose stall is in the row of the
    next iteration; its exit code, and memory of the process.
    """
    folder, log = run.output / NAME, run.output / f"{NAME}.log"
    before = len(read_rows(folder / "metrics.jsonl"))
    memory: list[tuple[float, float]] = []
    command = [sys.executable, "-m", "longtake", "train", str(config)]
    with log.open("a") as out:
        process = subprocess.Popen(command, cwd=runs.ROOT, stdout=out, stderr=subprocess.STDOUT)
        first = None
        while process.poll() is None:
            time.sleep(0.2)
            memory.append((time.time(), resident_gib(process.pid)))
            rows = len(read_rows(folder / "metrics.jsonl")) - before
            if first is None and rows > 0:
                first = time.monotonic()
            if first is not None and time.monotonic() - first > seconds and rows > save_every:
                process.send_signal(signal.SIGTERM)
                break
        code = process.wait()
    if code not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(f"the run ended with {code}; the end of {log}:\n{log.read_text()[-3000:]}")
    return {"exit code": code, "memory": memory}


def resident_gib(pid: int) -> float:
    """Resident memory of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 2**20


def summary(rows: list[dict[str, Any]], saves: list[dict[str, Any]], wall: float) -> dict[str, Any]:
    """The stall in a segment's rows and saves, and what iterations beside a save cost."""
    # The last save is after the last row: what the loop waited for is all of it.
    stall = sum(row.get("seconds/checkpoint", 0.0) for row in rows)
    last = saves[-1] if saves and rows and saves[-1]["step"] > rows[-1]["step"] else None
    final = sum(last[f"seconds/{part}"] for part in ("wait", "stage", "write")) if last else 0.0
    beside = set()
    for save in saves[:-1] if last else saves:
        end = save["seconds/write"]
        for row in rows:
            if row["step"] >= save["step"] and end > 0:
                beside.add(row["step"])
                end -= row["seconds"]
    seconds = [(row["step"] in beside, row["seconds"]) for row in rows[1:]]
    critic = [(row["step"] in beside, row["seconds_of/critic"]) for row in rows[1:] if "seconds_of/critic" in row]
    return {
        "iterations": len(rows),
        "saves": len(saves),
        "checkpoint GiB": saves[-1]["size_bytes"] / 2**30 if saves else None,
        "wall seconds": wall,
        "stall seconds": stall,
        "stall share": stall / wall if wall else None,
        "seconds of the last save, at the stop": final,
        "staging seconds": [round(save["seconds/stage"], 3) for save in saves],
        "waiting for the save before, seconds": [round(save["seconds/wait"], 3) for save in saves],
        "writing seconds": [round(save["seconds/write"], 3) for save in saves],
        "iteration seconds, beside a save": average(seconds, True),
        "iteration seconds, otherwise": average(seconds, False),
        "critic seconds, beside a save": average(critic, True),
        "critic seconds, otherwise": average(critic, False),
    }


def average(values: list[tuple[bool, float]], wanted: bool) -> float | None:
    """Mean of the values with that mark."""
    found = [value for mark, value in values if mark is wanted]
    return mean(found) if found else None


def plot(segments: list[Mapping[str, Any]], file: Path) -> None:
    """Losses, memory and seconds an iteration over the whole run; saves are grey lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(9, 11), constrained_layout=True)
    rows = {row["step"]: row for segment in segments for row in segment["rows"]}
    steps = sorted(rows)
    for name in ("critic_loss", "generator_loss"):
        points = [(step, rows[step][name]) for step in steps if rows[step].get(name) is not None]
        axes[0].plot(*zip(*points) if points else ([], []), label=name, linewidth=0.8)
    axes[1].plot(steps, [rows[step]["seconds"] for step in steps], label="seconds an iteration", linewidth=0.8)
    gpu = [(step, rows[step]["memory_gib"]) for step in steps if "memory_gib" in rows[step]]
    if gpu:
        axes[2].plot(*zip(*gpu), label="GPU memory, peak of an iteration, GiB")
    for number, segment in enumerate(segments):
        for save in segment["saves"]:
            axes[1].axvline(save["step"], color="0.8", zorder=0)
        start = segment["memory"][0][0] if segment["memory"] else 0
        points = [(at - start, gib) for at, gib in segment["memory"] if gib]
        axes[3].plot(*zip(*points) if points else ([], []), label=f"host memory, segment {number + 1}, GiB")
    axes[3].set_xlabel("seconds in the segment")
    for axis in axes:
        if axis.lines:
            axis.legend()
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Runs a segment; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of weights and data (default: work/ in the output)")
    parser.add_argument("--segment-seconds", type=float, default=540, help="training of a call (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=50, help="iterations (default: %(default)s)")
    parser.add_argument("--mode", choices=("async", "sync"), default="async", help="default: %(default)s")
    parser.add_argument("--lora-rank", type=int, default=0, help="low-rank updates on one frozen base (default: none)")
    parser.add_argument("--max-steps", type=int, default=100_000, help="iterations at most (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="pictures in the data set (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny sizes")
    args = parser.parse_args(arguments)
    run = runs.Run(args)
    config = prepare(run, args)
    folder = run.output / NAME
    known = run.output / "segments.json"
    segments: list[dict[str, Any]] = json.loads(known.read_text()) if known.exists() else []
    saves_before = len(read_rows(folder / "saves.jsonl"))
    held = list_checkpoints(checkpoints_folder(folder))
    first = int(held[-1].name.removeprefix("step_")) if held else 0
    ran = train(run, config, args.segment_seconds, args.save_every)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] >= first and "seconds" in row]
    saves = read_rows(folder / "saves.jsonl")[saves_before:]
    for path in list_checkpoints(checkpoints_folder(folder)):
        verify_checkpoint(path)
    wall = sum(row["seconds"] + row.get("seconds/checkpoint", 0.0) for row in rows)
    segments.append({"rows": rows, "saves": saves, "memory": ran["memory"]})
    known.write_text(json.dumps(segments) + "\n")
    run.record(f"segment {len(segments)}", {"first step": first, "mode": args.mode, **summary(rows, saves, wall)})
    shares = [part for name, part in run.results.items() if name.startswith("segment")]
    total, stall = sum(part["wall seconds"] for part in shares), sum(part["stall seconds"] for part in shares)
    run.record("all segments", {"wall seconds": total, "stall seconds": stall, "stall share": stall / total})
    plot(segments, run.output / "save_stall.png")
    print(runs.table(run.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
