"""The benchmark of saving, rehearsed with tiny sizes: two segments, the second of which resumes the first."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("lmdb")
ROOT = Path(__file__).parents[2]


def test_the_stall_is_that_of_the_timeline():
    sys.path.insert(0, str(ROOT))
    try:
        save_stall = import_module("benchmarks.save_stall")
    finally:
        sys.path.remove(str(ROOT))
    rows = [
        {"step": step, "seconds": 2.0, "seconds_of/critic": 1.0, "seconds/checkpoint": 0.0} for step in range(4, 10)
    ]
    rows[2] |= {"seconds/checkpoint": 0.5, "seconds": 3.0}
    times = {"seconds/wait": 0.0, "seconds/stage": 0.5, "size_bytes": 2**30}
    saves = [{"step": 6, "seconds/write": 2.5, **times}, {"step": 10, "seconds/write": 4.0, **times}]
    found = save_stall.summary(rows, saves, 13.5)
    assert found["stall seconds"] == 0.5 and found["stall share"] == 0.5 / 13.5
    assert found["seconds of the last save, at the stop"] == 4.5 and found["checkpoint GiB"] == 1
    assert found["iteration seconds, beside a save"] == 3.0 and found["iteration seconds, otherwise"] == 2.0


@pytest.mark.slow
def test_two_segments_make_one_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.save_stall", "-o", str(tmp_path), "--tiny", "--device", "cpu"]
    command += ["--segment-seconds", "1", "--save-every", "5", "--rows", "2"]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    one, two = results["segment 1"], results["segment 2"]
    assert two["first step"] == one["iterations"] > 5
    for part in (one, two):
        assert part["saves"] >= 2 and 0 < part["stall seconds"] < part["wall seconds"]
        assert len(part["staging seconds"]) == len(part["writing seconds"]) == part["saves"]
    steps = [row["step"] for row in map(json.loads, (tmp_path / "save_stall/metrics.jsonl").read_text().splitlines())]
    assert steps == list(range(one["iterations"] + two["iterations"]))
    assert (tmp_path / "save_stall.png").stat().st_size > 10_000
    assert len(list((tmp_path / "save_stall/checkpoints").iterdir())) == 1
