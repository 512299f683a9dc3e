"""Two gloo ranks: reading slices gives what reading whole gives, in part of the memory; the options of `parallel`."""

import json
import shutil
from dataclasses import replace

import memory_run
import pytest
import torch
from forked_ranks import torchrun
from safetensors.torch import load_file, save_file
from tiny_lora import adapted, adapter_of, stir
from tiny_stage import TEACHER, make_model

from longtake.parallel.mesh import Mesh
from longtake.models.sizes import DiTConfig
from longtake.models.lora import factors
from longtake.weights.lora import Base, write_adapter
from longtake.weights.config_json import config_to_json, write_config
from longtake.weights.fingerprint import weights_identity
from longtake.weights.load import save_dit
from longtake.run_folder import latest_checkpoint
from longtake.train.metrics import read_rows

LARGE = DiTConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=8, text_dim=64, text_len=8)


@pytest.fixture(scope="module")
def shop(workshop, tmp_path_factory):
    """The workshop with text-to-video weights to widen, low-rank updates to merge, and a large model."""
    folder = tmp_path_factory.mktemp("shop")
    for name in ("encoders", "teacher", "data"):
        shutil.copytree(workshop / name, folder / name)
    narrow = replace(TEACHER, model_type="t2v", in_channels=TEACHER.out_channels, image_dim=None)
    save_dit(narrow, make_model(narrow, seed=4).state_dict(), folder / "narrow", torch.bfloat16)
    (folder / "sizes").mkdir()
    write_config(folder / "sizes", config_to_json(TEACHER))
    model = stir(adapted(make_model()))
    base = Base(str(folder / "teacher"), weights_identity(folder / "teacher"))
    write_adapter(folder / "updates", factors(model.state_dict()), adapter_of(model, base=base))
    shutil.copytree(folder / "teacher", folder / "broken")
    file = folder / "broken" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["blocks.1.ffn.2.weight"][-1, -1] = torch.nan  # in the part of the last rank
    save_file(state, file)
    save_dit(LARGE, make_model(LARGE).state_dict(), folder / "large", torch.bfloat16)
    return folder


def two(*arguments):
    done = torchrun(2, memory_run.__file__, *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def read_by_two(shop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    two(shop, folder, "load")
    return folder


def test_sharded_loading_equals_loading_whole(shop, read_by_two, tmp_path):
    """Whole weights, updates on bfloat16, widened and merged ones, roles: bit for bit what one rank reads."""
    memory_run.loaded(shop, tmp_path, Mesh())
    for variant in memory_run.VARIANTS:
        got, wanted = (load_file(folder / f"{variant}.safetensors") for folder in (read_by_two, tmp_path))
        assert got.keys() == wanted.keys() and len(wanted) > 50
        for key, value in wanted.items():
            assert got[key].dtype == value.dtype and torch.equal(got[key], value), (variant, key)
    teacher, one = (
        load_file(shop / "teacher" / "diffusion_pytorch_model.safetensors"),
        load_file(tmp_path / "whole.safetensors"),
    )
    for name in ("generator", "critic", "teacher"):
        assert all(torch.equal(one[f"{name}.{key}"], value) for key, value in teacher.items())


def test_no_rank_ever_holds_a_network_whole(read_by_two):
    for rank in (0, 1):
        held = json.loads((read_by_two / f"held{rank}.json").read_text())
        assert held["shards"] <= 0.51 * held["whole"] and held["whole"] > 100 << 20
        assert 0.8 * held["shards"] < held["most"] < held["shards"] + 2 * held["biggest"] + (12 << 20)


def test_every_rank_says_what_one_found_not_finite(shop, read_by_two, tmp_path):
    file = shop / "broken" / "diffusion_pytorch_model.safetensors"
    said = [(read_by_two / f"refused{rank}.txt").read_text() for rank in (0, 1)]
    said.append(memory_run.refused(shop, tmp_path, Mesh()))
    assert all(text.startswith(f"blocks.1.ffn.2.weight of {file} holds values that are not finite") for text in said)


# ---- options of `parallel` -------------------------------------------------------------------------------------------
def rows(folder):
    read = read_rows(folder / "distill" / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "speed"))} for row in read]


def weights(folder):
    path = latest_checkpoint(folder / "distill" / "checkpoints")
    return load_file(path / "generator" / "model.safetensors")


@pytest.mark.slow
def test_options_train_what_the_defaults_train(shop, tmp_path):
    two(shop, tmp_path / "two", "train", *memory_run.TRAININGS)
    memory_run.trained(shop, tmp_path / "one", Mesh(), ["plain"])
    wanted = weights(tmp_path / "one" / "plain")
    for name in memory_run.TRAININGS:
        for mine, theirs in zip(rows(tmp_path / "two" / name), rows(tmp_path / "one" / "plain"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6), name
        got = weights(tmp_path / "two" / name)
        assert all((got[key] - value).abs().max() < 1e-5 for key, value in wanted.items()), name
