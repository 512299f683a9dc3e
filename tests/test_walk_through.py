"""Every command of the walk-through in docs/recipes.md, in its order, on tiny weights.

The commands come from the fenced blocks of the document, and so do the values that are added for the size of a test.
The fast test runs them in this process, shorter still; the slow one as they stand, with torchrun and two ranks in place of
four.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_wan
import torch
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.job import JobConfig, load_config
from longtake.doctor.estimate import Need
from longtake.inference.video_io import read_video
from longtake.run_folder import latest_checkpoint, read_manifest
from longtake.weights.locate import HUB_REPOSITORIES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "recipes.md").read_text()
SECTION = TEXT[TEXT.index("## From weights and pictures") : TEXT.index("## Other Wan models")]
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", SECTION, re.M | re.S)
    for line in block.replace("\\\n", " ").splitlines()
]
# Not run here: what needs a network or makes an environment (tests/test_scripts.py runs setup.sh), each with a stand-in
STAND_INS = {"bash scripts/setup.sh": "set-up", "source .venv/bin/activate": "set-up", "longtake download": "network"}
# What is large or not here, and what stands for it
SMALLER = {"step_003000": "step_000002", "node0:29500": "localhost:0", "--nnodes 2": "--nnodes 1"}
# What the fast test adds: one row of a batch, no validation, no video longer than those of training
SHORTER = {"train": ["batch_size=1", "validate_every=0"], "--run": ["--seconds", "2"], "--config": ["--seconds", "1"]}
LAUNCHER = re.compile(r"^torchrun (.*?)-m -- ")


def added_values() -> dict[str, list[str]]:
    """The values of the test by kind of command, from the document."""
    (block,) = re.findall(r"^```text\n(.*?)^```", SECTION, re.M | re.S)
    rows = [re.split(r"\s{2,}", line) for line in block.strip().splitlines()]
    return {kind.strip(): values.split() for kinds, values in rows for kind in kinds.split(",")}


VALUES = added_values()


def at_test_size(command: str) -> list[str]:
    """A `longtake` command with the values of the test."""
    for large, small in SMALLER.items():
        command = command.replace(large, small)
    words = shlex.split(command)
    kind = f"{words[1]} --model" if "--model" in words else words[1]
    if kind not in VALUES:
        return words
    values = VALUES[kind]
    files = [word for word in words if word.endswith(".yaml")]
    if kind != "generate --model" and isinstance(job := load_config(files[0]), JobConfig):
        values = [f"{stage}.{value}" for stage in job.stages for value in values]
    batch = [word for word in words if word.startswith("batch_size=")]  # on the ranks that are there
    return [word for word in words if word not in batch] + values


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder like a clone of the repository, with photos; weights appear when they are downloaded."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tiny_wan.write_photos(tmp_path / "photos")
    for end in ("jpg", "txt"):
        shutil.copy(tmp_path / f"photos/photo0.{end}", tmp_path / f"photos/cat.{end}")
    return tmp_path


def download(command: str) -> None:
    """What `longtake download` would leave, tiny."""
    _, _, repository, _, folder = shlex.split(command)
    assert repository in HUB_REPOSITORIES
    tiny_wan.write_model(Path(folder), tiny_wan.I2V, tiny_wan.make_encoders())


def walk(run: Callable[[str, list[str]], tuple[int, str]], seconds: int = 10) -> None:
    """Runs all commands; `run(launcher, words)` gives exit code and output. The student's first video has `seconds`."""
    doctors = []
    for command in COMMANDS:
        if command.startswith(tuple(STAND_INS)):
            if command.startswith("longtake download"):
                download(command)
            continue
        if command.startswith("tail "):
            shown = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
            assert '"critic_loss"' in shown.stdout
            continue
        launcher = LAUNCHER.match(command)
        words = at_test_size(command[launcher.end() :] if launcher else command)
        assert words[0] == "longtake", command
        code, output = run(launcher[1] if launcher else "", words)
        if words[1] == "doctor":
            doctors.append((code, output))
        else:
            assert code == 0, f"{command}\n{output}"
    # Before encoding the sets are missing, and nothing else but the stage that is trained later; then all is well.
    (first, missing), (second, well) = doctors
    assert first == 1 and len(re.findall("PROBLEM: stage .*: missing data: ", missing)) == 2
    assert missing.count("PROBLEM") == 2
    assert second == 0 and "all is well" in well
    for stage in ("teacher_forcing", "distill"):
        newest = latest_checkpoint(Path("outputs/wan_i2v_1_3b") / stage / "checkpoints")
        assert read_manifest(newest)["step"] == 2
    assert read_video("cat.mp4")[0].shape == (16 * seconds, 32, 32, 3)
    videos = sorted(path.name for path in Path("videos").glob("*.mp4"))
    assert videos == ["cat-seed0.mp4", "photo0-seed0.mp4", "photo1-seed0.mp4"]
    assert len(list(Path("clips").glob("*.mp4"))) == 3 and len(read_video("clips/cat-seed0.mp4")[0]) == 81


def test_the_walk_through_has_all_its_steps():
    kinds = [LAUNCHER.sub("", command).split()[:2] for command in COMMANDS]
    assert ["longtake", "download"] in kinds
    for name in ("doctor", "generate", "encode", "train", "convert"):
        assert ["longtake", name] in kinds
    assert sum("--nproc-per-node 4" in command for command in COMMANDS) >= 6


@pytest.mark.whole
def test_every_command_runs(clone, monkeypatch):
    # What is traced takes its time: the slow test does it.
    need = Need({"trained weights": 1}, 1, "backward", 1)
    monkeypatch.setattr("longtake.doctor.run.stage_need", lambda *_, **__: need)

    def run(_: str, words: list[str]) -> tuple[int, str]:
        more = [word for kind, values in SHORTER.items() if kind in words for word in values]
        done = CliRunner().invoke(app, [*words[1:], *more])
        return done.exit_code, done.output + str(done.exception or "")

    walk(run, seconds=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_runs_as_it_stands(clone):
    """With real ranks; `python -m torch.distributed.run` is torchrun."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(launcher: str, words: list[str]) -> tuple[int, str]:
        for large, small in SMALLER.items():
            launcher = launcher.replace(large, small)
        launcher = re.sub(r"--nproc-per-node \d+", "--nproc-per-node 2", launcher)
        start = ["-m", "torch.distributed.run", *shlex.split(launcher), "-m", "--"] if launcher else ["-m"]
        done = subprocess.run(
            [sys.executable, *start, *words], capture_output=True, text=True, timeout=300, env=environment, check=False
        )
        return done.returncode, done.stdout + done.stderr

    walk(run)
