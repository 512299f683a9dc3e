"""The benchmark of the 14B model on one GPU: its cases are what it says, and it runs at tiny size on a CPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def one_gpu():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.one_gpu_14b")
    sys.path.remove(str(ROOT))


def test_the_cases_are_what_they_say(one_gpu, tmp_path):
    case = one_gpu.CASES["14b"]
    config = one_gpu.stage(case, "14b", tmp_path)
    assert (case.sizes.dit.dim, case.sizes.dit.num_layers, case.sizes.dit.image_dim) == (5120, 40, 1280)
    assert (config.video.height, config.video.width, config.video.num_latent_frames) == (480, 832, 21)
    assert list(config.plan.stream().blocks(0, 21)) == [(0, 1), (1, 5), (5, 9), (9, 13), (13, 17), (17, 21)]
    assert config.objective.shared_base and config.activation_checkpointing is True and config.precision == "bf16"
    assert config.lora.rank == config.objective.critic.lora.rank == 128 and config.lora.targets is None
    assert one_gpu.CASES["1.3b"].rank == 256 and one_gpu.CASES["1.3b"].sizes.dit.dim == 1536
    whole = one_gpu.stage(one_gpu.CASES["1.3b-whole"], "whole", tmp_path)
    assert whole.lora is None and not whole.objective.shared_base
    draws = one_gpu.KeyedRNG(config.seed)
    assert [draws.integer(step, "exit_step", 0, 4) for step in range(2)] == [3, 3]


@pytest.mark.parametrize("name", ["14b", "1.3b-whole"])
def test_a_tiny_case_trains_both_networks(one_gpu, tmp_path, name):
    result = one_gpu.run_case(name, one_gpu._TINY_CASES[name], tmp_path, torch.device("cpu"))
    assert result["finite"] and len(result["losses"]) == 3
    assert {"generator, iteration 0", "critic, iteration 0", "critic, iteration 1"} <= result["seconds"].keys()
    if name == "14b":  # every B of student and critic, and of the student's average
        assert result["updates that moved"] == result["updates"] == 3 * 2 * 12
        assert result["trained parameters"]["generator"] == result["trained parameters"]["critic"]
        held = result["held GiB"]  # the base once, beside it the updates of both
        assert (
            held["frozen weights"] < 4 * result["parameters"] / 2**30 and held["average"] * 2 == held["trained weights"]
        )


@pytest.mark.slow
def test_the_command_itself(one_gpu, tmp_path):
    arguments = ["-o", str(tmp_path), "--tiny", "--device", "cpu"]
    assert one_gpu.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(one_gpu.CASES) and all(values["finite"] for values in results.values())
    assert "| 14b | 1.3b | 1.3b-whole |" in (tmp_path / "results.md").read_text()


def test_a_case_without_time_is_recorded(one_gpu, tmp_path):
    assert one_gpu.main(["-o", str(tmp_path), "--tiny", "--cases", "14b", "--budget-seconds", "0"]) == 1
    assert json.loads((tmp_path / "results.json").read_text()) == {"14b": {"error": "no time is left"}}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_is_measured(one_gpu, tmp_path):
    result = one_gpu.run_case("14b", one_gpu._TINY_CASES["14b"], tmp_path, torch.device("cuda"))
    assert result["finite"] and 0 < result["most GiB"] <= result["reserved GiB"]
