"""How a network is computed: fused element-wise work is the same mathematics."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.models import attention, execution
from longtake.models.execution import Execution
from longtake.models.recompute import ByBlock
from longtake.rollout.denoise import Denoiser
from longtake.rollout.self_forcing import roll_out

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


@pytest.mark.whole
@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_fused_work_equals_plain_work(dtype, tolerance, rope, traced, rel):
    model = make_tiny_model(True).cast(dtype)
    plain = last_of_a_stream(model, rope, Execution())
    assert not traced
    assert rel(last_of_a_stream(model, rope, Execution(fuses=True)), plain) < tolerance
    assert len(set(traced)) == len(traced) == 8  # each once, for all layers


@pytest.mark.whole
@pytest.mark.parametrize("again", [False, True, "selective", "products"])
@pytest.mark.parametrize("bf16", [False, True])
def test_fused_work_has_the_gradients_of_plain_work(again, bf16, traced, rel):
    """Of all weights, also where a backward computes blocks again, wholly or without attention."""
    found = []
    for fuses in (False, True):
        model = make_tiny_model(True)
        model = model.executed(Execution(recompute=again, fuses=fuses))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            sigma = torch.tensor([0.9, 0.3])
            loss = model(make_tiny_latents(5), sigma, make_tiny_condition(model)).square().mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert len(set(traced)) == len(traced) == 6
    assert rel(found[1], found[0]) < (2e-2 if bf16 else 1e-6)


def test_what_enters_products_is_rounded_once_where_work_is_fused():
    weight, half = torch.zeros(2), torch.zeros(2, dtype=torch.float16)
    fused, plain = Execution(fuses=True), Execution()
    assert fused.entering(weight) == plain.entering(weight) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.entering(weight) == torch.bfloat16 and plain.entering(weight) == torch.float32
        assert fused.entering(half) == torch.float16


@pytest.mark.whole
def test_joined_exit_steps_are_fused(traced, rel):
    """What a roll-out left is computed again in backward, where gradients flow, by the same compiled functions."""
    plan, found = tiny_plan(2, 1, 5, 1), []

    def noise(start, end, step):
        return torch.randn(2, end - start, 4, 4, 6, generator=torch.Generator().manual_seed(100 * start + step))

    for fuses in (False, True):
        model = make_tiny_model(True)
        model = model.executed(Execution(recompute=True, fuses=fuses))
        student, condition = Denoiser(model, batched_exit_backward=True), make_tiny_condition(model)
        made = roll_out(student, condition, noise(0, 1, 9), noise, plan, 7, (4, 6), with_grad=True)
        made.latents.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert rel(found[1], found[0]) < 1e-6 and "beside" in traced


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

    @pytest.mark.parametrize("ways", [[True] * 4, [False, "products", True, "selective"], [False] * 4])
    def test_training_as_on_a_gpu_has_the_gradients_of_plain_training(self, ways, rel):
        """Fastest attention, fused work, and blocks that keep as much as they are told, beside none of that."""
        sizes = {"num_layers": 4, "dim": 256, "ffn_dim": 512, "num_heads": 2, "freq_dim": 64}
        attention.choose_kernels(torch.device("cuda", 0), torch.bfloat16, 128)
        quick = Execution(recompute=ByBlock(ways), attend=attention.attend_fastest, fuses=True)
        found = []
        for one in (Execution(), quick):
            model = make_tiny_model(True, **sizes).cuda().executed(one)
            condition, sigma = make_tiny_condition(model).to("cuda"), torch.tensor([0.9, 0.3], device="cuda")
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = model(make_tiny_latents(9).cuda(), sigma, condition).square().mean()
            loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert rel(found[1], found[0]) < 3e-2
