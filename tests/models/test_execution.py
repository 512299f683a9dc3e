"""How a network is computed: fused element-wise work is the same mathematics."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.models import execution
from longtake.models.execution import Execution
from longtake.rollout.denoise import Denoiser

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def last_of_a_stream(model, rope, execution, device="cpu"):
    """The velocity of a noisy pass at a full window that has been evicted from."""
    plan = tiny_plan(2, 1, 5, 1, rope)
    condition, cache = make_tiny_condition(model).to(device), model.new_cache(plan, 2, (4, 6))
    with torch.no_grad():
        for number, frames in enumerate((1, 2, 2, 2)):
            x = make_tiny_latents(frames, seed=number).to(device)
            Denoiser(model)(x, torch.zeros(2, device=device), condition, cache, commit=True)
        x, sigma = make_tiny_latents(2, seed=9).to(device), torch.full((2,), 0.7, device=device)
        return Denoiser(model.executed(execution))(x, sigma, condition, cache)


@pytest.fixture()
def traced(monkeypatch):
    """The functions that are compiled; here into what torch traced of them, which must be all, in one graph."""
    compile, names = torch.compile, []

    def traces(function, **given):
        names.append(function.__name__)
        return compile(function, backend="aot_eager", **given)

    monkeypatch.setattr(torch, "compile", traces)
    monkeypatch.setattr(execution, "has_triton", lambda: True)
    execution._compiled.cache_clear()
    torch._dynamo.reset()
    yield names
    execution._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_fused_work_equals_plain_work(dtype, tolerance, rope, traced, rel):
    model = make_tiny_model(True).cast(dtype)
    plain = last_of_a_stream(model, rope, Execution())
    assert not traced
    assert rel(last_of_a_stream(model, rope, Execution(fuses=True)), plain) < tolerance
    assert len(set(traced)) == len(traced) == 7  # each once, for all layers


def test_without_a_compiler_nothing_is_fused(monkeypatch, rel):
    monkeypatch.setattr(execution, "has_triton", lambda: False)
    monkeypatch.setattr(torch, "compile", None)
    model = make_tiny_model(True)
    plain = last_of_a_stream(model, "relative", Execution())
    assert torch.equal(last_of_a_stream(model, "relative", Execution(fuses=True)), plain)


class TestCuda:
    pytestmark = cuda

    @pytest.mark.parametrize(
        "rope, dtype, tolerance", [("absolute", torch.float32, 1e-4), ("relative", torch.bfloat16, 2e-2)]
    )
    def test_fused_work_equals_plain_work(self, rope, dtype, tolerance, rel):
        model = make_tiny_model(True).cuda().cast(dtype)
        plain = last_of_a_stream(model, rope, Execution(), "cuda")
        assert rel(last_of_a_stream(model, rope, Execution(fuses=True), "cuda"), plain) < tolerance
