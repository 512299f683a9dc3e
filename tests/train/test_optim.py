"""AdamW here is torch's, with a learning rate that follows from the iteration."""

import pytest
import torch
from torch import nn

from longtake.config.groups import OptimConfig
from longtake.train.optim import NetworkOptimizer


def network(dtype=torch.float32, *sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes or (6, 5, 3), (sizes or (6, 5, 3))[1:]))).to(dtype)


def give_gradients(module, step):
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("settings", [{"beta1": 0.9}, {"beta1": 0.0, "weight_decay": 0.1, "warmup_steps": 3}])
def test_equals_torch_adamw_bit_for_bit(settings):
    mine, theirs = network(), network()
    optimizer = NetworkOptimizer(mine, OptimConfig(lr=1e-2, max_grad_norm=1e9, **settings), 5)
    betas, decay = (settings["beta1"], 0.999), settings.get("weight_decay", 0.0)
    wanted = torch.optim.AdamW(theirs.parameters(), lr=1e-2, eps=1e-8, betas=betas, weight_decay=decay)
    for step in range(5):
        for module in (mine, theirs):
            give_gradients(module, step)
        wanted.param_groups[0]["lr"] = optimizer.learning_rate(step)
        optimizer.step(step, optimizer.gradient_norm().item())
        wanted.step()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    tensors = optimizer.tensors()
    kept = {"step", "exp_avg_sq", *["exp_avg"] * (settings["beta1"] > 0)}  # with beta1 0 it is the gradient
    for name, p in theirs.named_parameters():
        for key, value in wanted.state[p].items():
            assert key not in kept or torch.equal(tensors.pop(f"{name}.{key}"), value)
    assert not tensors


def test_the_learning_rate_rises_stays_and_falls():
    optimizer = NetworkOptimizer(network(), OptimConfig(lr=1.0, warmup_steps=4, decay_steps=5), 12)

    def rates(optimizer, steps):
        for optimizer.steps_done in range(steps):
            yield optimizer.learning_rate(optimizer.steps_done)

    assert list(rates(optimizer, 14)) == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 5, 0.8, 0.6, 0.4, 0.2, 0, 0])
    both = NetworkOptimizer(network(), OptimConfig(lr=1.0, warmup_steps=4, decay_steps=4), 4)
    assert list(rates(both, 4)) == pytest.approx([1 / 4, 3 / 8, 3 / 8, 1 / 4])
