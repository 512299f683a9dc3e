"""Norms with what surrounds them: the functions that they are, and the kernels that do the same on a GPU."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model

from longtake.models import layers, norms
from longtake.models.execution import Execution

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_without_a_gpu_they_are_the_functions():
    shift, scale, gate = torch.randn(3, 2, 3, 1, 16).unbind(0)
    x, made, weight, bias = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16), torch.randn(16), torch.randn(16)
    x.requires_grad_()
    one, rest = Execution(fuses=True), (1e-6, torch.bfloat16)
    same, h = norms.kept_and_modulated(x, shift, scale, *rest, one)
    assert same is x and torch.equal(h, layers.modulated(x, shift, scale, *rest))
    pairs = [
        (
            norms.gated_then_normed(x, made, gate, weight, bias, *rest, one),
            layers.gated_then_normed,
            (made, gate, weight, bias),
        ),
        (
            norms.added_then_modulated(x, made, shift, scale, *rest, one),
            layers.added_then_modulated,
            (made, shift, scale),
        ),
    ]
    for found, function, given in pairs:
        assert all(torch.equal(a, b) for a, b in zip(found, function(x, *given, *rest), strict=True))
    assert torch.equal(norms.rms_norm(x, weight, 1e-6, one), layers.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize(
    ("wrong", "ms", "used"), [(1e-3, (2.0, 1.0), True), (1e-3, (1.0, 2.0), False), (float("nan"), (2.0, 1.0), False)]
)
def test_kernels_are_used_where_they_are_right_and_faster(wrong, ms, used, monkeypatch, caplog):
    times = iter(ms)
    monkeypatch.setattr(norms, "has_triton", lambda: True)
    monkeypatch.setattr(norms, "off", lambda *_: [1e-4, wrong])
    monkeypatch.setattr(norms, "milliseconds", lambda *_: next(times))
    monkeypatch.setattr(torch, "randn", lambda *shape, device, randn=torch.randn: randn(*shape[:2], 2, shape[3]))
    assert norms.are_faster.__wrapped__(torch.device("cuda", 0), torch.bfloat16, 64) == used
    assert ("is off by" in caplog.text) == (wrong != 1e-3)
    assert not norms.are_faster.__wrapped__(torch.device("cpu"), torch.bfloat16, 64)
    assert not norms.are_faster.__wrapped__(torch.device("cuda", 0), torch.bfloat16, 2**14)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_kernel_is_also_tried_where_backward_makes_it_again(wrong):
    def kernel(x, weight):
        again = torch._C._current_graph_task_id() != -1
        return ((x * (1 + wrong * again)).exp() * weight,)

    given = [torch.randn(3, 5), torch.randn(5)]
    found = norms._differences(kernel, lambda x, weight: (x.exp() * weight,), given)
    assert (max(found) > 0.5) == bool(wrong) and max(found[:3]) < 1e-6


class TestCuda:
    pytestmark = cuda

    def test_the_kernels_are_what_they_say(self):
        device = torch.device("cuda", 0)
        assert max(norms.off(device, torch.float32)) < 1e-4 and max(norms.off(device, torch.bfloat16)) < 6e-3

    def test_a_network_trains_with_them(self, rel, monkeypatch):
        """Of a width that is no power of two, beside plain functions in float32."""
        sizes = {"dim": 192, "ffn_dim": 264, "num_heads": 2, "num_layers": 2, "freq_dim": 64}
        found, used = [], []
        inner = norms._Normed.apply
        monkeypatch.setattr(norms._Normed, "apply", lambda *given: used.append(1) or inner(*given))
        for one in (Execution(), Execution(fuses=True, by_rows=True)):
            model = make_tiny_model(True, **sizes).cuda().executed(one)
            condition, sigma = make_tiny_condition(model).to("cuda"), torch.tensor([0.9, 0.3], device="cuda")
            model(make_tiny_latents(7).cuda(), sigma, condition).square().mean().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert rel(found[1], found[0]) < 1e-3 and len(used) == 2 * 6
