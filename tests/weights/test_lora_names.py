"""Low-rank updates of others: names and scales that are read, kinds that are refused by name, and values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_read import same

from longtake.cli.app import app
from longtake.errors import CheckpointError, ConfigError
from longtake.models.dit import VideoDiT
from longtake.weights.convert import convert
from longtake.weights.load import load_dit, save_dit
from longtake.weights.lora import CONFIG, WEIGHTS, LowRank, read_lora
from longtake.weights.names import to_diffusers_key

RANK = 4
LAYER = "blocks.1.cross_attn.o"
DIFFUSERS = "blocks.1.attn2.to_out.0"
FLAT = LAYER.replace(".", "_")
A = torch.randn(RANK, 32, generator=torch.Generator().manual_seed(1))
B = torch.randn(32, RANK, generator=torch.Generator().manual_seed(2))
TWO = torch.tensor(2.0)
State = dict[str, torch.Tensor]


def pair(stem: str, first: str = "lora_A.weight", second: str = "lora_B.weight") -> State:
    return {f"{stem}.{first}": A, f"{stem}.{second}": B}


def kohya(stem: str) -> State:
    return pair(stem, "lora_down.weight", "lora_up.weight") | {f"{stem}.alpha": TWO}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., VideoDiT]) -> VideoDiT:
    return tiny_model(True)


def read(model: VideoDiT, file: Path, scale: float | None = None) -> LowRank:
    return read_lora(file, {name: tensor.to("meta") for name, tensor in model.state_dict().items()}, scale=scale)


def saved(tensors: State, file: Path, metadata: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, file, metadata)
    return file


def refused(model: VideoDiT, file: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(model, file)
    assert "\n" not in str(caught.value)


# ---- names -----------------------------------------------------------------------------------------------------------
NAMES = {
    "PEFT": (pair(f"base_model.model.{LAYER}"), 1),
    "PEFT, named": (pair(LAYER, "lora_A.distill.weight", "lora_B.distill.weight"), 1),
    "wrapped": (pair(f"module.base_model.model.blocks.1._fsdp_wrapped_module.{LAYER[9:]}"), 1),
    "ComfyUI": (pair(f"diffusion_model.{LAYER}"), 1),
    "bare": (pair(LAYER), 1),
    "diffusers": (pair(f"transformer.{DIFFUSERS}"), 1),
    "diffusers, older": (pair(f"transformer.{DIFFUSERS}", "lora.down.weight", "lora.up.weight"), 1),
    "diffusers, in PEFT": (pair(f"base_model.model.{DIFFUSERS}"), 1),
    "musubi-tuner": (kohya(f"lora_unet_{FLAT}"), 0.5),
    "musubi-tuner, two underscores": (kohya(f"lora_unet__{FLAT}"), 0.5),
    "flat diffusers": (kohya(f"lora_unet_{DIFFUSERS.replace('.', '_')}"), 0.5),
    "LightX2V": (kohya(f"diffusion_model.{LAYER}"), 0.5),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_others(kind: str, model: VideoDiT, tmp_path: Path) -> None:
    tensors, scale = NAMES[kind]
    low = read(model, saved(tensors, tmp_path / "l.safetensors"))
    weight = model.state_dict()[f"{LAYER}.weight"]
    wanted = weight.double() + scale * (B.double() @ A.double())
    torch.testing.assert_close(low.merge(f"{LAYER}.weight", weight).double(), wanted, rtol=1e-5, atol=1e-5)
    assert low.merge(f"{LAYER}.bias", weight) is weight and low.scale == scale
    torch.save(tensors, tmp_path / "l.bin")
    assert read(model, tmp_path / "l.bin").scales == low.scales
    assert read(model, tmp_path / "l.bin", scale=3.0).scale == 3.0


def test_every_layer_is_found_by_every_form_of_its_name(model: VideoDiT, tmp_path: Path) -> None:
    layers = [n.removesuffix(".weight") for n, p in model.state_dict().items() if n.endswith(".weight") and p.ndim == 2]
    assert len(layers) == 2 * 12 + 2 * 2 + 1 + 2 + 1
    forms = {
        "original": lambda n: f"diffusion_model.{n}",
        "diffusers": lambda n: f"transformer.{to_diffusers_key(f'{n}.weight').removesuffix('.weight')}",
        "flat": lambda n: f"lora_unet_{n.replace('.', '_')}",
        "flat diffusers": lambda n: f"lora_unet_{to_diffusers_key(f'{n}.weight')[:-7].replace('.', '_')}",
    }
    for form in forms.values():
        tensors = {}
        for name in layers:
            rows, columns = model.state_dict()[f"{name}.weight"].shape
            tensors |= {
                f"{form(name)}.lora_A.weight": torch.ones(2, columns),
                f"{form(name)}.lora_B.weight": torch.ones(rows, 2),
            }
        assert set(read(model, saved(tensors, tmp_path / "l.safetensors")).factors) == {f"{n}.weight" for n in layers}


def test_whole_differences_are_read_and_taken_out_again(model: VideoDiT, tmp_path: Path) -> None:
    """LightX2V's: weights of norms and the head, biases, modulations; and a patch embedding's factors."""
    state = model.state_dict()
    kinds = {
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.self_attn.norm_k.diff": "blocks.0.self_attn.norm_k.weight",
        f"{LAYER}.diff_b": f"{LAYER}.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.head.diff": "head.head.weight",
        "head.diff_m": "head.modulation",
        "patch_embedding.diff_b": "patch_embedding.bias",
    }
    changes = {key: torch.randn(state[name].shape) for key, name in kinds.items()}
    patch = {"A": torch.randn(2, *state["patch_embedding.weight"].shape[1:]), "B": torch.randn(32, 2, 1, 1, 1)}
    tensors = changes | kohya(LAYER) | {f"patch_embedding.lora_{x}.weight": tensor for x, tensor in patch.items()}
    file = saved({f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "l.safetensors")
    wanted = {name: state[name] + changes[key] for key, name in kinds.items()}
    wanted[f"{LAYER}.weight"] = state[f"{LAYER}.weight"] + 0.5 * B @ A
    product = torch.einsum("or,ricpq->oicpq", patch["B"][:, :, 0, 0, 0], patch["A"])
    wanted["patch_embedding.weight"] = state["patch_embedding.weight"] + product
    save_dit(model.config, state, tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "merged", "longtake", lora=file)
    for name, tensor in load_dit(tmp_path / "merged").state_dict().items():
        torch.testing.assert_close(tensor, wanted.get(name, state[name]), rtol=1e-5, atol=1e-5)
    convert(tmp_path / "merged", tmp_path / "out", "longtake", lora=file, unmerge=True)
    for name, tensor in load_dit(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="lora_scale=2 stands for alpha / rank, and .* leave lora_scale out"):
        read(model, file, scale=2.0)
    one = saved({"blocks.0.norm3.diff": changes["blocks.0.norm3.diff"]}, tmp_path / "one.safetensors")
    torch.testing.assert_close(
        read(model, one, scale=0.5).differences["blocks.0.norm3.weight"], 0.5 * changes["blocks.0.norm3.diff"]
    )
    bias = torch.randn(32)
    low = read(model, saved(kohya(LAYER) | {f"{LAYER}.lora_B.bias": bias}, tmp_path / "one.safetensors"))
    torch.testing.assert_close(low.differences[f"{LAYER}.bias"], 0.5 * bias)
    saved({f"{LAYER}.lora_B.bias": bias}, tmp_path / "one.safetensors")
    refused(model, tmp_path / "one.safetensors", "holds lora_B of .*bias and no factors of")


# ---- scale -----------------------------------------------------------------------------------------------------------
PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2.0}
SCALES = {
    "none": ({}, None, 1.0),
    "config": (None, PEFT, 0.5),
    "rslora": (None, PEFT | {"use_rslora": True}, 2 / math.sqrt(RANK)),
    "alpha_pattern": (None, PEFT | {"alpha_pattern": {"cross_attn.o": 12}}, 3.0),
    "rank_pattern": (None, PEFT | {"r": 8, "rank_pattern": {r"blocks\.\d+\.cross_attn\.o": RANK}}, 0.5),
    "patterns of others": (None, PEFT | {"alpha_pattern": {"attn.o": 12}, "rank_pattern": {"q": 9}}, 0.5),
    "kohya": ({"ss_network_dim": "4", "ss_network_alpha": "2.0"}, None, 0.5),
    "kohya, without": ({"ss_network_dim": "Dynamic", "ss_network_alpha": "None"}, None, 1.0),
    "plain": ({"rank": "4", "alpha": "8"}, None, 2.0),
    "alpha alone": ({"lora_alpha": "8"}, None, 2.0),
    "scale": ({"scale": "0.25", "format": "pt"}, None, 0.25),
    "diffusers": ({"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in PEFT.items()})}, None, 0.5),
    "config wins": ({"lora_alpha": "8"}, PEFT, 0.5),
}


@pytest.mark.parametrize("kind", SCALES)
def test_scales(kind: str, model: VideoDiT, tmp_path: Path) -> None:
    metadata, config, scale = SCALES[kind]
    saved(pair(f"base_model.model.{LAYER}"), tmp_path / WEIGHTS, metadata)
    if config is not None:
        (tmp_path / CONFIG).write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / WEIGHTS):
        assert read(model, path).scale == pytest.approx(scale)
        assert read(model, path, scale=0.125).scale == 0.125


WRONG = {
    "rank": (None, PEFT | {"r": 8}, "says rank 8, and the factors of .* have rank 4: they do not belong together"),
    "rank in metadata": ({"rank": "8", "alpha": "8"}, None, "the metadata of .* says rank 8, and the factors"),
    "rank_pattern": (None, PEFT | {"rank_pattern": {"o": 8}}, "says rank 8, and the factors"),
    "alpha null": (None, PEFT | {"lora_alpha": None}, "lora_alpha is null, and the scale .* give it yourself"),
    "alpha 0": (None, PEFT | {"lora_alpha": 0}, "lora_alpha is 0, and the scale"),
    "alpha nan": (None, PEFT | {"lora_alpha": math.nan}, "lora_alpha is nan, and the scale"),
    "r 0": (None, PEFT | {"r": 0}, "r is 0, and the scale"),
    "r text": (None, PEFT | {"r": "four"}, "r is four, and the scale"),
    "pattern": (None, PEFT | {"alpha_pattern": {"(": 1}}, "a pattern that is no regular expression"),
    "pattern null": (None, PEFT | {"alpha_pattern": {LAYER: None}}, "alpha of .* is null"),
    "metadata": ({"ss_network_alpha": "inf"}, None, "ss_network_alpha is inf, and the scale"),
    "metadata 0": ({"ss_network_alpha": "0"}, None, "ss_network_alpha is 0, and the scale"),
    "metadata json": ({"lora_adapter_metadata": "{"}, None, "lora_adapter_metadata is not valid JSON"),
    "config json": (None, "[", "adapter_config.json is not valid JSON"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_scales_that_are_none(kind: str, model: VideoDiT, tmp_path: Path) -> None:
    metadata, config, message = WRONG[kind]
    saved(pair(f"base_model.model.{LAYER}"), tmp_path / WEIGHTS, metadata)
    if config is not None:
        (tmp_path / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    refused(model, tmp_path, message)
    assert read(model, tmp_path, scale=1.5).scale == 1.5


@pytest.mark.parametrize("alpha", [None, 0.0, math.nan, math.inf, "two"])
def test_an_alpha_of_a_layer_must_be_a_number(alpha: object, model: VideoDiT, tmp_path: Path) -> None:
    torch.save({**pair(LAYER), f"{LAYER}.alpha": alpha}, tmp_path / "l.pt")
    refused(model, tmp_path / "l.pt", rf"alpha is {'null' if alpha is None else alpha}, and the scale .* lora_scale")
    torch.save({**pair(LAYER), f"{LAYER}.alpha": 2.0}, tmp_path / "l.pt")
    assert read(model, tmp_path / "l.pt").scale == 0.5
    if isinstance(alpha, float):
        saved(kohya(LAYER) | {f"{LAYER}.alpha": torch.tensor(alpha)}, tmp_path / "l.safetensors")
        refused(model, tmp_path / "l.safetensors", f"alpha is {alpha}")


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_given_scale_must_be_finite_before_anything_is_read(scale: float, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for call in (
        lambda: read_lora(nowhere, {}, scale=scale),
        lambda: load_dit(nowhere, lora=nowhere, lora_scale=scale),
        lambda: convert(nowhere, tmp_path / "out", "longtake", lora=nowhere, lora_scale=scale),
    ):
        with pytest.raises(ConfigError, match=f"lora_scale={scale} is no finite number; give alpha / rank"):
            call()
    with pytest.raises(ConfigError, match="lora_scale=2 was given without updates; name their file"):
        convert(nowhere, tmp_path / "out", "longtake", lora_scale=2.0)


def test_the_command_refuses_it_too(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    command = [
        "convert",
        str(tmp_path),
        str(tmp_path / "out"),
        "--to",
        "longtake",
        "--lora",
        "x",
        "--lora-scale",
        "nan",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "lora_scale=nan is no finite number" in result.output


# ---- refused ---------------------------------------------------------------------------------------------------------
ONE = torch.ones(1)
REFUSED = {
    "DoRA": ({**pair(LAYER), f"{LAYER}.dora_scale": ONE}, r"of the kind DoRA \(.*dora_scale\); .* merge them where"),
    "DoRA of PEFT": ({**pair(LAYER), f"{LAYER}.lora_magnitude_vector.weight": ONE}, "of the kind DoRA"),
    "LoHa": ({f"lora_unet_{FLAT}.hada_w1_a": A}, "of the kind LoHa"),
    "LoKr": ({f"lora_unet_{FLAT}.lokr_w1": A}, "of the kind LoKr"),
    "half": ({f"diffusion_model.{LAYER}.lora_A.weight": A}, f"{LAYER}.weight has lora_A only"),
    "alpha alone": ({**pair(LAYER), "blocks.0.ffn.0.alpha": TWO}, "blocks.0.ffn.0.weight has alpha only"),
    "twice": ({**pair(LAYER), **pair(f"transformer.{LAYER}")}, f"holds {LAYER}.weight twice, as .* and as .*keep one"),
    "shape": ({f"{LAYER}.lora_A.weight": A[:, :3], f"{LAYER}.lora_B.weight": B}, r"factors are \(32, 4\) and \(4, 3\)"),
    "ranks": ({f"{LAYER}.lora_A.weight": A[:3], f"{LAYER}.lora_B.weight": B}, r"factors are \(32, 4\) and \(3, 32\)"),
    "difference": ({f"{LAYER}.diff": A}, r"is \(32, 32\) and its difference is \(4, 32\)"),
    "no layer": (pair("blocks.9.self_attn.q"), "the base has no blocks.9.self_attn.q.weight"),
    "no flat layer": (kohya("lora_unet_blocks_9_self_attn_q"), "the base has no lora_unet_blocks_9_self_attn_q"),
    "Flux": (kohya("lora_unet_double_blocks_0_img_attn_qkv"), "the base has no lora_unet_double_blocks_0"),
    "text encoder": ({**pair(LAYER), **kohya("lora_te_text_model_layers_0_mlp")}, "is of a text encoder"),
    "whole weights": ({f"{LAYER.replace('cross', 'self')}.weight": A}, "no low-rank updates .* but whole weights of Wan"),
    "a VAE": ({"decoder.conv1.weight": A}, "no low-rank updates .* but a VAE"),
    "nan": ({**pair(LAYER), f"{LAYER}.lora_A.weight": A * math.nan}, r"lora_A.weight of .* not finite"),
    "inf difference": ({f"{LAYER}.diff_b": torch.full((32,), math.inf)}, r"diff_b of .* not finite"),
    "integers": ({**pair(LAYER), f"{LAYER}.lora_A.weight": A.to(torch.int8)}, "has type torch.int8; weights must be"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_named(kind: str, model: VideoDiT, tmp_path: Path) -> None:
    tensors, message = REFUSED[kind]
    refused(model, saved(tensors, tmp_path / "l.safetensors"), message)
    torch.save(tensors, tmp_path / "l.pt")
    refused(model, tmp_path / "l.pt", message)


def test_a_merged_weight_must_be_finite(model: VideoDiT, tmp_path: Path) -> None:
    save_dit(model.config, model.state_dict(), tmp_path / "base", torch.float16)
    file = saved(pair(LAYER), tmp_path / "l.safetensors")
    assert not same(load_dit(tmp_path / "base", lora=file), load_dit(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight with the update of .* not finite"):
        load_dit(tmp_path / "base", lora=file, lora_scale=1e39)
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight with its update, as torch.float16, holds values"):
        convert(tmp_path / "base", tmp_path / "out", "longtake", lora=file, lora_scale=1e6)


def test_files_of_a_folder(model: VideoDiT, tmp_path: Path) -> None:
    for name in ("pytorch_lora_weights.safetensors", "any.safetensors"):
        saved(pair(LAYER), tmp_path / name[:3] / name)
        (tmp_path / name[:3] / f"._{name}").write_bytes(b"\x00\x05\x16\x07")
        assert set(read(model, tmp_path / name[:3]).factors) == {f"{LAYER}.weight"}
    saved(pair(LAYER), tmp_path / "any" / "other.safetensors")
    refused(model, tmp_path / "any", "holds any.safetensors, other.safetensors and no adapter_model.safetensors; give")
    (tmp_path / "l.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(model, tmp_path / "l.safetensors", "is a Git LFS pointer")
