"""One block against a cache: which calls are made, at which levels, and where gradient flows."""

import pytest
import torch
from tiny_batches import record
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.errors import CacheError
from longtake.flow.path import add_noise
from longtake.rollout.denoise import Denoiser, Guidance, commit_block, denoise_block

SIGMAS = [1.0, 0.9, 0.75, 0.5]
RULES = tiny_plan(2, 1, 5, 1, sigmas=SIGMAS)


def noise_of(frames, batch=2):
    return lambda step: make_tiny_latents(frames, batch, seed=100 + step)


@pytest.fixture
def scene():
    model = make_tiny_model(i2v=True)
    condition = make_tiny_condition(model)
    cache = model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6))
    commit_block(Denoiser(model), cache, condition, make_tiny_latents(1))
    return model, cache, condition


@pytest.mark.parametrize("exit_step", [None, 0, 2, 3])
def test_levels_and_renoising_follow_the_steps(scene, exit_step, monkeypatch):
    model, cache, condition = scene
    calls = record(model, monkeypatch)
    noise = noise_of(2)
    clean = denoise_block(Denoiser(model), cache, condition, noise, RULES, exit_step=exit_step).clean
    last = 3 if exit_step is None else exit_step
    assert [call["sigma"].tolist() for call in calls] == [pytest.approx([s, s]) for s in SIGMAS[: last + 1]]
    assert all(call["sigma"].dtype == torch.float32 and not call["commit"] for call in calls)
    x = noise(0)
    for step, call in enumerate(calls):
        assert torch.equal(call["x"], x)
        predicted = x - SIGMAS[step] * call["out"]
        if step < last:
            x = add_noise(predicted, noise(step + 1), torch.full((2,), SIGMAS[step + 1]))
    torch.testing.assert_close(clean, predicted)
    assert clean.dtype == torch.float32 and not clean.requires_grad


def test_the_cache_is_only_read(scene):
    model, cache, condition = scene
    keys, held = cache.keys.clone(), cache.held_frames
    for with_grad in (False, True):
        denoise_block(Denoiser(model), cache, condition, noise_of(2), RULES, with_grad=with_grad)
    assert torch.equal(cache.keys, keys) and cache.held_frames == held and cache.position == 1


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_gradient_flows_through_the_exit_step_alone(scene, exit_step, monkeypatch):
    model, cache, condition = scene
    calls = record(model, monkeypatch)
    clean = denoise_block(
        Denoiser(model), cache, condition, noise_of(2), RULES, exit_step=exit_step, with_grad=True
    ).clean
    assert [call["with_grad"] for call in calls] == [False] * exit_step + [True]
    assert [call["out"].requires_grad for call in calls] == [False] * exit_step + [True]
    assert not calls[-1]["x"].requires_grad
    (mine,) = torch.autograd.grad(clean.square().sum(), model.blocks[0].self_attn.q.weight)
    # the gradient of that one call, made again by hand
    call = calls[-1]
    again = call["x"] - SIGMAS[exit_step] * Denoiser(model)(call["x"], call["sigma"], condition, cache)
    (expected,) = torch.autograd.grad(again.square().sum(), model.blocks[0].self_attn.q.weight)
    assert mine.abs().max() > 0
    torch.testing.assert_close(mine, expected)


def test_graded_step_reaches_every_part_of_the_model(scene):  # spec N.6
    model, cache, condition = scene
    clean = denoise_block(Denoiser(model), cache, condition, noise_of(2), RULES, exit_step=1, with_grad=True).clean
    clean.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_no_gradient_is_kept_inside_no_grad(scene):
    model, cache, condition = scene
    with torch.no_grad():
        assert not denoise_block(Denoiser(model), cache, condition, noise_of(2), RULES).clean.requires_grad


def test_the_context_pass_is_at_sigma_zero_without_gradient(scene, monkeypatch):
    model, cache, condition = scene
    calls = record(model, monkeypatch)
    clean = make_tiny_latents(2).requires_grad_()
    commit_block(Denoiser(model), cache, condition, clean)
    (call,) = calls
    assert call["commit"] and not call["with_grad"] and call["sigma"].tolist() == [0.0, 0.0]
    assert torch.equal(call["x"], clean) and not call["x"].requires_grad
    assert cache.position == 3 and cache.held_frames == [0, 1, 2] and not cache.keys.requires_grad


def test_both_sides_of_guidance_are_denoised_and_committed_alike(scene, monkeypatch):
    """Each with its condition and its cache; the context of both is the guided block at sigma 0."""
    model, cache, condition = scene
    other, twin = make_tiny_condition(model, seed=9), model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6))
    commit_block(Denoiser(model), twin, other, make_tiny_latents(1))
    calls = record(model, monkeypatch)
    guidance = Guidance(3.0, other, twin)
    clean = denoise_block(
        Denoiser(model), cache, condition, noise_of(2), RULES.but(sigmas=(1.0,)), guidance=guidance
    ).clean
    with_text, without = (call["out"] for call in calls)
    torch.testing.assert_close(clean, noise_of(2)(0) - (without + 3.0 * (with_text - without)))
    calls.clear()
    commit_block(Denoiser(model), cache, condition, clean.requires_grad_(), guidance=guidance)
    assert [call["condition"] for call in calls] == [condition, other]
    for call in calls:
        assert call["commit"] and call["sigma"].tolist() == [0.0, 0.0]
        assert torch.equal(call["x"], clean) and not call["x"].requires_grad
    assert cache.position == twin.position == 3 and not torch.equal(cache.keys, twin.keys)


def test_joined_exit_steps_are_those_of_each_block(scene):
    """Blocks of other lengths, at levels of their own."""
    model, cache, condition = scene
    exits, expected = [], []
    for frames, exit_step in ((1, 0), (3, 2)):
        block = noise_of(frames)
        expected.append(
            denoise_block(Denoiser(model), cache, condition, block, RULES, exit_step=exit_step, with_grad=True).clean
        )
        plain = denoise_block(Denoiser(model), cache, condition, block, RULES, exit_step=exit_step, exits=exits).clean
        assert not plain.requires_grad
        commit_block(Denoiser(model), cache, condition, plain)
    made = Denoiser(model).exits_with_grad(condition, exits)
    torch.testing.assert_close(made, torch.cat(expected, 1))
    weight = model.blocks[0].self_attn.q.weight
    mine, theirs = (torch.autograd.grad(each.square().sum(), weight)[0] for each in (made, torch.cat(expected, 1)))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_graded_call_cannot_commit(scene):
    model, cache, condition = scene
    with pytest.raises(CacheError, match="commit"):
        Denoiser(model)(make_tiny_latents(2), torch.zeros(2), condition, cache, commit=True)
