"""Low-rank updates inside the transformer: start, gradients, arithmetic, sizes; and their files, with PEFT as oracle."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_lora import ALPHA, RANK, adapted, adapter_of, add_lora, own, stir
from tiny_plan import causal_layout, tiny_plan

from longtake.errors import CheckpointError, ConfigError
from longtake.models import attention
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.models.lora import factors, targets_of
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser
from longtake.weights.convert import convert
from longtake.weights.fingerprint import weights_identity
from longtake.weights.load import load_dit, save_dit
from longtake.weights.lora import BASE, CONFIG, WEIGHTS, Base, read_lora, write_adapter
from longtake.weights.presets import PRESETS

ALL = {f"self_attn.{n}" for n in "qkvo"} | {f"cross_attn.{n}" for n in "qkvo"} | {"ffn.0", "ffn.2"}
IMAGE = {"cross_attn.k_img", "cross_attn.v_img"}


def velocity(model, condition, context=None, frames=3):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, frames, 4, 4, 6, generator=generator)
    return model(x, torch.full((2, frames), 0.7), condition, context)


def written(model: VideoDiT, folder: Path, base: Base) -> Path:
    """The updates of a model in a folder."""
    write_adapter(folder, factors(model.state_dict()), adapter_of(model, base=base))
    return folder


@pytest.mark.parametrize("i2v", [False, True])
def test_the_start_is_the_base_and_only_updates_get_gradients(i2v, tiny_model, tiny_condition):
    plain, model = tiny_model(i2v), tiny_model(i2v)
    before, condition = own(plain), tiny_condition(plain)
    assert set(targets_of(model, None)) == (ALL | IMAGE if i2v else ALL)
    adapted(model)
    assert torch.equal(velocity(model, condition), velocity(plain, condition))
    velocity(stir(model), condition).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == trained == set(factors(dict(model.named_parameters())))
    assert len(trained) == 2 * 2 * (12 if i2v else 10)  # factors, layers, linear layers of a block
    after = own(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("at_once", [1, 24, 40])
def test_without_gradient_mlps_are_computed_some_frames_at_a_time(at_once, tiny_model, tiny_condition, monkeypatch):
    """2 samples of 5 frames of 6 tokens: one, two and three frames a call, with gradient all; the same velocities."""
    model = stir(adapted(tiny_model()))
    condition, seen, gelu = tiny_condition(model), [], F.gelu
    between = model.config.ffn_dim
    monkeypatch.setattr(
        F, "gelu", lambda x, **how: (seen.append(x.shape[1]) if x.shape[-1] == between else None) or gelu(x, **how)
    )
    with torch.no_grad():
        whole = velocity(model, condition, frames=5)
        monkeypatch.setattr("longtake.models.layers._TOKENS_AT_ONCE", at_once)
        torch.testing.assert_close(velocity(model, condition, frames=5), whole)
    frames = max(1, at_once // 12)
    assert seen == [5, 5, *[*[frames] * (5 // frames), *[5 % frames] * (5 % frames > 0)] * 2]  # two blocks
    velocity(model, condition, frames=5)
    assert seen[-2:] == [5, 5]


def test_one_layer_computes_the_formula(tiny_model):
    """W x + b + (alpha / rank) B A x, in float64 by hand."""
    layer = stir(adapted(tiny_model())).blocks[1].ffn[0]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (RANK, 32) and b.shape == (48, RANK) and 0 < a.abs().max() <= 32**-0.5
    weight = layer.base_layer.weight.double() + ALPHA / RANK * torch.einsum("or,ri->oi", b.double(), a.double())
    wanted = x.double() @ weight.T + layer.base_layer.bias.double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=0, atol=1e-5)


def test_the_first_values_follow_seed_purpose_and_layer_alone(tiny_model):
    def values(model):
        return factors(model.state_dict())

    one = values(adapted(tiny_model()))
    torch.manual_seed(123)  # other global state, other weights, other targets: the same values
    some = values(adapted(tiny_model(seed=5), ["ffn.2", "self_attn.q"]))
    assert len(some) == 8 and all(torch.equal(one[name], value) for name, value in some.items())
    other = values(adapted(tiny_model(), seed=1))
    critic = values(add_lora(tiny_model(), r"blocks\.\d+\.ffn\.0", RANK, ALPHA, KeyedRNG(0), "critic lora_A"))
    firsts = [name for name in one if ".lora_A." in name]
    assert not any(torch.equal(one[name], other[name]) for name in firsts)
    assert not any(torch.equal(one[name], critic[name]) for name in critic if ".lora_A." in name)
    assert len({tuple(one[name].flatten()[:4].tolist()) for name in firsts}) == len(firsts) == 20


def test_unknown_targets_are_named(tiny_model):
    with pytest.raises(ConfigError, match=r"lora.targets names norm3, q; the linear layers of a block are self_attn.q"):
        targets_of(tiny_model(), ["q", "norm3", "ffn.0"])


@pytest.mark.whole
@pytest.mark.parametrize(
    ("preset", "numbers", "tensors"), [("wan2.1-t2v-1.3b", 349_962_240, 600), ("wan2.1-fun-1.3b-inp", 397_148_160, 720)]
)
def test_trained_numbers_at_full_size(preset, numbers, tensors):
    """Rank 256 on a 1.3B model; closed form: rank x (inputs + outputs) of each layer."""
    config = PRESETS[preset]
    with torch.device("meta"):
        model = VideoDiT(config)
        add_lora(model, adapter_of(model).pattern, 256, 256.0, KeyedRNG(0), "x")
    square, mlp = 2 * config.dim, config.dim + config.ffn_dim
    closed = config.num_layers * 256 * ((8 if config.image_dim is None else 10) * square + 2 * mlp)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert (sum(p.numel() for p in trained), len(trained)) == (closed, tensors) == (numbers, tensors)


# ---- the same numbers on every way through the model ---------------------------------------------------------------
@torch.no_grad()
def test_merged_equals_unmerged_in_every_use(tiny_model, tiny_condition, tiny_latents, tmp_path, rel, monkeypatch):
    """Bidirectional, masked (dense and flex attention) and streamed with a cache."""
    base = tiny_model(True)
    save_dit(base.config, base.state_dict(), tmp_path / "base")
    model = stir(adapted(tiny_model(True)))
    merged = load_dit(tmp_path / "base", lora=written(model, tmp_path / "lora", Base("toy", "0")))
    condition, layout = tiny_condition(base), causal_layout(tiny_plan(2, 1), 3)
    assert rel(velocity(base, condition), velocity(merged, condition)) > 0.1
    assert rel(velocity(model, condition), velocity(merged, condition)) < 1e-6
    dense = [velocity(network, condition, layout) for network in (model, merged)]
    monkeypatch.setattr(attention, "make_mask", partial(attention.make_mask, flex=True))
    layout = causal_layout(tiny_plan(2, 1), 3)
    flex = [velocity(network, condition, layout) for network in (model, merged)]
    assert rel(*dense) < 1e-6 and rel(*flex) < 1e-6 and rel(dense[0], flex[0]) < 1e-5
    streams = []
    for network in (model, merged):
        cache = network.new_cache(tiny_plan(2, 1, 3, 1), 2, (4, 6))
        x = tiny_latents(7)
        parts = [Denoiser(network)(x[:, :1], torch.zeros(2), condition, cache, commit=True)]
        for start in (1, 3, 5):
            block = x[:, start : start + 2]
            parts.append(Denoiser(network)(block, torch.full((2,), 0.6), condition, cache))
            Denoiser(network)(block, torch.zeros(2), condition, cache, commit=True)
        streams.append(torch.cat(parts, 1))
    assert rel(*streams) < 1e-6


def test_activation_checkpointing_gives_the_same_gradients(tiny_model, tiny_condition):
    gradients = []
    for checkpointing in (False, True):
        model = stir(adapted(tiny_model(True)))
        model = model.executed(Execution(recompute=checkpointing))
        velocity(model, tiny_condition(model)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


def test_a_bfloat16_base_computes_what_autocast_makes_of_float32(tiny_model, tiny_condition, rel):
    """Bit for bit, since autocast would round the same weights; gradients up to bfloat16; and no autocast works too."""
    results = []
    for kept in (torch.float32, torch.bfloat16):
        model = tiny_model(True).cast(kept)
        types = {name: p.dtype for name, p in model.named_parameters()}
        model = stir(adapted(model)).executed(Execution(recompute=True))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert {name: p.dtype for name, p in own(model).items()} == types
        with torch.autocast("cpu", torch.bfloat16):
            out = velocity(model, tiny_condition(model))
        out.square().mean().backward()
        results.append((out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])))
    assert torch.equal(results[0][0], results[1][0])
    assert rel(results[0][1], results[1][1]) < 0.01
    plain = velocity(model.requires_grad_(False), tiny_condition(model))
    assert 0 < (plain - results[0][0]).norm() / plain.norm() < 0.05


def test_under_autocast_layers_share_their_input(tiny_model, tiny_condition):
    """PEFT's cast to float32 and autocast's back would leave each of q, k and v a copy of the input for backward."""
    model = stir(adapted(tiny_model().cast(torch.bfloat16)))
    inputs = set()
    for layer in (model.blocks[0].self_attn.q, model.blocks[0].self_attn.k):
        layer.lora_A["default"].register_forward_pre_hook(lambda _, x: inputs.add((x[0].dtype, x[0].data_ptr())))
    with torch.autocast("cpu", torch.bfloat16):
        velocity(model, tiny_condition(model))
    assert len(inputs) == 1 and {dtype for dtype, _ in inputs} == {torch.bfloat16}


# ---- files -----------------------------------------------------------------------------------------------------------
def test_files_have_the_published_names_and_peft_reads_them(tiny_model, tiny_condition, tmp_path):
    from peft import PeftModel

    model = stir(adapted(tiny_model(True), ["self_attn.q", "cross_attn.v_img", "ffn.2"]))
    folder = written(model, tmp_path / "lora", Base("toy", "0"))
    held = load_file(folder / WEIGHTS)
    names = [
        f"blocks.{i}.{n}.lora_{x}" for i in (0, 1) for n in ("self_attn.q", "cross_attn.v_img", "ffn.2") for x in "AB"
    ]
    assert set(held) == {f"base_model.model.{name}.weight" for name in names}
    assert held["base_model.model.blocks.1.ffn.2.lora_A.weight"].shape == (RANK, 48)
    condition = tiny_condition(model)
    oracle = PeftModel.from_pretrained(tiny_model(True), folder).base_model.model
    assert torch.equal(velocity(oracle, condition), velocity(model, condition))
    low = read_lora(folder, own(model))
    assert low.scale == ALPHA / RANK and read_lora(folder / WEIGHTS, own(model), scale=0.25).scale == 0.25


@pytest.mark.whole
def test_a_folder_of_updates_loads_with_its_base_like_any_weights(tiny_model, tmp_path):
    """Also on top of weights that are a folder of updates themselves, in another place, and converted."""
    model = tiny_model()
    save_dit(model.config, model.state_dict(), tmp_path / "log/base")
    first = Base("../base", weights_identity(tmp_path / "log/base"))
    one = written(stir(adapted(tiny_model()), 1), tmp_path / "log/one", first)
    second = Base("../one", weights_identity(one))
    two = written(stir(adapted(tiny_model(), seed=3), 2), tmp_path / "log/two", second)
    (tmp_path / "log").rename(tmp_path / "moved")
    one, two = tmp_path / "moved/one", tmp_path / "moved/two"
    by_hand = model.state_dict()
    for folder in (one, two):
        low = load_file(folder / WEIGHTS)
        for name, weight in by_hand.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in low:
                product = torch.einsum("or,ri->oi", low[f"{stem}.lora_B.weight"], low[f"{stem}.lora_A.weight"])
                by_hand[name] = weight + ALPHA / RANK * product
    loaded = load_dit(two).state_dict()
    for name, weight in by_hand.items():
        torch.testing.assert_close(loaded[name], weight, rtol=1e-6, atol=1e-6)
    convert(two, tmp_path / "whole", "longtake")
    assert all(torch.equal(loaded[name], value) for name, value in load_dit(tmp_path / "whole").state_dict().items())
    convert(tmp_path / "whole", tmp_path / "out", "longtake", lora=two, unmerge=True)
    for name, value in load_dit(one).state_dict().items():
        torch.testing.assert_close(load_dit(tmp_path / "out").state_dict()[name], value, rtol=0, atol=2e-6)
    with pytest.raises(ConfigError, match="unmerge takes a low-rank update out of the weights; name its file"):
        convert(two, tmp_path / "other", "longtake", unmerge=True)


def test_another_base_is_refused(tiny_model, tmp_path):
    for seed in (0, 1):
        save_dit(tiny_model().config, tiny_model(seed=seed).state_dict(), tmp_path / f"base{seed}")
    base = Base(str(tmp_path / "base0"), weights_identity(tmp_path / "base0"))
    folder = written(stir(adapted(tiny_model())), tmp_path / "lora", base)
    assert load_dit(folder).config == tiny_model().config
    (tmp_path / "base0").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"belong to the weights at .*base0, which are not there; put them back"):
        load_dit(folder)
    (tmp_path / "base1").rename(tmp_path / "base0")
    with pytest.raises(CheckpointError, match=r"trained on weights with the SHA-256 \w{16}, and those at .*base0 have"):
        load_dit(folder)
    with pytest.raises(CheckpointError, match="network=critic was given, and .*lora holds one network only"):
        load_dit(folder, network="critic")
    (folder / BASE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"base.json must hold source and identity of the base"):
        load_dit(folder)


def test_an_identity_is_that_of_the_tensors_and_not_of_their_files(tiny_model, tmp_path):
    model = tiny_model(text_dim=4096, text_len=512)
    save_dit(model.config, model.state_dict(), tmp_path / "a")
    identity = weights_identity(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "diffusers", shard_bytes=100_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1 and weights_identity(tmp_path / "b") == identity
    state = model.state_dict()
    state["blocks.1.ffn.2.bias"][3] += 1e-6  # one number of one tensor
    save_dit(model.config, state, tmp_path / "c")
    save_dit(model.config, model.state_dict(), tmp_path / "d", torch.bfloat16)
    assert len({identity, weights_identity(tmp_path / "c"), weights_identity(tmp_path / "d")}) == 3
    base = Base(str(tmp_path / "a"), identity)
    one = written(stir(adapted(tiny_model(text_dim=4096, text_len=512))), tmp_path / "e", base)
    before = weights_identity(one)
    fields = json.loads((one / CONFIG).read_text())
    (one / CONFIG).write_text(json.dumps(fields | {"lora_alpha": 1.0}))  # the scale is a part of what is computed
    assert weights_identity(one) != before


def test_updates_of_other_kinds_are_refused(tiny_model, tmp_path):
    model = adapted(tiny_model())
    folder = written(model, tmp_path / "lora", Base("toy", "0"))
    fields = json.loads((folder / CONFIG).read_text())
    for changed, message in (
        (fields | {"use_dora": True}, "sets use_dora; only plain updates"),
        (fields | {"peft_type": "LOHA"}, "sets peft_type=LOHA; only plain updates"),
        (
            fields | {"fan_in_fan_out": True, "init_lora_weights": "pissa"},
            "sets fan_in_fan_out, init_lora_weights=pissa",
        ),
        ({"peft_type": "LORA"}, r"adapter_config.json must hold r and lora_alpha"),
    ):
        (folder / CONFIG).write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            read_lora(folder, own(model))
