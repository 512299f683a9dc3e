"""The benchmark of two GPUs, rehearsed with two CPU ranks: every part leaves its numbers."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from forked_ranks import torchrun

pytest.importorskip("lmdb")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_gpus():
    sys.path.insert(0, str(ROOT))
    try:
        return import_module("benchmarks.two_gpus")
    finally:
        sys.path.remove(str(ROOT))


def test_rates_are_of_the_same_iterations(two_gpus):
    results = {
        "train, one GPU": {"batch": 1, "rows": [2.0, 4.0, 99.0]},
        "train, two GPUs, a sample each": {"batch": 2, "rows": [2.0, 6.0, 1.0]},
        "train, two GPUs, one sample together": {"batch": 1, "rows": [1.0, 3.0]},
    }
    found = two_gpus.compare(results)
    assert found["iterations compared"] == 2 and found["samples/s, one GPU"] == 2 / 6
    assert found["times one GPU, two GPUs, a sample each"] == pytest.approx(1.5)
    assert found["times one GPU, two GPUs, one sample together"] == pytest.approx(1.5)
    failed = {"train, two GPUs, one sample together, nothing recomputed": {"batch": 1, "rows": []}}
    assert two_gpus.compare(results | failed) == found
    assert two_gpus.compare({"train, one GPU": {"batch": 1, "rows": []}}) == {}


def test_the_trainings_are_the_recipe_on_other_meshes(two_gpus, tmp_path, monkeypatch):
    from longtake.config.job import load_config

    run = two_gpus.Run(two_gpus.parse(["-o", str(tmp_path), "--device", "cpu"]))
    launched = {}

    def start(self, name, arguments, progress, *, ranks):
        launched[name] = (load_config(arguments[2], arguments[3:]), ranks)
        progress()
        return True

    monkeypatch.setattr(two_gpus.Run, "python", start)
    for name in two_gpus.TRAININGS:
        two_gpus.train(run, name, 10, 3)
    configs = [config for config, _ in launched.values()]
    assert [ranks for _, ranks in launched.values()] == [1, 2, 2, 2, 2] and len({c.name for c in configs}) == 5
    assert [config.micro_batch(ranks) for config, ranks in launched.values()] == [1, 1, 1, 1, 1]
    assert [config.batch_size for config in configs] == [1, 2, 1, 2, 1]
    assert {config.max_steps for config in configs} == {13}
    assert [config.parallel.sequence for config in configs] == [1, 1, 2, 1, 2]
    assert [config.parallel.data_parallel for config in configs] == ["fsdp", "ddp", "ddp", "fsdp", "ddp"]
    assert [config.activation_checkpointing for config in configs] == [True, True, True, True, False]
    assert len({(c.seed, c.video.height, c.video.num_latent_frames, c.plan.window_frames) for c in configs}) == 1


def test_one_gpu_is_too_few(two_gpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert two_gpus.main(["-o", str(tmp_path), "--device", "cuda"]) == 1
    assert "two GPUs are needed and 1 is visible" in capsys.readouterr().out


def rehearse(folder, parts):
    command = [sys.executable, "-m", "benchmarks.two_gpus", "-o", str(folder), "--tiny", "--device", "cpu"]
    command += [
        "--iterations",
        "1",
        "--warm-up",
        "1",
        "--rows",
        "2",
        "--rounds",
        "1",
        "--repeats",
        "1",
        "--parts",
        parts,
        "--seconds",
        "4",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=280)
    return json.loads((folder / "results.json").read_text())


def assert_passes(found):
    passes = [values for name, values in found.items() if "pass" in name or "clip" in name or "backward" in name]
    kernels = [values for values in passes if "sum" in values]
    passes = [values for values in passes if "sum" not in values]
    assert len(kernels) == 2 and all(0 < max(list(times.values())[1:]) < times["sum"] for times in kernels)
    assert len(passes) == 4
    for values in passes:
        assert values["ms alone"] > 0 and values["ms together"] > 0 and values["relative difference"] < 2e-2
    assert sum("exchanges of 2 layers" in name for name in found) == 2


@pytest.mark.whole
def test_passes_alone_and_together(two_gpus, tmp_path, monkeypatch):
    def forked(name, words, ranks):
        done = torchrun(ranks, "-m", *words)
        assert done.returncode == 0, done.stderr
        return True

    args = two_gpus.parse(["-o", str(tmp_path), "--tiny", "--device", "cpu", "--rounds", "1", "--repeats", "1"])
    run = two_gpus.Run(args)
    monkeypatch.setattr(run, "python", forked)
    sys.modules["benchmarks.random_files"].write_weights(run.sizes, run.work / "weights", run.device)
    two_gpus.measure_in_ranks(run, args)
    assert_passes(json.loads((tmp_path / "results.json").read_text())["passes"])


@pytest.mark.slow
def test_the_command_itself(two_gpus, tmp_path):
    results = rehearse(tmp_path, "files,train,passes,generate")
    assert_passes(results["passes"])
    assert results["train"]["iterations compared"] == 1
    assert set(results["generate"]) == set(two_gpus.WAYS) and all(
        made["seconds a block"] > 0 for made in results["generate"].values()
    )
    for name in list(two_gpus.TRAININGS)[:4]:  # the last one only where it is asked for
        assert results["train"][f"samples/s, {name}"] > 0 and results[f"train, {name}"]["finite"]
    assert "| train | times one GPU, two GPUs, one sample together |" in (tmp_path / "results.md").read_text()
