"""Compares this tree with another commit, bit for bit: losses, checkpoints and frames of five iterations of each stage.

    python scripts/fingerprint.py BASE [--stages teacher,causal,distill,long] [--ranks 1,2] [--work DIR]

A change of shape claims to change no numbers; this shows it. BASE is checked out into a worktree, both trees train the
toy's stages on the same data, on the same machine, one after the other, and what they leave is compared: every scalar
of `metrics.jsonl` that is no time or rate, every tensor of the newest checkpoint (by its bytes: names may change), and
33 generated frames. Nothing is kept from one run to the next, since results differ between processors and versions of
torch. Exit code 0 means that all is equal. Each tree is used through its command line and public names alone.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5
COMMON = ["batch_size=4", "micro_batch_size=2", f"max_steps={STEPS}", f"save_every={STEPS}", "validate_every=0"]
COMMON += ["ema.start_step=2", "log_every=1", "optim.warmup_steps=0", "optim.lr=1e-3"]
# What each stage needs besides, so that five iterations reach all of it.
MORE = {
    "teacher": [],
    "causal": [],
    "distill": ["objective.critic.updates_per_generator=2"],
    "long": [
        "objective.critic.updates_per_generator=2",
        "objective.critic.critic_warmup_steps=0",
        "objective.num_chunks=[3]",
    ],
}
# What keys were called before commits that had no `objective`
BEFORE = {"objective.critic.": "critic.", "objective.num_chunks": "long.num_chunks"}
# Scalars that measure the machine, not the training.
TIMES = ("second", "per_s", "mfu", "util", "gib", "bytes", "memory", "time", "flops", "phase", "wait", "stall")
FRAMES = """
import sys, numpy, longtake
frames = longtake.Generator.from_run(sys.argv[1], device="cpu").stream(sys.argv[2], sys.argv[3], num_frames=33, seed=7)
numpy.save(sys.argv[4], numpy.concatenate(list(frames)))
"""


def main() -> int:
    """Reads the command line; 0 where nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--stages", default=",".join(MORE), help="stages, in order (default: all)")
    parser.add_argument("--ranks", default="1,2", help="numbers of CPU processes (default: 1,2)")
    parser.add_argument("--work", type=Path, help="folder for what is written (default: a temporary one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fingerprint-") as temporary:
        work = given.work or Path(temporary)
        tree = work / "base"
        git("worktree", "add", "--detach", str(tree), given.base)
        try:
            return compare(tree, work, given.stages.split(","), [int(ranks) for ranks in given.ranks.split(",")])
        finally:
            git("worktree", "remove", "--force", str(tree))


def compare(tree: Path, work: Path, stages: list[str], ranks: list[int]) -> int:
    """Prints a line for each run; 1 where anything differs."""
    data = work / "data"
    run(tree, ["-m", "longtake", "world", str(data), "--num-worlds", "8", "--num-frames", "65"])
    wrong = 0
    for count in ranks:
        prints = [fingerprint(where, work / f"{name}{count}", data, stages, count) for name, where in trees(tree)]
        for stage in stages:
            differing = [part for part, value in prints[0][stage].items() if prints[1][stage][part] != value]
            wrong += bool(differing)
            print(
                f"{stage}, {count} rank(s): {'differs in ' + ', '.join(differing) if differing else 'equal'}",
                flush=True,
            )
            for part in differing:
                explain(part, prints[0][stage][part], prints[1][stage][part])
    return int(wrong > 0)


def trees(base: Path) -> list[tuple[str, Path]]:
    """The two trees, by name."""
    return [("base", base), ("here", ROOT)]


def fingerprint(tree: Path, logdir: Path, data: Path, stages: list[str], ranks: int) -> dict[str, dict[str, object]]:
    """What the stages leave, by stage."""
    found = {}
    for stage in stages:
        kind = "images" if stage == "distill" else "clips"
        more, recipe = MORE[stage], tree / "configs" / "toy" / f"{stage}.yaml"
        if "objective:" not in recipe.read_text():
            for now, before in BEFORE.items():
                more = [value.replace(now, before) for value in more]
        values = [*COMMON, *more, f"logdir={logdir}", f"data.path={data / kind}"]
        if stage in ("distill", "long"):
            values.append("optim.lr=1e-4")
        start = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        run(tree, [*start, "-m", "longtake", "train", str(recipe), *values])
        folder = logdir / stage
        found[stage] = {"losses": losses(folder), "tensors": tensors(folder)}
        if stage != "teacher":
            picture = sorted((data / "images").glob("*.png"))[0]
            run(
                tree,
                ["-c", FRAMES, str(folder), str(picture), "a red circle drifts to the right", str(folder / "f.npy")],
            )
            found[stage]["frames"] = hashlib.sha256(np.load(folder / "f.npy").tobytes()).hexdigest()
    return found


def losses(folder: Path) -> list[dict[str, float]]:
    """The scalars of each iteration that do not measure the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not any(word in key for word in TIMES)} for row in rows]


def tensors(folder: Path) -> collections.Counter[str]:
    """How often each tensor occurs in the newest checkpoint, by shape, type and bytes."""
    from safetensors import safe_open

    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    found: collections.Counter[str] = collections.Counter()
    for file in sorted(newest.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                tensor = opened.get_tensor(name).contiguous()
                digest = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().tobytes())
                found[f"{tuple(tensor.shape)} {tensor.dtype} {digest.hexdigest()}"] += 1
    return found


def explain(part: str, base: object, here: object) -> None:
    """The first thing that differs."""
    if isinstance(base, list) and isinstance(here, list):
        first = next((pair for pair in zip(base, here) if pair[0] != pair[1]), (len(base), len(here)))
        print(f"  {part}: {first[0]} -> {first[1]}", flush=True)
    elif isinstance(base, collections.Counter) and isinstance(here, collections.Counter):
        print(f"  {part}: {(base - here).total()} of {base.total()} tensors are not there any more", flush=True)


def run(tree: Path, arguments: list[str]) -> None:
    """Runs Python in a tree; ends this script with its output where that fails."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(arguments)[:300]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def git(*arguments: str) -> None:
    """Runs git in this repository."""
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
