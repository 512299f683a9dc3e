"""Compiled blocks compute what uncompiled ones do, and are left out by name where there is no compiler."""

import logging

import pytest
import torch

from longtake.parallel import fsdp as module
from longtake.parallel.mesh import Mesh
from longtake.parallel.fsdp import parallelize
from longtake.errors import ConfigError
from longtake.plan import StreamPlan
from longtake.rollout.denoise import Denoiser
from longtake.rollout.self_forcing import roll_out
from tiny_plan import causal_layout, tiny_plan


def test_without_a_compiler_blocks_run_uncompiled(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    module._has_compiler.cache_clear()
    with caplog.at_level(logging.WARNING):
        models = [parallelize(tiny_model(), Mesh(), compiled=True) for _ in range(2)]
    module._has_compiler.cache_clear()
    said = [record.message for record in caplog.records if "parallel.compile" in record.message]
    assert said == ["parallel.compile=true needs a C++ compiler, which is not there: blocks run uncompiled"]
    assert all(block._compiled_call_impl is None for model in models for block in model.blocks)


def test_a_variant_of_a_block_too_many_is_an_error_and_not_run_uncompiled(
    tiny_model, tiny_condition, tiny_latents, monkeypatch
):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **given: compile(function, backend="eager", **given))
    monkeypatch.setattr(module, "_has_compiler", lambda kind: True)
    monkeypatch.setattr(module, "VARIANTS", 1)
    torch._dynamo.reset()
    try:
        model = parallelize(tiny_model(num_layers=1), Mesh(), compiled=True)
        given = (tiny_latents(3), torch.zeros(2), tiny_condition(model))
        with torch.no_grad():
            for _ in range(2):
                model(*given)
        with pytest.raises(ConfigError, match="blocks of 1 different kinds and sizes are compiled"):
            model(*given)  # with gradient
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(not module._has_compiler("cpu"), reason="needs a C++ compiler")
def test_compiled_blocks_equal_uncompiled_ones(tiny_model, tiny_condition, tiny_latents):
    """Bidirectional, masked and cached calls with recomputation: outputs and gradients, to 1e-5."""
    rules = tiny_plan(2, 1, 5, 1, sigmas=(1.0, 0.5))

    def noise(start, end, step):
        return torch.randn(2, end - start, 4, 4, 6, generator=torch.Generator().manual_seed(100 * start + step))

    def results(compiled):
        model = parallelize(tiny_model(True), Mesh(), recompute=True, compiled=compiled)
        x, sigma, condition = tiny_latents(5), torch.tensor([0.9, 0.3]), tiny_condition(model)
        layout = causal_layout(tiny_plan(2, 1, 5, 1), 5)
        found = []
        for call in (
            lambda: model(x, sigma, condition),
            lambda: model(x, sigma, condition, layout),
            lambda: (
                roll_out(Denoiser(model), condition, noise(0, 1, 9), noise, rules, 3, (4, 6), with_grad=True).latents
            ),
        ):
            model.zero_grad()
            out = call()
            out.square().mean().backward()
            found += [out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])]
        return found

    for mine, theirs in zip(results(True), results(False), strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.slow
@pytest.mark.skipif(not module._has_compiler("cpu"), reason="needs a C++ compiler")
def test_compiled_blocks_whose_exit_steps_are_joined(tiny_model, tiny_condition):
    """Backward runs the compiled blocks, of two blocks of a video at once."""
    torch._dynamo.reset()
    rules = tiny_plan(2, 1, 5, 1, sigmas=(1.0, 0.5))

    def noise(start, end, step):
        return torch.randn(2, end - start, 4, 4, 6, generator=torch.Generator().manual_seed(100 * start + step))

    found = []
    for compiled in (True, False):
        model = parallelize(tiny_model(True), Mesh(), recompute=True, compiled=compiled)
        student = Denoiser(model, batched_exit_backward=compiled)
        condition = tiny_condition(model)
        out = roll_out(student, condition, noise(0, 1, 9), noise, rules, 5, (4, 6), with_grad=True).latents
        out.square().mean().backward()
        found.append([out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()
