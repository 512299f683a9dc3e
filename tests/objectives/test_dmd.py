"""Distribution matching against the finite formulas of spec G (N.11), and what is drawn once for all."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny_batches import RULES, make_batch, record
from tiny_models import make_tiny_model
from tiny_objectives import parts_of
from tiny_plan import tiny_plan

from longtake.errors import TrainingError
from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.objectives.dmd_keys import CriticConfig, DataLoss
from longtake.objectives.scores import dmd_gradient, dmd_loss
from longtake.parallel.mesh import Mesh
from longtake.plan import warp
from longtake.rng import KeyedRNG
from longtake.train.loop import nonfinite

FRAMES = 7


def make_dmd(i2v=True, rules=RULES, seed=3, critic=None, clean=False, phase=nullcontext, **settings):
    networks = [make_tiny_model(i2v=i2v, seed=k) for k in range(3)]
    settings = DmdConfig(teacher="toy", critic=CriticConfig(**critic or {}), **settings)
    frames = FRAMES if i2v else 6
    return Dmd(
        parts_of(*networks, seed=seed, plan=rules, num_frames=frames, first_frame_clean=clean, phase=phase), settings
    )


def watched(dmd, monkeypatch):
    """Recorded calls of generator, critic and real score, and the roll-outs that were made."""
    calls = {name: record(getattr(dmd, name), monkeypatch) for name in ("generator", "critic", "real")}
    made, roll_out = [], dmd._roll_out

    def keep(*args, **options):
        made.append(roll_out(*args, **options))
        return made[-1]

    monkeypatch.setattr(dmd, "_roll_out", keep)
    return calls, made


# ---- the generator's loss --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("i2v", [True, False])
def test_gradient_is_the_finite_formula(i2v, monkeypatch):
    """N.11, recomputed in float64 from what the networks were given and gave; frame 0 of I2V has no gradient."""
    rules = RULES if i2v else tiny_plan(2, 2, 4, 2, sigmas=RULES.sigmas)
    dmd = make_dmd(i2v, rules)
    calls, made = watched(dmd, monkeypatch)
    batch = make_batch(dmd.generator.model, [4, 9], dmd.parts.num_frames)
    result = dmd.loss("generator", batch, 0)
    x, counted = made[0].latents, slice(1 if i2v else 0, None)
    (critic,), (cond, uncond) = calls["critic"], calls["real"]
    noisy, sigma = critic["x"].double(), critic["sigma"].double()[:, :, None, None, None]

    # one level a clip, frame 0 noised like the rest; the noise of the sample
    noise = KeyedRNG(3).noise(0, "generator_noise", batch.indices, x.shape[1:]).double()
    assert (critic["sigma"] == critic["sigma"][:, :1]).all() and not critic["with_grad"]
    torch.testing.assert_close(noisy, (1 - sigma) * x.double() + sigma * noise, rtol=0, atol=1e-6)
    for call in (cond, uncond):
        assert torch.equal(call["x"], critic["x"]) and torch.equal(call["sigma"], critic["sigma"])

    fake = noisy - sigma * critic["out"].double()
    clean_cond, clean_uncond = (noisy - sigma * call["out"].double() for call in (cond, uncond))
    real = clean_cond + 3.0 * (clean_cond - clean_uncond)  # the published form with g = 3, w = 4
    scale = (x.double() - real).abs()[:, counted].mean((1, 2, 3, 4), keepdim=True)
    gradient = (fake - real) / scale
    count = x[:, counted].numel()
    (mine,) = torch.autograd.grad(result.loss, x, retain_graph=True)
    torch.testing.assert_close(mine[:, counted].double(), gradient[:, counted] / count, rtol=1e-4, atol=1e-8)
    if i2v:
        assert (mine[:, 0] == 0).all()
    torch.testing.assert_close(result.loss.double(), 0.5 * gradient[:, counted].square().mean(), rtol=1e-4, atol=0)
    norm = result.metrics["dmdtrain_gradient_norm"].double()
    torch.testing.assert_close(norm, gradient[:, counted].abs().mean(), rtol=1e-4, atol=0)

    # and down to the weights: the Jacobian of the roll-out applied to that gradient
    weight = dmd.generator.model.blocks[1].ffn[0].weight
    (whole,) = torch.autograd.grad(result.loss, weight, retain_graph=True)
    (expected,) = torch.autograd.grad(x, weight, grad_outputs=mine)
    torch.testing.assert_close(whole, expected)
    assert whole.abs().max() > 0


def test_gradient_and_loss_on_numbers():
    """Two frames of one value, worked out on paper; the given picture (frame 0) is not counted."""
    student = torch.tensor([9.0, 1.0, 3.0]).view(1, 3, 1, 1, 1).requires_grad_()
    real = torch.tensor([5.0, 0.0, 6.0]).view(1, 3, 1, 1, 1)
    fake = torch.tensor([7.0, 2.0, 5.0]).view(1, 3, 1, 1, 1)
    counted = torch.tensor([False, True, True])
    gradient = dmd_gradient(fake, real, student.detach(), counted)
    assert gradient.flatten().tolist() == [0.0, 1.0, -0.5]  # (fake - real) / mean(1, 3)
    loss = dmd_loss(student, gradient, 1)
    assert loss.item() == pytest.approx(0.5 * (1 + 0.25) / 2)
    loss.backward()
    assert student.grad.flatten().tolist() == [0.0, 0.5, -0.25]


def test_real_videos_add_their_loss_to_the_students_and_nothing_to_the_critics():
    plain, dmd = make_dmd(), make_dmd(data_loss=DataLoss(weight=0.25))
    forced = dmd.data_loss
    batch = make_batch(dmd.generator.model, [4, 9], FRAMES)
    weights = list(dmd.generator.model.parameters())

    def gradients(loss):
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found)]

    found, alone = dmd.loss("generator", batch, 3), plain.loss("generator", batch, 3)
    real = forced.loss("generator", batch, 3).loss
    torch.testing.assert_close(found.loss, alone.loss + 0.25 * real)
    assert found.metrics["generator_loss"] == alone.metrics["generator_loss"]
    torch.testing.assert_close(found.metrics["data_loss"], real.detach())
    alone = torch.autograd.grad(alone.loss, list(plain.generator.model.parameters()), allow_unused=True)
    for mine, matched, taught in zip(gradients(found.loss), alone, gradients(real)):
        torch.testing.assert_close(mine, (0 if matched is None else matched) + 0.25 * taught, rtol=1e-4, atol=1e-6)
    assert torch.equal(dmd.loss("critic", batch, 3).loss, plain.loss("critic", batch, 3).loss)


def test_real_videos_may_be_longer_than_what_is_matched():
    dmd = make_dmd(data_loss=DataLoss(weight=1.0))
    batch = make_batch(dmd.generator.model, [4, 9], FRAMES + 4)
    assert dmd.loss("generator", batch, 0).loss.isfinite() and dmd.loss("critic", batch, 0).loss.isfinite()
    with pytest.raises(TrainingError, match="teacher forcing learns from videos and its data have none"):
        dmd.loss("generator", make_batch(dmd.generator.model, [4, 9], FRAMES, videos=False), 0)


def test_the_normaliser_is_that_of_each_sample():
    torch.manual_seed(0)
    fake, real, student = (torch.randn(3, 5, 2, 2, 2) for _ in range(3))
    counted = torch.tensor([False, True, True, True, True])
    whole = dmd_gradient(fake, real, student, counted)
    for k in range(3):
        part = slice(k, k + 1)
        torch.testing.assert_close(whole[part], dmd_gradient(fake[part], real[part], student[part], counted))


def test_unconditional_score_keeps_the_picture(monkeypatch):
    dmd = make_dmd()
    calls, _ = watched(dmd, monkeypatch)
    batch = make_batch(dmd.generator.model, [4, 9])
    dmd.loss("generator", batch, 0)
    cond, uncond = (call["condition"] for call in calls["real"])
    assert cond is batch.condition and calls["critic"][0]["condition"] is batch.condition
    assert torch.equal(uncond.text, batch.empty_text)
    assert uncond.image is batch.condition.image and uncond.frames is batch.condition.frames


def test_guidance_of_one_needs_no_unconditional_score(monkeypatch):
    dmd = make_dmd(guidance=1.0)
    calls, _ = watched(dmd, monkeypatch)
    dmd.loss("generator", make_batch(dmd.generator.model, [4]), 0)
    assert len(calls["real"]) == 1


@pytest.mark.parametrize("turn", ["generator", "critic"])
def test_clean_first_frame_of_ti2v_models(turn, monkeypatch):
    dmd = make_dmd(clean=True)
    calls, _ = watched(dmd, monkeypatch)
    batch = make_batch(dmd.generator.model, [4, 9])
    dmd.loss(turn, batch, 0)
    for call in calls["critic"] + calls["real"]:
        assert (call["sigma"][:, 0] == 0).all() and (call["sigma"][:, 1:] > 0).all()
        assert torch.equal(call["x"][:, 0], batch.first_latent[:, 0])


def test_levels_follow_the_law_of_the_spec(monkeypatch):
    """u uniform, warped with the shift, clamped to 0.02 .. 0.98 (G.1); another draw for the critic."""
    dmd = make_dmd()
    levels = {}
    for turn in ("generator", "critic"):
        batch = make_batch(dmd.generator.model, list(range(300)), 1)
        _, sigma, _ = dmd._noised(batch.latents, batch, 0, turn)
        levels[turn] = sigma[:, 0]
        assert sigma.min() >= 0.02 and sigma.max() == pytest.approx(0.98) and sigma.dtype == torch.float32
        assert levels[turn].median() == pytest.approx(warp(0.5, 5.0), abs=0.06)
    assert not torch.equal(levels["generator"], levels["critic"])


# ---- the critic's loss -----------------------------------------------------------------------------------------------
def test_critic_loss_uses_the_velocity_as_it_comes(monkeypatch):
    """Mean over the generated frames of (v - (noise - x))^2, never through clean latents and back (G.2, M-19)."""
    dmd = make_dmd()
    calls, made = watched(dmd, monkeypatch)
    batch = make_batch(dmd.generator.model, [4, 9])
    result = dmd.loss("critic", batch, 1)
    (call,), x = calls["critic"], made[0].latents
    noise = KeyedRNG(3).noise(1, "critic_noise", batch.indices, x.shape[1:])
    assert torch.equal(result.loss, (call["out"] - (noise - x))[:, 1:].square().mean())
    (grad,) = torch.autograd.grad(result.loss, call["out"], retain_graph=True)
    torch.testing.assert_close(grad[:, 1:], 2 * (call["out"] - noise + x)[:, 1:] / x[:, 1:].numel())
    assert (grad[:, 0] == 0).all()
    result.loss.backward()
    assert all(p.grad is None for p in dmd.generator.model.parameters())
    assert all(p.grad is not None for p in dmd.critic.parameters())
    assert calls["real"] == [] and not any(call["with_grad"] for call in calls["generator"])
    assert set(result.metrics) == {"critic_loss", "exit_step"}


def test_generator_turn_leaves_scores_without_gradient():
    dmd = make_dmd()
    dmd.loss("generator", make_batch(dmd.generator.model, [4]), 0).loss.backward()
    assert all(p.grad is None for p in [*dmd.critic.parameters(), *dmd.real.parameters()])
    assert not any(p.requires_grad for p in dmd.real.parameters())
    assert all(p.grad is not None for p in dmd.generator.model.parameters())


# ---- what is shared --------------------------------------------------------------------------------------------------
def test_critic_learns_from_the_generators_own_roll_out_once(monkeypatch):
    """In an iteration with a generator update nothing is rolled out twice, over several micro-batches as well."""
    dmd = make_dmd()
    calls, made = watched(dmd, monkeypatch)
    batches = [make_batch(dmd.generator.model, [0, 1]), make_batch(dmd.generator.model, [2, 3])]
    for batch in batches:
        dmd.loss("generator", batch, 0)
    count = len(calls["generator"])
    alone = make_dmd()
    for batch in batches:
        loss = dmd.loss("critic", batch, 0).loss
        torch.testing.assert_close(loss, alone.loss("critic", batch, 0).loss)  # the same videos as without sharing
    assert len(made) == 2 and len(calls["generator"]) == count and dmd._clips == {}
    dmd.loss("critic", batches[0], 0)  # used once
    assert len(made) == 3
    dmd.loss("critic", batches[0], 1)
    assert len(made) == 4 and made[-1].latents.grad_fn is None


def test_shared_roll_outs_hold_no_graph_and_do_not_outlive_their_step():
    dmd = make_dmd()
    dmd.loss("generator", make_batch(dmd.generator.model, [0]), 0)
    dmd.loss("generator", make_batch(dmd.generator.model, [1]), 0)
    assert not any(made.latents.requires_grad for made in dmd._clips.values()) and len(dmd._clips) == 2
    dmd.loss("critic", make_batch(dmd.generator.model, [2]), 1)
    assert dmd._clips == {}


def test_turns_are_one_generator_update_in_five():
    dmd = make_dmd()
    assert [len(dmd.turns(step)) for step in range(11)] == [2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 2]
    assert dmd.turns(0) == ["generator", "critic"] and dmd.turns(1) == ["critic"]
    assert [make_dmd(critic={"updates_per_generator": 1}).turns(step) for step in (0, 1)] == [
        ["generator", "critic"]
    ] * 2
    assert set(dmd.networks) == {"generator", "critic"}
    late = make_dmd(critic={"updates_per_generator": 2, "critic_warmup_steps": 3})
    assert [len(late.turns(step)) for step in range(8)] == [1, 1, 1, 2, 1, 2, 1, 2]


def test_later_blocks_of_fewer_levels_draw_an_exit_step_of_their_own(monkeypatch):
    """Each step of either list comes equally often, whatever the other list's draw."""
    dmd = make_dmd(rules=RULES.but(later_sigmas=(1.0, 0.6)))
    pairs = Counter(dmd.exits(step) for step in range(800))
    assert len(pairs) == 8 and min(pairs.values()) > 60
    assert all(dmd.exits(step)[0] == make_dmd().exits(step) for step in range(20))
    calls, _ = watched(dmd, monkeypatch)
    step = next(step for step in range(100) if dmd.exits(step) == (0, 1))
    dmd.loss("critic", make_batch(dmd.generator.model, [0]), step)
    counts = Counter(call["position"] for call in calls["generator"] if not call["commit"])
    assert [counts[start] for start in sorted(counts)] == [1, 2, 2]


def test_exit_step_is_one_number_for_all_blocks_samples_and_ranks(monkeypatch):
    dmd, another_rank, another_seed = make_dmd(), make_dmd(), make_dmd(seed=4)
    steps = [dmd.exit_step(step) for step in range(200)]
    assert steps == [another_rank.exit_step(step) for step in range(200)]
    assert set(steps) == {0, 1, 2, 3} and min(Counter(steps).values()) > 30
    assert steps != [another_seed.exit_step(step) for step in range(200)]
    calls, _ = watched(dmd, monkeypatch)
    for indices in ([0], [1, 2]):
        calls["generator"].clear()
        result = dmd.loss("generator", make_batch(dmd.generator.model, indices), 7)
        assert result.metrics["exit_step"] == steps[7]
        by_block = Counter(call["position"] for call in calls["generator"] if not call["commit"])
        assert by_block == dict.fromkeys((1, 3, 5), steps[7] + 1)
        with_grad = [call["sigma"][0].item() for call in calls["generator"] if call["with_grad"]]
        assert with_grad == pytest.approx([RULES.sigmas[steps[7]]] * 3)


@pytest.mark.parametrize("turn", ["generator", "critic"])
def test_draws_do_not_depend_on_how_the_batch_is_split(turn):
    """A batch of 4 equals 2 + 2: loss, metrics and gradient."""
    losses, gradients = [], []
    for parts in ([[3, 4, 5, 6]], [[3, 4], [5, 6]], [[3], [4], [5], [6]]):
        dmd = make_dmd()
        total = 0.0
        for part in parts:
            loss = dmd.loss(turn, make_batch(dmd.generator.model, part), 5).loss / len(parts)
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append([p.grad for p in dmd.networks[turn].parameters()])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_later_step_and_another_sample_see_other_noise():
    dmd = make_dmd()
    one = make_batch(dmd.generator.model, [3])
    losses = {step: dmd.loss("critic", one, step).loss.item() for step in (1, 2)}
    assert losses[1] != losses[2] and losses[1] == dmd.loss("critic", one, 1).loss.item()
    noise = dmd._roll_out_noise(make_batch(dmd.generator.model, [3, 4]), 1)
    parts = [noise(1, 3, 0), noise(1, 3, 1), noise(3, 5, 0), noise(3, 5, 1)]
    values = torch.cat([part.flatten(1) for part in parts], 0)
    assert len({tuple(row[:4].tolist()) for row in values}) == 8  # every block, step and sample its own


# ---- failure and timing ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("network", ["real", "critic", "generator"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_prediction_is_not_hidden(network, value, monkeypatch):
    dmd = make_dmd()
    model = dmd.generator.model if network == "generator" else getattr(dmd, network)
    forward = model.forward

    def broken(*args, **options):
        out = forward(*args, **options)
        spoil = torch.zeros_like(out)
        spoil[0, -1, 0, 0, 0] = value
        return out + spoil

    monkeypatch.setattr(model, "forward", broken)
    loss = dmd.loss("generator", make_batch(dmd.generator.model, [0, 1]), 0).loss
    assert not loss.isfinite()
    assert "must be finite" in nonfinite(Mesh(), 0, "generator", loss.item(), 1.0)


def test_phases_name_roll_out_and_scores():
    entered = []

    @contextmanager
    def phase(name):
        entered.append(name)
        yield

    dmd = make_dmd(phase=phase)
    batch = make_batch(dmd.generator.model, [0])
    dmd.loss("generator", batch, 0)
    assert entered == ["rollout", "scores"]
    dmd.loss("critic", batch, 0)
    assert entered[2:] == ["scores"]
    dmd.loss("critic", batch, 1)
    assert entered[3:] == ["rollout", "scores"]
