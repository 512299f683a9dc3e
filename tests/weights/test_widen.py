"""Text-to-video weights widened to 36 channels and an image branch: the same function until trained."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents
from tiny_plan import causal_layout, tiny_plan

from longtake.condition import Condition
from longtake.errors import ConfigError
from longtake.models.dit import VideoDiT
from longtake.models.sizes import DiTConfig
from longtake.rollout.denoise import Denoiser
from longtake.weights import widen as widening
from longtake.weights.load import Opened, load_opened

SEED = 3


def wide_config(model: VideoDiT, **changes) -> DiTConfig:
    added = {"model_type": "i2v", "in_channels": 12, "image_dim": 10}
    return dataclasses.replace(model.config, **added | changes)


def widen(model: VideoDiT, config: DiTConfig, seed: int) -> VideoDiT:
    """A model in memory as weights that are opened, widened and loaded."""
    state = model.state_dict()

    def read(names):
        return ((name, state[name]) for name in names)

    opened = widening.widen(Opened(model, read, str), config, seed)
    return load_opened(opened, dtype=state["blocks.0.cross_attn.k.weight"].dtype)


def conditions(wide: VideoDiT) -> list[Condition]:
    """Ordinary and extreme y and CLIP tokens."""
    plain = make_tiny_condition(wide)
    assert plain.frames is not None
    image = None if plain.image is None else 1e3 * plain.image
    return [plain, dataclasses.replace(plain, image=image, frames=-1e4 * plain.frames)]


@pytest.mark.parametrize("changes", [{}, {"image_positions": 5, "model_type": "flf2v"}, {"image_dim": None}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_output_is_exactly_that_of_the_text_to_video_model(changes, dtype, tiny_model) -> None:
    model = tiny_model().cast(dtype)
    wide = widen(model, wide_config(model, **changes), SEED)
    assert {n: p.dtype for n, p in model.named_parameters()}.items() <= {
        n: p.dtype for n, p in wide.named_parameters()
    }.items()
    x, sigma = make_tiny_latents(5), torch.tensor([0.3, 0.9])
    for condition in conditions(wide):
        text = Condition(condition.text)
        assert torch.equal(wide(x, sigma, condition), model(x, sigma, text))
        layout = causal_layout(tiny_plan(2, 1, rope="absolute"), 5)
        assert torch.equal(wide(x, sigma, condition, layout), model(x, sigma, text, layout))


@torch.no_grad()
def test_streaming_is_the_same_too(tiny_model) -> None:
    model = tiny_model()
    wide = widen(model, wide_config(model), SEED)
    condition = make_tiny_condition(wide)
    text = Condition(condition.text)
    caches = [net.new_cache(tiny_plan(2, 1, 3, 1), 2, (4, 6)) for net in (wide, model)]
    for block in make_tiny_latents(4).split(1, 1):
        for commit in (False, True):
            sigma = torch.full((2,), 0.0 if commit else 0.7)
            ours = Denoiser(wide)(block, sigma, condition, caches[0], commit=commit)
            assert torch.equal(ours, Denoiser(model)(block, sigma, text, caches[1], commit=commit))


def test_every_new_part_learns(tiny_model) -> None:
    """Gradients reach the zero parts at once, and what is behind them after one step."""
    wide = widen(tiny_model(), wide_config(tiny_model()), SEED)
    condition, x = make_tiny_condition(wide), make_tiny_latents(5)
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        wide(x, torch.tensor([0.3, 0.9]), condition).square().mean().backward()
        moved = {name for name, p in wide.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert wide.patch_embedding.weight.grad[:, 4:].abs().max() > 0
        assert {f"blocks.{n}.cross_attn.v_img.weight" for n in range(2)} <= moved
        behind = {name for name, _ in wide.named_parameters() if "k_img" in name or "img_emb" in name}
        # Softmax does not see a constant added to all keys: the bias of k_img acts through the norm alone.
        assert bool(behind <= moved) == (step == 1)
        optimizer.step()


def test_the_same_seed_gives_the_same_weights_and_wans_initialisation(tiny_model) -> None:
    one, two = (widen(tiny_model(), wide_config(tiny_model()), SEED).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    key = one["blocks.0.cross_attn.k_img.weight"]
    assert abs(float(key.std()) / (2 / (32 + 32)) ** 0.5 - 1) < 0.1  # Xavier
    assert not torch.equal(key, one["blocks.1.cross_attn.k_img.weight"])
    assert torch.equal(one["img_emb.proj.4.weight"], torch.ones(32))


def test_only_text_to_video_weights_of_the_same_size_widen(tiny_model) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"they have dim=32 \(not 64\), num_layers=2 \(not 3\); name a preset"):
        widen(model, wide_config(model, dim=64, num_layers=3), SEED)
    wide = tiny_model(True)
    with pytest.raises(ConfigError, match="in_channels=12 already; only text-to-video weights widen"):
        widen(wide, wide_config(model), SEED)
