"""The scripts: they parse, help, refuse what is wrong; the main job leaves what it promises, also after `kill -9`."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from safetensors.torch import load_file

from longtake.run_folder import latest_checkpoint, read_manifest
from longtake.train.metrics import read_rows

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
SHELL = [*sorted(SCRIPTS.glob("*.sh")), ROOT / ".ci" / "run"]

# The main job, as small as it gets: every stage, every file, few worlds and steps.
TINY = [
    *("data.num_worlds=16", "causal.max_steps=2", "distill.max_steps=2"),
    *("causal.validation.num_worlds=2", "distill.validation.num_worlds=2"),
    *("evaluation.num_worlds=4", "evaluation.teacher_steps=4"),
]
# Smaller still for the runs that are killed: a checkpoint after each step, no videos in between.
KILLED = [
    *("data.num_worlds=8", "data.formats=[images, clips]"),
    *("causal.max_steps=5", "causal.save_every=1", "causal.validation.num_worlds=0"),
    *("causal.batch_size=4", "causal.micro_batch_size=2"),
    *("distill.max_steps=5", "distill.save_every=1", "distill.validation.num_worlds=0"),
    *("distill.batch_size=4", "distill.micro_batch_size=2", "distill.objective.critic.updates_per_generator=2"),
    *("evaluation.num_worlds=2", "evaluation.teacher_steps=2", "evaluation.ablations=false"),
]


def bash(*command: object, path: str | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = dict(os.environ) | ({} if path is None else {"PATH": path})
    words = ["bash", *(str(word) for word in command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60)


def present_python(folder: Path) -> str:
    """A PATH on which `python` is the one that runs these tests."""
    folder.mkdir(exist_ok=True)
    (folder / "python").unlink(missing_ok=True)
    # A script, not a link: through a link Python would not find the packages of its virtual environment.
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# ---- each script ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_script_parses_and_stops_at_the_first_error(path):
    assert bash("-n", path).returncode == 0
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    assert "|| true" not in text and "eval " not in text  # nothing hides a failure


@pytest.mark.parametrize("name", ["train_i2v_local.sh", "test.sh", "setup.sh", "browser.sh"])
def test_help_names_every_option_and_sets_nothing_up(name, tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "a folder" / "scripts", ignore=shutil.ignore_patterns("assets"))
    script = tmp_path / "a folder" / "scripts" / name
    shown = bash(script, "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "Usage: " in shown.stdout and not shown.stdout.startswith("#")
    options = set(re.findall(r"^ +(--[a-z-]+)(?:=\*|\)| \|)", script.read_text(), re.M)) - {"--help"}
    assert all(option in shown.stdout for option in options)
    assert "set -euo" not in shown.stdout and not (tmp_path / "a folder" / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "2"], "unknown option --gpu"),
        (["--gpus"], "--gpus needs a value"),
        (["--gpus", "two"], "--gpus two must be a number"),
        (["--config", "no.yaml"], "--config no.yaml does not exist"),
        (["fast"], "'fast' is neither an option nor stage.key=value"),
    ],
)
def test_main_job_refuses_wrong_options_before_the_set_up(arguments, message, tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("assets"))
    (tmp_path / "configs/toy").mkdir(parents=True)
    (tmp_path / "configs/toy/i2v.yaml").touch()
    refused = bash(tmp_path / "scripts/train_i2v_local.sh", *arguments)
    assert refused.returncode == 2 and message in refused.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.whole
def test_main_job_refuses_a_wrong_key_with_one_message(tmp_path):
    path = present_python(tmp_path / "bin")
    script = SCRIPTS / "train_i2v_local.sh"
    refused = bash(script, "--no-setup", "--logdir", tmp_path / "run", "distill.max_step=3", path=path)
    assert refused.returncode == 2 and refused.stderr.startswith("ConfigError: unknown key stages.distill.max_step")
    assert "Traceback" not in refused.stderr and not (tmp_path / "run").exists()
    refused = bash(script, "--no-setup", "--gpus=99", "--logdir", tmp_path / "run", path=path)
    assert refused.returncode == 2 and "--gpus 99: this machine has" in refused.stderr


@pytest.mark.parametrize(
    ("given", "started"),
    [
        (["--gpus", "1"], "-u -m longtake train"),
        (
            ["--gpus", "1", "--restarts", "2"],
            "-m torch.distributed.run --standalone --nproc-per-node 1 --max-restarts 2",
        ),
        (["--gpus", "2"], "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 0"),
    ],
)
def test_main_job_needs_torchrun_for_several_processes_or_restarts_alone(given, started, tmp_path):
    """By a python on a machine with two GPUs that shows what it would be given."""
    (tmp_path / "python").write_text(
        '#!/bin/sh\ncase "$*" in *--check*) ;; *device_count*) echo 2 16 ;; *) echo "$OMP_NUM_THREADS" "$*" ;; esac\n'
    )
    (tmp_path / "python").chmod(0o755)
    script, path = SCRIPTS / "train_i2v_local.sh", f"{tmp_path}:{os.environ['PATH']}"
    done = bash(script, "--no-setup", *given, "distill.max_steps=3", path=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{16 // int(given[1])} {started} ") and done.stdout.endswith(
        " distill.max_steps=3\n"
    )


def test_one_process_is_alone_on_a_cluster_that_says_something_else(tmp_path, monkeypatch):
    """As where torchrun --standalone starts it, which sets these anew."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    shows = 'echo "started${RANK-}${WORLD_SIZE-}${LOCAL_RANK-}"'
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *--check*) ;; *device_count*) echo 1 4 ;; *) {shows} ;; esac\n'
    )
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert bash(SCRIPTS / "train_i2v_local.sh", "--no-setup", path=path).stdout == "started\n"


def test_setup_says_which_python_is_too_old(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "setup.sh", tmp_path / "scripts")
    old = tmp_path / "bin"
    old.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        (old / name).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.2 && exit 0\nexit 1\n')
        (old / name).chmod(0o755)
    refused = bash(tmp_path / "scripts/setup.sh", path=f"{old}:{os.environ['PATH']}")
    assert refused.returncode == 1 and not (tmp_path / ".venv").exists()
    assert "no Python 3.11 or newer was found (python3 is Python 3.10.2)" in refused.stderr
    # A virtual environment that is already there is never thrown away.
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(old / "python", tmp_path / ".venv/bin/python")
    refused = bash(tmp_path / "scripts/setup.sh")
    assert refused.returncode == 1 and "older than 3.11; remove that folder" in refused.stderr


@pytest.fixture
def set_up(tmp_path):
    """Runs setup.sh beside a stand-in for .venv/bin/python (and uv), which writes down each installation."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(SCRIPTS / "setup.sh", tmp_path / "scripts")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    log = tmp_path / "pip.log"
    log.touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = pip ] && echo "$@" >> "{log}" && echo "Collecting x\n  Downloading x-1.whl (5.1 MB)"\nexit 0\n'
    )
    uv = tmp_path / "bin/uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\necho "uv $@" >> "{log}"\n')
    for program in (python, uv):
        program.chmod(0o755)

    def run(*arguments: str, code: int = 0, **environment: str) -> tuple[str, list[str]]:
        """What it said, and what was installed so far."""
        path = {"PATH": f"{uv.parent}:{os.environ['PATH']}"}
        words = ["bash", str(tmp_path / "scripts/setup.sh"), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | path | environment, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stderr, log.read_text().splitlines()

    run.folder, run.python = tmp_path, python
    return run


def test_setup_installs_once_and_again_when_the_pins_change(set_up):
    folder = set_up.folder
    said, first = set_up()
    assert len(first) == 1 and f"-c {folder}/constraints.txt torch==" in first[0] and first[0].endswith("[serve]")
    assert "  Downloading x-1.whl (5.1 MB)" in said and "Collecting" not in said  # a line a package, with its size
    assert "GB of disk are free" in said and "Done: .venv takes" in said
    assert set_up() == ("", first)
    assert set_up("dev")[1][1].endswith("[serve,dev]")
    assert len(set_up()[1]) == len(set_up("dev")[1]) == 2  # what holds the tests' packages holds the others
    (folder / "constraints.txt").write_text((folder / "constraints.txt").read_text() + "wheel==0.1\n")
    assert len(set_up()[1]) == 3
    python = set_up.python
    python.write_text(python.read_text().replace("exit 0", '[ "$2" != pip ] || ! echo "No matching distribution"'))
    (folder / "constraints.txt").write_text("torch==2.13.0\n")
    said, _ = set_up(code=1)
    assert "could not be installed" in said and "No matching distribution" in said
    assert not list((folder / ".venv").glob(".longtake-setup-*"))  # an incomplete one is done again


def test_setup_takes_torch_from_the_index_that_is_asked_for_and_remembers_it(set_up):
    said, first = set_up("--cpu")
    uninstalled, installed = first
    assert (
        uninstalled.endswith("uninstall -y torch")
        and "--extra-index-url https://download.pytorch.org/whl/cpu" in installed
    )
    assert len(set_up()[1]) == len(set_up("--cpu")[1]) == 2  # scripts that call it keep the choice
    changed = set_up("--torch-index", "https://download.pytorch.org/whl/cu128")[1]
    assert len(changed) == 4 and "--extra-index-url https://download.pytorch.org/whl/cu128 -c" in changed[3]
    assert "--extra-index-url https://download.pytorch.org/whl/cu128 -c" in set_up("dev")[1][4]


def test_setup_with_uv(set_up):
    said, calls = set_up("--uv", "--cpu")
    assert [call.split()[:3] for call in calls] == [["uv", "pip", "uninstall"], ["uv", "pip", "install"]]
    assert "--index-strategy unsafe-best-match" in calls[1]
    (set_up.folder / "bin/uv").unlink()
    assert "uv is not installed" in set_up("--uv", code=1)[0]
    shutil.rmtree(set_up.folder / ".venv")
    uv = set_up.folder / "bin/uv"
    made = set_up.folder / ".venv/bin"
    uv.write_text(
        f'#!/bin/sh\necho "$@" >> "{set_up.folder}/uv.log"\nmkdir -p {made}\nln -sf {sys.executable} {made}/python\n'
    )
    uv.chmod(0o755)
    set_up("--uv")
    assert (set_up.folder / "uv.log").read_text().startswith("venv --seed --python >=3.11 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast"], "unknown argument 'fast'; there are dev, --cpu, --torch-index URL and --uv"),
        (["--torch-index"], "--torch-index needs the URL of an index"),
        (["--torch-index", "cu128"], "must begin with https://"),
    ],
)
def test_setup_refuses_wrong_arguments(set_up, arguments, message):
    said, calls = set_up(*arguments, code=1)
    assert message in said and calls == []


def test_setup_fails_on_a_bad_python(set_up):
    """Also where .venv is there already: what was asked for would else be passed over silently."""
    old = set_up.folder / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    said, calls = set_up(code=1, PYTHON=str(set_up.folder / "none"))
    assert "is no program" in said and calls == []
    said, calls = set_up(code=1, PYTHON=str(old))
    assert "is Python 3.10.2; Python 3.11 or newer is needed" in said and calls == []
    shutil.rmtree(set_up.folder / ".venv")
    assert "is Python 3.10.2" in set_up(code=1, PYTHON=str(old))[0] and not (set_up.folder / ".venv").exists()


def test_every_dependency_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for kind in ("dev", "serve") for name in project["optional-dependencies"][kind]),
    ]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), pins
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    assert {re.split(r"[<>=\[]", name)[0].lower() for name in wanted} - {"longtake"} <= pinned
    assert len(pinned) == len(pins) and "torchvision" not in pinned


# ---- the main job -----------------------------------------------------------------------------------------------------
def main_job(logdir: Path, overrides: list[str], output: Path) -> subprocess.Popen:
    """Starts the main job on two CPU processes, as the leader of its own process group."""
    command = ["bash", str(SCRIPTS / "train_i2v_local.sh"), "--no-setup", "--gpus", "0", "--logdir", str(logdir)]
    environment = dict(os.environ) | {"PATH": present_python(output.parent / "bin")}
    with output.open("ab") as file:
        return subprocess.Popen(
            [*command, *overrides], stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def finish(logdir: Path, overrides: list[str], output: Path) -> str:
    """What a run of the main job printed."""
    before = output.stat().st_size if output.exists() else 0
    code = main_job(logdir, overrides, output).wait(timeout=600)
    text = output.read_bytes()[before:].decode(errors="replace")
    assert code == 0, text[-4000:]
    return text


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def weights(stage: Path) -> dict:
    """Every tensor of the newest checkpoint: weights, averages and optimizer states, of all ranks."""
    checkpoint = latest_checkpoint(stage / "checkpoints")
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)}:{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_main_job_leaves_what_it_promises_and_goes_on(tmp_path):
    logdir = tmp_path / "run"
    text = finish(logdir, TINY, tmp_path / "1.log")
    table = (logdir / "evaluation.md").read_text()
    rows = ["truth", "teacher", "teacher, causal", "causal", "distill"]
    for row in rows:
        assert f"\n| {row} " in table and f"\n| {row} " in text
    assert set(rows) <= json.loads((logdir / "evaluation.json").read_text())["rows"].keys()

    data = logdir / "data"
    assert len(list((data / "images").glob("*.png"))) == len(list((data / "clips").glob("*.mp4"))) == 16
    assert list((data / "lmdb").glob("shard_*/data.mdb"))
    for stage in (logdir / "causal", logdir / "distill"):
        assert read_manifest(latest_checkpoint(stage / "checkpoints"))["world_size"] == 2
        assert read_manifest(latest_checkpoint(stage / "checkpoints"))["step"] == 2
        steps = [row for row in read_rows(stage / "metrics.jsonl") if "generator_loss" in row or "critic_loss" in row]
        assert [row["step"] for row in steps] == [0, 1]
        assert list(stage.glob("events.out.tfevents.*")) and (stage / "config.yaml").stat().st_size > 500
    for folder in (logdir, logdir / "causal", logdir / "distill"):
        assert (folder / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
        videos = list((folder / "samples").glob("*.mp4"))
        assert videos and all(num_frames(video) >= 33 for video in videos)

    kept = {
        path: path.stat().st_mtime_ns for path in [*logdir.rglob("checkpoints/*/*"), *logdir.glob("*/metrics.jsonl")]
    }
    again = finish(logdir, TINY, tmp_path / "2.log")
    assert "Stage causal is complete" in again and "Stage distill is complete" in again
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "\n| distill " in again and (logdir / "evaluation.md").read_text() == table


def processes_below(root: int) -> list[int]:
    """Process ids of `root` and all its descendants, whatever their session."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue  # it ended meanwhile
    found = [root]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found


def kill_9(job: subprocess.Popen) -> None:
    """Kills the process group of the command; its processes of other sessions must die with it."""
    below = processes_below(job.pid)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 10
    while left := [process for process in below if Path(f"/proc/{process}").exists()]:
        if time.monotonic() > deadline:
            for process in left:
                os.kill(process, signal.SIGKILL)
            raise AssertionError(f"{left} of {below} outlived the killed command and would train on, unseen")
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux), as the script itself does")
def test_kill_9_at_random_moments_changes_no_bit(tmp_path):
    """Killed in steps and in saves of both stages, the command run again ends with the weights of a whole run."""
    finish(tmp_path / "whole", KILLED, tmp_path / "whole.log")
    run, output = tmp_path / "run", tmp_path / "run.log"
    moment = random.Random(5)

    def in_save(stage: str, step: int) -> Callable[[], bool]:
        return lambda: (run / stage / "checkpoints" / f".tmp-step_{step:06d}").is_dir()

    def after(stage: str, step: int, seconds: float) -> Callable[[], bool]:
        done = run / stage / "checkpoints" / f"step_{step:06d}"
        return lambda: done.is_dir() and time.time() - done.stat().st_mtime > seconds

    seen = []
    for name, reached in [
        ("in a save of causal", in_save("causal", 2)),
        ("in a step of causal", after("causal", 3, moment.uniform(0, 0.5))),
        ("in a save of distill", in_save("distill", 1 + moment.randrange(2))),
        ("in a step of distill", after("distill", 3, moment.uniform(0, 1.5))),
        # By the run's own progress, not by the clock: a fast machine would be done before the kill.
        ("near the end", after("distill", 4, moment.uniform(0, 3))),
    ]:
        job = main_job(run, KILLED, output)
        while not reached() and job.poll() is None:
            time.sleep(0.005)
        ended = job.poll()
        assert ended is None, f"{name}: the run ended with {ended} before it was killed: {output.read_text()[-3000:]}"
        kill_9(job)
        left = sorted(path.name for path in run.glob("*/checkpoints/*"))
        seen.append((name, left))
    assert any(leftover.startswith(".tmp-step") for _, left in seen for leftover in left), seen

    finish(run, KILLED, output)
    for stage in ("causal", "distill"):
        whole, resumed = weights(tmp_path / "whole" / stage), weights(run / stage)
        assert whole.keys() == resumed.keys() and len(whole) > 100
        assert [key for key in whole if not whole[key].equal(resumed[key])] == [], seen
        assert losses(tmp_path / "whole" / stage) == losses(run / stage)
    numbers = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "run")]
    assert numbers[0] == numbers[1]


def losses(stage: Path) -> list[dict]:
    rows = read_rows(stage / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "speed"))} for row in rows]
