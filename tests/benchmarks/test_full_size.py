"""The benchmark at full size, rehearsed with tiny sizes: every part runs and leaves its numbers."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.job import load_config

pytest.importorskip("lmdb")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def full_size():
    sys.path.insert(0, str(ROOT))
    try:
        return import_module("benchmarks.full_size")
    finally:
        sys.path.remove(str(ROOT))


def in_process(self, name, arguments, progress=lambda: None):
    """In place of another process, which would spend seconds on imports."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    progress()
    assert result.exit_code == 0, result.output
    return True


def test_all_parts_leave_their_numbers(full_size, tmp_path, monkeypatch):
    monkeypatch.setattr(full_size.Run, "longtake", in_process)
    given = ["-o", str(tmp_path), "--tiny", "--windows", "9:1", "--iterations", "2", "--rows", "2", "--seconds", "2.5"]
    assert full_size.main([*given, "--parts", "rates,files,encode"]) == 0
    assert full_size.main([*given, "--parts", "train,generate"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rates"]["matmul 64^3, TFLOP/s"] > 0 and results["rates"]["autocast keeps gradients after no_grad"]
    trained = results["train, window 9, sink 1"]
    assert trained["iterations"] == 2 and trained["finite"] and trained["peak GiB"] is None
    assert sum(map(len, trained["seconds by exit step"].values())) == 2
    assert not list(tmp_path.glob("*/checkpoints/*"))
    made = results["generate"]
    assert made["frames"] == 40 and made["blocks"] == len(made["block seconds"]) == 3
    decoding = made["seconds to decode a block"]
    assert len(decoding) == 4 and all(seconds > 0 for seconds in decoding.values())
    shown = (tmp_path / "results.md").read_text()
    assert all(f"| {part} |" in shown for part in results)


def test_the_stage_at_full_size_is_the_recipe(full_size, tmp_path):
    args = full_size.parse(["-o", str(tmp_path), "--device", "cpu"])
    run = full_size.Run(args)
    for window, sink in full_size.windows_of(run.sizes.windows):
        config = load_config(full_size.stage(run, window, sink, args.iterations, path="data", kind="encoded"))
        assert (config.plan.window_frames, config.plan.sink_frames) == (window, sink)
        assert (config.video.height, config.video.width, config.video.num_latent_frames) == (480, 832, 21)
        assert list(config.plan.stream().blocks(0, 21)) == [(0, 1), (1, 5), (5, 9), (9, 13), (13, 17), (17, 21)]
        assert config.precision == "bf16" and config.activation_checkpointing and config.save_every == 0
    assert run.sizes.tokens == 1560 and {window for window, _ in full_size.windows_of(run.sizes.windows)} == {12, 13}


def test_each_exit_step_has_a_generator_update(full_size):
    from longtake.rng import KeyedRNG

    draws = KeyedRNG(full_size.telling_seed(20))
    assert {draws.integer(step, "exit_step", 0, 4) for step in (5, 10, 15, 20)} == {0, 1, 2, 3}


def test_summaries_leave_the_first_out(full_size):
    first = {"exit_step": 0.0, "generator_loss": 1.0, "critic_loss": None, "seconds": 99.0}
    alone = {"exit_step": 2.0, "critic_loss": 1.0, "seconds": 2.0, "memory_gib": 5.0}
    rows = [
        {**first, "seconds_of/generator": 50.0, "seconds_of/critic": 49.0, "memory_gib": 7.0},
        {**alone, "seconds_of/critic": 1.0},
        {**alone, "seconds_of/critic": 3.0},
    ]
    short = full_size.summary(rows, 20)
    assert short["seconds by exit step"] == {"critic update": {"2": 2.0}}
    assert (short["iterations"], short["finite"], short["peak GiB"], short["iteration seconds"]) == (2, False, 7.0, 2.0)
    assert full_size.summary(rows[1:], 20)["finite"] and not full_size.summary([], 20)["finite"]
    blocks = full_size.block_summary([5.0, 9.0, 2.0, 4.0, 3.0], [1, 1, 2 << 30, 3 << 30, 2 << 30], first=2)
    assert blocks["blocks"] == 4 and blocks["picture seconds"] == 5.0
    assert blocks["seconds a block from 2 on: least, median, most"] == [2.0, 3.0, 4.0]
    assert blocks["allocated GiB from block 2 on: least, most"] == [2.0, 3.0]


def test_a_failed_part_is_recorded_and_the_rest_runs(full_size, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(full_size, "files", fail)
    assert full_size.main(["-o", str(tmp_path), "--tiny", "--parts", "rates,files"]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["files failed"] == {"error": "too large"} and "rates" in results
    assert full_size.main(["-o", str(tmp_path / "late"), "--tiny", "--parts", "rates", "--budget-seconds", "0"]) == 0
    assert "no time is left for rates" in capsys.readouterr().out


def test_a_process_is_stopped_at_the_end_of_the_budget(full_size, tmp_path, monkeypatch):
    monkeypatch.setattr(full_size.sys, "executable", "sleep")  # `sleep -m longtake ...` fails, and that is told
    run = full_size.Run(full_size.parse(["-o", str(tmp_path), "--tiny"]))
    with pytest.raises(RuntimeError, match="longtake train failed; the end of"):
        run.longtake("one", ["train"])
    script = tmp_path / "forever"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(full_size.sys, "executable", str(script))
    run.budget = run.budget - run.remaining + 0.3
    seen = []
    assert run.longtake("two", ["train"], lambda: seen.append(run.remaining)) is False and seen


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    command = [sys.executable, "-m", "benchmarks.full_size", "-o", str(tmp_path), "--tiny", "--device", "cpu"]
    command += ["--iterations", "1", "--rows", "1", "--seconds", "1"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    results = json.loads((tmp_path / "results.json").read_text())
    for part in ("train, window 9, sink 1", "train, window 8, sink 0"):
        assert results[part]["iterations"] == 1 and results[part]["finite"]
    assert results["encode"]["finished"] and results["generate"]["frames"] == 16
