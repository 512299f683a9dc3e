"""Passes by weights that are rounded beforehand are those that autocast would make, update after update."""

from __future__ import annotations

import pytest
import torch
from tape import Tape
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan
from torch.optim.adamw import adamw

from longtake.config.groups import OptimConfig
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser, commit_block
from longtake.rollout.rounded import Rounded
from longtake.rollout.self_forcing import roll_out
from longtake.train import optim
from longtake.train.optim import NetworkOptimizer

FUSED = {"fused": True, "foreach": False}
RULES = tiny_plan(2, 1, 5, 1, sigmas=(1.0, 0.5))


def noise(start, end, step):
    return torch.randn(2, end - start, 4, 4, 6, generator=torch.Generator().manual_seed(100 * start + step))


def test_roll_outs_and_their_gradients_are_equal_bit_for_bit():
    found = []
    for rounds in (False, True):
        model = make_tiny_model(i2v=True)
        rounded = Rounded(model, torch.bfloat16) if rounds else None
        student = Denoiser(model, graphs=CUDAGraphRunner(Tape()), rounded=rounded, batched_exit_backward=True)
        optimizer, condition = NetworkOptimizer(model, OptimConfig(lr=1e-2), 9), make_tiny_condition(model)
        found.append([])
        for step in range(4):  # until passes are replayed
            with torch.autocast("cpu", torch.bfloat16):
                made = roll_out(student, condition, make_tiny_latents(1), noise, RULES, 7, (4, 6), with_grad=True)
            made.latents.square().mean().backward()
            optimizer.step(step, optimizer.gradient_norm().item())
            optimizer.zero_grad()
            found[-1].append(made.latents.detach())
    plain, rounded_ones = found
    assert all(torch.equal(a, b) for a, b in zip(plain, rounded_ones, strict=True))
    assert not torch.equal(plain[0], plain[-1])


@pytest.mark.parametrize("fused", [False, True])
def test_changed_weights_are_seen_by_running_caches(fused, monkeypatch):
    """Of videos that go on, whose caches nobody lends anew; fused kernels do not show that they changed weights."""
    if fused:
        monkeypatch.setattr(optim, "adamw", lambda *args, **given: adamw(*args, **{**given, **FUSED}))
    model = make_tiny_model(i2v=True)
    rounded = Rounded(model, torch.bfloat16)
    student, condition = Denoiser(model, rounded=rounded), make_tiny_condition(model)
    cache = model.new_cache(RULES, 2, (4, 6))
    commit_block(student, cache, condition, make_tiny_latents(1))
    before = [p.clone() for p in rounded.current().parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = NetworkOptimizer(model, OptimConfig(lr=0.1), 9)
    optimizer.step(0, optimizer.gradient_norm().item())
    after = list(rounded.current().parameters())
    assert all(torch.equal(a, p.to(a.dtype)) for a, p in zip(after, model.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(after, before))
