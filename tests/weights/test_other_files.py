"""Other people's files of weights: what is unambiguous is read, all else is named in one sentence."""

from __future__ import annotations

import json
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_read import INDEX, WEIGHTS, same, save_config, sharded

from longtake.encoders.strict import check_folder, load_strictly
from longtake.errors import CheckpointError
from longtake.inference.source import Source
from longtake.models.dit import VideoDiT
from longtake.weights.load import load_dit, save_dit
from longtake.weights.locate import find_weights
from longtake.weights.names import clean_key

State = dict[str, torch.Tensor]


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_dit(path)
    assert "\n" not in str(caught.value)


# ---- read ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prefix",
    [
        "diffusion_model.",
        "model.diffusion_model.",
        "transformer.",
        "dit.",
        "pipe.dit.",
        "generator.",
        "generator.model._fsdp_wrapped_module.",
        "module._orig_mod.model.",
        "_orig_mod.module.",
    ],
)
def test_what_stands_before_the_names_is_removed(prefix: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    save_config(model, tmp_path)
    save_file({prefix + key: value for key, value in model.state_dict().items()}, tmp_path / "a.safetensors")
    assert same(load_dit(tmp_path / "a.safetensors"), model)
    assert clean_key(prefix + "blocks.0.norm3.bias") == "blocks.0.norm3.bias"


PICKLES: dict[str, Callable[[State], object]] = {
    "state_dict": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3, "lr": 0.1},
    "nested": lambda s: {"generator": {"model": s}, "optimizer": {"state": {"blocks.0.w": {"exp_avg": torch.ones(2)}}}},
    "bare with a step": lambda s: {**s, "step": 5, "best": None, "count": torch.tensor(3)},
    "bare with settings": lambda s: {**s, "config": {"lr": 1.0}, "args": ["x"]},
    "parameters": lambda s: {
        "model": {k: torch.nn.Parameter(v) for k, v in s.items()},
        "critic": {"a.b": torch.ones(1)},
    },
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in s.items()}},
    "with encoders": lambda s: {
        "state_dict": {**{f"model.diffusion_model.{k}": v for k, v in s.items()}}
        | {"first_stage_model.decoder.conv1.weight": torch.ones(1), "text_encoders.shared.weight": torch.ones(1)}
    },
}


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".PTH", ".x"])
def test_one_network_is_found_wherever_it_lies(suffix: str, tiny_model, tmp_path: Path) -> None:
    """By the contents, whatever the suffix says."""
    model = tiny_model()
    save_config(model, tmp_path)
    for name, held in PICKLES.items():
        file = tmp_path / f"a{suffix}"
        torch.save(held(model.state_dict()), file)
        assert same(load_dit(file), model), name
        assert find_weights(file).path == file
    if suffix != ".x":
        assert same(load_dit(tmp_path), model), "a folder with this file alone"
    (tmp_path / "a.safetensors").write_bytes(file.read_bytes())
    refused(tmp_path / "a.safetensors", "is a file of torch.save and no safetensors; rename it to a.pt")
    (tmp_path / "a.safetensors").unlink()


def test_of_several_networks_one_must_be_named(tiny_model, tmp_path: Path) -> None:
    models = {name: tiny_model(seed=n) for n, name in enumerate(("model", "ema"))}
    save_config(models["model"], tmp_path)
    file = tmp_path / "a.pt"
    torch.save({name: model.state_dict() for name, model in models.items()} | {"step": 5}, file)
    refused(file, rf"holds ema, model; name .* `longtake convert {file} FOLDER --to longtake --network NAME`")
    assert same(load_dit(file, network="ema"), models["ema"])
    with pytest.raises(CheckpointError, match="holds ema, model, not critic; name one of them"):
        load_dit(file, network="critic")
    torch.save(models["model"].state_dict(), file)
    with pytest.raises(CheckpointError, match="holds one network without a name, not ema; leave network out"):
        load_dit(file, network="ema")


def test_shards_of_torch_save(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    save_config(model, tmp_path)
    state = dict(model.state_dict())
    names = [f"pytorch_model-{n:05d}-of-00002.bin" for n in (1, 2)]
    for n, name in enumerate(names):
        torch.save({key: state[key] for key in list(state)[n::2]}, tmp_path / name)
    assert same(load_dit(tmp_path), model)
    places = {key: names[n % 2] for n, key in enumerate(state)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(load_dit(tmp_path), model) and find_weights(tmp_path).path == tmp_path
    (tmp_path / names[1]).unlink()
    refused(tmp_path, f"lacks 1 of 2 weight files: {names[1]}; download it again")
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    refused(tmp_path, f"lacks 1 of 2 weight files: {names[1]}; download it again")


def test_files_of_macos_do_not_count(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    folder = sharded(model, tmp_path / "model")
    for name in [file.name for file in folder.iterdir()]:
        (folder / f"._{name}").write_bytes(b"\x00\x05\x16\x07" + bytes(50))
    assert same(load_dit(folder), model)
    refused(folder / f"._{INDEX}", "is an AppleDouble file, in which macOS keeps notes")
    encoder = tmp_path / "vae"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    (encoder / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07")
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors"):
        check_folder(encoder, "VAE")


# ---- named -----------------------------------------------------------------------------------------------------------
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
CONTENTS = {
    "empty": (b"", r"is empty \(0 bytes\); download it again"),
    "pointer": (LFS, "is a Git LFS pointer, .*git lfs pull"),
    "gguf": (b"GGUF" + bytes(99), "is GGUF, .*take the .safetensors .* dequantize"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "is a page of HTML or XML and no weights: the download failed"),
    "json": (b'{"error": "Entry not found"}', "is JSON text and no weights"),
    "text": (b"Access denied", r"holds no weights \(it begins with b'Access d'\)"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive that is cut short"),
    "half a pickle": (b"\x80\x02}q", r"cannot be read by torch.load\(weights_only=True\)|is a file of torch.save"),
    "header": ((1 << 30).to_bytes(8, "little") + b"{", "is cut short and cannot be read as safetensors"),
    "wrong header": ((9).to_bytes(8, "little") + b'{"a": 1} ' + bytes(9), "cannot be read as safetensors"),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf"])
def test_what_is_no_file_of_weights_is_named(kind: str, suffix: str, tiny_model, tmp_path: Path) -> None:
    content, message = CONTENTS[kind]
    save_config(tiny_model(), tmp_path)
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    refused(file, message)
    if (kind, suffix) not in [("wrong header", ".gguf"), ("half a pickle", ".gguf")]:  # a folder goes by suffixes
        refused(tmp_path, message)
    with pytest.raises(CheckpointError, match=message):
        load_dit(Source.of_model(file, tmp_path, must_stream=False).weights)
    if suffix == ".safetensors" and kind != "wrong header":
        with pytest.raises(CheckpointError, match=message):
            load_strictly(object, tmp_path)


def test_an_index_that_is_a_pointer_is_named(tiny_model, tmp_path: Path) -> None:
    sharded(tiny_model(), tmp_path)
    (tmp_path / INDEX).write_bytes(LFS)
    refused(tmp_path, "index.json is not valid JSON: it is a Git LFS pointer: run `git lfs pull`")


@pytest.mark.whole
def test_damaged_files_are_named(tiny_model, tmp_path: Path) -> None:
    """Whatever is cut off or changed in the first bytes of either format: one sentence."""
    model = tiny_model()
    save_config(model, tmp_path)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    generator = torch.Generator().manual_seed(3)
    for name in ("a.safetensors", "a.pt", "old.pt"):
        whole = (tmp_path / name).read_bytes()
        for trial in range(60):
            where = int(torch.randint(0, len(whole) if trial % 2 else 1500, (), generator=generator))
            cut = whole[:where] if trial % 3 == 0 else whole[:where] + b"\xff\x00\x13" + whole[where + 3 :]
            (tmp_path / f"x{name}").write_bytes(cut)
            try:
                load_dit(tmp_path / f"x{name}")
            except CheckpointError as error:
                assert "\n" not in str(error)


def test_pickles_with_code_are_named(tiny_model, tmp_path: Path) -> None:
    torch.save({"generator": tiny_model().state_dict(), "args": Namespace(lr=1)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"holds argparse\.Namespace beside its tensors, which is not loaded .* save")
    torch.save({"a.b": torch.empty(2, device="meta")}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "a.b of .* is a tensor without data of its own")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a.safetensors", b"x")
    refused(tmp_path / "a.pt", "cannot be read by torch.load")


OTHERS = {
    "decoder.middle.0.residual.0.gamma": r"a VAE \(name the folder of the encoders with --encoders\), not a Wan",
    "decoder.mid_block.resnets.0.norm1.gamma": "a VAE",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a text encoder",
    "blocks.0.attn.q.weight": "a text encoder",
    "visual.transformer.0.attn.to_qkv.weight": "an image or text encoder",
    "double_blocks.0.img_attn.qkv.weight": "Flux or HunyuanVideo",
    "model.diffusion_model.double_blocks.0.img_attn_qkv.weight": "Flux or HunyuanVideo",
    "model.diffusion_model.input_blocks.0.0.weight": "Stable Diffusion",
    "transformer_blocks.0.norm1.linear.weight": "CogVideoX",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "backbone.x.weight": "something else, not a Wan transformer: expected are names such as blocks.0.self_attn.q.weight",
    "blocks.0.self_attn.q.lora_down.weight": r"low-rank updates, not weights .* --lora",
}


@pytest.mark.parametrize("key", OTHERS)
def test_weights_of_other_models_are_named(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    save_file({key: torch.ones(2, 2)}, tmp_path / WEIGHTS)
    refused(tmp_path, OTHERS[key])
    torch.save({key: torch.ones(2, 2)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", OTHERS[key])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"vace_blocks.0.before_proj.weight": torch.ones(1)}, "holds Wan VACE, whose additional layers"),
        ({"blocks.0.ffn.0.scale_weight": torch.ones(())}, r"quantised weights with scales .*scaled.* take the bf16"),
        ({"scaled_fp8": torch.ones(2).to(torch.float8_e4m3fn)}, "quantised weights with scales"),
        ({"head.head.weight": torch.zeros(16, 32).to(torch.float8_e5m2)}, "head.head.weight of .* has type F8_E5M2"),
    ],
)
def test_relatives_and_quantised_weights_are_named(extra: State, message: str, tiny_model, tmp_path: Path) -> None:
    save_dit(tiny_model().config, tiny_model().state_dict(), tmp_path)
    save_file(tiny_model().state_dict() | extra, tmp_path / WEIGHTS)
    refused(tmp_path, message)


# ---- not finite ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_values_that_are_not_finite_are_refused(value: float, suffix: str, tiny_model: Callable[..., VideoDiT],
                                                tmp_path: Path) -> None:  # fmt: skip
    from longtake.weights.convert import convert

    model = tiny_model()
    model.blocks[1].ffn[2].bias.data[3] = value
    save_config(model, tmp_path)
    file = tmp_path / f"a{suffix}"
    torch.save(model.state_dict(), file) if suffix == ".pt" else save_file(model.state_dict(), file)
    refused(file, rf"blocks.1.ffn.2.bias of {file} holds values that are not finite \(nan or inf\)")
    with pytest.raises(CheckpointError, match="not finite"):
        convert(file, tmp_path / "out", "longtake")
    assert not (tmp_path / "out").exists()


def test_a_type_that_cannot_hold_a_value_is_refused(tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    model.head.head.bias.data[0] = 1e6
    with pytest.raises(CheckpointError, match=r"head.head.bias as torch.float16 holds values that are not finite"):
        save_dit(model.config, model.state_dict(), tmp_path, torch.float16)
