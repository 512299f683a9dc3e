"""Masks whose parts have keys of their own: the same numbers and gradients, by one call and by one pass over memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_attention import LAYOUTS
from test_flash4 import package as package
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.models import apart as apart_module
from longtake.models import attention
from longtake.models.apart import Places, _flash4, _together, apart, joins, plainly, puts_rightly
from longtake.models.attention import attend, attend_fastest, make_mask
from longtake.models.cache import KVCache
from longtake.models.context import MaskOverCache, PreparedMask
from longtake.models.execution import Execution
from longtake.models.layers import rope_turn
from longtake.models.recompute import ByBlock, keep_attention, keep_products

CPU = torch.device("cpu")
cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_network_is_the_same(name, monkeypatch, rel):
    """As prepared for a GPU, where keys go to each part of the mask, and as one part after the other reads them."""
    layout = LAYOUTS[name]
    model = make_tiny_model(True)
    condition = make_tiny_condition(model, num_frames=7)
    x = make_tiny_latents(layout.num_entries)
    sigma = torch.linspace(0.1, 0.9, layout.num_entries).expand(2, -1)
    found = []
    for joined in (None, lambda mask: mask):
        prepared = PreparedMask.of(layout, model.tokens_per_frame(4, 6), CPU, joins=joined)
        assert (prepared.places is None) == (joined is None)
        made = model(x, sigma, condition, prepared)
        model.zero_grad()
        made.square().mean().backward()
        found.append(torch.cat([made.flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]))
    assert rel(found[1], found[0]) < 1e-6


@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_frames_of_a_cache_stay_as_they_were_stored(rope, monkeypatch, rel):
    """Those of a cache with absolute positions are rotated already, wherever they go."""
    plan = tiny_plan(2, 1, 5, 1, rope)
    model = make_tiny_model(True)
    condition, size = make_tiny_condition(model, num_frames=9), (4, 6)
    cache: KVCache = model.new_cache(plan, 2, size, 9)
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)))
    layout = plan.replay_layout(5, 5, 9)
    over = MaskOverCache(layout, cache, torch.arange(len(plan.past(5))))
    x, sigma = make_tiny_latents(layout.num_entries), torch.full((2, layout.num_entries), 0.5)
    found = []
    for joined in (None, lambda mask: mask):
        monkeypatch.setattr(Execution, "flex", lambda *_: False)
        with torch.no_grad():
            found.append(
                model.executed(Execution(joins=joined))(x, sigma, condition, replace(over, layout=replace(layout)))
            )
    assert rel(found[1], found[0]) < 1e-6


def test_places_know_where_each_entry_went():
    places = Places.of(torch.tensor([0, 1, 3, 1, 2, 0, 0]), 2, 5)
    went = [places.order[a:b].tolist() for a, b in zip(places.first, places.first[1:])]
    assert went == [[0, 5, 6], [1, 3], [4], [2], []]
    x, turn = torch.randn(2, 10, 3, 4), rope_turn(torch.tensor([0, 1, 3, 7, 2, 9, 5]), 1, 2, 4)
    frames = x.unflatten(1, (5, 2))
    assert torch.equal(places.put(x), torch.cat([frames[:, e] for e in (0, 1, 3, 1, 2, 0, 0)], 1))
    assert torch.equal(places.put(x, turn)[:, :2], places.put(x)[:, :2]) and not torch.equal(
        places.put(x, turn), places.put(x)
    )
    for one in (turn, None):
        given = x.clone().requires_grad_(), one, places.entry, places.order, places.first, places.tokens
        torch.library.opcheck(torch.ops.longtake.put.default, given)
        (found,), (wanted,) = (
            torch.autograd.grad(put, given[0], torch.ones_like(put).cumsum(1))
            for put in (places.put(given[0], one), plainly(places, given[0], one))
        )
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_parts_go_by_one_call(name, package, rel):
    found, tokens = package(), 5
    before = make_mask(LAYOUTS[name].allowed, tokens, CPU)
    mask, slots = apart(before)
    entries = len(before.allowed)
    q, k, v = (torch.randn(2, n * tokens, 3, 16, requires_grad=True) for n in (entries, *before.allowed.shape[1:] * 2))
    places = Places.of(slots, tokens, before.allowed.shape[1])
    results = []
    for together in (None, _flash4(mask)):
        if together is None:
            out = attend(q, k, v, mask=before)
        else:
            out = attend_fastest(q, places.put(k), places.put(v), mask=replace(mask, together=together))
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(rel(own, truth) < 1e-5 for truth, own in zip(*results))
    assert found.calls == ["forward"] * 2 * len(mask.parts) + ["backward"] * 2 * len(mask.parts)


def test_the_result_of_all_parts_is_kept_by_selective_recomputation(package, rel):
    found, results = package(), []
    mask, _ = apart(make_mask(LAYOUTS["causal"].allowed, 5, CPU))
    sizes = [5 * n for n in (*mask.allowed.shape, mask.allowed.shape[1])]
    run = _flash4(mask)

    def work(q, k, v):
        return run(q.sin(), k.cos(), v * 2).tanh()

    for context in (None, keep_attention, keep_products):
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, n, 3, 16, generator=generator).requires_grad_() for n in sizes]
        found.calls.clear()
        if context is None:
            out = work(*inputs)
        else:
            out = torch.utils.checkpoint.checkpoint(work, *inputs, use_reentrant=False, context_fn=context)
        out.square().sum().backward()
        results.append([x.grad for x in inputs])
        assert found.calls.count("forward") == len(mask.parts)
    assert all(rel(one, truth) < 1e-6 for truth, *others in zip(*results) for one in others)


@pytest.mark.parametrize(("ms", "used"), [([2.0, 1.0], True), ([1.0, 2.0], False)])
@pytest.mark.parametrize("wrong", [1.0, 1.2])
def test_one_call_is_used_where_it_is_right_and_faster(ms, used, wrong, package, monkeypatch):
    package(wrong=wrong)
    times = iter(ms)
    monkeypatch.setattr("longtake.models.apart.is_right", lambda _what, _place, off, most: max(off()) <= most)
    monkeypatch.setattr(attention, "choose_kernels", lambda *_: None)
    monkeypatch.setattr(attention, "gradient_kernels", lambda *_: [attention.Kernel("FLASH_ATTENTION_4", attend)])
    monkeypatch.setattr(attention, "milliseconds", lambda *_: next(times))
    monkeypatch.setattr(attention, "random_problem", _of_two_heads)
    found = _together.__wrapped__(CPU, torch.float32, 16)
    assert (found is not None) == (used and wrong == 1)


@pytest.mark.parametrize("wrong", [0, 1])
def test_both_kernels_are_also_tried_where_backward_makes_them_again(wrong, package, monkeypatch):
    package()
    monkeypatch.setattr(attention, "random_problem", _of_two_heads)

    def spoilt(run):
        again = lambda: torch._C._current_graph_task_id() != -1  # noqa: E731
        return lambda x, *given: run(x * torch.full_like(x, 1 + wrong * again()), *given)

    inner = apart_module._flash4
    monkeypatch.setattr(apart_module, "_flash4", lambda mask: spoilt(inner(mask)))
    found = apart_module._off(CPU, torch.float32, 16)
    assert max(found[:4]) < 1e-5 and (max(found) > 0.1) == bool(wrong)
    put = Places.put
    monkeypatch.setattr(Places, "put", lambda self, x, turn=None: spoilt(partial(put, self))(x, turn))
    assert (max(apart_module._off_in_places(CPU, torch.float32)) > 0.1) == bool(wrong)


def _of_two_heads(device, dtype, head_width, queries, keys, heads):
    sizes, generator = (queries, keys, keys), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, head_width, generator=generator) for n in sizes)
    return q, k, v


def test_without_a_gpu_nothing_is_apart():
    assert not puts_rightly(CPU, torch.float32) and joins(CPU, torch.float32, 16) is None


class TestCuda:
    pytestmark = cuda

    def test_the_kernel_is_what_it_says(self, rel):
        device = torch.device("cuda", 0)
        assert puts_rightly(device, torch.bfloat16)
        entry = torch.tensor([0, 1, 3, 1, 2, 0, 0, 4, 4], device=device)
        places, turn = Places.of(entry, 37, 6), rope_turn(torch.arange(9, device=device), 1, 37, 128)
        x = torch.randn(2, 6 * 37, 12, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(2, 9 * 37, 12, 128, device=device, dtype=torch.bfloat16)
        for one in (turn, None):
            made, truth = places.put(x, one), plainly(places, x.double(), one)
            assert rel(made.double(), truth.double()) < 4e-3
            found, wanted = (
                torch.autograd.grad(out, x, g)[0] for out, g in ((made, grad), (truth, grad.to(truth.dtype)))
            )
            assert rel(found.double(), wanted.double()) < 5e-3

    def test_masked_training_as_on_a_gpu_has_the_gradients_of_plain_training(self, rel):
        """Fused, with kept products, in places; beside one part after the other without any of that."""
        sizes = {"num_layers": 4, "dim": 256, "ffn_dim": 512, "num_heads": 2, "freq_dim": 64}
        layout, device = LAYOUTS["teacher forcing"], torch.device("cuda", 0)
        ways = [True, "selective", "products", False]
        quick = Execution(recompute=ByBlock(ways), attend=attend_fastest, fuses=True, by_rows=True)
        found = []
        for one in (Execution(), quick):
            model = make_tiny_model(True, **sizes).to(device).executed(one)
            condition = make_tiny_condition(model, num_frames=7).to("cuda")
            joined = None if one is not quick else joins(device, torch.bfloat16, 128)
            prepared = PreparedMask.of(layout, 6, device, flex=False, joins=joined)
            x, sigma = make_tiny_latents(layout.num_entries).to(device), torch.full((2, layout.num_entries), 0.5)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = model(x, sigma.to(device), condition, prepared).square().mean()
            loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert rel(found[1], found[0]) < 3e-2
