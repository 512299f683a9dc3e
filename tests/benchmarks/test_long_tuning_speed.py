"""The benchmark of long tuning: what it holds against what, and a rehearsal on a CPU."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("lmdb")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def long_tuning():
    sys.path.insert(0, str(ROOT))
    try:
        return import_module("benchmarks.long_tuning")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def run(long_tuning, tmp_path):
    return long_tuning.Run(long_tuning.parse(["-o", str(tmp_path), "--tiny", "--device", "cpu"]))


def row(gib, *, generator=False, loss=1.0):
    return {"seconds": 2.0, "memory_gib": gib, "critic_loss": loss} | ({"generator_loss": 1.0} if generator else {})


def test_rows_in_short(long_tuning):
    found = long_tuning.summary([row(9.0, generator=True), row(5.0), row(9.5, generator=True), row(6.0)], 2)
    assert found["iterations"] == 4 and found["finite"] and found["iteration seconds"] == 2.0
    assert found["peak GiB"] == 9.5 and found["peak GiB of later chunks"] == 6.0
    assert found["seconds by kind"] == {
        "generator and critic, first chunk": [2.0], "critic, later chunk": [2.0, 2.0]
    }  # fmt: skip
    assert not long_tuning.summary([row(1.0, loss=None)], 2)["finite"] and not long_tuning.summary([], 2)["finite"]


def test_memory_must_not_depend_on_the_length(long_tuning, run):
    frames = [1 + chunks * (run.sizes.num_latent_frames - 1) for chunks in (2, 12)]
    for chunks, peak in ((2, 50.0), (12, 50.9)):
        run.record(f"{chunks} chunks", {"peak GiB of later chunks": peak})
    long_tuning.compare(run, [2, 12])
    assert run.results["memory"]["latent frames"] == frames
    assert run.results["memory"]["change"] == pytest.approx(0.018)
    run.record("12 chunks", {"peak GiB of later chunks": 51.1})
    with pytest.raises(RuntimeError, match=r"differ by 2\.2%, more than 2%"):
        long_tuning.compare(run, [2, 12])
    run.record("12 chunks", {"peak GiB of later chunks": None})
    long_tuning.compare(run, [2, 12])  # nothing to compare


def test_its_stage_is_what_the_issue_of_long_videos_asks_for(long_tuning, run):
    from longtake.config.job import load_config

    config = load_config(long_tuning.stage(run, 12, 12, path=str(run.work / "lmdb"), kind="lmdb"))
    assert (
        config.objective.kind == "long_tuning" and config.objective.shared_base and config.objective.num_chunks == [12]
    )
    assert config.lora.rank == config.objective.critic.lora.rank == long_tuning.TINY_RANK
    assert config.activation_checkpointing is True and config.micro_batch(1) == 1


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    command = [sys.executable, "-m", "benchmarks.long_tuning", "-o", str(tmp_path), "--tiny", "--device", "cpu"]
    subprocess.run([*command, "--chunks", "2", "3"], cwd=ROOT, check=True, timeout=280)
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("2 chunks", "3 chunks"):
        assert results[name]["iterations"] == 10 and results[name]["finite"]
    assert "| 3 chunks | iterations | 10 |" in (tmp_path / "results.md").read_text()
