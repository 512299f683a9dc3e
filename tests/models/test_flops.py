"""Counted operations against what `FlopCounterMode` sees of the real model."""

import pytest
import torch
from tiny_lora import add_lora
from tiny_models import HEIGHT, IMAGE_TOKENS, WIDTH, make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longtake.config.groups import LoraConfig
from longtake.models import flops
from longtake.models.flops import Call, Work
from longtake.models.lora import targets_of
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser, commit_block, denoise_block
from longtake.weights.lora import Adapter, Base
from longtake.weights.presets import PRESETS

TOKENS = (HEIGHT // 2) * (WIDTH // 2)
FRAMES, BATCH = 7, 2
PLAN = tiny_plan(2)


def counted(work):
    """Operations of `work()`; the mathematical attention, whose products the counter knows on any device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


def call_of(model, frames=FRAMES):
    image = IMAGE_TOKENS if model.config.image_dim is not None else 0
    return Call.bidirectional(BATCH, frames, TOKENS, model.config.text_len, image)


@pytest.fixture(params=[False, True], ids=["t2v", "i2v"])
def model(request):
    return make_tiny_model(i2v=request.param)


def test_bidirectional_pass_and_its_backward(model):
    call, condition = call_of(model), make_tiny_condition(model)
    ran, velocity = counted(lambda: model(make_tiny_latents(FRAMES), torch.full((BATCH,), 0.5), condition))
    assert ran == flops.forward(model.config, call).total
    ran, _ = counted(lambda: velocity.sum().backward())
    assert ran == flops.backward(model.config, call).total


@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_masked_pass(model, rope):
    """The permitted pairs alone are computed, here counted one by one."""
    layout = PLAN.but(window_frames=4, sink_frames=0, rope=rope).teacher_forcing_layout(FRAMES)
    call = call_of(model).masked(layout)
    assert call.entries == 2 * FRAMES and call.pairs < (call.entries * TOKENS) ** 2
    x, sigma = torch.cat([make_tiny_latents(FRAMES)] * 2, 1), torch.full((BATCH, 2 * FRAMES), 0.5)
    ran, _ = counted(lambda: model(x, sigma, make_tiny_condition(model), layout))
    assert ran == flops.forward(model.config, call).total
    pairs = 0
    for start, end in PLAN.blocks(0, FRAMES):
        seen = end - start + len(PLAN.but(window_frames=4, sink_frames=0).attended(start, end))
        pairs += 2 * (end - start) * seen * TOKENS**2  # the clean half and the noisy half see equally much
    assert call.pairs == pairs


@pytest.mark.parametrize("with_grad", [False, True])
def test_a_cached_block_with_a_window(model, with_grad):
    """Past frames that fit the window, and the context's keys and values once without gradient."""
    condition = make_tiny_condition(model)
    cache = model.new_cache(tiny_plan(2, 1, 5, 1), BATCH, (HEIGHT, WIDTH))
    first = call_of(model, 1)
    ran, _ = counted(lambda: commit_block(Denoiser(model), cache, condition, make_tiny_latents(1)))
    assert ran == flops.forward(model.config, first.cached(1, 0, with_context=True)).total
    commit_block(Denoiser(model), cache, condition, make_tiny_latents(2))
    commit_block(Denoiser(model), cache, condition, make_tiny_latents(2))
    past = len(PLAN.but(window_frames=5, sink_frames=1).attended(5, 7))
    assert past == 3  # the sink, and two frames before
    call = first.cached(2, past, with_context=with_grad)
    noise = make_tiny_latents(2)
    ran, out = counted(
        lambda: (
            denoise_block(
                Denoiser(model),
                cache,
                condition,
                lambda step: noise,
                PLAN.but(sigmas=(1.0, 0.5)),
                exit_step=1,
                with_grad=with_grad,
            ).clean
        )
    )
    passes = [first.cached(2, past, with_context=False), call]
    assert ran == sum(flops.forward(model.config, each).total for each in passes)
    if with_grad:
        ran, _ = counted(lambda: out.sum().backward())
        assert ran == flops.backward(model.config, call).total


@pytest.mark.parametrize("targets", [None, ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.2"]])
def test_low_rank_updates(model, targets):
    lora = LoraConfig(rank=3, targets=targets)
    adapter = Adapter(3, 3.0, targets_of(model, targets), Base("toy", ""))
    add_lora(model, adapter.pattern, 3, 3.0, KeyedRNG(0), "test")
    call, condition = call_of(model), make_tiny_condition(model)
    ran, velocity = counted(lambda: model(make_tiny_latents(FRAMES), torch.full((BATCH,), 0.5), condition))
    assert ran == flops.forward(model.config, call, lora).total
    ran, _ = counted(lambda: velocity.sum().backward())
    assert ran == flops.backward(model.config, call, lora).total


def test_the_published_model_has_the_published_numbers():
    """2.5 GFLOP a token in linear layers, 283 TFLOP for 21 frames of 480x832, and 28 TFLOP for 3 streamed frames."""
    config = PRESETS["wan2.1-t2v-1.3b"]
    clip = Call.bidirectional(1, 21, 1560, 512)
    assert flops.forward(config, clip).total == pytest.approx(283e12, rel=0.02)
    block = flops.forward(config, clip.cached(3, 9, with_context=False))
    assert block.total == pytest.approx(28e12, rel=0.02)
    assert block.products / (3 * 1560) == pytest.approx(2.5e9, rel=0.02)


def test_work_adds_up():
    one = Work(1, 2, 3)
    assert one + one == one * 2 and (one * 2).total == 12
