"""The MLP as one operator: the results and gradients of its layers, what it keeps, and what is not asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.models import gelu
from longtake.models.execution import Execution
from longtake.models.gelu import FirstLayerAgain, mlp_with_gradient
from longtake.models.layers import MLP
from longtake.models.recompute import keep_attention, keep_narrow_products, keep_products

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[MLP, Tensor]:
    torch.manual_seed(0)
    return MLP(24, 72).to(device), (2 * torch.randn(50, 24)).to(device, dtype).requires_grad_()


def weights(layers: MLP) -> list[Any]:
    return [layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias]


def gradients(out: Tensor, given: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), [t for t in given if t.requires_grad]))


def test_the_wide_result_is_let_go_and_made_again_where_narrow_products_are_kept(rel):
    layers, x = problem()
    truth = gradients(layers(x, Execution()), [x, *weights(layers)])
    held: list[int] = []

    def pack(kept: Tensor) -> Tensor:
        held.append(kept.numel())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept), FirstLayerAgain():
        made = mlp_with_gradient(x, *weights(layers))
    assert 50 * 72 not in held and 50 * 24 in held
    assert all(rel(own, one) < 1e-5 for own, one in zip(gradients(made, [x, *weights(layers)]), truth, strict=True))


@pytest.mark.parametrize("frozen", [(), (0,), (1, 3), (2,), (0, 1, 2, 3)])
def test_results_and_gradients_are_those_of_the_layers(frozen, rel):
    layers, x = problem()
    given = weights(layers)
    for number in frozen:
        given[number].requires_grad_(False)
    truth, made = layers(x, Execution()), mlp_with_gradient(x, *given)
    assert rel(made, truth) < 1e-6
    for own, wanted in zip(gradients(made, [x, *given]), gradients(truth, [x, *given]), strict=True):
        assert rel(own, wanted) < 1e-5


def test_what_needs_no_gradient_is_not_computed():
    layers, x = problem()
    made = mlp_with_gradient(x.detach(), *weights(layers))
    assert all(g is not None for g in gradients(made, weights(layers)))
    for again in (False, True):
        given = x.detach(), *(w.detach() for w in weights(layers)), again
        torch.library.opcheck(torch.ops.longtake.mlp.default, given)


def test_where_products_are_kept_nothing_of_it_runs_again(monkeypatch, rel):
    layers, x = problem()
    calls: list[tuple[int, ...]] = []
    inner = gelu._gelu
    monkeypatch.setattr(gelu, "_gelu", lambda hidden: calls.append(tuple(hidden.shape)) or inner(hidden))

    def work(x: Tensor) -> Tensor:
        return mlp_with_gradient(x.sin(), *weights(layers)).cos()

    truth, wanted = gradients(work(x), [x, *weights(layers)]), {None: 1, keep_attention: 2}
    wanted |= {keep_narrow_products: 1, keep_products: 1}
    for context, count in wanted.items():
        calls.clear()
        options = {} if context is None else {"context_fn": context}
        made = torch.utils.checkpoint.checkpoint(work, x, use_reentrant=False, **options) if context else work(x)
        found = gradients(made, [x, *weights(layers)])
        assert len(calls) == count
        assert all(rel(own, one) < 1e-6 for own, one in zip(found, truth, strict=True))


class TestCuda:
    pytestmark = cuda

    def test_the_kernels_are_right_and_used(self, rel):
        device = torch.device("cuda", 0)
        assert gelu.is_right(device)
        layers, x = problem("cuda")
        found = []
        for one in (Execution(), Execution(fuses=True)):
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                made = layers(x.bfloat16(), one)
            found.append([made, *gradients(made.float(), [x, *weights(layers)])])
        assert all(rel(own, wanted) < 2e-2 for wanted, own in zip(*found, strict=True))

    def test_all_sizes(self, rel):
        for rows, width in ((1, 8), (513, 8960), (1030, 264)):
            x, grad = (torch.randn(rows, width, device="cuda").bfloat16() for _ in range(2))
            truth = torch.ops.aten.gelu_backward(grad.double(), x.double(), approximate="tanh")
            made, change, total = gelu.gelu_backward(x, grad.clone())
            assert rel(made.double(), torch.nn.functional.gelu(x.double(), approximate="tanh")) < 4e-3
            assert rel(change.double(), truth) < 4e-3 and rel(total.double(), change.double().sum(0)) < 1e-5
