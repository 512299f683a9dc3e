"""Roll-outs whose context has gradient, by brute force: what their calls had is streamed by the oracle in float64.

It keeps the graph of what it remembers: a context pass of each block's detached latents with gradient, then later exit
steps through it.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from oracle import run
from tiny_models import relative_error

from longtake.flow.path import clean_from_velocity
from longtake.models.cache import CacheView
from longtake.rng import KeyedRNG
from longtake.rollout import replay

SIZE, HORIZON = (4, 2), 5


@pytest.fixture(autouse=True)
def _layouts():
    """Masks of one test are none of another's, which may compute in another type."""
    replay._layout.cache_clear()


@pytest.fixture
def double(monkeypatch):
    """What Wan computes in float32, in float64 here."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def noise(start, end, step):
    return KeyedRNG(5).noise(0, "noise", [0], (end - start, 4, *SIZE), part=10 * start + step)


def calls_of(model, monkeypatch):
    """Calls against a cache from now on, by the frame where they were made: (latents, level, stored)."""
    found, forward = {}, model.forward

    def spy(x, sigma, condition, context=None):
        if isinstance(context, CacheView):
            found.setdefault(context.cache.position, []).append((x, sigma, context.commit))
        return forward(x, sigma, condition, context)

    monkeypatch.setattr(model, "forward", spy)
    return found


def exit_steps(sizes, state, condition, plan, calls, blocks, exit_step, *, detached=0, exits_from=0, reader=None):
    """Clean latents of the exit steps of what `calls` had, with a graph into `state` (and `reader`, the weights of what
    denoises, where those that store are others).
    """
    end = blocks[-1][1]
    x, noisy = torch.zeros(2, 1, end, 4, *SIZE, dtype=torch.float64)
    levels, exit_levels = torch.zeros(2, 1, end)
    for start, stop in blocks:
        made = calls.get(start, [])
        for latents, sigma, commit in made:
            if commit:  # the last one counts: a cache may be made again
                x[:, start:stop], levels[:, start:stop] = latents, sigma[:, None]
        if start >= exits_from:
            noisy[:, start:stop], sigma, _ = made[min(exit_step, len(plan.levels(start)) - 1)]
            exit_levels[:, start:stop] = sigma[:, None]
    trace = run(
        *(state, x, levels, condition.text, condition.image, condition.frames),
        num_heads=sizes.num_heads,
        text_len=sizes.text_len,
        blocks=blocks,
        window=plan.window_frames,
        sink=plan.sink_frames if plan.window_frames else 0,
        rope=plan.rope,
        noisy=noisy,
        noisy_sigma=exit_levels,
        graph=True,
        detached=detached,
        noisy_state=reader,
    )
    learnt = sum(stop - start for start, stop in blocks if start >= exits_from)
    at = slice(end - learnt, end)
    return clean_from_velocity(noisy[:, at], trace.noisy[:, -learnt:], exit_levels[:, at].double())


def compare(parameters: Mapping[str, torch.Tensor], made, wanted, state, tolerance=1e-10):
    """Outputs, and the gradient of every parameter for one random sum of them."""
    assert relative_error(made.detach(), wanted.detach()) < tolerance
    weight = torch.randn(made.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for p in parameters.values():
        p.grad = None
    (made * weight).sum().backward()
    (wanted * weight).sum().backward()
    for name, p in parameters.items():
        expected = torch.zeros_like(p) if state[name].grad is None else state[name].grad
        assert (p.grad - expected).norm() <= tolerance * (1 + expected.norm()), name
