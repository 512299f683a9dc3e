"""What low-rank updates compute without gradient, merged for the call, against the three products with gradient."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import Linear
from test_shared_base import make
from tiny_lora import RANK, adapted, stir
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error
from tiny_plan import tiny_plan
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.models.lora import inject_lora
from longtake.models.low_rank import Merging
from longtake.models.shared_base import AdapterSwitch, SharedBase, Turns
from longtake.rollout.denoise import Denoiser, commit_block, denoise_block
from longtake.rollout.self_forcing import roll_out

RULES = tiny_plan(2, 1, 5, 1, sigmas=(1.0, 0.6, 0.3))
SIZE = (4, 6)


def noise(start, end, step):
    return torch.randn(2, end - start, 4, *SIZE, generator=torch.Generator().manual_seed(100 * start + step))


def layers_with(*names, shape, rank, alpha):
    """A network of one linear layer that has updates of these names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape))
    for name in names:
        inject_lora(model, "0", rank, alpha, name)
        for factors in (model[0].lora_A, model[0].lora_B):
            nn.init.normal_(factors[name].weight)
    return model


def rolled(student, precise, *, with_grad=False):
    condition = make_tiny_condition(student.model)
    with nullcontext() if precise else torch.autocast("cpu", torch.bfloat16):
        made = roll_out(student, condition, make_tiny_latents(1), noise, RULES, 7, SIZE, with_grad=with_grad)
    return made.latents


def unmerged(monkeypatch):
    monkeypatch.setattr(Merging, "plain", lambda layer: None)


@pytest.mark.parametrize("targets", [None, ["ffn.0", "cross_attn.k"], ["ffn.2"]])
@pytest.mark.parametrize("role", ["generator", "critic", "teacher"])
def test_roll_outs_are_those_of_the_layers_in_float32(role, targets, monkeypatch):
    roles, own = make(make_tiny_model, targets=targets)
    found = [rolled(Denoiser(roles[role]), precise=True)]
    whole = rolled(Denoiser(own[role]), precise=True)  # also of updates of a network of its own
    unmerged(monkeypatch)
    found.append(rolled(Denoiser(roles[role]), precise=True))
    assert relative_error(*found) < 1e-6 and relative_error(found[0], whole) < 1e-6
    other = rolled(Denoiser(roles["teacher" if role != "teacher" else "generator"]), precise=True)
    assert relative_error(found[0], other) > 0.01


@pytest.mark.parametrize("how", [{}, {"batched_exit_backward": True}, {"replays": True}])
@pytest.mark.parametrize("precise", [True, False])
def test_gradients_of_roll_outs_are_those_of_the_layers(how, precise, monkeypatch):
    """In bfloat16 as near as those of another order of the same sums: of products of rows that are computed apart."""
    found = []
    for merges in (True, False):
        if not merges:
            unmerged(monkeypatch)
        roles, _ = make(make_tiny_model)
        if not precise:
            roles["generator"].base.model.cast(torch.bfloat16)
        made = rolled(Denoiser(roles["generator"], **how), precise, with_grad=True)
        made.square().mean().backward()
        trained = [p for p in roles["generator"].parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.any() for p in trained)
        found.append((made.detach(), torch.cat([p.grad.flatten() for p in trained])))
    bound = 1e-5 if precise else 0.05
    assert all(relative_error(mine, theirs) < bound for mine, theirs in zip(*found, strict=True))


class Counted(TorchDispatchMode):
    """Counts matrix products by the rows of what they multiply."""

    def __init__(self):
        super().__init__()
        self.rows = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.rows[args[-2].shape[0], args[-2].shape[1]] += 1
        return func(*args, **(kwargs or {}))


def test_a_pass_multiplies_tokens_as_whole_weights_do():
    """Beside those, one product for each updated layer, as wide as its weight and as deep as the rank."""
    found = []
    for model in (make_tiny_model(True), stir(adapted(make_tiny_model(True)))):
        student, condition, cache = Denoiser(model), make_tiny_condition(model), model.new_cache(RULES, 2, SIZE)
        commit_block(student, cache, condition, make_tiny_latents(1))
        with Counted() as counted, torch.no_grad():
            student(make_tiny_latents(2), torch.full((2,), 0.5), condition, cache)
        found.append(counted.rows)
    more = found[1] - found[0]
    assert found[0] - found[1] == Counter()
    assert more == {(32, RANK): 2 * 7, (48, RANK): 2}  # of two blocks; keys and values of the text are kept


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e-1])
def test_a_merged_weight_is_no_farther_from_float64_than_the_layers(size):
    """In bfloat16, of updates of 0.1 to 10 % of the weight: the smallest is less than what most weights are rounded by,
    and what shows of it is as much as where its product is added to theirs.
    """
    draws = torch.Generator().manual_seed(0)
    layer = layers_with("default", shape=(256, 320), rank=16, alpha=8.0)[0]
    with torch.no_grad():
        layer.weight.copy_(0.03 * torch.randn(320, 256, generator=draws))
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.mul_(size * layer.weight.norm() / (0.5 * b @ a).norm())
        layer.base_layer.bfloat16()
        x = torch.randn(400, 256, generator=draws).bfloat16()
        change = x.double() @ (0.5 * b.double() @ a.double()).T
        truth = x.double() @ layer.weight.double().T + layer.base_layer.bias.double() + change
        plain = layer.base_layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            merged = layer(x)
        layers = layer(x).detach()
    assert merged.dtype == layers.dtype == torch.bfloat16 and not torch.equal(merged, layers)
    assert relative_error(merged, truth) < 1.02 * relative_error(layers, truth) < 0.01

    def shown(made):
        """How much of the update shows in what was made."""
        return float(((made.double() - plain.double()) * change).sum() / change.square().sum())

    assert shown(merged) > max(0.4, shown(layers) - 0.02)


def test_where_entries_take_turns_the_layers_are_as_with_gradient():
    model, switch = layers_with("one", "two", shape=(6, 4), rank=2, alpha=6.0), AdapterSwitch()
    SharedBase(model, switch)
    layer = model[0]
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        parts = []
        for name, part in zip(("one", "two"), x.split([2, 3], 1), strict=True):
            with switch.on(name):
                parts.append(layer(part))
        with switch.on(Turns(((2, "one"), (3, "two")))):
            torch.testing.assert_close(layer(x), torch.cat(parts, 1))
        with switch.on(Turns(((5, "three"),))):
            assert torch.equal(layer(x), layer.base_layer(x))


def test_with_gradient_the_forward_is_that_of_peft_and_without_what_peft_merges():
    """Of one update and of two that are on at once; in float32."""
    for names in (["one"], ["two"], ["one", "two"]):
        layer = layers_with("one", "two", shape=(6, 4), rank=2, alpha=6.0)[0]
        layer.set_adapter(names)
        x = torch.randn(3, 6)
        assert torch.equal(layer(x), Linear.forward(layer, x))
        with torch.no_grad():
            found = layer(x)
            layer.merge()
            torch.testing.assert_close(found, layer.base_layer(x))


def test_changed_updates_are_seen_at_once():
    """By videos that go on, whose caches nobody lends anew: nothing is kept of a merged weight."""
    model = stir(adapted(make_tiny_model(True)))
    student, condition = Denoiser(model), make_tiny_condition(model)
    cache = model.new_cache(RULES, 2, SIZE)
    commit_block(student, cache, condition, make_tiny_latents(1))
    made = []
    for change in (False, True):
        if change:
            stir(model, seed=8)
        with torch.no_grad():
            made.append(denoise_block(student, cache, condition, lambda step: noise(1, 3, step), RULES).clean)
    assert relative_error(*made) > 0.01
