"""Reading and writing weights: both name formats, strict, and nothing is ever unpickled."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import load_state

import longtake
from longtake.errors import CheckpointError
from longtake.models.dit import VideoDiT
from longtake.weights.config_json import config_from_json, config_to_json
from longtake.weights.load import check_state, load_dit, save_dit
from longtake.weights.names import clean_key, original_names, to_diffusers_key

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _same(a: VideoDiT, b: VideoDiT) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def _diffusers_config(model: VideoDiT) -> dict:
    c = model.config
    return {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": c.num_heads,
        "attention_head_dim": c.head_width,
        "ffn_dim": c.ffn_dim,
        "num_layers": c.num_layers,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "text_dim": c.text_dim,
        "freq_dim": c.freq_dim,
        "image_dim": c.image_dim,
        "pos_embed_seq_len": c.image_positions,
        "eps": c.eps,
    }


@pytest.mark.parametrize("i2v", [False, True])
def test_original_folder_and_single_file(i2v: bool, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(i2v)
    save_dit(model.config, model.state_dict(), tmp_path)
    for path in (tmp_path, tmp_path / WEIGHTS, str(tmp_path)):
        loaded = longtake.load_dit(path)
        assert loaded.config == model.config and _same(loaded, model)
        assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert config_from_json(config_to_json(model.config)) == model.config


def test_another_patch_is_kept(tiny_model, tmp_path: Path) -> None:
    usual = tiny_model().config
    model = VideoDiT(replace(usual, patch_size=(1, 1, 1)))
    save_dit(model.config, model.state_dict(), tmp_path)
    loaded = load_dit(tmp_path)
    assert loaded.config == model.config and _same(loaded, model)
    assert "patch_size" not in config_to_json(usual), "files of usual models stay as they were"


@pytest.mark.parametrize("positions", [None, 5])
def test_diffusers_folder_whole_sharded_and_single_file(positions, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(True, image_positions=positions)
    renamed = {to_diffusers_key(key): value for key, value in model.state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(_diffusers_config(model)))
    save_file(renamed, tmp_path / WEIGHTS)
    for path in (tmp_path, tmp_path / WEIGHTS):
        assert _same(load_dit(path), model)
    (tmp_path / WEIGHTS).unlink()
    # A shard need not hold a name by which the format is recognised: formats are told apart over all shards.
    names = sorted(renamed)
    for shard, part in enumerate((names[:7], names[7:40], names[40:])):
        save_file(
            {n: renamed[n] for n in part}, tmp_path / f"diffusion_pytorch_model-{shard + 1:05d}-of-00003.safetensors"
        )
    assert _same(load_dit(tmp_path), model)
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 weight files: .*-00002-of-00003"):
        load_dit(tmp_path)


def test_a_folder_saved_by_diffusers_loads(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=12, freq_dim=32, ffn_dim=48, num_layers=2
    )
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load_dit(tmp_path)
    names = original_names(theirs.state_dict())
    state = {names[key]: value for key, value in theirs.state_dict().items()}
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


# How a key `rest` of the model, or `rest` of block i, is called in the checkpoints of Self-Forcing's family (K.3).
LAYOUTS = {
    "whole model one FSDP1 unit": ("model._fsdp_wrapped_module.{rest}", "model._fsdp_wrapped_module.blocks.{i}.{rest}"),
    "an FSDP1 unit a block": ("model.{rest}", "model.blocks.{i}._fsdp_wrapped_module.{rest}"),
    "units in units, checkpointed": (
        "_fsdp_wrapped_module.model.{rest}",
        "_fsdp_wrapped_module.model.blocks.{i}._fsdp_wrapped_module._checkpoint_wrapped_module.{rest}",
    ),
    "compiled under DDP": ("module._orig_mod.{rest}", "module._orig_mod.blocks.{i}._orig_mod.{rest}"),
    "DDP around the wrapper": ("module.model.{rest}", "module.model.blocks.{i}.{rest}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("diffusers", [False, True])
def test_keys_of_wrapped_models_are_cleaned(layout, diffusers, tiny_model, tmp_path: Path) -> None:
    top, block = LAYOUTS[layout]

    def wrapped(key: str) -> str:
        key = to_diffusers_key(key) if diffusers else key
        if key.startswith("blocks."):
            _, layer, rest = key.split(".", 2)
            return block.format(i=layer, rest=rest)
        return top.format(rest=key)

    model = tiny_model(True)
    state = {wrapped(key): value for key, value in model.state_dict().items()}
    assert len(state) == len(model.state_dict()) and all(key not in state for key in model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(model.config)))
    save_file(state, tmp_path / WEIGHTS)
    assert _same(load_dit(tmp_path), model)
    del state[wrapped("blocks.1.norm3.weight")]
    save_file(state, tmp_path / WEIGHTS)
    name = "norm2" if diffusers else "norm3"
    with pytest.raises(CheckpointError, match=rf"missing \(1\): blocks.1.{name}.weight"):
        load_dit(tmp_path)


def test_cleaning_touches_wrappers_only(tiny_model) -> None:
    for model in (tiny_model(), tiny_model(True, image_positions=5)):
        for key in model.state_dict():
            assert clean_key(key) == key and clean_key(to_diffusers_key(key)) == to_diffusers_key(key)
    for key in ("blocks.0.model.weight", "blocks.0.module.weight", "remodel.weight", "my_orig_module.weight"):
        assert clean_key(key) == key


def test_a_parameter_that_is_there_twice_is_an_error(tiny_model, tmp_path: Path) -> None:
    """Two files of one folder that overlap: an old file beside the shards of a new one."""
    model = tiny_model()
    save_dit(model.config, model.state_dict(), tmp_path)
    save_file({"model.head.head.bias": torch.zeros(16)}, tmp_path / "zz.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_dit(tmp_path)
    for part in (f"head.head.bias is in {WEIGHTS}", "in zz.safetensors (as model.head.head.bias)", str(tmp_path)):
        assert part in str(caught.value)
    assert _same(load_dit(tmp_path / WEIGHTS), model)
    one = tmp_path / "one.safetensors"
    save_file({"head.head.bias": torch.zeros(16), "module.head.head.bias": torch.ones(16)}, one)
    with pytest.raises(CheckpointError, match="as module.head.head.bias"):
        load_dit(one)


def test_missing_surplus_and_reshaped_keys_are_listed(tiny_model, tmp_path: Path) -> None:
    model = tiny_model(True)
    state = dict(model.state_dict())
    del state["blocks.1.cross_attn.k_img.weight"]
    state["blocks.7.ffn.0.bias"] = torch.zeros(3)
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :4].contiguous()
    save_dit(model.config, state, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_dit(tmp_path)
    for part in (
        "missing (1): blocks.1.cross_attn.k_img.weight",
        "surplus (1): blocks.7.ffn.0.bias",
        "reshaped (1): patch_embedding.weight (32, 4, 1, 2, 2) instead of (32, 12, 1, 2, 2)",
        str(tmp_path),
    ):
        assert part in str(caught.value)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="here does not fit"):
        load_state(model, state, "here")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    check_state(before, model, "same")


def test_text_model_does_not_take_image_weights(tiny_model) -> None:
    with pytest.raises(CheckpointError, match=r"surplus .*img_emb"):
        load_state(tiny_model(), tiny_model(True).state_dict(), "i2v")


class _Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle of a foreign folder was executed",))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.pth", WEIGHTS])
def test_pickles_are_never_loaded(name: str, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(tiny_model().config)))
    (tmp_path / name).write_bytes(pickle.dumps(_Bomb()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match="safetensors"):
            load_dit(path)


def test_broken_folders_are_named(tiny_model, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_dit(tmp_path / "nowhere")
    save_file(tiny_model().state_dict(), tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_dit(tmp_path)
    fields = config_to_json(tiny_model().config)
    del fields["ffn_dim"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="ffn_dim"):
        load_dit(tmp_path)
    for wrong in (
        {"dim": "32"},
        {"num_heads": 0},
        {"eps": None},
        {"patch_size": 2},
        {"num_layers": 10**6},
        {"ffn_dim": -1},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config_to_json(tiny_model().config) | wrong))
        with pytest.raises(CheckpointError, match=r"config.json (says|holds a size of the wrong kind)"):
            load_dit(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(tiny_model().config)))
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        load_dit(tmp_path)
    for key in ("blocks.0.self_attn.w.weight", "head.norm", "model.patch_embedding.weight"):
        with pytest.raises(CheckpointError, match="not a parameter name"):
            to_diffusers_key(key)


@pytest.mark.parametrize("how", ["cast", "load"])
def test_cast_keeps_the_float32_parts(how: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(True, image_positions=5)
    if how == "load":
        save_dit(model.config, model.state_dict(), tmp_path, torch.bfloat16)
        assert load_file(tmp_path / WEIGHTS)["head.head.weight"].dtype == torch.bfloat16
        assert {p.dtype for p in load_dit(tmp_path).parameters()} == {torch.float32}
        model = load_dit(tmp_path, dtype=torch.bfloat16)
    else:
        model = model.cast(torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in kept} == {torch.bfloat16}
    # A.4: time MLP, modulation, layer norms and head; the weights of RMS norms follow the matrix products.
    wanted = {"head.modulation", "head.head.weight", "head.head.bias"}
    for module in ("time_embedding.0", "time_embedding.2", "time_projection.1", "img_emb.proj.0", "img_emb.proj.4"):
        wanted |= {f"{module}.weight", f"{module}.bias"}
    for layer in (0, 1):
        wanted |= {f"blocks.{layer}.{name}" for name in ("modulation", "norm3.weight", "norm3.bias")}
    assert kept == wanted
    back = model.cast(torch.float32)
    assert {p.dtype for p in back.parameters()} == {torch.float32}


def test_saving_through_a_type_changes_only_the_type(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    save_dit(model.config, model.state_dict(), tmp_path / "new" / "folder", torch.bfloat16)
    loaded = load_dit(tmp_path / "new" / "folder")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.bfloat16().float())
