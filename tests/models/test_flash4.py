"""FlashAttention-4 as an operator: what calls the package sees, what it keeps, and what it refuses. The package needs a
GPU; here its two functions are the mathematics.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from longtake.models import attention, flash4
from longtake.models.attention import attend
from longtake.models.execution import Execution
from longtake.models.recompute import keep_attention, keep_products
from longtake.train.keeping import keeps_some


class Package(ModuleType):
    """`flash_attn.cute.interface`, as far as it is called."""

    def __init__(self, wrong: float = 1.0, error: Exception | None = None) -> None:
        super().__init__("flash_attn.cute.interface")
        self.calls: list[str] = []
        self.shapes: list[tuple[int, ...]] = []  # of videos and queries, backward
        self.wrong, self.error = wrong, error

    def _flash_attn_fwd(self, q, k, v, *, return_lse, **lengths):
        if lengths:
            made = [self._flash_attn_fwd(*part, return_lse=return_lse) for part in parts_of((q, k, v), **lengths)]
            return torch.cat([out[0] for out, *_ in made]), torch.cat([sums[0] for _, sums, *_ in made], 1), *[None] * 3
        self.calls.append("forward")
        assert return_lse and not torch.is_grad_enabled() or not q.requires_grad
        if self.error is not None:
            raise self.error
        scores = torch.einsum("blnk,bsnk->bnls", q, k).float() / q.shape[-1] ** 0.5
        out = torch.einsum("bnls,bsnk->blnk", scores.softmax(-1).to(v.dtype), v).contiguous()
        return out, scores.logsumexp(-1), None, None, None

    def _flash_attn_bwd(self, q, k, v, out, grad, log_sum, **lengths):
        if lengths:
            parts = parts_of((q, k, v, out, grad, log_sum.T), **lengths)
            made = [self._flash_attn_bwd(*five, sums.transpose(1, 2)) for *five, sums in parts]
            return tuple(torch.cat([part[0] for part in parts]) for parts in zip(*made))
        self.calls.append("backward")
        self.shapes.append(tuple(q.shape[:2]))
        scores = torch.einsum("blnk,bsnk->bnls", q, k).float() / q.shape[-1] ** 0.5
        share = (scores - log_sum[..., None]).exp()
        inner = torch.einsum("blnk,bsnk->bnls", grad, v).float()
        change = share * (inner - (grad * out).sum(-1).transpose(1, 2)[..., None].float()) / q.shape[-1] ** 0.5
        change, share = change.to(q.dtype), share.to(q.dtype)
        dq, dk = torch.einsum("bnls,bsnk->blnk", change, k), torch.einsum("bnls,blnk->bsnk", change, q)
        return self.wrong * dq, dk, torch.einsum("bnls,blnk->bsnk", share, grad)


def parts_of(tensors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """The sequences of tensors of several lengths, each as a batch of one; of keys and values are the second and third."""
    both = [ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k)]
    assert [max(lengths) for lengths in both] == [max_seqlen_q, max_seqlen_k]
    assert all(ends.dtype == torch.int32 and ends.is_contiguous() for ends in (cu_seqlens_q, cu_seqlens_k))
    return zip(*(each[None].split(both[index in (1, 2)], 1) for index, each in enumerate(tensors)))


@pytest.fixture()
def package(monkeypatch):
    def install(**options) -> Package:
        found = Package(**options)
        for name in ("flash_attn", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", found)
        return found

    return install


def problem(requires_grad: bool = True):
    generator = torch.Generator().manual_seed(0)
    sizes = (12, 20, 20)
    return [torch.randn(2, n, 3, 16, generator=generator).requires_grad_(requires_grad) for n in sizes]


def test_the_operator_has_the_gradients_of_attention(package, rel):
    found, results = package(), []
    kernel = attention._flash4_with_gradient()
    assert kernel is not None
    for run in (attend, kernel.run):
        q, k, v = problem()
        out = run(q, k, v)
        out.square().sum().backward()
        results.append((out.detach(), q.grad, k.grad, v.grad))
    assert found.calls == ["forward", "backward"]
    assert all(rel(own, truth) < 1e-5 for truth, own in zip(*results))
    torch.library.opcheck(torch.ops.longtake.flash4.default, problem(False))


def test_few_keys_have_their_gradient_from_many_cores(package, monkeypatch, rel):
    """As many pieces of equal length as give each core several, of 21 and 42 latents and of a clip's 21."""
    for queries, blocks, count in ((65520, 48, 21), (65520, 36, 30), (127920, 48, 20), (32760, 48, 21), (6240, 48, 6)):
        assert flash4.pieces(queries, blocks, 132) == count and queries % count == 0
    assert [flash4.pieces(*each, 132) for each in ((6240, 1908), (1560, 156), (6240, 588), (4099, 12))] == [1] * 4
    found, results = package(), []
    monkeypatch.setattr(flash4, "_LEAST", 3)
    for count in (1, 100):
        monkeypatch.setattr(flash4, "cores", lambda _, count=count: count)
        q, k, v = problem()
        flash4.flash4(q, k, v).square().sum().backward()
        results.append((q.grad, k.grad, v.grad))
    assert found.shapes == [(2, 12), (2 * 4, 3)]
    assert all(rel(own, truth) < 1e-5 for truth, own in zip(*results))


@pytest.mark.parametrize("options", [{}, {"wrong": 1.1}, {"error": KeyError("sm_50")}, {"error": RuntimeError("no")}])
def test_it_is_used_only_where_result_and_gradients_are_right(options, package):
    package(**options)
    kernel = attention._flash4_with_gradient()
    assert kernel is not None
    place = torch.device("cpu"), torch.float32, 16
    assert attention._is_right(kernel, *place, gradients=True) == (not options)
    assert attention._is_right(kernel, *place) == ("error" not in options)


def test_its_result_is_kept_by_selective_recomputation(package, rel):
    found, results = package(), []
    kernel = attention._flash4_with_gradient()
    assert kernel is not None

    def work(q, k, v):
        return kernel.run(q.sin(), k.cos(), v * 2).tanh()

    for context in (None, keep_attention, keep_products):
        inputs = problem()
        found.calls.clear()
        out = work(*inputs)
        if context is not None:
            found.calls.clear()
            out = torch.utils.checkpoint.checkpoint(work, *inputs, use_reentrant=False, context_fn=context)
        out.square().sum().backward()
        results.append([x.grad for x in inputs])
        assert found.calls == ["forward", "backward"]
    assert all(rel(one, truth) < 1e-6 for truth, *others in zip(*results) for one in others)
    assert keeps_some(Execution(attend=lambda q, k, v: kernel.run(q, k, v)), torch.device("cpu"), torch.float32, 16)
