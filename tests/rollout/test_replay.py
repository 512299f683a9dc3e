"""The packed replay: the same exit steps as the roll-out's, and the gradient of brute force, context included."""

import pytest
import torch
from oracle import run
from tiny_batches import record
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.flow.path import clean_from_velocity
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser
from longtake.rollout.replay import packed_replay, recompute_on_backward
from longtake.rollout.self_forcing import roll_out

SIGMAS, SIZE = (1.0, 0.9, 0.75, 0.5), (4, 6)


def layout_of(rules, frames):
    return rules.teacher_forcing_layout(frames)


def problem(i2v, rope, frames):
    """A tiny model, its condition, and latents as a roll-out would leave them."""
    model = make_tiny_model(i2v=i2v)
    condition = make_tiny_condition(model, num_frames=frames)
    rules = tiny_plan(2, 1 if i2v else 2, 5 if i2v else 6, 1 if i2v else 2, rope, sigmas=SIGMAS)
    sigma = torch.full((2, frames), 0.75)
    sigma[:, : int(i2v)] = 0.0
    clean, noisy = make_tiny_latents(frames, seed=3), make_tiny_latents(frames, seed=4)
    noisy[:, : int(i2v)] = clean[:, : int(i2v)]
    return model, condition, rules, clean, noisy, sigma


@pytest.mark.parametrize(
    ("i2v", "rope", "frames", "context"),
    [
        (True, "relative", 9, "pass"),
        (True, "absolute", 9, "pass"),
        (False, "relative", 10, "pass"),
        (True, "relative", 9, "last_step"),
    ],
)
def test_gradients_are_those_of_brute_force_autograd_through_the_cache(i2v, rope, frames, context, monkeypatch):
    """With eviction, in float64: one packed forward against the oracle, which streams block by block with a graph."""
    model, condition, rules, clean, noisy, sigma = problem(i2v, rope, frames)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what Wan computes in float32, in float64 here
    model.double()
    weight = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight[:, : int(i2v)] = 0
    rules = rules.but(context=context, given_frames=int(i2v))
    stored = torch.tensor(rules.context_levels(frames)).expand(2, -1)
    assert stored.any() == (context == "last_step")
    mine = packed_replay(model, condition, clean, stored, noisy, sigma, layout_of(rules, frames))
    (mine * weight).sum().backward()
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    trace = run(
        state,
        clean,
        stored,
        condition.text,
        condition.image,
        condition.frames,
        num_heads=model.config.num_heads,
        text_len=model.config.text_len,
        blocks=list(rules.blocks(0, frames)),
        window=rules.window_frames,
        sink=rules.sink_frames,
        rope=rope,
        noisy=noisy,
        noisy_sigma=sigma,
        graph=True,
    )
    wanted = clean_from_velocity(noisy.double(), trace.noisy, sigma.double())
    assert (mine - wanted).abs().max() < 1e-10
    (wanted * weight).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad - state[name].grad).norm() <= 1e-10 * (1 + state[name].grad.norm()), name


@pytest.mark.parametrize("law", [{}, {"context": "last_step", "sigmas": SIGMAS[:3]}, {"context_sigma": 0.3}])
def test_the_exit_steps_of_a_roll_out_are_made_again(law, monkeypatch):
    """Also where the context is what the last step saw."""
    model, condition, rules, *_ = problem(True, "relative", 9)
    rules = rules.but(**law)
    calls = record(model, monkeypatch)

    def noise(start, end, step):
        return KeyedRNG(5).noise(0, "noise", [0, 1], (end - start, 4, *SIZE), part=10 * start + step)

    made = roll_out(Denoiser(model), condition, make_tiny_latents(1, seed=7), noise, rules, 9, SIZE, exit_step=2)
    exits = [call["x"] for call in calls if call["sigma"][0] == SIGMAS[2]]
    stored = torch.cat(
        [*(call["x"] for call in calls if call["commit"]), made.latents[:, 7:]], 1
    )  # nobody reads the last
    levels = torch.tensor(rules.with_given(1).context_levels(9)).expand(2, -1)
    noisy = torch.cat([made.latents[:, :1], *exits], 1)
    sigma = torch.full((2, 9), SIGMAS[2])
    sigma[:, 0] = 0
    again = packed_replay(model, condition, stored, levels, noisy, sigma, layout_of(rules, 9))
    torch.testing.assert_close(again, made.latents, rtol=1e-4, atol=1e-5)


def test_the_context_gets_gradient_and_the_latents_none():
    model, condition, rules, clean, noisy, sigma = problem(True, "relative", 9)
    clean.requires_grad_()
    noisy.requires_grad_()
    found = packed_replay(model, condition, clean, torch.zeros_like(sigma), noisy, sigma, layout_of(rules, 9))
    assert torch.autograd.grad(found.sum(), [clean, noisy], allow_unused=True) == (None, None)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_forward_made_before_is_run_in_backward_alone(bf16):
    """Values are those that are given, gradients those of the function, also where nothing needs or gives one."""
    layer, unused = torch.nn.Linear(3, 3), torch.nn.Parameter(torch.ones(2))
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    x, y, runs = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), []

    def run(x, y, none):
        assert none is None
        runs.append(torch.is_autocast_enabled("cpu"))
        return (layer(x).tanh().float() * y * frozen).sum(1)

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected = torch.autograd.grad(run(x, y, None).square().sum(), [x, *layer.parameters()])
        with torch.no_grad():
            made = run(x, y, None)
        runs.clear()
        out = recompute_on_backward(made, run, (x, y, None), [*layer.parameters(), unused, frozen])
        assert torch.equal(out, made) and not runs
        loss = out.square().sum()
    loss.backward()  # outside of autocast, as the loop has it
    assert runs == [bf16] and unused.grad is None and frozen.grad is None and y.grad is None
    for found, wanted in zip((x.grad, layer.weight.grad, layer.bias.grad), expected, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
