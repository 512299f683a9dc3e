"""Activation checkpointing: full and selective give the gradients of none; selective runs self-attention once."""

import pytest
import torch
from tiny_plan import causal_layout, tiny_plan
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.errors import CacheError
from longtake.models.execution import Execution
from longtake.models.recompute import ByBlock
from longtake.parallel.fsdp import parallelize
from longtake.parallel.mesh import Mesh
from longtake.rollout.denoise import Denoiser
from longtake.rollout.self_forcing import roll_out

MODES = [False, True, "selective"]


class Counted(TorchDispatchMode):
    """Forward calls of attention kernels."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += "scaled_dot_product" in name and "backward" not in name
        return function(*args, **(kwargs or {}))


def gradients(model, loss, counted):
    with counted:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused_shards", [False, True])  # two accounts of what is kept
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_gradients_are_equal_and_selective_keeps_attention(
    tiny_model, tiny_condition, tiny_latents, bf16, mask, fused_shards
):
    found, counts = {}, {}
    for mode in MODES:
        model = tiny_model(True).executed(Execution(fused_shards=fused_shards))
        model = parallelize(model, Mesh(), recompute=mode)
        layout = causal_layout(tiny_plan(2, 1, 5, 1), 5) if mask else None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(tiny_latents(5), torch.tensor([0.9, 0.3]), tiny_condition(model), layout).square().mean()
        counted = Counted()
        found[mode], counts[mode] = gradients(model, loss, counted), counted.count
    # Each layer has self-attention, by the three blocks of a mask, and cross-attention to text and to CLIP tokens.
    layers = 2 * ((3 if mask else 1) + 2)
    assert counts == {False: 0, True: layers, "selective": 2 * 2}  # the latter alone
    for mode in MODES[1:]:
        assert found[mode].keys() == found[False].keys()
        if bf16:
            for name, value in found[False].items():
                torch.testing.assert_close(found[mode][name], value, rtol=0.02, atol=1e-3)
        else:
            assert all(torch.equal(found[mode][name], value) for name, value in found[False].items())


@pytest.mark.parametrize("fused_shards", [False, True])
def test_each_block_keeps_as_much_as_it_is_told(tiny_model, tiny_condition, tiny_latents, fused_shards):
    """Nothing is computed again of the first blocks, all but attention of the next, all of the rest; and it may change
    from one update to the next.
    """
    by_block, found, counts = ByBlock([True, True]), [], []
    model = tiny_model(True).executed(Execution(fused_shards=fused_shards))
    model = parallelize(model, Mesh(), recompute=by_block)
    plain = tiny_model(True)
    some, products, narrow = "selective", "products", "narrow"
    pairs = (
        (False, True),
        (some, True),
        (False, some),
        (False, False),
        (True, True),
        (products, True),
        (narrow, products),
    )
    for ways in (None, *pairs):
        one = plain if ways is None else model
        by_block.follow(ways or ())
        one.zero_grad()
        loss = one(tiny_latents(5), torch.tensor([0.9, 0.3]), tiny_condition(one)).square().mean()
        counted = Counted()
        found.append(gradients(one, loss, counted))
        counts.append(counted.count)
    assert counts == [0, 3, 5, 2, 0, 6, 5, 4]  # of two blocks with three attentions each, of which one is to itself
    assert all(torch.equal(one[name], value) for one in found[1:] for name, value in found[0].items())


@pytest.mark.parametrize("mode", MODES[1:])
def test_backward_computes_again_from_rounded_inputs_and_from_nothing_else_that_is_rounded(
    mode, tiny_model, tiny_condition, tiny_latents, monkeypatch
):
    model = parallelize(tiny_model(True), Mesh(), recompute=mode, recompute_from=torch.bfloat16)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append([t.detach().clone() for t in inputs[:2]]))
    x, sigma, condition = tiny_latents(5), torch.tensor([0.9, 0.3]), tiny_condition(model)
    out = model(x, sigma, condition)
    with torch.no_grad():
        assert torch.equal(model(x, sigma, condition), out)  # forward knows nothing of it
    first, forward = len(model.blocks), seen[: len(model.blocks)]
    mine = gradients(model, out.square().mean(), Counted())
    again = list(reversed(seen[2 * first :]))
    assert len(again) == first
    for (tokens, clock), (kept, same_clock) in zip(forward, again, strict=True):
        assert torch.equal(kept, tokens.bfloat16().float()) and not torch.equal(kept, tokens)
        assert torch.equal(same_clock, clock)
    plain = parallelize(tiny_model(True), Mesh(), recompute=mode)
    exact = gradients(plain, plain(x, sigma, condition).square().mean(), Counted())
    assert mine.keys() == exact.keys()
    wrong = [(mine[name] - exact[name]).norm() / exact[name].norm() for name in exact if exact[name].any()]
    assert 0 < max(wrong) < 0.02


@pytest.mark.parametrize("rope, fused_shards", [("relative", False), ("absolute", False), ("relative", True)])
def test_roll_outs_are_equal_with_eviction(tiny_model, tiny_condition, rope, fused_shards):
    """Window 5 of 9 frames: what was evicted for others is still read by the backward of earlier blocks."""
    rules = tiny_plan(2, 1, 5, 1, rope, sigmas=(1.0, 0.5))

    def noise(start, end, step):
        generator = torch.Generator().manual_seed(100 * start + step)
        return torch.randn(2, end - start, 4, 4, 6, generator=generator)

    found = []
    joined = ByBlock(["selective", "products"])  # nothing of which is recomputed by checkpointing
    for mode, batched in [*((mode, False) for mode in MODES), (True, True), (joined, True)]:
        model = tiny_model(True).executed(Execution(fused_shards=fused_shards))
        model = parallelize(model, Mesh(), recompute=mode)
        student, condition = Denoiser(model, batched_exit_backward=batched), tiny_condition(model)
        made = roll_out(student, condition, noise(0, 1, 9), noise, rules, 9, (4, 6), with_grad=True)
        found.append(gradients(model, made.latents.square().mean(), Counted()))
    alone, together = found[: len(MODES)], found[len(MODES) :]
    for truth, *others in (alone, together):
        assert all(torch.equal(one[name], value) for one in others for name, value in truth.items())


def test_selective_still_pins_what_it_read(tiny_model, tiny_condition, tiny_latents):
    """Attention is kept, its inputs are not: an overwrite before backward is refused."""
    model = parallelize(tiny_model(True), Mesh(), recompute="selective")
    condition, sigma = tiny_condition(model), torch.zeros(2)
    cache = model.new_cache(tiny_plan(2, 1, 3, 1), 2, (4, 6))
    for frames in (1, 2):
        with torch.no_grad():
            Denoiser(model)(tiny_latents(frames), sigma, condition, cache, commit=True)
    out = Denoiser(model)(tiny_latents(1), sigma + 0.5, condition, cache)
    with pytest.raises(CacheError, match="pending backward"), torch.no_grad():
        Denoiser(model)(tiny_latents(2), sigma, condition, cache, commit=True)
    out.sum().backward()
    with torch.no_grad():
        Denoiser(model)(tiny_latents(2), sigma, condition, cache, commit=True)
