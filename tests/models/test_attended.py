"""What self-attention of a block that streams reads, made in one pass over memory: norms, rotation, the window."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.models import context
from longtake.models.cache import beside
from longtake.models.execution import Execution
from longtake.models.layers import rms_norm, rotated
from longtake.rollout.denoise import Denoiser
from longtake.rollout.stream import LatentStream

CPU = torch.device("cpu")


def defined(q, k, v, weights, eps, turns, stored, slots, write_slots, *, relative):
    """What the kernel computes, one operation after the other."""
    (keys, values), own = stored, q.shape[1] // stored[0].shape[2]
    heads = keys.shape[3:]
    q, k = (rms_norm(t, weight, eps).unflatten(-1, heads) for t, weight in zip((q, k), weights))
    q, k, v = rotated(q, turns[0]), k if relative else rotated(k, turns[1]), v.unflatten(-1, heads)
    blocks = ((slots.numel(), own),)
    seen = beside(keys, slots, k, blocks, turns[1] if relative else None), beside(values, slots, v, blocks)
    if write_slots is not None:
        for kept, fresh in zip(stored, (k, v)):
            kept.index_copy_(1, write_slots, fresh.unflatten(1, (own, -1)))
    return q, *seen


def spoilt(part):
    """The same with one thing wrong."""

    def kernel(q, k, v, weights, eps, turns, stored, slots, write_slots, *, relative):
        if part == "slots":
            slots = slots.flip(0)
        if part == "places of the block":
            write_slots = write_slots.flip(0)
        if part == "nothing stored":
            write_slots = None
        if part == "norm":
            weights = weights[::-1]
        if part == "turn":
            turns = (turns[0].flip(-1), turns[1])
        if part == "not finite":
            v = v / 0
        return defined(q, k, v, weights, eps, turns, stored, slots, write_slots, relative=relative)

    return kernel


def chosen(kernel, monkeypatch):
    """What is used where the kernel is this one."""
    monkeypatch.setitem(sys.modules, "longtake.models.attended_triton", SimpleNamespace(attended=kernel))
    context.attended_at_once.cache_clear()
    return context.attended_at_once(CPU, torch.float32)


@pytest.fixture(autouse=True)
def forgotten():
    yield
    context.attended_at_once.cache_clear()


def test_a_right_kernel_is_used_and_a_wrong_one_is_not(monkeypatch, caplog):
    assert chosen(defined, monkeypatch) is defined
    for part in ("slots", "places of the block", "nothing stored", "norm", "turn", "not finite"):
        with caplog.at_level(logging.WARNING):
            assert chosen(spoilt(part), monkeypatch) is None, part
        assert "is not used" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_a_stream_is_the_same_in_one_pass(rope, monkeypatch):
    """Bit for bit, from an empty cache to a window that has been evicted from, with passes that store and others."""
    plan, model = (
        tiny_plan(2, 1, 5, 1, rope, context="last_step", context_from=1, sigmas=(1.0, 0.6)),
        make_tiny_model(True),
    )
    calls = []

    def noise(start, end, step):
        return torch.randn(2, end - start, 4, 4, 6, generator=torch.Generator().manual_seed(100 * start + step))

    def at_once(self, layer, projected, norms, heads):
        calls.append((self.view.num_past, self.view.commit))
        return self.by_kernel(defined, layer, projected, norms)

    found = []
    for kernel in (False, True):
        if kernel:
            monkeypatch.setattr(context.CachedContext, "attended", at_once)
        cache, condition = model.new_cache(plan, 2, (4, 6)), make_tiny_condition(model)
        stream = LatentStream(Denoiser(model), cache, condition, make_tiny_latents(1), noise, plan)
        made = [stream.next() for _ in range(5)]
        found.append(torch.cat([t.flatten() for t in (*made, cache.keys, cache.values)]))
    assert torch.equal(*found)
    assert {(0, True), (3, False), (3, True)} <= set(calls)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    @pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
    def test_the_kernel_is_right(self, dtype, most):
        from longtake.models.attended_triton import attended

        for rope in ("relative", "absolute"):
            assert context._difference(attended, rope, torch.device("cuda", 0), dtype) < most

    @pytest.mark.parametrize("rope", ["relative", "absolute"])
    def test_a_stream_by_the_kernel(self, rope, rel):
        plan, model = (
            tiny_plan(2, 1, 5, 1, rope, context="last_step", context_from=1, sigmas=(1.0, 0.6)),
            make_tiny_model(True).cuda(),
        )

        def noise(start, end, step):
            generator = torch.Generator().manual_seed(100 * start + step)
            return torch.randn(2, end - start, 4, 4, 6, generator=generator).cuda()

        found = []
        for fuses in (False, True):
            denoiser = Denoiser(model.executed(Execution(fuses=fuses)))
            cache, condition = model.new_cache(plan, 2, (4, 6)), make_tiny_condition(model).to("cuda")
            stream = LatentStream(denoiser, cache, condition, make_tiny_latents(1).cuda(), noise, plan)
            made = [stream.next() for _ in range(5)]
            found.append(torch.cat([t.flatten() for t in (*made, cache.keys, cache.values)]))
        assert context.attended_at_once(torch.device("cuda", 0), torch.float32) is not None
        assert rel(found[1], found[0]) < 1e-4
