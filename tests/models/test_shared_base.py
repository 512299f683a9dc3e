"""Roles of one base compute, learn and are named as networks of their own; recomputation sees the right updates."""

import pytest
import torch
from tiny_lora import adapter_of, add_lora, stir
from tiny_plan import tiny_plan

from longtake.models.lora import first_factors, inject_lora
from longtake.models.shared_base import AdapterSwitch, AdapterView, SharedBase
from longtake.parallel.fsdp import parallelize
from longtake.parallel.mesh import Mesh
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser

NAMES = ("generator", "critic")


def make(tiny_model, recompute=False, targets=None, switch=None):
    """(roles, networks of their own) of the same weights and updates; `critic` has updates on `targets` alone."""
    base = tiny_model(True).requires_grad_(False)
    own = {"teacher": tiny_model(True).requires_grad_(False)}
    own["teacher"] = parallelize(own["teacher"], Mesh(), recompute=recompute)
    for seed, name in enumerate(NAMES):
        adapter = adapter_of(tiny_model(True), targets if name == "critic" else None)
        inject_lora(base, adapter.pattern, 3, 6.0, name)
        parameters = dict(base.named_parameters())
        with torch.no_grad():
            for key, value in first_factors(base, KeyedRNG(0), f"{name} lora_A", name):
                parameters[key].copy_(value)
        own[name] = stir(add_lora(tiny_model(True), adapter.pattern, 3, 6.0, KeyedRNG(0), f"{name} lora_A"), seed)
        own[name] = parallelize(own[name], Mesh(), recompute=recompute)
    shared = SharedBase(parallelize(base, Mesh(), recompute=recompute), switch)
    roles = {name: AdapterView(shared, name) for name in NAMES} | {"teacher": AdapterView(shared, None)}
    with torch.no_grad():
        for name in NAMES:
            values = dict(own[name].named_parameters())
            for key, parameter in roles[name].named_parameters():
                if ".lora_" in key:
                    parameter.copy_(values[key])
    return roles, own


@pytest.mark.parametrize("targets", [None, ["ffn.0", "cross_attn.k"]])
def test_roles_have_the_names_and_values_of_networks(tiny_model, targets):
    roles, own = make(tiny_model, targets=targets)
    for name in NAMES:
        trained = [{k: p for k, p in x.named_parameters() if p.requires_grad} for x in (roles[name], own[name])]
        assert list(trained[0]) == list(trained[1]) and len(trained[0]) > 0
        states = [x.state_dict() for x in (roles[name], own[name])]
        assert all(torch.equal(states[0][key], value) for key, value in states[1].items() if ".lora_" in key)
        plain = [{k.replace(".base_layer.", "."): v for k, v in s.items() if ".lora_" not in k} for s in states]
        assert plain[0].keys() == plain[1].keys()
        assert all(torch.equal(plain[0][key], value) for key, value in plain[1].items())
    assert not any(p.requires_grad for p in roles["teacher"].parameters())
    roles["teacher"].eval().requires_grad_(False)  # as the objective does: the others are trained nevertheless
    assert all(any(p.requires_grad for p in roles[name].parameters()) for name in NAMES)


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_backward_recomputes_under_the_updates_of_its_forward(tiny_model, tiny_condition, tiny_latents, recompute):
    """All roles are called, then their graphs run backward in another order, with another role on."""
    roles, own = make(tiny_model, recompute)
    x, sigma = tiny_latents(5), torch.tensor([0.9, 0.3])
    condition = tiny_condition(own["teacher"])
    losses = {}
    for kind, networks in (("roles", roles), ("own", own)):
        for name in NAMES:
            losses[kind, name] = networks[name](x, sigma, condition).square().mean()
            with torch.no_grad():
                losses[kind, f"{name} teacher"] = networks["teacher"](x, sigma, condition).square().mean()
    for name in (*NAMES, "critic teacher"):
        assert torch.equal(losses["roles", name], losses["own", name])
    assert len({float(losses["own", name].detach()) for name in (*NAMES, "critic teacher")}) == 3
    for kind in ("roles", "own"):
        for name in reversed(NAMES):
            losses[kind, name].backward()
    for name in NAMES:
        pairs = zip(roles[name].named_parameters(), own[name].named_parameters(), strict=True)
        trained = [(key, p.grad, q.grad) for (key, p), (_, q) in pairs if q.requires_grad]
        assert trained and all(torch.equal(mine, theirs) for _, mine, theirs in trained)
        assert all(theirs.abs().max() > 0 for _, _, theirs in trained)


def test_without_the_context_of_its_forward_the_gradient_would_be_another(tiny_model, tiny_condition, tiny_latents):
    """What the hook of recomputation prevents: a teacher's pass in between would switch the updates off."""
    gradients = []
    for kept in (True, False):
        roles, own = make(tiny_model, True, switch=None if kept else AdapterSwitch())  # nothing enters its contexts
        loss = roles["generator"](tiny_latents(3), torch.tensor([0.9, 0.3]), tiny_condition(own["teacher"])).mean()
        try:
            loss.backward()
        except torch.utils.checkpoint.CheckpointError:
            gradients.append(None)  # the recomputed graph has other tensors than the first
        else:
            gradients.append(next(p.grad for n, p in roles["generator"].named_parameters() if ".lora_B." in n))
    assert gradients[0] is not None and (gradients[1] is None or not torch.equal(*gradients))


def test_kept_cross_attention_belongs_to_a_role(tiny_model, tiny_condition, tiny_latents):
    """One cache handed from role to role with one condition: each projects its own keys and values."""
    roles, own = make(tiny_model)
    condition, x = tiny_condition(own["teacher"]), tiny_latents(2)
    sigma = torch.tensor([0.9, 0.3])
    cache = roles["generator"].new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6))
    with torch.no_grad():
        for name in ("generator", "critic", "teacher", "generator"):
            wanted = Denoiser(own[name])(x, sigma, condition, own[name].new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6)))
            assert torch.equal(Denoiser(roles[name])(x, sigma, condition, cache), wanted)
