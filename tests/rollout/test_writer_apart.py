"""SGF+: the context is written by other low-rank updates than those that denoise; roll-outs, replay, gradient.

The judge is `brute_force.py`, in float64, with the merged weights of two networks: W + (alpha /
rank) B A, of whose factors autograd gives the gradient through what is remembered.
"""

from dataclasses import replace

import pytest
import torch
from brute_force import HORIZON, SIZE, calls_of, compare, exit_steps, noise
from brute_force import _layouts as _layouts
from brute_force import double as double
from test_self_gradient import LAWS
from tiny_codec import TinyCodec
from tiny_lora import ALPHA, RANK, adapter_of
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error

from longtake.models.execution import Execution
from longtake.models.lora import WRITER, inject_lora, is_factor
from longtake.models.shared_base import SharedBase, WriterApart
from longtake.rollout.denoise import Denoiser
from longtake.rollout.long_video import LongStream
from longtake.rollout.packed import PackedClip
from longtake.rollout.recache import LatentHistory, recache
from longtake.rollout.self_forcing import roll_out

ROLES = ("generator", WRITER)


def make_pair(i2v=True, recompute=False, targets=None, stirred=ROLES):
    """A student of two roles, each with updates of its own values; those that are not `stirred` have B = 0."""
    base = make_tiny_model(i2v=i2v).requires_grad_(False)
    adapter = adapter_of(base, targets)
    for role in ROLES:
        inject_lora(base, adapter.pattern, RANK, ALPHA, role)
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if is_factor(name):
                off = ".lora_B." in name and not any(f".{role}." in name for role in stirred)
                parameter.copy_(0.0 if off else 0.3 * torch.randn(parameter.shape, generator=draws))
    return WriterApart(SharedBase(base.executed(Execution(recompute=recompute))), "generator")


def factors_of(pair):
    """Of both roles, by their names in the base."""
    return {name: p for name, p in pair.base.model.named_parameters() if is_factor(name)}


def merged(pair, role, factors):
    """Weights of one role as a network of its own, with the graph of `factors`."""
    state = {}
    for name, p in pair.base.model.named_parameters():
        if is_factor(name):
            continue
        state[name.replace(".base_layer.", ".")] = p.detach().clone()
    for name in factors:
        if f".lora_A.{role}." in name:
            a, b = factors[name], factors[name.replace(".lora_A.", ".lora_B.")]
            key = name.partition(".lora_A.")[0] + ".weight"
            state[key] = state[key] + ALPHA / RANK * b @ a
    return state


def whole(pair, role, i2v=True):
    model = make_tiny_model(i2v=i2v).to(next(pair.parameters()).dtype)
    with torch.no_grad():
        model.load_state_dict(merged(pair, role, factors_of(pair)))
    return model.requires_grad_(False)


def problem(law, frames=9, **options):
    plan = LAWS[law]
    i2v = plan.first_frames == 1
    pair = make_pair(i2v, **options)
    pair.base.model.double()
    condition = make_tiny_condition(pair, 1, num_frames=frames, size=SIZE)
    picture = make_tiny_latents(1, seed=7)[:1, ..., :2] if i2v else None
    return pair, condition, picture, plan.with_given(int(i2v))


def brute_force(pair, condition, plan, calls, blocks, exit_step, **options):
    """(clean latents of exit steps, factors with a graph): stored by the writer, read by the other."""
    factors = {name: p.detach().clone().requires_grad_() for name, p in factors_of(pair).items()}
    writer, reader = merged(pair, WRITER, factors), merged(pair, "generator", factors)
    rest = condition, plan, calls, blocks, exit_step
    return exit_steps(pair.config, writer, *rest, reader=reader, **options), factors


def watched(pair, monkeypatch):
    return calls_of(pair.base.model, monkeypatch)


@pytest.mark.parametrize(
    ("law", "recompute"),
    [
        ("window", False),
        *(pytest.param(law, True, marks=pytest.mark.slow) for law in ("window", "absolute", "no window", "no picture")),
    ],
)
def test_the_replay_is_the_roll_out_and_its_gradient_that_of_brute_force(law, recompute, double, monkeypatch):
    pair, condition, picture, plan = problem(law, recompute=recompute)
    frames, exit_step, given = (10 if picture is None else 9), 2, plan.given_frames
    plain = roll_out(Denoiser(pair), condition, picture, noise, plan, frames, SIZE, exit_step=exit_step)
    i2v = picture is not None
    two = Denoiser(whole(pair, "generator", i2v), writer=whole(pair, WRITER, i2v))
    apart = roll_out(two, condition, picture, noise, plan, frames, SIZE, exit_step=exit_step)
    assert relative_error(plain.latents, apart.latents) < 1e-10
    calls = watched(pair, monkeypatch)
    options = {"exit_step": exit_step, "with_grad": True}
    made = roll_out(Denoiser(pair, replays=True), condition, picture, noise, plan, frames, SIZE, **options)
    assert relative_error(made.latents.detach(), plain.latents) < 1e-10
    blocks = list(plan.blocks(0, frames))
    wanted, factors = brute_force(pair, condition, plan, calls, blocks, exit_step, exits_from=given)
    compare(factors_of(pair), made.latents[:, given:], wanted, factors)


def test_a_part_of_a_long_video_teaches_the_writer_by_what_it_stored_itself(double, monkeypatch):
    pair, condition, picture, plan = problem("window", 13, recompute=True)
    calls, every, start = watched(pair, monkeypatch), {}, 1
    sizes = condition, picture, plan, SIZE, TinyCodec(pair.config)
    stream = LongStream(Denoiser(pair, replays=True), *sizes, horizon=5, max_frames=40, spare_frames=HORIZON)
    plain = LongStream(Denoiser(pair), *sizes, horizon=5, max_frames=40)
    for end in (5, 9, 13):
        expected = plain.advance(end, noise, exit_step=1)
        calls.clear()
        made = stream.advance(end, noise, exit_step=1, with_grad=True)
        assert relative_error(made.latents.detach(), expected.latents) < 1e-10
        every |= calls
        if end > 5:
            blocks, first = list(plan.blocks(0, end)), plan.block_of(start - 1)[0]
            wanted, factors = brute_force(pair, condition, plan, every, blocks, 1, detached=first, exits_from=start)
            compare(factors_of(pair), made.latents[:, start - end :], wanted, factors)
        start = end


def test_without_values_it_is_the_form_of_one_network(double):
    """B = 0 in both roles: what a stage begins as."""
    pair, condition, picture, plan = problem("window", stirred=())
    one = make_tiny_model(i2v=True).double()
    options = {"exit_step": 1, "with_grad": True}
    both, alone = (
        roll_out(Denoiser(model, replays=True), condition, picture, noise, plan, 9, SIZE, **options).latents.detach()
        for model in (pair, one)
    )
    assert relative_error(both, alone) < 1e-12


def test_the_writer_learns_by_keys_and_values_alone(double):
    """Nobody reads what its last block makes of them: no gradient there, but for keys and values."""
    pair, condition, picture, plan = problem("window")
    made = roll_out(Denoiser(pair, replays=True), condition, picture, noise, plan, 9, SIZE, exit_step=1, with_grad=True)
    made.latents.square().sum().backward()
    last = pair.config.num_layers - 1
    for name, p in factors_of(pair).items():
        reads = f".{WRITER}." not in name
        writes = not name.startswith(f"blocks.{last}.") or ".self_attn.k." in name or ".self_attn.v." in name
        assert (p.grad.abs().max() > 0) == (reads or writes), name


@pytest.mark.slow
def test_the_gradients_of_both_roles_are_of_the_loss_of_both(double):
    """Not of one network that is called twice: with equal values, theirs add up to that of one."""
    pair, condition, picture, plan = problem("window", stirred=())
    with torch.no_grad():
        for name, p in factors_of(pair).items():
            if ".generator." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
                factors_of(pair)[name.replace(".generator.", f".{WRITER}.")].copy_(p)
    one = whole(pair, WRITER).requires_grad_(True)
    options = {"exit_step": 1, "with_grad": True}
    for model in (pair, one):
        made = roll_out(Denoiser(model, replays=True), condition, picture, noise, plan, 9, SIZE, **options).latents
        made.square().sum().backward()
    weights = dict(one.named_parameters())
    for name, p in factors_of(pair).items():
        if ".lora_B.generator." in name:
            layer = name.partition(".lora_B.")[0]
            a = factors_of(pair)[name.replace(".lora_B.", ".lora_A.")]
            both = p.grad + factors_of(pair)[name.replace(".generator.", f".{WRITER}.")].grad
            torch.testing.assert_close(both, ALPHA / RANK * weights[f"{layer}.weight"].grad @ a.T)


@pytest.mark.parametrize(("switch", "law"), [(None, "none"), (5, "none"), (5, "rebuild")])
def test_teacher_forcing_beside_it_learns_after_the_writers_context(switch, law, double):
    """As two networks of their own, one of which stores each clean block in a cache that the other reads; it makes that
    anew, too, where the caption changes.
    """
    pair, condition, _, plan = problem("window")
    plan = plan.but(recache=law)
    clean, noisy = (make_tiny_latents(9, seed=seed)[:1, ..., :2].double() for seed in (1, 2))
    later = make_tiny_condition(pair, 1, seed=8).text
    told = replace(condition, later_text=later)
    sigma, packed = torch.full((1, 9), 0.6), PackedClip(plan)
    both, kept = Denoiser(whole(pair, "generator"), writer=whole(pair, WRITER)), LatentHistory(plan)
    cache = both.model.new_cache(plan, 1, SIZE)
    with torch.no_grad():
        made = packed.velocity(pair, told, (clean, torch.zeros(1, 9)), noisy, sigma, switch)
        for start, end in plan.blocks(0, 9):
            if start == switch:
                condition = condition.with_text(later)
                if law == "rebuild":
                    recache(both, cache, condition, kept)
            if start >= plan.given_frames:
                wanted = both(noisy[:, start:end], sigma[:, 0], condition, cache)
                assert relative_error(made[:, start:end], wanted) < 1e-10
            both(clean[:, start:end], torch.zeros(1), condition, cache, commit=True)
            kept.append(clean[:, start:end])
