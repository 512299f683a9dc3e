"""Products of 8-bit floats: the scales, the bounds of their errors, and a network of them."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from tape import Tape
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error
from tiny_plan import causal_layout, tiny_plan
from tiny_sessions import make_generator, open_session, take
from torch import nn

from longtake.errors import CheckpointError
from longtake.models import sizes
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.models.fp8 import (
    FP8,
    FP8Linear,
    Rows,
    gelu_quantised,
    gelu_quantised_once,
    has_kernel,
    plainly_multiplied,
    quantised,
)
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.rollout.stream import LatentStream
from longtake.weights.presets import PRESETS


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantised(rows: Rows) -> torch.Tensor:
    return rows.values.double() * rows.scale.double()


@pytest.fixture(params=["mlp", "all layers"])
def quantised_model(request, monkeypatch):
    """A tiny network with 8-bit weights in the MLPs, or as a large one has them, in all layers of its blocks."""
    if request.param == "all layers":
        monkeypatch.setattr(sizes, "_QUANTISED_WEIGHTS", 0)
    return make_tiny_model(i2v=True).quantise()


# ---- one product -----------------------------------------------------------------------------------------------------
def test_a_row_has_the_scale_of_its_largest_number_and_a_bounded_error():
    x = random(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    rows = quantised(x)
    assert rows.values.dtype == FP8 and rows.scale.shape == (50, 1)
    assert torch.equal(rows.scale, x.abs().amax(1, keepdim=True) / 448)
    error = (dequantised(rows) - x.double()).abs()
    most = torch.maximum(x.abs() / 16, rows.scale / 1024)
    assert (error <= most * 1.0001).all() and (error > most * 0.9).any()  # and is nearly reached


def test_rows_of_zeros_and_of_what_is_not_finite():
    x = torch.zeros(4, 8)
    x[1, 2], x[2, 3], x[3] = torch.nan, torch.inf, 1e-30
    values, scale = quantised(x)
    assert torch.equal(values[0].float(), torch.zeros(8)) and float(scale[0]) > 0
    assert torch.equal(values[3].float(), torch.zeros(8))  # below the least scale
    assert not (values[1].float() * scale[1]).isfinite().any() and not (values[2].float() * scale[2]).isfinite().any()


def test_a_row_does_not_depend_on_the_others():
    x, layer = random(20, 64), FP8Linear.of(nn.Linear(64, 48))
    alone = quantised(x[3:5])
    assert torch.equal(quantised(x).values[3:5].float(), alone.values.float())
    assert torch.equal(quantised(x).scale[3:5], alone.scale)
    torch.testing.assert_close(layer(x)[3:5], layer(x[3:5]), rtol=1e-6, atol=1e-6)


def test_a_layer_is_the_product_of_the_quantised_numbers():
    """In float64, from the definition; and within the bound that follows from those of its two factors."""
    linear, x = nn.Linear(64, 48), random(3, 5, 64)
    layer = FP8Linear.of(linear)
    weight = quantised(linear.weight.detach())
    expected = dequantised(quantised(x)) @ dequantised(weight).T + linear.bias.double()
    assert relative_error(layer(x), expected) < 1e-6
    linear.requires_grad_(False)
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    rows = quantised(x)
    bounds = [
        torch.maximum(t.abs() / 16, s / 1024).double() for t, s in ((x, rows.scale), (linear.weight, weight.scale))
    ]
    most = bounds[0] @ linear.weight.abs().double().T + (x.abs().double() + bounds[0]) @ bounds[1].T
    assert ((layer(x) - exact).abs() <= most * 1.0001).all()
    assert 0.01 < relative_error(layer(x), exact) < 0.05


def test_a_layer_has_the_type_of_its_bias_and_takes_rows():
    layer, x = FP8Linear.of(nn.Linear(32, 16).bfloat16()), random(4, 32)
    assert layer(x).dtype == torch.bfloat16 and layer.weight.nbytes == 32 * 16
    assert torch.equal(layer(quantised(x)), layer(x))
    hidden = random(4, 32, seed=1)
    assert torch.equal(gelu_quantised(hidden).scale, quantised(nn.functional.gelu(hidden, approximate="tanh")).scale)


def test_a_device_without_such_products_says_so_once(caplog):
    has_kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            FP8Linear.of(nn.Linear(8, 8))(random(2, 8))
    assert [r.message for r in caplog.records if "fp8" in r.message] == [
        "precision fp8: products of 8-bit floats are computed in wider types, slower than bf16: cpu has none"
    ]


# ---- a network -------------------------------------------------------------------------------------------------------
@pytest.mark.whole
def test_which_layers_of_the_published_networks_are_quantised():
    small, large = PRESETS["wan2.1-fun-1.3b-inp"], PRESETS["wan2.1-i2v-14b-480p"]
    assert small.quantises(1536, 8960) and small.quantises(8960, 1536) and not small.quantises(1536, 1536)
    assert large.quantises(5120, 5120) and large.quantises(13824, 5120)
    with torch.device("meta"):
        model = VideoDiT(large).cast(torch.bfloat16)
        before = sum(p.nbytes for p in model.parameters()) / 2**30
        after = sum(p.nbytes for p in model.quantise().parameters()) / 2**30
    assert before > 30 and after < 16  # GiB, of which 40 are to hold a stream


def test_layers_are_quantised_and_nothing_else(quantised_model, request):
    all_layers = "all layers" in request.node.name
    kinds = {name: type(module) for name, module in quantised_model.blocks[0].named_modules()}
    assert kinds["ffn.0"] == kinds["ffn.2"] == FP8Linear
    layers = [f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"]
    assert {kinds[name] for name in [*layers, "cross_attn.k_img"]} == {FP8Linear if all_layers else nn.Linear}
    assert not any(isinstance(m, FP8Linear) for m in (*quantised_model.text_embedding, quantised_model.head.head))
    assert not any(p.requires_grad for p in quantised_model.blocks[0].ffn.parameters())


def velocity(model, execution=None):
    x, sigma, condition = make_tiny_latents(5), torch.full((2,), 0.7), make_tiny_condition(model)
    with torch.no_grad():
        return (model if execution is None else model.executed(execution))(x, sigma, condition)


def test_the_error_of_a_network(quantised_model):
    error = relative_error(velocity(quantised_model), velocity(make_tiny_model(i2v=True)))
    assert 1e-3 < error < 0.06


@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_a_stream_equals_the_masked_pass(quantised_model, rope):
    """To what rounding can do: a number that falls on the other side of a step of e4m3 moves by an eighth of itself."""
    plan, frames = tiny_plan(2, 1, 5, 1, rope), 9
    condition, clean = make_tiny_condition(quantised_model), make_tiny_latents(frames)
    cache, made = quantised_model.new_cache(plan, 2, (4, 6)), []
    with torch.no_grad():
        for start, end in plan.blocks(0, frames):
            sigma = torch.zeros(2, end - start)
            made.append(Denoiser(quantised_model)(clean[:, start:end], sigma, condition, cache, commit=True))
        masked = quantised_model(clean, torch.zeros(2, frames), condition, causal_layout(plan, frames))
    assert relative_error(torch.cat(made, 1), masked) < 2e-3


def test_captured_passes_give_the_same_bits(quantised_model):
    plan = tiny_plan(2, 1, 5, 1, sigmas=(1.0, 0.5))
    condition = make_tiny_condition(quantised_model)

    def made(graphs):
        cache = quantised_model.new_cache(plan, 2, (4, 6))
        noise = lambda start, end, step: random(2, end - start, 4, 4, 6, seed=10 * start + step)  # noqa: E731
        denoiser = Denoiser(quantised_model, graphs=graphs)
        stream = LatentStream(denoiser, cache, condition, make_tiny_latents(1), noise, plan)
        return torch.cat([stream.next() for _ in range(8)], 1)

    tape = Tape()
    assert torch.equal(made(CUDAGraphRunner(tape)), made(None)) and tape.replayed > 0


@pytest.mark.whole
def test_fused_quantising_is_the_same(quantised_model, monkeypatch):
    from longtake.models import execution

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **given: compile(function, backend="aot_eager", **given))
    monkeypatch.setattr(execution, "has_triton", lambda: True)
    execution._compiled.cache_clear()
    torch._dynamo.reset()
    try:
        fused = velocity(quantised_model, Execution(fuses=True))
    finally:
        execution._compiled.cache_clear()
        torch._dynamo.reset()
    assert relative_error(fused, velocity(quantised_model)) < 2e-3


def test_a_video_of_8_bit_weights(tmp_path):
    """It is made, saved and resumed; and a session of another precision is refused by name."""
    generator = make_generator(precision="fp8")
    assert generator.model.blocks[0].ffn[0].bias.dtype == torch.bfloat16
    session = open_session(generator)
    begun = take(session, 3)
    session.save(tmp_path / "a.session")
    assert np.array_equal(take(generator.resume(tmp_path / "a.session"), 2), take(session, 2)) and len(begun) == 17
    with pytest.raises(CheckpointError, match="precision: saved fp8, here bf16"):
        make_generator(precision="bf16").resume(tmp_path / "a.session")
    settings = generator.settings.model_copy(update={"precision": "bf16"})
    with pytest.raises(CheckpointError, match="precision: saved fp8, here bf16"):
        replace(generator, settings=settings).resume(tmp_path / "a.session")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [48, 8960, 13824])
def test_gelu_is_quantised_in_one_pass(width):
    once = gelu_quantised_once(torch.device("cuda", 0))
    assert once is not None
    x = (random(7, 11, width) * 3).to("cuda", torch.bfloat16)
    x[0, 0] = 0
    made, plain = once(x), gelu_quantised(x)
    assert made.shape == plain.shape and made.scale.shape == plain.scale.shape
    torch.testing.assert_close(made.scale, plain.scale, rtol=1e-5, atol=0)
    assert relative_error(dequantised(made), dequantised(plain)) < 5e-3
    x[1, 2, 3], x[2, 2, 5] = torch.nan, torch.inf
    for row in ((1, 2), (2, 2)):
        assert not dequantised(once(x))[row].isfinite().any()
    assert dequantised(once(x))[3:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 6240])
def test_a_gpu_multiplies_as_the_definition_does(rows):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")
    device = torch.device("cuda", 0)
    assert has_kernel(device)
    layer, x = FP8Linear.of(nn.Linear(1536, 8960).bfloat16().to(device)), random(rows, 1536).to(device)
    made, given = layer(x), quantised(x)
    expected = plainly_multiplied(given.values, given.scale, layer.weight, layer.scale, layer.bias.float())
    assert relative_error(made, expected) < 5e-3
