"""The stage that the benchmark of saving trains."""

import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest

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
    given = {"tiny": True, "device": "cpu", "output": folder, "work": None, **changes}
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
