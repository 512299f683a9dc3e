"""AdamW here is torch's; bfloat16 weights learn what they cannot hold at once; int8 moments survive a checkpoint."""

import importlib.util

import pytest
import torch
from torch import nn

from longtake.errors import ConfigError
from longtake.train import moments
from longtake.train.optim import NetworkOptimizer, OptimizerSettings
from longtake.train.rounding import round_stochastically

has_torchao = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not has_torchao, reason="torchao is not installed")


def network(dtype=torch.float32, *sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes or (6, 5, 3), (sizes or (6, 5, 3))[1:]))).to(dtype)


def give_gradients(module, step):
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("settings", [{}, {"betas": (0.0, 0.999), "weight_decay": 0.1, "warmup_steps": 3}])
def test_equals_torch_adamw_bit_for_bit(settings):
    mine, theirs = network(), network()
    ours = OptimizerSettings(lr=1e-2, max_grad_norm=None, **settings)
    optimizer = NetworkOptimizer(mine, ours)
    fields = {key: value for key, value in settings.items() if key != "warmup_steps"}
    wanted = torch.optim.AdamW(theirs.parameters(), lr=1e-2, eps=1e-8, **({"weight_decay": 0.0} | fields))
    for step in range(5):
        for module in (mine, theirs):
            give_gradients(module, step)
        wanted.param_groups[0]["lr"] = optimizer.learning_rate(step)
        optimizer.step(step, optimizer.gradient_norm())
        wanted.step()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    tensors = optimizer.tensors()
    for name, p in theirs.named_parameters():
        for key, value in wanted.state[p].items():
            assert torch.equal(tensors[f"{name}.{key}"], value)


def test_the_learning_rate_rises_stays_and_falls():
    optimizer = NetworkOptimizer(network(), OptimizerSettings(1.0, warmup_steps=4, decay_steps=5, total_steps=12))

    def rates(optimizer, steps):
        for optimizer.steps_done in range(steps):
            yield optimizer.learning_rate(optimizer.steps_done)

    assert list(rates(optimizer, 14)) == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 5, 0.8, 0.6, 0.4, 0.2, 0, 0])
    both = NetworkOptimizer(network(), OptimizerSettings(1.0, warmup_steps=4, decay_steps=4, total_steps=4))
    assert list(rates(both, 4)) == pytest.approx([1 / 4, 3 / 8, 3 / 8, 1 / 4])


# ---- bfloat16 weights --------------------------------------------------------------------------------------------------
def test_rounding_is_unbiased_and_to_neighbours():
    """The mean over many draws is the number, within five standard errors; each draw is a neighbour."""
    values = torch.tensor([1.0 + 1 / 512, 1.0 + 1 / 1024, -3.1415927, 1e-20, 255.9, 1.9990234, 0.0, -0.7])
    draws = 40_000
    generator = torch.Generator().manual_seed(0)
    rounded = round_stochastically(values.expand(draws, -1), generator).double()
    below = (values.view(torch.int32) & -(1 << 16)).view(torch.float32).double()  # towards zero
    step = (((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32).double() - below).abs()
    assert (((rounded - below).abs() == 0) | ((rounded - below).abs() == step)).all()
    error = (rounded.mean(0) - values.double()).abs()
    assert (error <= 5 * step / 2 / draws**0.5).all()
    nearest = values.to(torch.bfloat16).double()
    assert ((nearest - values.double()).abs()[:2] > 10 * error[:2]).all()  # to nearest would be off for ever


def test_rounding_keeps_what_bfloat16_holds_and_what_is_not_finite():
    held = torch.tensor([1.0, -0.5, 3.0, float("inf"), float("-inf"), 0.0])
    got = round_stochastically(held.expand(100, -1), torch.Generator().manual_seed(1))
    assert torch.equal(got.float(), held.expand(100, -1))
    assert round_stochastically(torch.tensor([float("nan")]), torch.Generator()).isnan().all()


def test_updates_below_the_resolution_accumulate():
    """1000 updates of 2e-5 on weights of 1, whose neighbours are 4e-3 and 8e-3 away."""
    weights = nn.Linear(64, 64, bias=False)
    nn.init.ones_(weights.weight)
    weights.to(torch.bfloat16)
    optimizer = NetworkOptimizer(weights, OptimizerSettings(lr=2e-5, betas=(0.0, 0.999)))
    for step in range(1000):
        weights.weight.grad = torch.full((64, 64), -0.5, dtype=torch.bfloat16)
        before = weights.weight.detach().clone()
        optimizer.step(step, 1.0)
        assert (weights.weight.detach() - before).abs().max() <= 2**-7
    assert abs(float(weights.weight.detach().double().mean()) - 1.02) < 1e-3
    plain = torch.ones(1, dtype=torch.bfloat16)
    assert torch.equal(plain + 2e-5, plain)  # what rounding to nearest does to each of them


def test_bfloat16_weights_follow_float32_ones():
    """Over 200 steps, within 5 % of the way; the same seed rounds the same."""
    start = network(torch.bfloat16, 32, 32)
    whole = network(torch.bfloat16, 32, 32).float()
    again = network(torch.bfloat16, 32, 32)
    settings = OptimizerSettings(lr=1e-3, seed=3)
    optimizers = [NetworkOptimizer(module, settings) for module in (start, whole, again)]
    first = whole[0].weight.detach().clone()
    target = torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
    for step in range(200):
        for module, optimizer in zip((start, whole, again), optimizers, strict=True):
            module[0].weight.grad = (module[0].weight.detach().float() - target).to(module[0].weight.dtype)
            optimizer.step(step, 1.0)
    assert torch.equal(start[0].weight, again[0].weight)
    way = (whole[0].weight - first).norm()
    assert (start[0].weight.float() - whole[0].weight).norm() < 0.05 * way


# ---- int8 moments ------------------------------------------------------------------------------------------------------
def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(moments, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="optim.moments=int8 needs the package torchao; install it"):
        NetworkOptimizer(network(), OptimizerSettings(lr=1e-3, moments="int8"))


@needs_torchao
def test_int8_moments_are_small_follow_float32_and_are_restored():
    def made(kind):
        module = network(torch.float32, 256, 64, 256)
        return module, NetworkOptimizer(module, OptimizerSettings(lr=1e-3, moments=kind))

    (eight, small), (whole, large), (other, restored) = made("int8"), made("float32"), made("int8")
    sizes = [sum(t.numel() * t.element_size() for t in o.tensors().values()) for o in (small, large)]
    assert sizes[0] < 0.65 * sizes[1]  # the second layer's rows are 64 numbers: they stay in float32
    assert small.tensors()["0.weight.exp_avg.codes"].dtype == torch.uint8
    assert "1.weight.exp_avg" in small.tensors()
    start = whole[0].weight.detach().clone()
    for step in range(20):
        for module in (eight, whole):
            give_gradients(module, step)
        for optimizer in (small, large):
            optimizer.step(step, 1.0)
    assert (eight[0].weight - whole[0].weight).norm() < 0.1 * (whole[0].weight - start).norm()
    other.load_state_dict(eight.state_dict())
    for name, tensor in restored.tensors().items():
        tensor.copy_(small.tensors()[name])
    for module, optimizer in ((eight, small), (other, restored)):
        give_gradients(module, 20)
        optimizer.step(20, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(eight.parameters(), other.parameters(), strict=True))
