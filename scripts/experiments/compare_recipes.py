"""Compares recipes of a student in the toy world: one thing differs at a time; same teacher, iterations and seeds.

    python scripts/experiments/compare_recipes.py --output runs/compare --jobs 16

Writes the data, trains the causal initialisations and then every recipe by `longtake train`, as separate processes,
`--jobs` at a time; scores each on held-out worlds at the training horizon and at four times that, those of `--raw`
without EMA too; writes `compare.{json,md,png}`. Run again, it goes on where it stopped. `docs/log.md` has results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longtake.evaluation.pictures import curves, write_png
from longtake.rollout.denoise import Denoiser

ROOT = Path(__file__).resolve().parents[2]
DATA_SEED, WORLD_SEED, OPEN_SEED = 0, 1_000_003, 1_000_037
CORES = os.cpu_count() or 1
COLUMNS = (
    ("position px", "position_error_px", "{:.2f}"),
    ("motion", "motion_ratio", "{:.3f}"),
    ("stopped", "stop_rate", "{:.1%}"),
    ("shape", "shape_kept", "{:.1%}"),
    ("colour", "colour_kept", "{:.1%}"),
    ("count", "count_kept", "{:.1%}"),
    ("open bits", "open_bits", "{:.2f}"),
    ("open stopped", "open_stop_rate", "{:.1%}"),
    ("4x position px", "long_position_error_px", "{:.2f}"),
    ("4x motion", "long_motion_ratio", "{:.3f}"),
    ("4x stopped", "long_stop_rate", "{:.1%}"),
    ("4x shape", "long_shape_kept", "{:.1%}"),
    ("4x count", "long_count_kept", "{:.1%}"),
)


@dataclass(frozen=True)
class Recipe:
    """A row of the comparison: what differs from `configs/toy/distill.yaml` with guidance 2.

    `rules` also hold for its causal initialisation; `causal` False starts from the bidirectional teacher;
    `share` of the iterations, so that every recipe makes about as many optimizer updates.
    """

    name: str
    rules: tuple[str, ...] = ()
    changes: tuple[str, ...] = field(default=("objective.guidance=2",))
    causal: bool = True
    share: float = 1.0

    @property
    def initialisation(self) -> str:
        return "_".join(["causal", *(rule.split(".")[-1].replace("=", "") for rule in self.rules)])


RECIPES = (
    Recipe("base"),
    Recipe("bidirectional", causal=False),
    Recipe("bidirectional2", causal=False, share=2.0),  # the iterations of both stages
    Recipe("guidance1", changes=("objective.guidance=1",)),
    Recipe("guidance4", changes=("objective.guidance=4",)),
    Recipe("shift3", rules=("flow.shift=3",)),
    Recipe("updates1", changes=("objective.guidance=2", "objective.critic.updates_per_generator=1"), share=0.6),
    Recipe("block2", rules=("plan.block_frames=2",)),
    Recipe("block1", rules=("plan.block_frames=1",)),
)


def main() -> None:
    """Reads the command line; with --score it is one of its own processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--recipes", nargs="+", default=[recipe.name for recipe in RECIPES])
    parser.add_argument("--causal-steps", type=int, default=600)
    parser.add_argument("--distill-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--data-worlds", type=int, default=2048)
    parser.add_argument("--worlds", type=int, default=128, help="held-out worlds at the training horizon")
    parser.add_argument("--long-worlds", type=int, default=32, help="held-out worlds at four times the horizon")
    parser.add_argument("--raw", nargs="*", default=["base"], help="recipes that are also scored without EMA")
    parser.add_argument("--jobs", type=int, default=CORES)
    parser.add_argument("--causal-seconds", type=float, default=3600, help="a causal run is stopped after that")
    parser.add_argument("--distill-seconds", type=float, default=3600, help="a distillation is stopped after that")
    parser.add_argument("--score", nargs=2, metavar=("STAGE", "FILE"), help="(internal) score one stage folder")
    args = parser.parse_args()
    args.output = args.output.resolve()
    if args.score:
        stage, file = map(Path, args.score)
        kinds = ["ema", "raw"] if stage.parent.name.rsplit("_seed")[0] in args.raw else ["ema"]
        score(stage, file, args.worlds, args.long_worlds, kinds)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """All processes, then the report."""
    chosen = [recipe for recipe in RECIPES if recipe.name in args.recipes]
    args.output.mkdir(parents=True, exist_ok=True)
    data = args.output / "data"
    longtake("world", data, "--num-worlds", args.data_worlds, "--num-frames", 65, "--seed", DATA_SEED,
             "--format", "clips", log=args.output / "world.log")  # fmt: skip
    # Encoded once, for all of them.
    encoded = args.output / "encoded"
    together = min(256, args.data_worlds)
    longtake("encode", ROOT / "configs/toy/causal.yaml", "--output", encoded, "--rows-per-shard", together,
             f"data.path={data / 'clips'}", f"batch_size={together}", f"micro_batch_size={together}",
             f"data.num_workers={min(4, CORES)}", log=args.output / "encode.log", threads=CORES)  # fmt: skip
    common = ["validate_every=0", "data.kind=encoded", "log_every=10", "save_every=100000", "keep_checkpoints=1",
              "data.num_workers=1", f"batch_size={args.batch}", f"micro_batch_size={args.batch}"]  # fmt: skip

    def causal(name: str) -> None:
        rules = next(recipe.rules for recipe in chosen if recipe.initialisation == name)
        train("causal", args.output / name, [*common, *rules, "seed=1", f"data.path={encoded}",
              f"max_steps={args.causal_steps}", "ema.decay=0.97"], args.causal_seconds,
              max(1, CORES // len(initialisations)))  # fmt: skip

    def measure(stage: Path) -> None:
        file = args.output / f"{stage.parent.name}_{stage.name}.json"
        if not file.exists():
            run([sys.executable, __file__, "--output", args.output, "--score", stage, file, "--worlds", args.worlds,
                 "--long-worlds", args.long_worlds, "--raw", *args.raw], file.with_suffix(".log"))  # fmt: skip

    def distill(pair: tuple[Recipe, int]) -> None:
        recipe, seed = pair
        folder = args.output / f"{recipe.name}_seed{seed}"
        start = args.output / recipe.initialisation / "causal" if recipe.causal else "toy"
        train("distill", folder, [*common, *recipe.rules, *recipe.changes, f"seed={seed}", f"init_from={start}",
              f"data.path={encoded}", f"max_steps={round(args.distill_steps * recipe.share)}",
              "ema.decay=0.9"], args.distill_seconds)  # fmt: skip
        measure(folder / "distill")

    initialisations = sorted({recipe.initialisation for recipe in chosen if recipe.causal})
    pairs = [(recipe, seed) for recipe in reversed(chosen) for seed in args.seeds]
    stages = [args.output / name / "causal" for name in initialisations]
    began = time.time()
    failed = 0
    # The recipes and their scores come before the scores of the initialisations: a machine may be lent for a time only.
    work: tuple[tuple[str, Sequence[tuple[Callable[[Any], None], Any]]], ...] = (
        ("causal initialisations", [(causal, name) for name in initialisations]),
        ("recipes and scores", [*((distill, pair) for pair in pairs), *((measure, stage) for stage in stages)]),
    )
    for name, items in work:
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(function, item) for function, item in items]
        errors = [error for future in futures if (error := future.exception()) is not None]
        failed += len(errors)
        print(f"{time.time() - began:5.0f}s {name}", *errors, sep="\n", flush=True)
    report(args.output)
    if failed:
        raise SystemExit(f"{failed} processes failed; see above")


def train(stage: str, folder: Path, changes: Sequence[str], seconds: float, threads: int = 1) -> None:
    """One stage in a process of its own; stopped (and saved) when its time is over."""
    config = ROOT / "configs/toy" / f"{stage}.yaml"
    log = folder.parent / f"{folder.name}_{stage}.log"
    longtake("train", config, "--logdir", folder, *changes, log=log, seconds=seconds, threads=threads)


def longtake(*words: object, log: Path, seconds: float | None = None, threads: int = 1) -> None:
    """One `longtake` command."""
    run([sys.executable, "-m", "longtake", *words], log, seconds, threads)


def run(words: Sequence[object], log: Path, seconds: float | None = None, threads: int = 1) -> None:
    """A command with its output in `log`; SIGTERM when `seconds` are over. Raises: RuntimeError when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("ab") as file:
        process = subprocess.Popen([str(word) for word in words], stdout=file, stderr=file, env=environment)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait()
    if code not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(f"{' '.join(map(str, words[:6]))} ... ended with {code}:\n{log.read_text()[-2000:]}")


def score(stage: Path, file: Path, num_worlds: int, num_long: int, kinds: Sequence[str]) -> None:
    """Writes the scores of one stage's newest checkpoint, with EMA ("ema"), without ("raw") or both."""
    from longtake.config.job import load_config
    from longtake.config.stage import StageConfig
    from longtake.encoders.bundle import Encoders
    from longtake.evaluation.rows import held_out, score_row, student_row
    from longtake.parallel.mesh import init_mesh
    from longtake.run_folder import exported_weights, find_checkpoint, read_manifest
    from longtake.toy.metrics import summarise
    from longtake.toy.world import sample_world
    from longtake.weights.load import load_dit

    checkpoint = find_checkpoint(stage)
    manifest = read_manifest(checkpoint)
    config = StageConfig.from_tree(manifest["config"])
    with init_mesh() as mesh:
        encoders = Encoders.load(config.encoders_folder, mesh.device)
        frames = load_config(ROOT / "configs/toy/distill.yaml").video.num_latent_frames  # causal clips may be longer
        sets = {"": (WORLD_SEED, num_worlds, frames), "long_": (WORLD_SEED, num_long, 4 * (frames - 1) + 1)}
        batches = {
            prefix: held_out(encoders, mesh, seed=seed, num_worlds=number, num_latent_frames=length, batch_size=32)
            for prefix, (seed, number, length) in sets.items()
        }
        is_open = [i for i in range(8 * num_worlds) if any(s.is_open for s in sample_world(OPEN_SEED, i).sprites)]
        batches["open_"] = held_out(
            encoders, mesh, seed=OPEN_SEED, num_worlds=num_worlds, num_latent_frames=frames, batch_size=32,
            only=is_open[:num_worlds],
        )  # fmt: skip
        result: dict[str, Any] = {"step": manifest["step"], "config": manifest["config"]}
        for kind in kinds:
            model = load_dit(exported_weights(checkpoint, prefer_ema=kind == "ema"), mesh.device).eval()
            row = student_row(Denoiser(model), config.stream_plan, seed=WORLD_SEED)
            scores = {prefix: summarise(score_row(row, part, mesh)[0]) for prefix, part in batches.items()}
            flat = {prefix + key: value for prefix, summary in scores.items() for key, value in summary.items()}
            flat["open_bits"] = flat["open_open_entropy_bits"]
            result[kind] = flat
    file.write_text(json.dumps(result) + "\n")


def report(output: Path) -> None:
    """Table and curves of everything that was scored."""
    results = {file.stem: json.loads(file.read_text()) for file in sorted(output.glob("*_*.json"))}
    lines = [["recipe", "iterations", *(title for title, _, _ in COLUMNS)]]
    for name, result in results.items():
        for kind in (kind for kind in ("ema", "raw") if kind in result):
            cells = [form.format(result[kind][key]) for _, key, form in COLUMNS]
            lines.append([f"{name} {kind}", str(result["step"]), *cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])
    (output / "compare.md").write_text(text + "\n")
    (output / "compare.json").write_text(json.dumps(results) + "\n")
    print(text)
    longer = {name: {"curves": result["ema"]["long_curves"]} for name, result in results.items()}
    write_png(output / "compare.png", curves(longer))


if __name__ == "__main__":
    main()
