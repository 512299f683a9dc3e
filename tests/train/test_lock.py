"""One run a folder: the second is refused and changes nothing; the lock dies with its process and not with a child."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from encoded_files import config_of
from tiny_stage import stage_config

from longtake import lock
from longtake.config.job import JobConfig
from longtake.encodings.write import encode
from longtake.errors import ConfigError
from longtake.lock import LOCK
from longtake.parallel.mesh import Mesh
from longtake.train.job import run_job
from longtake.train.lock import only_run
from longtake.train.stage import run_stage

# Takes the lock, forks a child that outlives it, says so, and waits.
HOLDER = """
import os, sys, time
from pathlib import Path
from longtake.parallel.mesh import Mesh
from longtake.train.lock import only_run
with only_run(Path(sys.argv[1]), Mesh(), "x"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    """Starts a process that has the lock of a folder, and a child of it; `kill -9` for both in the end."""
    pids = []

    def start(folder: Path) -> tuple[int, int]:
        program = [sys.executable, "-c", HOLDER, str(folder)]
        holder = subprocess.Popen(
            program, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
        )
        assert holder.stdout is not None
        pids.extend((holder.pid, int(holder.stdout.readline())))
        return pids[-2], pids[-1]

    yield start
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.whole
def test_every_run_in_a_folder_in_use_is_refused_and_changes_nothing(workshop, tmp_path, hold):
    stage = stage_config(workshop, tmp_path, "causal", max_steps=1)
    job = JobConfig(logdir=str(tmp_path), stages={"causal": stage.model_dump()}, data=None, evaluation=None)
    encoded = tmp_path / "encoded"
    runs = {
        stage.folder: lambda: run_stage(stage, Mesh()),
        tmp_path: lambda: run_job(job, Mesh()),
        encoded: lambda: encode(config_of(workshop, tmp_path), encoded, Mesh()),
    }
    for folder, run in runs.items():
        holder, child = hold(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(
            ConfigError, match=rf"in use already, by process {holder} on {socket.gethostname()} since 2"
        ):
            run()
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        os.kill(holder, signal.SIGKILL)
        for _ in range(100):
            try:
                with only_run(folder, Mesh(), "x"):
                    break
            except ConfigError:
                time.sleep(0.05)
        else:
            pytest.fail("the lock outlived its process")
        os.kill(child, 0)  # the child still lives


@pytest.mark.whole
def test_two_folders_side_by_side(tmp_path, hold):
    hold(tmp_path / "a")
    with only_run(tmp_path, Mesh(), "x"), only_run(tmp_path / "b", Mesh(), "x"):
        pass


def test_what_cannot_be_locked_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("x")
    told = pytest.raises(ConfigError, match="file/s cannot be written .*; make it writable, or name another")
    with told, only_run(tmp_path / "file" / "s", Mesh(), "name another"):
        pass

    def unsupported(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    with only_run(tmp_path, Mesh(), "x"):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert "has no file locks (No locks available)" in caplog.text
