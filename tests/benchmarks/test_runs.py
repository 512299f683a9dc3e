"""What the benchmarks share, with tiny sizes: parts that run, fail or are stopped, and summaries of a training."""

import json
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from longtake.config.job import load_config

pytest.importorskip("lmdb")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs():
    sys.path.insert(0, str(ROOT))
    try:
        return import_module("benchmarks.runs")
    finally:
        sys.path.remove(str(ROOT))


def make_run(runs, folder, **changes):
    given = {"budget_seconds": 60.0, "tiny": True, "device": "cpu", "output": folder, "work": None, **changes}
    return runs.Run(Namespace(**given))


def test_the_stage_at_full_size_is_the_recipe(runs, tmp_path):
    run = make_run(runs, tmp_path, tiny=False)
    for window, sink in runs.windows_of(run.sizes.windows):
        config = load_config(runs.stage(run, window, sink, 20, path="data", kind="encoded"))
        assert (config.plan.window_frames, config.plan.sink_frames) == (window, sink)
        assert (config.video.height, config.video.width, config.video.num_latent_frames) == (480, 832, 21)
        assert list(config.plan.blocks(0, 21)) == [(0, 1), (1, 5), (5, 9), (9, 13), (13, 17), (17, 21)]
        assert config.precision == "bf16" and config.activation_checkpointing and config.save_every == 0
    assert run.sizes.tokens == 1560 and {window for window, _ in runs.windows_of(run.sizes.windows)} == {12, 13}


def test_each_exit_step_has_a_generator_update(runs):
    from longtake.rng import KeyedRNG

    draws = KeyedRNG(runs.telling_seed(20))
    assert {draws.integer(step, "exit_step", 0, 4) for step in (5, 10, 15, 20)} == {0, 1, 2, 3}


def test_summaries_leave_the_first_out(runs):
    first = {"exit_step": 0.0, "generator_loss": 1.0, "critic_loss": None, "seconds": 99.0}
    alone = {"exit_step": 2.0, "critic_loss": 1.0, "seconds": 2.0, "memory_gib": 5.0}
    rows = [
        {**first, "seconds_of/generator": 50.0, "seconds_of/critic": 49.0, "memory_gib": 7.0},
        {**alone, "seconds_of/critic": 1.0},
        {**alone, "seconds_of/critic": 3.0},
    ]
    short = runs.summary(rows, 20)
    assert short["seconds by exit step"] == {"critic update": {"2": 2.0}}
    assert (short["iterations"], short["finite"], short["peak GiB"], short["iteration seconds"]) == (2, False, 7.0, 2.0)
    assert runs.summary(rows[1:], 20)["finite"] and not runs.summary([], 20)["finite"]


def test_a_failed_part_is_recorded_and_the_rest_runs(runs, tmp_path, capsys):
    def fail():
        raise torch.OutOfMemoryError("too large")

    run = make_run(runs, tmp_path)
    parts = {"files": [fail], "train": [lambda: run.record("train", {"seconds": 2.0})]}
    assert run.parts(parts, ["files", "train"]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["files failed"] == {"error": "too large"} and results["train"] == {"seconds": 2.0}
    assert "| train | seconds | 2 |" in (tmp_path / "results.md").read_text()
    late = make_run(runs, tmp_path / "late", budget_seconds=0.0)
    assert late.parts(parts, ["files"]) == 0
    assert "no time is left for files" in capsys.readouterr().out


def test_a_process_is_stopped_at_the_end_of_the_budget(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.sys, "executable", "sleep")  # `sleep -m longtake ...` fails, and that is told
    run = make_run(runs, tmp_path)
    with pytest.raises(RuntimeError, match="longtake train failed; the end of"):
        run.longtake("one", ["train"])
    script = tmp_path / "forever"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(runs.sys, "executable", str(script))
    run.budget = run.budget - run.remaining + 0.3
    seen = []
    assert run.longtake("two", ["train"], lambda: seen.append(run.remaining)) is False and seen
