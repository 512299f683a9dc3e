"""Scores folders of toy students: in the length of training, and window by window in videos ten times as long.

    python scripts/experiments/score_students.py FOLDER ... --jobs 2 -o scores.jsonl

One process a student; a line of JSON for each, and a table of all. Worlds and noise are those of `longtake evaluate`.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from longtake.rollout.denoise import Denoiser

WORLD_SEED, OPEN_SEED = 1_000_003, 1_000_037
SHORT = ("position_error_px", "motion_ratio", "shape_kept", "colour_kept", "count_kept")
WORST = ("shape_kept", "colour_kept", "count_kept", "saturation", "contrast")


def score(
    folder: Path, *, worlds: int, long_worlds: int, open_worlds: int, long_frames: int, seed: int
) -> dict[str, Any]:
    """The scores of one folder of weights."""
    import torch

    from longtake.condition import pixel_frames
    from longtake.config.job import load_config
    from longtake.config.stage import TOY_ASSETS, StageConfig
    from longtake.encoders.bundle import Encoders
    from longtake.evaluation.rows import held_out, score_row, student_row
    from longtake.parallel.mesh import init_mesh
    from longtake.toy.metrics import summarise
    from longtake.toy.windows import WindowRule
    from longtake.toy.world import sample_world
    from longtake.weights.load import load_dit

    torch.set_num_threads(1)
    config = load_config(Path(__file__).resolve().parents[2] / "configs/toy/distill.yaml")
    assert isinstance(config, StageConfig)
    horizon, block = config.video.num_latent_frames, config.plan.block_frames
    found: dict[str, Any] = {"name": folder.name}
    with init_mesh("cpu") as mesh:
        encoders = Encoders.load(TOY_ASSETS, mesh.device)
        row = student_row(Denoiser(load_dit(folder, mesh.device).eval()), config.stream_plan, seed=seed)
        sets = [("short", seed, worlds, horizon, None), ("long", seed, long_worlds, long_frames, None)]
        is_open = [i for i in range(8 * open_worlds) if any(s.is_open for s in sample_world(OPEN_SEED, i).sprites)]
        sets.append(("open", OPEN_SEED, open_worlds, horizon, is_open))
        for name, listed, number, frames, only in sets:
            if number == 0:
                continue
            batches = held_out(
                encoders, mesh, seed=listed, num_worlds=number, num_latent_frames=frames, batch_size=16, only=only
            )
            rule = WindowRule(pixel_frames(horizon), 2 * 4 * block) if name == "long" else None
            found[name] = summarise(score_row(row, batches, mesh, rule=rule)[0])
    return found


def known(values: list[float | None]) -> list[float]:
    """Without the windows in which nothing was found; nan where there are no others."""
    return [value for value in values if value is not None] or [float("nan")]


def table(results: list[dict[str, Any]]) -> str:
    """One row a student."""
    titles = ["student", "position px", "motion", "shape", "colour", "count", "open bits", "open stand", "10x px"]
    titles += ["motion lowest to highest", "worst shape", "colour", "count", "saturation", "contrast"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for result in results:
        cells = [result["name"]]
        short = result.get("short", {})
        cells += [f"{short[key]:.4f}" if key in short else "" for key in SHORT]
        opened = result.get("open", {})
        cells += [f"{opened[key]:.3f}" if opened else "" for key in ("open_entropy_bits", "open_stop_rate")]
        if "long" in result:
            windows = result["long"]["windows"]
            motion = known(windows["motion_ratio"])
            cells += [f"{result['long']['position_error_px']:.2f}", f"{min(motion):.3f} to {max(motion):.3f}"]
            cells += [f"{min(known(windows[key])):.4f}" for key in WORST]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of the lines")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--worlds", type=int, default=96)
    parser.add_argument("--long-worlds", type=int, default=24)
    parser.add_argument("--open-worlds", type=int, default=0)
    parser.add_argument("--long-frames", type=int, default=89, help="latent frames of the long videos")
    parser.add_argument("--seed", type=int, default=WORLD_SEED, help="of worlds and noise; open ones have their own")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = {name: getattr(args, name) for name in ("worlds", "long_worlds", "open_worlds", "long_frames", "seed")}
    results = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for result in pool.map(partial(score, **options), args.folders):
            results.append(result)
            with args.output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(table(results[-1:]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
