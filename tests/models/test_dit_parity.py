"""The transformer against diffusers' and against published sizes, and against the brute-force oracle."""

from __future__ import annotations

import inspect
import math

import oracle
import pytest
import torch
from published_tensors import published_table
from tiny_models import load_state, make_tiny_condition, make_tiny_latents, make_tiny_model, randomize
from tiny_plan import causal_layout, tiny_plan

from longtake.condition import Condition
from longtake.errors import ConfigError, ShapeError
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.models.sizes import DiTConfig
from longtake.rollout.denoise import Denoiser
from longtake.weights.config_json import config_from_json
from longtake.weights.names import original_names, to_diffusers_key

SMALL = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
I2V = {"model_type": "i2v", "in_channels": 36, "image_dim": 1280}
# Specification A.1: name -> (sizes, parameters, tensors); None where the table gives no number
PUBLISHED = {
    "t2v-1.3B": (SMALL, 1_418_996_800, 825),
    "t2v-14B": (LARGE, 14_288_491_584, 1095),
    "i2v-14B": ({**LARGE, **I2V}, 16_394_878_784, 1303),
    "flf2v-14B": ({**LARGE, **I2V, "model_type": "flf2v", "image_positions": 514}, 16_395_536_704, 1304),
    "fun-1.3B-inp": ({**SMALL, **I2V}, 1_564_428_608, 983),
    "i2v-a14B": ({**LARGE, "in_channels": 36}, None, 1095),
    "ti2v-5B": (
        {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_channels": 48, "out_channels": 48},
        None,
        825,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys_shapes_and_parameter_counts(name: str) -> None:
    sizes, parameters, tensors = PUBLISHED[name]
    with torch.device("meta"):
        model = VideoDiT(DiTConfig(**sizes))
    table = published_table(model.config)
    state = model.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {key: row[0] for key, row in table.items()}
    assert {key: to_diffusers_key(key) for key in state} == {key: row[1] for key, row in table.items()}
    assert set(original_names(row[1] for row in table.values()).values()) == set(state)
    assert len(state) == tensors
    if parameters is not None:
        assert sum(value.numel() for value in state.values()) == parameters


def _diffusers_model(i2v: bool, positions: int | None = None) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=36 if i2v else 16,
        out_channels=16,
        text_dim=12,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        image_dim=10 if i2v else None,
        added_kv_proj_dim=32 if i2v else None,
        rope_max_seq_len=64,
        pos_embed_seq_len=positions,
    )
    randomize(model, 3)
    return model.eval()


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v"])
def test_velocity_equals_diffusers_with_the_same_random_weights(kind: str, rel) -> None:
    i2v = kind != "t2v"
    theirs = _diffusers_model(i2v, 10 if kind == "flf2v" else None)
    ours = VideoDiT(config_from_json(dict(theirs.config)))
    names = original_names(theirs.state_dict())
    load_state(ours, {names[key]: value for key, value in theirs.state_dict().items()}, "diffusers")
    assert {to_diffusers_key(key) for key in ours.state_dict()} == set(theirs.state_dict())
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 16, 4, 6, generator=generator)
    y = torch.randn(2, 5, 20, 4, 6, generator=generator)
    text, image = torch.randn(2, 512, 12, generator=generator), torch.randn(2, 10, 10, generator=generator)
    # diffusers embeds the clock in float32 (error 1000 x 6e-8): these values are exact in both.
    sigma = torch.tensor([0.0, 0.0625])
    condition = Condition(text, image if i2v else None, y if i2v else None)
    with torch.no_grad():
        inputs = torch.cat([x, y[:, :3]], 2) if i2v else x
        # diffusers takes the two pictures of FLF2V as two samples
        tokens = image.view(4, 5, 10) if kind == "flf2v" else image
        truth = theirs(inputs.transpose(1, 2), sigma * 1000, text, tokens if i2v else None).sample.transpose(1, 2)
        assert rel(ours(x, sigma, condition), truth) < 1e-5
        # Able to fail: what the two conditions and the noise level change is far above the tolerance.
        assert rel(ours(x, sigma.flip(0), condition), truth) > 1e-2
        assert rel(ours(x, sigma, condition.with_text(text.flip(0))), truth) > 1e-2
        if i2v:
            assert rel(ours(x, sigma, Condition(text, image.flip(0), y)), truth) > 1e-2
            assert rel(ours(x, sigma, Condition(text, image, y.flip(0))), truth) > 1e-2


@pytest.mark.parametrize("i2v", [False, True])
def test_bidirectional_equals_oracle_and_one_block_without_window(i2v: bool, rel) -> None:
    # N.2: one block covering all frames, masked and cached, equals the bidirectional model.
    model, x = make_tiny_model(i2v), make_tiny_latents(5)
    condition = make_tiny_condition(model, num_frames=3)
    sigma = torch.tensor([[0.0, 0.3, 0.9375, 1.0, 0.5], [0.7, 0.1, 0.2, 0.0, 0.4]])
    truth = oracle.run(
        model.state_dict(),
        x,
        sigma,
        condition.text,
        condition.image,
        condition.frames,
        num_heads=2,
        text_len=8,
        blocks=[(0, 5)],
    )
    with torch.no_grad():
        assert rel(model(x, sigma, condition), truth.velocity) < 1e-5
        assert rel(model(x, sigma, condition, causal_layout(tiny_plan(5, 5), 5)), truth.velocity) < 1e-5
        for rope in ("absolute", "relative"):
            cache = model.new_cache(tiny_plan(2, 1, None, 0, rope), 2, (4, 6), max_frames=5)
            assert rel(Denoiser(model)(x, sigma, condition, cache, commit=True), truth.velocity) < 1e-5
        one_value = torch.tensor([0.25, 0.75])
        assert torch.equal(
            model(x, one_value, condition), model(x, one_value[:, None].expand(2, 5).contiguous(), condition)
        )


def test_d_clip_tokens_keep_batch_dimension(rel) -> None:
    # Repair (d): [1, L, D] stays three-dimensional, and every sample of a larger batch sees its own picture.
    model, x = make_tiny_model(True), make_tiny_latents(3, batch=3)
    condition, sigma = make_tiny_condition(model, batch=3), torch.tensor([0.2, 0.5, 0.8])
    assert condition.image is not None and condition.frames is not None
    plan = tiny_plan(2, 1)
    truth = oracle.run(
        model.state_dict(),
        x,
        sigma[:, None].expand(3, 3),
        condition.text,
        condition.image,
        condition.frames,
        num_heads=2,
        text_len=8,
        blocks=list(plan.blocks(0, 3)),
    )
    with torch.no_grad():
        layout = causal_layout(plan, 3)
        three = model(x, sigma, condition, layout)
        assert three.shape == x.shape and rel(three, truth.velocity) < 1e-5
        for b in range(3):
            row = slice(b, b + 1)
            own = Condition(condition.text[row], condition.image[row], condition.frames[row])
            one = model(x[row], sigma[row], own, layout)
            assert one.shape == (1, *x.shape[1:]) and rel(one, truth.velocity[row]) < 1e-5
            cache = model.new_cache(tiny_plan(2, 1, None, 0), 1, (4, 6), max_frames=3)
            streamed = [Denoiser(model)(x[row, s:e], sigma[row], own, cache, commit=True) for s, e in plan.blocks(0, 3)]
            assert rel(torch.cat(streamed, 1), truth.velocity[row]) < 1e-5
    with pytest.raises(ShapeError, match="batch first"):
        Condition(condition.text[:1], condition.image[0], condition.frames[:1])
    with pytest.raises(ShapeError, match="batch 1 and text has batch 3"):
        Condition(condition.text, condition.image[:1], condition.frames)


def _spy_on_clock(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    from longtake.models import dit

    seen: list[torch.Tensor] = []
    original = dit.sinusoid

    def spy(timestep: torch.Tensor, width: int) -> torch.Tensor:
        seen.append(timestep)
        return original(timestep, width)

    monkeypatch.setattr(dit, "sinusoid", spy)
    return seen


@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_clock_and_time_embedding_stay_float32_in_bfloat16(how: str, monkeypatch, rel) -> None:
    # N.10, M-20: in bfloat16 937.5 would become 936.
    model, x = make_tiny_model(True), make_tiny_latents(2, batch=1)
    condition, sigma = make_tiny_condition(model, batch=1), torch.tensor([[0.9375, 0.8333333]])
    with torch.no_grad():
        truth_e, truth_modulation = model._embed_time(sigma.double() * 1000)
        truth = model(x, sigma, condition)
        if how == "cast":
            model.cast(torch.bfloat16)
        seen = _spy_on_clock(monkeypatch)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            e, modulation = model._embed_time(sigma.double() * 1000)
            out = model(x, sigma, condition)
    assert all(torch.equal(clock, sigma.double() * 1000) for clock in seen) and len(seen) == 2
    assert e.dtype == modulation.dtype == out.dtype == torch.float32
    assert torch.equal(e, truth_e) and torch.equal(modulation, truth_modulation)
    assert 1e-4 < rel(out, truth) < 0.1  # the matrix products are bfloat16 indeed


def test_sinusoid_has_cosines_first_in_float64() -> None:
    from longtake.models.layers import sinusoid

    out = sinusoid(torch.tensor([937.5]), 256)[0]
    assert out.dtype == torch.float32
    for j in (0, 1, 64, 127):
        angle = 937.5 * 10000.0 ** (-j / 128)
        assert float(out[j]) == pytest.approx(math.cos(angle), abs=1e-7)
        assert float(out[128 + j]) == pytest.approx(math.sin(angle), abs=1e-7)


def test_initialisation_is_wans() -> None:
    model = VideoDiT(DiTConfig(dim=64, ffn_dim=96, num_heads=4, num_layers=1, text_dim=12, text_len=8))
    assert not model.head.head.weight.any() and not model.head.head.bias.any()
    assert float(model.time_embedding[2].weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.blocks[0].ffn[0].weight.detach().abs().max()) <= (6 / (64 + 96)) ** 0.5


def test_the_model_is_bare() -> None:
    """A call has four arguments, and who wants it computed another way gets another object of the same modules."""
    assert list(inspect.signature(VideoDiT.forward).parameters) == ["self", "x", "sigma", "condition", "context"]
    model = make_tiny_model()
    other = model.executed(Execution(recompute=True))
    assert not model.execution.recompute and other.execution.recompute
    assert all(a is b for a, b in zip(model.modules(), other.modules()) if a is not model)
    x, sigma, condition = make_tiny_latents(2), torch.full((2,), 0.5), make_tiny_condition(model)
    assert torch.equal(model(x, sigma, condition), other(x, sigma, condition))


def test_calls_that_do_not_fit_are_refused() -> None:
    model, x = make_tiny_model(True), make_tiny_latents(3)
    condition, sigma = make_tiny_condition(model), torch.zeros(2)
    layout, cache = causal_layout(tiny_plan(2), 3), model.new_cache(tiny_plan(2, 1, 3, 0), 2, (4, 6))
    text, image, frames = condition.text, condition.image, condition.frames
    assert image is not None and frames is not None
    calls = [
        ("x has shape", (x[:, :, :3], sigma, condition), None),
        ("sigma has shape", (x, torch.zeros(2, 4), condition), None),
        ("entries", (x[:, :2], sigma, condition), layout),
        ("x has 3 entries and the view 2", (x, sigma, condition), cache.view(2)),
        ("multiple of the patch", (x[..., :5], sigma, condition), None),
        ("cache was made for batch", (x[:1], sigma[:1], make_tiny_condition(model, 1)), cache),
        ("condition has batch", (x, sigma, make_tiny_condition(model, 1)), None),
        ("condition.text", (x, sigma, condition.with_text(torch.zeros(2, 9, 12))), None),
        ("needs condition.image", (x, sigma, Condition(text, None, frames)), None),
        ("needs condition.frames", (x, sigma, Condition(text, image)), None),
        ("condition.image has width", (x, sigma, Condition(text, image[..., :9], frames)), None),
        ("condition.frames has shape", (x, sigma, Condition(text, image, frames[:, :, :7])), None),
        ("float32", (x, sigma.bfloat16(), condition), None),
    ]
    for message, arguments, context in calls:
        with pytest.raises(ShapeError, match=message), torch.no_grad():
            Denoiser(model)(*arguments, cache) if context is cache else model(*arguments, context)
    with pytest.raises(ShapeError, match="takes no condition"):
        make_tiny_model()(x, sigma, condition)
    with pytest.raises(ConfigError, match="even width"):
        DiTConfig(dim=30, ffn_dim=8, num_heads=4, num_layers=1)
