"""Compares what a distilled student begins as, in the toy world: equal seconds for each, then the same distillation.

    python scripts/experiments/initialisations.py --output runs/initialisations --seconds 120 --seeds 1 2

`none` begins as the bidirectional teacher; `teacher_forcing` has all of the seconds; `ode` has half of them for teacher
forcing, and the other half for its paths and itself; `ode_bidirectional` has paths of the bidirectional teacher.
Seconds are those of the processor (`--clock cpu`) or of the clock, without the start of processes. Scored in the length
of training and in ten times that; writes `scores.jsonl`. Run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("none", "teacher_forcing", "ode", "ode_bidirectional")
STOPPED = (0, 128 + signal.SIGTERM)
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Study:
    """Where it is written, by which clock its seconds are, and the values of every stage."""

    folder: Path
    clock: str
    common: Sequence[str]

    def run(self, *words: object, log: str, seconds: float | None = None, since: Path | None = None) -> float:
        """One `longtake` command; SIGTERM once `seconds` are over since it wrote the file `since`. Its seconds.

        Raises: RuntimeError when it fails.
        """
        command, started = [sys.executable, "-m", "longtake", *map(str, words)], time.time()
        with (self.folder / f"{log}.log").open("ab") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
            begun, used, told = None, 0.0, False
            while process.poll() is None:
                time.sleep(0.2)
                now = self._now(process.pid)
                if (
                    begun is None
                    and (since is None or (since.is_file() and since.stat().st_mtime > started))
                    and now is not None
                ):
                    begun = now
                used = used if begun is None or now is None else now - begun
                if seconds is not None and used >= seconds and not told:
                    told = True
                    process.terminate()
        if process.returncode not in STOPPED:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}; see {log}.log")
        return used

    def _now(self, process: int) -> float | None:
        """Seconds of the clock, or those that the process has computed; None when it has ended."""
        if self.clock == "wall":
            return time.monotonic()
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / TICKS

    def train(self, recipe: str, name: str, *values: str, seconds: float | None = None) -> Path:
        """A stage of that name, unless it is there; its folder. With `seconds` it is stopped, and saved, then."""
        folder = self.folder / name / recipe.split("/")[1]
        done = folder / "done"
        if not done.exists():
            more = [f"logdir={folder.parent}", f"name={folder.name}", *self.common, *values]
            if seconds is not None:
                more += ["max_steps=1000000", "save_every=1000000", "optim.warmup_steps=10"]
            used = self.run("train", recipe, *more, log=name, seconds=seconds, since=folder / "metrics.jsonl")
            done.write_text(f"{used:.1f}\n")
        return folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of each way to begin")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="wall")
    parser.add_argument("--distill-steps", type=int, default=100, help="iterations of the distillation after it")
    parser.add_argument("--data-worlds", type=int, default=2048)
    parser.add_argument("--path-rows", type=int, default=0, help="clips that get paths; 0 = all")
    parser.add_argument("--path-steps", type=int, default=24, help="Euler steps of a path")
    parser.add_argument("--worlds", type=int, default=256, help="0 and 0: nothing is scored yet")
    parser.add_argument("--long-worlds", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    common = ["validate_every=0", "keep_checkpoints=1", "data.kind=auto", "checkpoint.mode=sync"]
    common += [f"batch_size={args.batch}", f"micro_batch_size={args.batch}"]
    study = Study(folder, args.clock, common)
    encode(study, args.data_worlds, args.path_rows or args.data_worlds)
    for seed in args.seeds:
        for way in args.ways:
            begin = way if way == "none" else str(initialisation(study, way, seed, args.seconds, args.path_steps))
            values = [f"init_from={'toy' if way == 'none' else begin}", f"data.path={folder / 'clips'}", f"seed={seed}"]
            values += [f"max_steps={args.distill_steps}", f"save_every={args.distill_steps}", "ema.start_step=0"]
            stage = study.train("toy/distill", f"{way}_seed{seed}_distilled", *values)
            score(study, stage, f"{way}_seed{seed}", args.worlds, args.long_worlds)


def encode(study: Study, worlds: int, path_worlds: int) -> None:
    """The clips of the toy world, encoded; and the first of them, of which paths are made."""
    folder = study.folder
    for name, number in (("data", worlds), ("few", path_worlds)):
        if not (folder / name / "world.json").is_file():
            study.run(
                "world", folder / name, "--num-worlds", number, "--num-frames", 65, "--format", "clips", log="world"
            )
    for name, source in (("clips", "data"), ("few_clips", "few")):
        path = f"data.path={folder / source / 'clips'}"
        study.run("encode", "toy/causal", "-o", folder / name, path, *study.common[-3:], log="encode")


def initialisation(study: Study, way: str, seed: int, seconds: float, path_steps: int) -> Path:
    """The stage that a way to begin ends with."""
    clips, own, steps = f"data.path={study.folder / 'clips'}", f"seed={seed}", f"objective.teacher_steps={path_steps}"
    if way == "ode_bidirectional":
        kind = ["objective.teacher_kind=bidirectional", "objective.teacher=toy", "init_from=toy"]
        return ode(study, f"{way}_seed{seed}", [*kind, "video.num_latent_frames=9", own, steps], seconds)
    half = study.train("toy/causal", f"half_seed{seed}", clips, own, seconds=seconds / 2)
    if way == "teacher_forcing":
        if not (study.folder / f"{way}_seed{seed}").exists():
            shutil.copytree(half.parent, study.folder / f"{way}_seed{seed}", ignore=shutil.ignore_patterns("done"))
        return study.train("toy/causal", f"{way}_seed{seed}", clips, own, seconds=seconds / 2)
    begins = [f"objective.teacher={half}", f"init_from={half}", own, steps]
    return ode(study, f"{way}_seed{seed}", begins, seconds / 2)


def ode(study: Study, name: str, values: Sequence[str], seconds: float) -> Path:
    """Regression to paths, which are made first in the same seconds."""
    paths, took = study.folder / f"{name}_paths", study.folder / f"{name}_paths.seconds"
    if not took.is_file():
        source = f"data.path={study.folder / 'few_clips'}"
        words = ["teacher-data", "toy/ode", "-o", paths, *values, source, *study.common[-3:]]
        used = study.run(*words, log=name, since=paths / "index.json")
        took.write_text(f"{used:.1f}\n")
    left = seconds - float(took.read_text())
    if left <= 0:
        raise SystemExit(f"{name}: its paths took {took.read_text().strip()} of {seconds} s; give fewer --path-rows")
    return study.train("toy/ode", name, *values, f"data.path={paths}", seconds=left)


def score(study: Study, stage: Path, name: str, worlds: int, long_worlds: int) -> None:
    """Keeps a stage's averaged weights in `students/`, and adds their scores, of any worlds, to `scores.jsonl`."""
    named = study.folder / "students" / name
    if named.exists():
        return
    (weights,) = (stage / "checkpoints").glob("step_*/generator_ema")
    shutil.copytree(weights, named)
    if not worlds and not long_worlds:
        return
    words = [sys.executable, str(ROOT / "scripts/experiments/score_students.py"), str(named)]
    words += ["-o", str(study.folder / "scores.jsonl"), "--worlds", str(worlds), "--long-worlds", str(long_worlds)]
    subprocess.run(words, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
