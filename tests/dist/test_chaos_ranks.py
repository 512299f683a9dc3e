"""A run on two ranks that is killed, corrupted and starved ends with the same bits, or stops with the right words."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longtake import run_folder
from longtake.train.metrics import read_rows

HERE = Path(__file__).parent


def run(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "chaos_run.py"), str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout)


def losses(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "speed"))} for row in rows]


@pytest.mark.whole
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_and_damaged_checkpoints_change_no_bit(tmp_path, kills):
    """SIGKILL and SIGTERM at seeded random moments, some in saves and some in start-up; a NaN on one rank."""
    story = run(tmp_path, "--kills", kills, "--seed", kills)["story"]
    assert sum("SIG" in line for line in story) == kills
    assert {"flipped", "missing", "manifest"} <= {line.split()[0] for line in story}
    whole, ended = (run_folder.latest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "run"))
    assert whole.name == ended.name == f"step_{10 * kills + 10:06d}"
    one, other = run_folder.read_manifest(whole), run_folder.read_manifest(ended)
    assert one["skipped"] == other["skipped"] == 2
    assert one["files"] == other["files"] and len(one["files"]) == 6  # sizes and checksums
    assert losses(tmp_path / "whole") == losses(tmp_path / "run"), story
    for path in (tmp_path / "run/checkpoints").iterdir():
        assert path.name.startswith(("step_", "damaged-")), story


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What came of each row of scenarios, by its names; one process imports everything for all of them."""
    return run(tmp_path_factory.mktemp("scenarios"), "--scenarios", "nan,plain", "starved,plain", "data,critic")


def test_a_nan_on_one_rank_stops_both_and_leaves_what_was_saved(seen):
    nan, again = seen["nan,plain"]
    assert nan["codes"] == [1, 1] and again["codes"] == [0, 0]
    for rank in (0, 1):
        assert f"rank {rank} Traceback" in nan["log"]
    assert nan["log"].count("TrainingError: step 4, generator: loss=[") == 2
    assert nan["checkpoints"] == ["step_000002", "step_000004"]


def test_a_write_that_fails_on_one_rank_stops_both_and_leaves_nothing_half(seen):
    failed, again = seen["starved,plain"]
    assert failed["codes"] == [1, 1] and failed["log"].count("rank 1: OSError(27, 'File too large')") == 2, failed
    assert failed["log"].count("longtake.errors.CheckpointError: writing ") == 2
    assert failed["checkpoints"] == ["step_000002", "step_000004"]
    assert again["codes"] == [0, 0] and again["checkpoints"] == ["step_000010", "step_000012"]


@pytest.mark.slow
def test_a_full_disk_is_told_and_older_checkpoints_stay(tmp_path):
    """A small file system: first no room by the estimate, then none although the estimate was not asked."""
    small = tmp_path / "small"
    small.mkdir()

    def outcome(name="plain"):
        return run(small, "--scenarios", name)[name][0]

    mount = ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(small)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        (tmp_path / "logs").mkdir()
        done = outcome()
        assert done["codes"] == [0, 0]
        for path in (small / "run0" / "checkpoints").glob("step_*2"):
            shutil.rmtree(path)
        (small / "fill").write_bytes(bytes(10 << 20))
        full = outcome()
        assert full["codes"] == [1, 1] and full["checkpoints"] == ["step_000010"], full
        assert full["log"].count("step_000010 needs 0.06 GiB in ") == 2 and "1 checkpoints there are intact" in full["log"]
        free = shutil.disk_usage(small).free
        (small / "fill").write_bytes(bytes((10 << 20) + free - (16 << 10)))
        broken = outcome("unchecked")
        assert broken["codes"] == [1, 1] and "No space left on device" in broken["log"], broken
        assert broken["checkpoints"] == ["step_000010"]
        (small / "fill").unlink()
        again = outcome()
        assert again["codes"] == [0, 0] and again["checkpoints"] == ["step_000010", "step_000012"]
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_hang_ends_with_the_name_of_the_rank(seen):
    """Rank 1 stands still in its data, then in its work; rank 0 waits in a collective for it."""
    for hung in seen["data,critic"]:
        assert all(code in (124, 1, -9, -15) for code in hung["codes"]) and 124 in hung["codes"], hung
        report = next(line for line in hung["log"].splitlines() if "NO PROGRESS" in line)
        behind, waits = report.split("(watchdog): ")[1].split(". The run ends")[0].split("; ")
        phase = {"data": "data", "critic": "forward"}[hung["name"]]
        assert behind.startswith(f"rank 1 has been in phase '{phase}' of step 5 for "), behind
        assert "chaos_run.py" in behind, behind
        assert waits.startswith("rank 0 waits in 'forward' of step 5"), waits
        assert hung["checkpoints"] == ["step_000002", "step_000004"]
