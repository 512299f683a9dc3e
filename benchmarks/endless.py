"""A stream of 10,000 latent frames: does its time, its memory or its picture drift?

    python -m benchmarks.endless -o outputs/endless                    (in the repository; --frames 400 rehearses it)

Streams the toy's weights (or those of --run or --model) from one toy picture through a `Session`, decodes every block,
and writes `endless.json` (all numbers), `endless.png` (time, memory, saturation and contrast as curves) and one line a
bar: the median time of a hundred more blocks against blocks 10 to 110 of a new stream, made in turns with them, within
5 % on a GPU and 15 % on a CPU (there the processor's time, since others may use it as well); as many bytes allocated
after the last block as after block 110; all latents and decoder features finite. The median times of the last hundred
blocks and of blocks 10 to 110 of the same stream are stated too, and decide nothing: a machine may be slower at one
time and faster at another. A stream that is too short for a hundred blocks at each end compares fewer.
The exit code is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longtake.config.generation import changes_of, read_stage
from longtake.inference.generator import Generator
from longtake.inference.session import Session
from longtake.toy.world import sample_world

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "longtake" / "assets" / "toy"
FIRST, COUNT = 10, 100  # blocks before the ones that are compared, and how many of these
BOUNDS = {"cuda": 0.05, "cpu": 0.15}


def allocated_bytes(device: torch.device) -> int:
    """Bytes in tensors: on a GPU what the allocator has given out, on a CPU the storages of all live tensors."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    # By exact type: isinstance would ask lazy modules for their class, and fake tensors have no storage.
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def saturation(frames: NDArray[np.uint8]) -> float:
    """Mean saturation (HSV) of uint8 [T, h, w, 3], in 0..1."""
    high = frames.max(-1).astype(np.float32)
    return float(((high - frames.min(-1)) / np.maximum(high, 1)).mean())


def contrast(frames: NDArray[np.uint8]) -> float:
    """Standard deviation of the luma of each frame of uint8 [T, h, w, 3], in 0..1, averaged over frames."""
    luma = frames @ (np.array([0.299, 0.587, 0.114], np.float32) / 255)
    return float(luma.std((1, 2)).mean())


def finite(session: Session) -> bool:
    """Whether the latest latents and the features that the decoder keeps are finite (bytes cannot show it)."""
    stream, decoder = session.state.stream, session.state.decoder
    assert stream is not None and stream.pending is not None and decoder is not None
    return all(bool(t.isfinite().all()) for t in (stream.pending.clean, *decoder.state()[0].values()))


def measure(session: Session, num_latent_frames: int, *, switch_every: int = 0) -> dict[str, Any]:
    """Numbers of every block of a new session up to `num_latent_frames`; `switch_every` blocks the prompt changes."""
    device = session.generator.device
    prompts = [session.prompt, "a large blue square travels to the left"]
    names = ("seconds", "cpu_seconds", "saturation", "contrast", "bytes", "finite")
    rows: dict[str, list[Any]] = {name: [] for name in names}
    session.next()  # the picture
    memory_at = _memory_blocks(session, num_latent_frames)
    while session.position < num_latent_frames:
        block = len(rows["seconds"])
        if switch_every and block and block % switch_every == 0:
            session.prompt = prompts[block // switch_every % 2]
        frames, seconds, cpu_seconds = timed(session)
        rows["seconds"].append(seconds)
        rows["cpu_seconds"].append(cpu_seconds)
        rows["saturation"].append(saturation(frames))
        rows["contrast"].append(contrast(frames))
        rows["finite"].append(finite(session))
        del frames
        rows["bytes"].append(allocated_bytes(device) if device.type == "cuda" or block in memory_at else None)
    return rows


def timed(session: Session) -> tuple[NDArray[np.uint8], float, float]:
    """The next block, and the seconds and the processor's seconds that it took."""
    started, worked = perf_counter(), process_time()
    frames = session.next()  # on the CPU: the GPU has finished
    return frames, perf_counter() - started, process_time() - worked


def in_turns(old: Session, new: Session, count: int) -> dict[str, list[float]]:
    """Seconds of `count` blocks of each, in turns; of the `new` session from block FIRST on."""
    on_cpu = old.generator.device.type == "cpu"
    for _ in range(1 + FIRST):  # the picture, and the blocks before
        new.next()
    times: dict[str, list[float]] = {"old": [], "new": []}
    for _ in range(count):
        for name, session in (("old", old), ("new", new)):
            _, seconds, cpu_seconds = timed(session)
            times[name].append(cpu_seconds if on_cpu else seconds)
    return times


def _memory_blocks(session: Session, num_latent_frames: int) -> set[int]:
    """Blocks after which a CPU's memory is counted, which takes long there."""
    total = math.ceil((num_latent_frames - 1) / session.generator.plan.block_frames)
    early, _ = compared(total)
    return {early.stop - 1, total - 1, *range(0, total, max(1, total // 8))}


def compared(num_blocks: int) -> tuple[slice, slice]:
    """The early and the late blocks that are compared."""
    count = max(1, min(COUNT, (num_blocks - FIRST) // 2))
    first = min(FIRST, max(0, num_blocks - 2 * count))
    return slice(first, first + count), slice(num_blocks - count, num_blocks)


def judge_times(early: list[float], late: list[float], kind: str) -> dict[str, Any]:
    """The bar of two sets of times: their medians."""
    before, after = median(early), median(late)
    change = after / before - 1
    return {"early_ms": before * 1e3, "late_ms": after * 1e3, "change": change, "met": abs(change) <= BOUNDS[kind]}


def judge(rows: dict[str, list[Any]], turns: dict[str, list[float]], kind: str) -> dict[str, dict[str, Any]]:
    """Each bar: what was measured and whether it is met."""
    early, late = compared(len(rows["seconds"]))
    seconds = rows["cpu_seconds" if kind == "cpu" else "seconds"]
    before, after = rows["bytes"][early.stop - 1], rows["bytes"][-1]
    spread = {
        name: (float(np.mean(rows[name][early])), float(np.mean(rows[name][late])))
        for name in ("saturation", "contrast")
    }
    return {
        "time": {
            name: value for name, value in judge_times(seconds[early], seconds[late], kind).items() if name != "met"
        },
        "time in turns": judge_times(turns["new"], turns["old"], kind),
        "memory": {"early_bytes": before, "late_bytes": after, "met": before == after},
        "finite": {"blocks": sum(rows["finite"]), "met": all(rows["finite"])},
        "saturation": {"early": spread["saturation"][0], "late": spread["saturation"][1]},
        "contrast": {"early": spread["contrast"][0], "late": spread["contrast"][1]},
    }


def draw(rows: dict[str, list[Any]], block_frames: int, path: Path) -> None:
    """Curves over latent frames."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(9, 9), sharex=True, constrained_layout=True)
    frames = 1 + block_frames * np.arange(1, len(rows["seconds"]) + 1)
    counted = [k for k, size in enumerate(rows["bytes"]) if size is not None]
    axes[0].plot(frames, np.array(rows["seconds"]) * 1e3, linewidth=0.6)
    axes[1].plot(frames[counted], [rows["bytes"][k] / 2**20 for k in counted], marker=".", linewidth=0.8)
    for axis, name in zip(axes[2:], ("saturation", "contrast")):
        axis.plot(frames, rows[name], linewidth=0.6)
    for axis, name in zip(axes, ("ms a block", "MiB in tensors", "saturation", "contrast")):
        axis.set_ylabel(name)
        axis.set_ylim(0, 1.1 * axis.dataLim.y1)
    axes[-1].set_xlabel("latent frame")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endless", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--frames", type=int, default=10_000, help="latent frames")
    parser.add_argument("--run", type=Path, help="log folder of a training run")
    parser.add_argument("--model", type=Path, default=TOY / "student", help="folder of weights, without --run")
    parser.add_argument("--encoders", type=Path, default=TOY, help="folder of its encoders")
    parser.add_argument("--config", type=Path, help="its rules, where they are not beside it")
    parser.add_argument("--dtype", help="bf16 or fp32")
    parser.add_argument("--rope", help="relative or absolute")
    parser.add_argument("--switch-every", type=int, default=0, help="blocks between two prompts; 0 = one prompt")
    parser.add_argument("--device")
    args = parser.parse_args(arguments)
    changes = changes_of(dtype=args.dtype, rope=args.rope)
    if args.run is not None:
        generator = Generator.from_run(args.run, args.device)
    else:
        stage = None if args.config is None else read_stage(args.config)
        generator = Generator.from_model(args.model, args.device, encoders=args.encoders, stage=stage, changes=changes)
    world = sample_world(3, 0)
    session = generator.open(world.render(1)[0], world.caption, history_blocks=0)
    started = perf_counter()
    rows = measure(session, args.frames, switch_every=args.switch_every)
    length, wall = (session.position, session.num_frames), perf_counter() - started
    early, _ = compared(len(rows["seconds"]))
    new = generator.open(world.render(1)[0], world.caption, history_blocks=0)
    turns = in_turns(session, new, early.stop - early.start)
    device = generator.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.processor()}"
    result = {
        "machine": machine.strip(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "latent_frames": length[0],
        "pixel_frames": length[1],
        "blocks": len(rows["seconds"]),
        "wall_seconds": wall,
        "switch_every": args.switch_every,
        "settings": generator.settings.model_dump(mode="json"),
        "bars": judge(rows, turns, device.type),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "endless.json").write_text(json.dumps({**result, "per_block": rows, "in_turns": turns}) + "\n")
    draw(rows, generator.plan.block_frames, args.output / "endless.png")
    print(f"{result['latent_frames']} latent frames, {result['blocks']} blocks on {result['machine']}")
    for name, bar in result["bars"].items():
        verdict = "" if "met" not in bar else "met: " if bar["met"] else "MISSED: "
        print(f"{name}: {verdict}" + ", ".join(f"{key} {value:.6g}" for key, value in bar.items() if key != "met"))
    return 0 if all(bar.get("met", True) for bar in result["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
