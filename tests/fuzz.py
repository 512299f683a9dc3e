"""Random commands with odd options, recipes and damaged files: whatever a user types or gives, no traceback.

    python tests/fuzz.py --seed 3 --seconds 300     # or --cases 40, or --only 17 to see one again

Each case runs in a forked child of this process, which has loaded everything, in a fresh copy of a folder of inputs.
A finding is a traceback, an end by signal or by any code but 0, 1, 2 and 130, a failure without a word, success
without an output, an input that changed, or no end in time.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from random import Random
from typing import get_args, get_type_hints

import yaml

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from fuzz_files import HUGE, NUMBERS, PATHS, TEXTS, change_tree, copy_fresh, damage  # noqa: E402

CPU_SECONDS, WALL_SECONDS = 60, 120
MEMORY, FILE_SIZE = 12 << 30, 64 << 20
CODES = {0, 1, 2, 130}
PICTURE = ["--image", "in.png", "--prompt", "a red circle climbs"]
TINY = ["max_steps=1", "batch_size=1", "micro_batch_size=1", "optim.warmup_steps=0"]
# A call of each command that works, by which parts are then changed; commands without one get odd values alone.
CALLS = {
    "train": [["stage.yaml", *TINY], ["distill.yaml", *TINY], ["stage.yaml", "--check"], ["job.yaml", "--check"]],
    "encode": [["stage.yaml", "-o", "new"], ["distill.yaml", "-o", "new", "--rows-per-shard", "2"]],
    "generate": [
        ["--model", "student", "--encoders", "encoders", *PICTURE, "--frames", "5", "-o", "new.mp4"],
        ["--run", "run", *PICTURE, "--frames", "5", "-o", "new.mp4"],
        ["--model", "student", "--encoders", "encoders", "--inputs", "data/images", "--frames", "5", "-o", "new"],
        ["--model", "student", "--encoders", "encoders", "--script", "story.yaml", "-o", "new.mp4"],
    ],
    "play": [["--model", "student", "--encoders", "encoders", *PICTURE, "--seconds", "0.4", "-o", "new.mp4"]],
    "evaluate": [["--run", "run", "--num-worlds", "1", "--batch-size", "1", "-o", "new"]],
    "measure": [["mine=data/clips", "--json", "new.json", "--block", "9+12"]],
    "verify": [["student", "--encoders", "encoders", "height=32", "width=32", "--json", "new.json"]],
    "world": [["new", "--num-worlds", "1", "--num-frames", "5"]],
    "doctor": [["stage.yaml"], ["stage.yaml", "--json"], ["--table"]],
    "convert": [["teacher", "new", "--to", "original"], ["teacher", "new", "--to", "longtake", "--lora", "lora"]],
    "export": [["run", "new"]],
    "config": [["stage"]],
}
# Files to damage, and calls that read them.
READERS = {
    "in.png": [CALLS["generate"][0], CALLS["generate"][3]],
    "story.yaml": [CALLS["generate"][3]],
    "stage.yaml": [["train", "stage.yaml", "--check"], ["generate", "--config", "stage.yaml", *CALLS["generate"][0]]],
    "teacher/*": [["convert", *CALLS["convert"][0]], ["train", "stage.yaml", *TINY], ["doctor", "stage.yaml"]],
    "student/*": [CALLS["generate"][0], ["verify", *CALLS["verify"][0]]],
    "encoders/*/*": [CALLS["generate"][0], ["encode", "stage.yaml", "-o", "new"]],
    "lora/*": [["convert", *CALLS["convert"][1]]],
    "run/**/*": [["export", "run", "new"], CALLS["generate"][1], ["train", "stage.yaml", *TINY, "max_steps=2", "--logdir", "run"]],
    "data/images/*": [CALLS["generate"][2], ["encode", "distill.yaml", "-o", "new"], ["train", "distill.yaml", *TINY]],
    "data/clips/**/*": [["encode", "stage.yaml", "-o", "new"], ["measure", *CALLS["measure"][0]], ["train", "stage.yaml", *TINY]],
    "data/lmdb/*/*": [["encode", "distill.yaml", "-o", "new", "data.path=data/lmdb", "data.kind=auto"]],
    "data/world*": [["world", "data", "--num-worlds", "2", "--num-frames", "17", "--overwrite"]],
    "tar/*": [["encode", "distill.yaml", "-o", "new", "data.path=tar", "data.kind=auto"]],
    "rows/*": [["encode", "distill.yaml", "-o", "new", "data.path=rows", "data.kind=auto"]],
    "encoded/*": [["train", "distill.yaml", *TINY, "data.path=encoded", "data.kind=auto"], ["encode", "distill.yaml", "-o", "encoded"]],
}  # fmt: skip


@dataclass
class Case:
    """A command line, what is typed while it runs, and what was done to its files."""

    words: list[str]
    typed: str = ""
    notes: list[str] = field(default_factory=list)


class Fuzz:
    """Makes cases by number and runs them in `work`, of which `master` is the fresh copy."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed, self.master, self.work = seed, folder / "master", folder / "work"
        os.environ["HOME"] = str(folder / "home")
        self.said = folder / "said"
        self.codes: Counter[str] = Counter()
        self.work.mkdir(parents=True)
        if self._forked(self._make_inputs) != (0, False):
            raise SystemExit(self.said.read_text(errors="replace"))
        self.work.rename(self.master)

    def _make_inputs(self) -> None:
        import fuzz_inputs

        fuzz_inputs.make(Path("."))

    def _forked(self, call) -> tuple[int, bool]:
        """Exit code of `call` in a child in `work`, negative for a signal, and whether it had to be stopped."""
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.setsid()
                os.chdir(self.work)
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                out = os.open(self.said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
                os.dup2(out, 1), os.dup2(out, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                call()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except BaseException:  # noqa: BLE001 (what a shell would show)
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code & 255)
        end = time.monotonic() + WALL_SECONDS
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), False
            if time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), True
            time.sleep(0.005)

    # ---- cases -------------------------------------------------------------------------------------------------------
    def make(self, number: int) -> Case:
        """The case of a number, its files in `work`."""
        random = Random(f"{self.seed} {number}")
        copy_fresh(self.master, self.work)
        return (self._options, self._recipe, self._file, self._file)[number % 4](random, number)

    def _options(self, random: Random, number: int) -> Case:
        commands = _commands()
        name = sorted(commands)[number // 4 % len(commands)]
        words = [name, *random.choice(CALLS.get(name, [[]]))]
        parameters = [p for p in commands[name].params if p.name not in ("help", "debug")]
        for parameter in random.sample(parameters, min(len(parameters), random.choice([1, 1, 2, 3]))):
            _give(words, parameter, _kind(name, parameter.name), random)
        typed = "".join(
            random.choice([*TEXTS, "/quit", "/save x", "/image in.png", "/help", "/save", "/rewind 1"]) + "\n"
            for _ in range(4)
        )
        return Case(words, typed)

    def _recipe(self, random: Random, number: int) -> Case:
        from longtake.config.base import describe
        from longtake.config.job import JobConfig
        from longtake.config.stage import StageConfig

        file = random.choice(["stage.yaml", "stage.yaml", "distill.yaml", "job.yaml", "story.yaml"])
        tree = yaml.safe_load((self.work / file).read_text())
        model = JobConfig if file == "job.yaml" else StageConfig
        extra = [] if file == "story.yaml" else [key.replace("<name>", "a") for key, *_ in describe(model)]
        notes = [change_tree(tree, random, extra) for _ in range(random.choice([1, 1, 2]))]
        (self.work / file).write_text(yaml.safe_dump(tree))
        real = [
            ["train", file, *TINY, "save_every=1"],
            ["encode", file, "-o", "new"],
            ["generate", *CALLS["generate"][0], "--config", file],
        ]
        calls = [["train", file, "--check"], ["doctor", file], *real]
        if file == "story.yaml":
            calls = [["generate", *CALLS["generate"][3]]]
        elif any("num_worlds" in note or str(HUGE) in note or "2**63" in note for note in notes):
            calls = calls[:2]  # what was asked for may rightly take years
        return Case(random.choice(calls), notes=notes)

    def _file(self, random: Random, number: int) -> Case:
        pattern = random.choice(sorted(READERS))
        files = sorted(p for p in self.work.glob(pattern) if p.is_file())
        every = sorted(p for p in self.work.rglob("*") if p.is_file())
        notes = [damage(random.choice(files), random, every)]
        words = random.choice(READERS[pattern])
        return Case(words if words[0] in _commands() else ["generate", *words], notes=notes)

    # ---- runs --------------------------------------------------------------------------------------------------------
    def run(self, case: Case) -> str | None:
        """What is wrong with how a case ends; None for nothing."""
        before = _state(self.work)
        (self.work.parent / "typed").write_bytes(case.typed.encode("utf-8", "surrogateescape"))

        def command() -> None:
            from longtake.cli import app as cli

            os.dup2(os.open(self.work.parent / "typed", os.O_RDONLY), 0)
            sys.stdin = open(0, errors="surrogateescape", closefd=False)  # noqa: SIM115
            sys.argv = ["longtake", *case.words]
            cli.main()

        code, stopped = self._forked(command)
        self.codes[f"{case.words[0]} {code}"] += 1
        said = self.said.read_text(errors="replace")
        if "Traceback (most recent call last)" in said:
            return f"traceback: {said.strip().splitlines()[-1][:300]}"
        if stopped or code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "does not end"
        if code not in CODES:
            return f"exit code {code}"
        if code and not said.strip():
            return f"exit code {code} without a word"
        changed = self._changed(case, before)
        if changed:
            return f"changed {changed}"
        wanted = next((case.words[k + 1] for k, word in enumerate(case.words[:-1]) if word == "-o"), None)
        if (
            code == 0
            and wanted in ("new", "new.mp4")
            and "--help" not in case.words
            and not list(self.work.glob("new*"))
        ):
            return "success without an output"
        if left := [p.name for p in self.work.rglob("*") if p.name.endswith(".part") or p.name.startswith(".tmp")]:
            return f"left {left[0]} behind"
        return None

    def _changed(self, case: Case, before: dict[str, tuple]) -> str | None:
        """The first input that is another file now, where replacing it was not asked for."""
        after = _state(self.work)
        for name, stat in before.items():
            if after.get(name) == stat:
                continue
            own = case.words[0] == "train" or "encoded" in case.words
            asked = "--overwrite" in case.words and not name.startswith(("keep/", "in.png", "story"))
            if not (own and name.startswith(("run/", "encoded/"))) and not asked:
                return name
        return None


def _state(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        found[path.relative_to(folder).as_posix()] = (
            stat.st_mode,
            stat.st_ino,
            stat.st_mtime_ns if not path.is_dir() else 0,
        )
    return {name: stat for name, stat in found.items() if (folder / name).is_symlink() or not (folder / name).is_dir()}


def _commands() -> dict:
    import typer

    from longtake.cli.app import app

    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _kind(command: str, parameter: str) -> type:
    """The type of a parameter, that of one value where there may be several or none."""
    from longtake.cli.app import app

    functions = {entry.name or entry.callback.__name__: entry.callback for entry in app.registered_commands}
    kind = get_type_hints(functions[command])[parameter]
    while get_args(kind):
        kind = get_args(kind)[0]
    return kind


def _give(words: list[str], parameter, kind: type, random: Random) -> None:
    """Gives a parameter an odd value, in place of the one it has."""
    pool = {int: NUMBERS, float: NUMBERS, Path: PATHS}.get(kind, TEXTS + NUMBERS)
    value = random.choice(pool if random.random() < 0.8 else TEXTS + NUMBERS + PATHS)
    if issubclass(kind, Enum) and random.random() < 0.7:
        value = random.choice(list(kind)).value
    if "Argument" in type(parameter).__name__:
        if parameter.name == "overrides":
            from longtake.config.base import describe
            from longtake.config.generation import GenerationConfig
            from longtake.config.stage import StageConfig

            model = GenerationConfig if words[0] in ("generate", "play", "export") else StageConfig
            keys = [key for key, *_ in describe(model) if "num_worlds" not in key and "max_steps" not in key]
            words.append(f"{random.choice(keys)}={random.choice(TEXTS + NUMBERS + PATHS)}")
        elif len(words) > 1 and not words[1].startswith("-"):
            words[1] = value
        else:
            words.insert(1, value)
        return
    option = parameter.opts[0]
    spelled = next((name for name in (*parameter.opts, *parameter.secondary_opts) if name in words), None)
    if parameter.is_flag:
        words.append(random.choice([*parameter.opts, *parameter.secondary_opts]))
    elif spelled is not None:
        words[words.index(spelled) + 1] = value
    else:
        words += [option, value]


def main() -> None:
    """Runs cases until the number or the time is reached; exit code 1 when something was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    for module in PRELOADED:
        __import__(module)
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="longtake-fuzz-"))
    found, times = [], Counter()
    try:
        fuzz = Fuzz(folder, args.seed)
        end, done = time.monotonic() + args.seconds, 0
        numbers = range(args.start, args.start + args.cases) if args.only is None else [args.only]
        for number in numbers:
            started = time.monotonic()
            if started > end:
                break
            case = fuzz.make(number)
            wrong = fuzz.run(case)
            done += 1
            times[case.words[0]] += time.monotonic() - started
            if args.only is not None:
                print(fuzz.said.read_text(errors="replace"))
            if wrong is not None or args.only is not None:
                words = " ".join(
                    repr(word[:80]) if len(word) > 80 or not word.isprintable() or " " in word or not word else word
                    for word in case.words
                )
                print(
                    f"case {number}: longtake {words}\n  {'; '.join(case.notes)}\n  -> {wrong}".encode(
                        "utf-8", "backslashreplace"
                    ).decode(),
                    flush=True,
                )
            if wrong is not None:
                found.append(number)
        print(f"seed {args.seed}: {done} cases, {len(found)} findings {found}")
        print(
            f"seconds { ({k: round(v) for k, v in times.items()}) }; command and exit code: {dict(sorted(fuzz.codes.items()))}"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if found else 0)


PRELOADED = [
    "torch", "av", "PIL.Image", "diffusers", "transformers", "safetensors.torch", "lmdb", "tiny_stage", "longtake.cli.app", "longtake.inference.script",
    "longtake.inference.batch", "longtake.inference.export", "longtake.inference.play", "longtake.evaluation.run", "longtake.doctor.run",
    "longtake.weights.convert", "longtake.train.job", "longtake.encodings.write", "longtake.toy.files", "fuzz_inputs",
]  # fmt: skip

if __name__ == "__main__":
    main()
