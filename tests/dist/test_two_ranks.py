"""Two real ranks (gloo, CPU): FSDP2 against one process, resume across rank counts, errors on every rank."""

import shutil
import signal
import subprocess
import sys

import pytest
import tiny_run
from forked_ranks import torchrun
from safetensors.torch import load_file

from longtake.parallel.mesh import Mesh
from longtake.run_folder import exported_weights, latest_checkpoint, read_manifest
from longtake.train.metrics import read_rows


def two(folder, *arguments):
    return torchrun(2, tiny_run.__file__, folder, *arguments)


def restarted(folder, *arguments, restarts):
    """By torchrun itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), tiny_run.__file__, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def losses(folder):
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "critic_loss" in row]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "speed"))} for row in rows]


def weights(folder):
    return load_file(exported_weights(latest_checkpoint(folder / "checkpoints")) / "model.safetensors")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = two(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_ranks_equal_one(tmp_path, two_ranks):
    tiny_run.run(tmp_path, Mesh())
    one, two = losses(tmp_path), losses(two_ranks)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    for key, value in weights(tmp_path).items():
        assert (value - weights(two_ranks)[key]).abs().max() < 1e-5


def test_two_ranks_killed_in_a_save_resume_on_two_and_on_one(tmp_path, two_ranks):
    killed = two(tmp_path / "two", "--kill-in-save", "6")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert latest_checkpoint(tmp_path / "two/checkpoints").name == "step_000003"
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    done = two(tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == losses(two_ranks)
    resumed, whole = weights(tmp_path / "two"), weights(two_ranks)
    assert all(resumed[key].equal(whole[key]) for key in whole)

    tiny_run.run(tmp_path / "one", Mesh())
    for a, b in zip(losses(tmp_path / "one"), losses(two_ranks), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)


@pytest.mark.whole
def test_after_a_rank_was_killed_all_are_restarted_and_go_on(tmp_path, two_ranks):
    """`torchrun --max-restarts 3`: rank 1 is killed in the first life, rank 0 in the second."""
    done = restarted(tmp_path, "--die-once", "1", "0", restarts=3)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"(exitcode: {-signal.SIGKILL})") == 2, done.stderr
    assert losses(tmp_path) == losses(two_ranks)
    resumed, whole = (latest_checkpoint(folder / "checkpoints") for folder in (tmp_path, two_ranks))
    assert resumed.name == "step_000008"
    assert read_manifest(resumed)["files"] == read_manifest(whole)["files"]


@pytest.mark.whole
def test_restarts_are_bounded(tmp_path):
    failed = restarted(tmp_path, "--die-once", "1", "1", restarts=1)
    assert failed.returncode != 0 and f"(exitcode: {-signal.SIGKILL})" in failed.stderr
    assert latest_checkpoint(tmp_path / "checkpoints") in (None, tmp_path / "checkpoints/step_000003")


def test_non_finite_on_one_rank_is_an_error_on_both(tmp_path, two_ranks):
    """Two ranks go on from what one rank saved, and stop together two steps later."""
    tiny_run.run(tmp_path, Mesh(), steps=3)
    failed = two(tmp_path, "--nan-at", "4")
    assert failed.returncode != 0
    for rank in (0, 1):
        assert f"[rank{rank}]: longtake.errors.TrainingError: step 4, generator: loss=[" in failed.stderr, failed.stderr
    for a, b in zip(losses(tmp_path), losses(two_ranks)[:4], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step_000003"


def test_an_error_on_one_rank_ends_both(tmp_path):
    failed = two(tmp_path, "--raise-on", "1")
    assert failed.returncode != 0 and "this rank broke" in failed.stderr
