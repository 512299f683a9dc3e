"""Cached roll-out = masked forward = brute-force oracle; what a roll-out may differentiate through."""

from __future__ import annotations

from collections.abc import Iterator

import oracle
import pytest
import torch
from axes import pairwise
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, with_self_attention
from tiny_plan import causal_layout, tiny_plan
from torch import Tensor

from longtake.condition import Condition
from longtake.errors import CacheError
from longtake.models.cache import KVCache
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.plan import StreamPlan
from longtake.rollout.denoise import Denoiser

# (first, block, frames), window, sink: with and without eviction, sinks inside, at and across block boundaries
PLANS = [((3, 3, 12), w, s) for w, s in ((None, 0), (6, 0), (7, 1), (6, 3), (9, 3), (8, 5), (12, 3), (20, 0))]
PLANS += [((1, 4, 17), w, s) for w, s in ((None, 0), (4, 0), (8, 0), (5, 1), (9, 1), (7, 3), (9, 5), (13, 5), (17, 1))]
ROPES = ("absolute", "relative")


def _sigmas(batch: int, frames: int) -> Tensor:
    """Another noise level for every sample and frame."""
    return torch.rand(batch, frames, generator=torch.Generator().manual_seed(9))


def _oracle(
    model: VideoDiT, x: Tensor, sigma: Tensor, condition: Condition, plan: StreamPlan, **options
) -> oracle.Trace:
    config, blocks = model.config, list(plan.blocks(0, x.shape[1]))
    sizes = {"num_heads": config.num_heads, "text_len": config.text_len, "blocks": blocks}
    text, image, frames = condition.text, condition.image, condition.frames
    return oracle.run(model.state_dict(), x, sigma, text, image, frames, **sizes, **options)


@torch.no_grad()
def _stream(
    model: VideoDiT, cache: KVCache, plan: StreamPlan, condition: Condition, clean: Tensor, noisy: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Every block twice, noisy without a trace and then clean for good: velocities of both, [B, F, C, H, W]."""
    clean_out, noisy_out = [], []
    for start, end in plan.blocks(0, clean.shape[1]):
        block = slice(start, end)
        noisy_out.append(Denoiser(model)(noisy[:, block], sigma[:, block], condition, cache))
        zero = torch.zeros_like(sigma[:, block])
        clean_out.append(Denoiser(model)(clean[:, block], zero, condition, cache, commit=True))
    return torch.cat(clean_out, 1), torch.cat(noisy_out, 1)


@pytest.mark.parametrize("i2v, rope, sizes, window, sink", pairwise((False, True), ROPES, PLANS))
def test_stream_equals_mask_equals_oracle(sizes, window, sink, rope: str, i2v: bool, rel) -> None:
    # N.3 (keys and values layer by layer) and N.4 (teacher forcing), batch 2 with different captions.
    first, block, frames = sizes
    plan, model = tiny_plan(block, first), make_tiny_model(i2v)
    condition = make_tiny_condition(model)
    clean, noisy = make_tiny_latents(frames), make_tiny_latents(frames, seed=5)
    sigma, zero = _sigmas(2, frames), torch.zeros(2, frames)
    rule = {"rope": rope, "window": window, "sink": sink}
    truth = _oracle(model, clean, zero, condition, plan, **rule, noisy=noisy, noisy_sigma=sigma)
    assert truth.noisy is not None

    cache = model.new_cache(tiny_plan(2, 1, window, sink, rope), 2, (4, 6), max_frames=None if window else frames)
    clean_out, noisy_out = _stream(model, cache, plan, condition, clean, noisy, sigma)
    assert rel(clean_out, truth.velocity) < 1e-5 and rel(noisy_out, truth.noisy) < 1e-5
    for layer in range(model.config.num_layers):
        for frame in cache.held_frames:
            slot = cache.slot_of(frame)
            assert rel(cache.keys[layer][:, slot], truth.keys[layer][frame]) < 1e-5
            assert rel(cache.values[layer][:, slot], truth.values[layer][frame]) < 1e-5

    rules = {"rope": rope, "window_frames": window, "sink_frames": sink}
    with torch.no_grad():
        full = model(clean, zero, condition, causal_layout(plan.but(**rules), frames))
        both = torch.cat([clean, noisy], 1), torch.cat([zero, sigma], 1)
        forced = model(*both, condition, plan.but(**rules).teacher_forcing_layout(frames))
    assert rel(full, truth.velocity) < 1e-5
    assert rel(forced, torch.cat([truth.velocity, truth.noisy], 1)) < 1e-5
    assert rel(clean_out, full) < 1e-5 and rel(noisy_out, forced[:, frames:]) < 1e-5


def test_the_comparison_above_can_fail(rel) -> None:
    # Window, sink, rope, caption, picture, y index and block plan each change the result far above the tolerance.
    plan, model = tiny_plan(4, 1), make_tiny_model(True)
    condition, x, zero = make_tiny_condition(model), make_tiny_latents(17), torch.zeros(2, 17)
    assert condition.image is not None and condition.frames is not None
    rule = {"rope": "absolute", "window": 9, "sink": 1}
    truth = _oracle(model, x, zero, condition, plan, **rule).velocity
    for change in ({"rope": "relative"}, {"window": 13}, {"sink": 5}, {"sink": 0}, {"window": None}):
        assert rel(_oracle(model, x, zero, condition, plan, **{**rule, **change}).velocity, truth) > 1e-3
    others = [
        condition.with_text(condition.text.flip(0)),
        Condition(condition.text, condition.image.flip(0), condition.frames),
        Condition(condition.text, condition.image, condition.frames.roll(1, 1)),
        Condition(condition.text, condition.image, condition.frames[:, :4]),
    ]
    for other in others:
        assert rel(_oracle(model, x, zero, other, plan, **rule).velocity, truth) > 1e-3
    assert rel(_oracle(model, x, zero, condition, tiny_plan(2, 1), **rule).velocity, truth) > 1e-3
    assert rel(_oracle(model, x, zero + 0.05, condition, plan, **rule).velocity, truth) > 1e-3


def test_cached_keys_equal_those_of_the_masked_forward_layer_by_layer(rel) -> None:
    # N.3 without the oracle: the keys that attention is handed in both paths.
    plan, model = tiny_plan(4, 1), make_tiny_model()
    condition, x, zero = make_tiny_condition(model), make_tiny_latents(9), torch.zeros(2, 9)
    cache = model.new_cache(tiny_plan(2, 1, None, 0, "absolute"), 2, (4, 6), max_frames=9)
    _stream(model, cache, plan, condition, x, torch.randn_like(x), zero)
    from longtake.models.attention import attend

    handed: list[tuple[Tensor, Tensor]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *, mask=None) -> Tensor:
        handed.append((k, v))
        return attend(q, k, v, mask=mask)

    with torch.no_grad():
        with_self_attention(model, spy)(x, zero, condition, causal_layout(plan, 9))
    assert len(handed) == model.config.num_layers
    for layer, (k, v) in enumerate(handed):
        assert rel(cache.keys[layer].flatten(1, 2), k) < 1e-5 and rel(cache.values[layer].flatten(1, 2), v) < 1e-5


@pytest.mark.parametrize("rope", ROPES)
def test_sink_across_the_first_block_is_rewritten_by_the_context_pass(rope: str, rel) -> None:
    # N.5, M-01, M-02: [1, 4, 4], sink 3; frames 1 and 2 lie in the sink and must end as clean keys.
    plan, model = tiny_plan(4, 1), make_tiny_model(True)
    condition, x = make_tiny_condition(model), make_tiny_latents(9)
    cache, counts = model.new_cache(tiny_plan(2, 1, 7, 3, rope), 2, (4, 6)), []
    from longtake.models.attention import attend

    def spy(q: Tensor, k: Tensor, v: Tensor, *, mask=None) -> Tensor:
        counts.append(k.shape[1] // cache.tokens_per_frame)
        return attend(q, k, v, mask=mask)

    model = with_self_attention(model, spy)
    with torch.no_grad():
        for start, end in plan.blocks(0, 5):
            for sigma in (1.0, 0.75, 0.5):
                Denoiser(model)(torch.randn(2, end - start, 4, 4, 6), torch.full((2,), sigma), condition, cache)
            Denoiser(model)(x[:, start:end], torch.zeros(2), condition, cache, commit=True)
    assert counts == [1] * 4 * model.config.num_layers + [5] * 4 * model.config.num_layers
    truth = _oracle(model, x[:, :5], torch.zeros(2, 5), condition, plan, rope=rope, window=7, sink=3)
    for layer in range(model.config.num_layers):
        for frame in range(5):
            assert rel(cache.keys[layer][:, cache.slot_of(frame)], truth.keys[layer][frame]) < 1e-5


def test_b_i2v_cross_attention_with_text_and_image_cache(rel) -> None:
    # Repair (b): text and image keys and values are both kept, apart, at their own lengths, and used.
    plan, model = tiny_plan(2, 1), make_tiny_model(True)
    condition, x, noisy = make_tiny_condition(model), make_tiny_latents(5), make_tiny_latents(5, seed=8)
    assert condition.image is not None
    cache, sigma = model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6)), _sigmas(2, 5)
    clean_out, noisy_out = _stream(model, cache, plan, condition, x, noisy, sigma)
    assert cache.has_cross(model, condition)
    for layer in range(model.config.num_layers):
        lengths = [t.shape for t in cache.cross(layer)]
        assert lengths == [(2, 8, 2, 16), (2, 8, 2, 16), (2, 5, 2, 16), (2, 5, 2, 16)]
    zero = torch.zeros(2, 5)
    truth = _oracle(model, x, zero, condition, plan, rope="relative", noisy=noisy, noisy_sigma=sigma)
    assert truth.noisy is not None
    assert rel(clean_out, truth.velocity) < 1e-5 and rel(noisy_out, truth.noisy) < 1e-5
    for other in (
        condition.with_text(condition.text.flip(0)),
        Condition(condition.text, condition.image.flip(0), condition.frames),
    ):
        cache.clear()
        changed, _ = _stream(model, cache, plan, other, x, noisy, sigma)
        assert rel(changed, clean_out) > 1e-2
        assert rel(changed, _oracle(model, x, zero, other, plan, rope="relative").velocity) < 1e-5


# ---- gradients ------------------------------------------------------------------------------------------------------


def _roll_out(
    model: VideoDiT, cache: KVCache, plan: StreamPlan, noise: list[Tensor], condition: Condition
) -> Iterator[Tensor]:
    """Self-forcing in miniature: one ungraded step, the exit step with gradient, and the context pass, block by block."""
    half = torch.full((noise[0].shape[0],), 0.5)
    for (start, end), x in zip(plan.blocks(), noise):
        assert cache.position == start and x.shape[1] == end - start
        with torch.no_grad():
            Denoiser(model)(x, half + 0.5, condition, cache)
        clean = x - 0.5 * Denoiser(model)(x, half, condition, cache)
        with torch.no_grad():
            # Handed over with its graph on purpose: a commit detaches.
            Denoiser(model)(clean, half - 0.5, condition, cache, commit=True)
        yield clean


def _noise(plan: StreamPlan, blocks: int) -> list[Tensor]:
    spans = [span for span, _ in zip(plan.blocks(), range(blocks))]
    return [make_tiny_latents(end - start, seed=20 + start).requires_grad_() for start, end in spans]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_no_gradient_crosses_blocks_and_conditions_get_theirs(rope: str, checkpointing: bool) -> None:
    # N.6, M-03.
    plan, model = tiny_plan(2, 1), make_tiny_model(True)
    model = model.executed(Execution(recompute=checkpointing))
    condition, noise = make_tiny_condition(model), _noise(plan, 4)
    cache = model.new_cache(tiny_plan(2, 1, 5, 1, rope), 2, (4, 6), spare_frames=6)
    outputs = list(_roll_out(model, cache, plan, noise, condition))
    assert not cache.keys.requires_grad and not cache.values.requires_grad
    for j, output in enumerate(outputs):
        grads = torch.autograd.grad(output.square().sum(), noise, retain_graph=True, allow_unused=True)
        for i, grad in enumerate(grads):
            assert (grad is not None and bool(grad.abs().max() > 0)) if i == j else grad is None
    outputs[-1].square().sum().backward()
    starved = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7]
    assert starved == []
    reached = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.grad is not None}
    wanted = {"text_embedding.0", "text_embedding.2", "img_emb.proj.1", "img_emb.proj.3"}
    wanted |= {f"blocks.{i}.cross_attn.{n}" for i in (0, 1) for n in ("k", "v", "k_img", "v_img", "norm_k_img")}
    assert wanted <= reached


def _gradients(rope: str, checkpointing: bool, spare: int, blocks: int = 5) -> dict[str, Tensor]:
    plan, model = tiny_plan(2, 1), make_tiny_model(True)
    model = model.executed(Execution(recompute=checkpointing))
    condition, noise = make_tiny_condition(model), _noise(plan, blocks)
    cache = model.new_cache(tiny_plan(2, 1, 5, 1, rope), 2, (4, 6), spare_frames=spare)
    loss = sum(((i + 1) * out.square().sum() for i, out in enumerate(_roll_out(model, cache, plan, noise, condition))))
    assert isinstance(loss, Tensor)
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters()}
    return {**named, **{f"noise.{i}": x.grad for i, x in enumerate(noise)}}  # type: ignore[dict-item]


@pytest.mark.parametrize("rope", ROPES)
def test_checkpointing_gives_equal_gradients_with_eviction_inside_the_chunk(rope: str) -> None:
    # N.7: 9 frames, window 5, sink 1: blocks 3 and 4 evict what blocks 1 and 2 read; spare_frames keeps it.
    plain, recomputed = _gradients(rope, False, 0), _gradients(rope, True, 6)
    assert plain.keys() == recomputed.keys()
    for name in plain:
        assert torch.allclose(plain[name], recomputed[name], rtol=1e-5, atol=1e-6 * float(plain[name].abs().max())), (
            name
        )
    with pytest.raises(CacheError, match="raise spare_frames by"):
        _gradients(rope, True, 0)


def test_fewest_spare_frames_that_work() -> None:
    # Of 9 frames, block [3, 5) reads frame 1 beside the sink; 4 more follow it, so 4 spare frames and no less.
    plain, recomputed = _gradients("relative", False, 0), _gradients("relative", True, 4)
    assert all(torch.allclose(plain[name], recomputed[name], rtol=1e-4, atol=1e-4) for name in plain)
    with pytest.raises(CacheError):
        _gradients("relative", True, 3)


def _pending(model: VideoDiT) -> tuple[KVCache, Condition, Tensor]:
    """A cache whose oldest frame is read by the pending backward of `output` and claimed by the next commit but one."""
    condition = make_tiny_condition(model)
    cache = model.new_cache(tiny_plan(2, 1, 3, 0), 2, (4, 6))
    zero, x = torch.zeros(2), make_tiny_latents(1)
    with torch.no_grad():
        for _ in range(3):
            Denoiser(model)(x, zero, condition, cache, commit=True)
    output = Denoiser(model)(x, zero, condition, cache)
    return cache, condition, output


def test_pending_backward_holds_its_slots_until_it_ran_or_was_dropped() -> None:
    model = make_tiny_model(True)
    model = model.executed(Execution(recompute=True))
    zero, x = torch.zeros(2), make_tiny_latents(1)

    @torch.no_grad()
    def commit_two(cache: KVCache, condition: Condition) -> None:
        for _ in range(2):
            Denoiser(model)(x, zero, condition, cache, commit=True)

    cache, condition, output = _pending(model)
    before = [cache.keys.clone(), cache.values.clone()]
    with pytest.raises(CacheError, match="pending backward"):
        commit_two(cache, condition)
    # The frame in the free slot was committed, the refused one left no trace.
    assert cache.position == 4 and cache.held_frames == [1, 2, 3]
    kept = [cache.slot_of(1), cache.slot_of(2)]
    assert all(torch.equal(a[:, :, kept], b[:, :, kept]) for a, b in zip(before, [cache.keys, cache.values]))

    loss = output.square().sum()
    loss.backward(retain_graph=True)  # the graph may be used again: still held
    with pytest.raises(CacheError, match="pending backward"):
        commit_two(cache, condition)
    loss.backward()
    commit_two(cache, condition)  # released, although `loss` and `output` are alive
    assert cache.position == 6

    cache, condition, output = _pending(model)
    del output
    commit_two(cache, condition)  # released with its graph

    model = model.executed(Execution(recompute=False))
    cache, condition, output = _pending(model)
    commit_two(cache, condition)  # nothing is recomputed: nothing to hold
    output.square().sum().backward()
