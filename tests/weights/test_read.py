"""Published layouts: pipelines, indices, `torch.save` files of students, low-rank updates, names of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.errors import CheckpointError
from longtake.models.dit import VideoDiT
from longtake.weights import presets
from longtake.weights.config_json import config_to_json
from longtake.weights.convert import convert
from longtake.weights.load import load_dit, save_dit
from longtake.weights.locate import is_hub_name
from longtake.weights.names import to_diffusers_key

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"


def same(a: VideoDiT, b: VideoDiT) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def save_config(model: VideoDiT, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_json(model.config)))


def sharded(model: VideoDiT, folder: Path, parts: int = 3) -> Path:
    save_config(model, folder)
    state = dict(model.state_dict())
    places = {}
    for n in range(parts):
        file = f"diffusion_pytorch_model-{n + 1:05d}-of-{parts:05d}.safetensors"
        part = {key: state[key] for key in list(state)[n::parts]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


# ---- folders ---------------------------------------------------------------------------------------------------------
def test_a_pipeline_folder_means_its_transformer(tiny_model, tmp_path: Path) -> None:
    model = tiny_model(True)
    save_dit(model.config, model.state_dict(), tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    save_file({"z": torch.zeros(1)}, tmp_path / "vae" / WEIGHTS)
    assert same(load_dit(tmp_path), model)
    assert presets.model_config(str(tmp_path)) == model.config


@pytest.mark.parametrize("pair", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")])
def test_one_of_two_experts_must_be_named(pair: tuple[str, str], tiny_model, tmp_path: Path) -> None:
    models = [tiny_model(seed=n) for n in range(2)]
    for name, model in zip(pair, models):
        save_dit(model.config, model.state_dict(), tmp_path / name)
    with pytest.raises(CheckpointError, match=f"holds two transformers; give .*/{pair[0]} or .*/{pair[1]}"):
        load_dit(tmp_path)
    for name, model in zip(pair, models):
        assert same(load_dit(tmp_path / name), model)


def test_shards_and_index_must_agree(tiny_model, tmp_path: Path) -> None:
    model = tiny_model(True)
    folder = sharded(model, tmp_path / "model")
    assert same(load_dit(folder), model)
    good = json.loads((folder / INDEX).read_text())
    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            load_dit(folder)

    save_file({"a": torch.zeros(1)}, folder / "old.safetensors")
    refused("holds old.safetensors, which its index does not name; remove them, or give the path of one file")
    (folder / "old.safetensors").unlink()
    (folder / "second.safetensors.index.json").write_text("{}")
    refused(r"holds 2 indices, \['diffusion.*', 'second.*'\]; keep one")
    (folder / "second.safetensors.index.json").unlink()
    for damaged in ("{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        (folder / INDEX).write_text(damaged)
        refused("has no weight_map of tensor names to file names; download it again")
    (folder / INDEX).write_text(json.dumps(good)[:50])
    refused("index.json is not valid JSON")
    moved = {**good["weight_map"], "head.head.bias": "diffusion_pytorch_model-00001-of-00003.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": {**moved, "head.extra": shard.name}}))
    refused(r"and its shards differ in 2 tensors: head.extra is in .*00002.* by the index and in None by the files")
    (folder / INDEX).write_text(json.dumps(good))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused("00002-of-00003.safetensors cannot be read as safetensors")
    shard.unlink()
    refused("lacks 1 of 3 weight files: diffusion_pytorch_model-00002-of-00003.safetensors; download")


def test_quantised_weights_are_refused(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    state = dict(model.state_dict()) | {"head.head.weight": torch.zeros(16, 32, dtype=torch.int8)}
    save_dit(model.config, state, tmp_path)
    with pytest.raises(
        CheckpointError, match="head.head.weight of .* has type I8; weights must be float64, .*quantised"
    ):
        load_dit(tmp_path)


def test_a_loaded_model_does_not_hang_on_its_file(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    save_dit(model.config, model.state_dict(), tmp_path)
    loaded = load_dit(tmp_path)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.seek(-400, 2)
        file.write(b"\xff" * 400)
    assert same(loaded, model)


# ---- torch.save files ------------------------------------------------------------------------------------------------
# K.3: prefix of the wrapper's state dict; infixes of FSDP1 (a unit a block) and checkpointing in generator_ema
NAMES = {
    "generator": "model.{rest}",
    "generator_ema": "model.{block}_fsdp_wrapped_module._checkpoint_wrapped_module.{rest}",
    "critic": "model.{rest}",
}


def named(network: str, key: str) -> str:
    block, rest = "", key
    if network == "generator_ema" and key.startswith("blocks."):
        _, layer, rest = key.split(".", 2)
        block = f"blocks.{layer}."
    elif network == "generator_ema":
        return f"model._fsdp_wrapped_module.{key}"
    return NAMES[network].format(block=block, rest=rest)


def student_file(models: dict[str, VideoDiT], file: Path) -> Path:
    held = {net: {named(net, k): v for k, v in model.state_dict().items()} for net, model in models.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-5}]}
    torch.save({**held, "generator_optimizer": optimizer, "step": 600}, file)
    save_config(next(iter(models.values())), file.parent)
    return file


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_student_checkpoints_give_the_network_that_is_asked_for(suffix: str, tiny_model, tmp_path: Path) -> None:
    models = {name: tiny_model(True, seed=n) for n, name in enumerate(NAMES)}
    file = student_file(models, tmp_path / f"model{suffix}")
    for network, model in models.items():
        assert same(load_dit(file, network=network), model)
    assert same(load_dit(file), models["generator_ema"])
    with pytest.raises(CheckpointError, match=r"holds critic, generator, generator_ema, not generator_lora; name one"):
        load_dit(file, network="generator_lora")
    convert(file, tmp_path / "critic", "longtake", network="critic")
    assert same(load_dit(tmp_path / "critic"), models["critic"])
    with pytest.raises(CheckpointError, match="network=critic was given, and .* holds one network only"):
        load_dit(tmp_path / "critic", network="critic")


@pytest.mark.parametrize("key", ["generator", "model", None])
def test_files_with_one_network_bare_or_named(key: str | None, tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    torch.save(state if key is None else {key: state}, tmp_path / "ode_init.pt")
    save_config(model, tmp_path)
    assert same(load_dit(tmp_path / "ode_init.pt"), model)


def test_a_file_without_config_json_is_recognised_by_its_tensors(tiny_model, tmp_path: Path, monkeypatch) -> None:
    model = tiny_model(True)
    torch.save({"generator": {f"model.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=r"config.json does not exist, and the tensors .* no preset \(toy, wan2.1"
    ):
        load_dit(tmp_path / "model.pt")
    monkeypatch.setitem(presets.PRESETS, "tiny", model.config)
    assert same(load_dit(tmp_path / "model.pt"), model)


def test_a_file_with_a_wrong_tensor_is_refused(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    del state["model.blocks.0.norm3.bias"]
    torch.save({"generator": state}, tmp_path / "model.pt")
    save_config(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"model.pt does not fit the model; missing \(1\): blocks.0.norm3.bias$"):
        load_dit(tmp_path / "model.pt")
    for held, message in (
        ([1, 2], "holds a list; it must hold a dict"),
        ({"step": 1}, "holds no weights; give a file"),
    ):
        torch.save(held, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=message):
            load_dit(tmp_path / "model.pt")


# ---- low-rank updates ------------------------------------------------------------------------------------------------
def updates(model: VideoDiT, rank: int = 3) -> dict[str, torch.Tensor]:
    """PEFT's names of an update of every linear layer in the blocks (H.7)."""
    generator = torch.Generator().manual_seed(7)
    state = {}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and name.endswith(".weight") and parameter.ndim == 2:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            state[f"{stem}.lora_A.weight"] = torch.randn(rank, parameter.shape[1], generator=generator)
            state[f"{stem}.lora_B.weight"] = torch.randn(parameter.shape[0], rank, generator=generator)
    return state


@pytest.mark.parametrize("layout", ["generator_lora", "bare", "safetensors", "wrapped"])
def test_base_and_low_rank_updates_are_merged(layout: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(True)
    base = student_file({"generator": model}, tmp_path / "longlive_base.pt")
    low = updates(model)
    assert len(low) == 2 * 2 * 12  # layers, factors, linear layers of an i2v block
    file = tmp_path / "lora.pt"
    if layout == "safetensors":
        file = tmp_path / "lora.safetensors"
        save_file(low, file)
    elif layout == "wrapped":  # written without get_peft_model_state_dict, inside FSDP1 units
        wrapped = {k.replace("_A.", "_A.default.").replace("_B.", "_B.default.") for k in low}
        assert len(wrapped) == len(low)
        torch.save({"model." + k.replace(".self_attn", "._fsdp_wrapped_module.self_attn")
                    .replace("lora_A.", "lora_A.default."): v for k, v in low.items()}, file)  # fmt: skip
    else:
        torch.save({"generator_lora": low, "critic_lora": {}, "step": 9} if layout != "bare" else low, file)
    merged = load_dit(base, lora=file, lora_scale=0.5)
    for name, before in model.state_dict().items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = before.double()
        if f"{stem}.lora_A.weight" in low:
            a, b = low[f"{stem}.lora_A.weight"].double(), low[f"{stem}.lora_B.weight"].double()
            wanted = wanted + 0.5 * torch.einsum("or,ri->oi", b, a)
            assert not torch.equal(merged.state_dict()[name], before)
        assert torch.allclose(merged.state_dict()[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_converting_merges_updates_in_the_stored_type(tiny_model, tmp_path: Path) -> None:
    model = tiny_model(text_dim=4096, text_len=512)
    save_dit(model.config, model.state_dict(), tmp_path / "base", torch.bfloat16)
    torch.save(updates(model), tmp_path / "lora.pt")
    convert(tmp_path / "base", tmp_path / "merged", "diffusers", lora=tmp_path / "lora.pt")
    held = load_file(tmp_path / "merged" / WEIGHTS)
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    for name, value in load_dit(tmp_path / "base", lora=tmp_path / "lora.pt").state_dict().items():
        assert torch.equal(held[to_diffusers_key(name)], value.bfloat16())


def test_updates_that_do_not_fit_are_listed(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    save_dit(model.config, model.state_dict(), tmp_path / "base")
    low = updates(model)
    stem = "base_model.model.blocks.0."
    del low[f"{stem}self_attn.q.lora_B.weight"]
    low[f"{stem}self_attn.k.lora_A.weight"] = torch.zeros(3, 31)
    low[f"{stem}cross_attn.k_img.lora_A.weight"] = low[f"{stem}cross_attn.k_img.lora_B.weight"] = torch.zeros(3, 3)
    low[f"{stem}norm3.weight"] = torch.zeros(3)
    torch.save(low, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError) as caught:
        load_dit(tmp_path / "base", lora=tmp_path / "lora.pt")
    for part in (
        "do not fit the base (4 problems)",
        "blocks.0.self_attn.q.weight has lora_A only",
        "blocks.0.self_attn.k.weight is (32, 32) and its factors are (32, 3) and (3, 31)",
        "the base has no blocks.0.cross_attn.k_img.weight",
        f"{stem}norm3.weight is no lora_A or lora_B weight",
    ):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match=r"nowhere.pt does not exist; give the file of the low-rank updates"):
        load_dit(tmp_path / "base", lora=tmp_path / "nowhere.pt")
    told = (
        "owner/updates/a/lora.pt does not exist; .* `hf download owner/updates a/lora.pt --local-dir updates` does it"
    )
    with pytest.raises(CheckpointError, match=told):
        load_dit(tmp_path / "base", lora="owner/updates/a/lora.pt")
    save_config(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"lora.pt holds low-rank updates, not weights \(.*\); give the base"):
        load_dit(tmp_path / "lora.pt")


# ---- the hub ---------------------------------------------------------------------------------------------------------
def others(folder: Path) -> None:
    """What else published repositories hold: none of it is needed."""
    for file in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json", "README.md",
                 "vae/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder/model.safetensors",
                 "image_encoder/model.safetensors", "examples/i2v_input.JPG"):  # fmt: skip
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"large")


def test_only_the_transformer_of_a_repository_is_fetched(hub, tiny_model) -> None:
    model = tiny_model(True)
    sharded(model, hub("Wan-AI/Wan2.1-I2V"))
    sharded(model, hub("Wan-AI/Wan2.1-I2V-Diffusers") / "transformer")
    for name in ("Wan-AI/Wan2.1-I2V", "Wan-AI/Wan2.1-I2V-Diffusers"):
        others(hub(name))
        hub.fetched.clear()
        assert same(load_dit(name), model)
        assert len(set(hub.fetched)) == 5  # three shards, the index, config.json


def test_experts_and_files_of_a_repository_are_named_behind_it(hub, tiny_model) -> None:
    models = [tiny_model(seed=n) for n in range(2)]
    for repository, first, second in (
        ("Wan-AI/Wan2.2", "high_noise_model", "low_noise_model"),
        ("Wan-AI/Wan2.2-Diffusers", "transformer", "transformer_2"),
    ):
        for model, name in zip(models, (first, second)):
            save_dit(model.config, model.state_dict(), hub(repository) / name)
        with pytest.raises(CheckpointError, match=f"holds two transformers; give .*{first} or .*{second}"):
            load_dit(repository)
        assert not any(file.endswith(".safetensors") for file in hub.fetched)
    assert same(load_dit("Wan-AI/Wan2.2/low_noise_model"), models[1])
    hub("a/b").mkdir(parents=True)
    (hub("a/b") / "checkpoints").mkdir()
    student_file({"generator": models[0]}, hub("a/b") / "checkpoints" / "dmd.pt")
    assert same(load_dit("a/b/checkpoints/dmd.pt"), models[0])
    with pytest.raises(CheckpointError, match="checkpoints/other.pt is not in the repository a/b"):
        load_dit("a/b/checkpoints/other.pt")


def test_the_hub_is_asked_only_for_names_that_are_not_local(hub, tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    save_dit(model.config, model.state_dict(), tmp_path / "Wan-AI" / "model")
    assert same(load_dit("Wan-AI/model"), model)  # a local folder wins
    for name in ("Wan-AI/typo", "./a/b", "../a/b", "/a/b", "single", "~/a"):
        assert not is_hub_name(name)
        with pytest.raises(CheckpointError, match="does not exist; give a folder or a file of weights, or OWNER/NAME"):
            load_dit(name)
    assert hub.asked == hub.fetched == []
    with pytest.raises(CheckpointError, match="x/y is neither a local path nor a repository of the Hugging Face hub"):
        load_dit("x/y")
