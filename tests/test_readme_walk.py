"""Every command of the README, in its order, in a clean folder: what is large is smaller, what needs a network stands in.

The fast test runs what takes seconds in this process; the slow one runs the rest, the first minute as it stands.
"""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_wan
from test_walk_through import LAUNCHER, VALUES, download
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.job import load_config
from longtake.inference.video_io import VideoWriter, read_video
from longtake.run_folder import latest_checkpoint, read_manifest

ROOT = Path(__file__).parent.parent
LANGUAGES = ("README.md", "README.zh-CN.md")
# tests/test_scripts.py makes environments, tests/serve opens servers
STAND_INS = ("bash scripts/setup.sh", "source .venv/bin/activate", "longtake serve")
SLOW = ("bash scripts/train_i2v_local.sh", "longtake evaluate --run outputs/toy", "torchrun ")
MAIN_JOB = (
    "--gpus=0 --no-setup data.num_worlds=8 causal.max_steps=1 distill.max_steps=1 causal.validate_every=0 "
    "distill.validate_every=0 causal.batch_size=8 evaluation.num_worlds=2 evaluation.teacher_steps=1"
)


def commands(readme: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / readme).read_text(), re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(params=LANGUAGES)
def clone(request, tmp_path, monkeypatch):
    """A folder like a clone of the repository, with photos and clips of one's own, and the README that is walked."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "examples", "scripts", "longtake"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiny_wan.write_photos(tmp_path / "photos")
    (tmp_path / "clips").mkdir()
    for k in range(2):
        frames = np.random.default_rng(k).integers(0, 256, (81, 64, 64, 3), np.uint8)
        with VideoWriter(tmp_path / f"clips/{k}.mp4", 16, 64, 64) as writer:
            writer.write(frames)
        (tmp_path / f"clips/{k}.txt").write_text("a cat walks")
    return request.param


def smaller(command: str) -> list[str]:
    """The words of a `longtake` command, so small that it takes seconds."""
    words = shlex.split(re.sub(r"--seconds \d+", "--seconds 1", LAUNCHER.sub("", command)))
    if words[1] not in ("train", "encode"):
        return words
    stages = getattr(load_config(words[2]), "stages", None)
    values = VALUES[words[1]]
    return words + ([f"{stage}.{value}" for stage in stages for value in values] if stages else values)


@pytest.mark.whole
def test_the_commands_run(clone):
    done = []
    for command in commands(clone):
        if command.startswith((*STAND_INS, *SLOW)):
            continue
        if command.startswith("longtake download"):
            download(command)
            continue
        words = smaller(command)
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}{result.exception or ''}"
        done.append(words[1])
    assert done == ["generate", "generate", "encode", "encode"]
    video, fps = read_video("stream.mp4")
    assert video.shape[1:] == (256, 256, 3) and len(video) >= 16 and fps == 16 and video.std() > 10
    assert np.array_equal(read_video("again.mp4")[0], video)
    for name in ("clips", "pictures"):
        assert Path("outputs/wan_i2v_1_3b/encoded", name).is_dir()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_minute_and_the_main_job_run(clone):
    """The first video as the README says it, in less than a minute; the main job and that for Wan with few iterations."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # Threads that wait for each other would count as work where others use the machine.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def run(command: str) -> None:
        words = shlex.split(command)
        words = [sys.executable, "-m", *words] if words[0] == "longtake" else words
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    first, _ = (line for line in commands(clone) if line.startswith("longtake generate"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run(first)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    assert len(read_video("stream.mp4")[0]) >= 160
    job, longer, wan = (line for line in commands(clone) if line.startswith(SLOW))
    run(f"{job} {MAIN_JOB} --logdir {Path.cwd() / 'outputs/toy'}")
    run(f"{longer} --num-worlds 1")
    for folder in ("outputs/toy", "outputs/longer"):
        assert {"evaluation.md", "evaluation.png", "contact_sheet.png"} <= {
            path.name for path in Path(folder).iterdir()
        }
    assert "distill" in Path("outputs/longer/evaluation.md").read_text()
    for command in (line for line in commands(clone) if line.startswith(("longtake download", "longtake encode"))):
        download(command) if "download" in command else run(shlex.join(smaller(command)))
    run(shlex.join(smaller(wan)))
    for stage in ("teacher_forcing", "distill"):
        newest = latest_checkpoint(Path("outputs/wan_i2v_1_3b") / stage / "checkpoints")
        assert read_manifest(newest)["step"] == 2
