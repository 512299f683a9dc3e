"""Scores of long videos in their context: what causal networks are shown, and the loss that follows from it."""

from dataclasses import replace

import pytest
import torch
from test_anchor import make_long
from test_long_tuning import HORIZON, NEW
from test_passes import clips_of, counted, total
from tiny_batches import RULES, make_batch, record
from tiny_models import HEIGHT, WIDTH, make_tiny_model

from longtake.objectives.anchor import Anchor, Statistics, anchor_loss
from longtake.objectives.in_context import ContextScores, score_in
from longtake.rng import KeyedRNG

HISTORY = 4  # as the window keeps beside the sink
IN_CONTEXT = {"context_scores": ContextScores(history_frames=HISTORY, sigma=0.25)}


@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize("targets", [4, 8])
def test_the_packed_pass_is_teacher_forcing_of_the_last_frames(rope, targets):
    """Beyond the window too, where the sink is seen at several distances."""
    plan, frames = RULES.but(rope=rope), 9
    model = make_tiny_model(i2v=True)
    batch = make_batch(model, [4, 9], frames)
    noisy, levels = torch.randn_like(batch.latents), torch.full((2, frames), 0.3)
    level = torch.full((2, frames), 0.7)
    layout = plan.replay_layout(0, frames - targets, frames)
    with torch.no_grad():
        whole = model(
            torch.cat([batch.latents, noisy], 1),
            torch.cat([levels, level], 1),
            batch.condition,
            plan.teacher_forcing_layout(frames),
        )[:, -targets:]
        mine = score_in(batch.latents, levels, layout, targets)(model, noisy, level, batch.condition)
    assert layout.num_entries == frames - 2 + targets and mine.shape == noisy.shape
    torch.testing.assert_close(mine[:, -targets:], whole, rtol=1e-5, atol=1e-5)
    assert (mine[:, :-targets] == 0).all()


def watched(long, monkeypatch):
    windows, roll_out = [], long._roll_out
    monkeypatch.setattr(long, "_roll_out", lambda *a, **k: windows.append(roll_out(*a, **k)) or windows[-1])
    return windows


def test_later_windows_are_the_sink_the_latest_frames_and_the_new_ones(monkeypatch):
    """Of the same videos as without: how they are scored changes no frame, and nothing is decoded any more."""
    long, plain = make_long(**IN_CONTEXT), make_long()
    batch = make_batch(long.generator.model, [4, 9], HORIZON)
    mine, theirs = watched(long, monkeypatch), watched(plain, monkeypatch)
    with torch.no_grad():
        for step in range(3):
            long.loss("critic", batch, step), plain.loss("critic", batch, step)
    video = torch.cat([theirs[0].latents, *(window.latents[:, -NEW:] for window in theirs[1:])], 1)
    torch.testing.assert_close(mine[0].latents, video[:, :HORIZON])
    for window, start in zip(mine[1:], (HORIZON, HORIZON + NEW)):
        expected = torch.cat([video[:, :1], video[:, start - HISTORY : start + NEW]], 1)
        torch.testing.assert_close(window.latents, expected)
        assert window.generated.tolist() == [False] * (1 + HISTORY) + [True] * NEW
        assert torch.equal(window.condition.frames, batch.condition.frames)
    assert long.codec.decoded == [[]] and long.codec.pictures == []


@pytest.mark.parametrize("step", [0, 1])
def test_loss_is_that_of_the_new_frames_after_the_noised_past(step, monkeypatch):
    """Recomputed in float64 from what the networks were given and gave: picture clean, the rest of the past at its
    level, one level for the window; no gradient into the past.
    """
    long = make_long(**IN_CONTEXT)
    indices = [4, 9]
    batch = make_batch(long.generator.model, indices, HORIZON)
    with torch.no_grad():
        for before in range(step):
            long.loss("critic", batch, before)
    windows, critic, teacher = (
        watched(long, monkeypatch),
        record(long.critic, monkeypatch),
        record(long.real, monkeypatch),
    )
    result = long.loss("generator", batch, step)
    x, new = windows[0].latents, NEW if step else HORIZON - 1
    frames, shape = x.shape[1] - RULES.block_frames, x.shape[1:]  # nobody would see the last block clean
    draws = KeyedRNG(3)
    context, noise = (draws.noise(step, f"generator_{name}", indices, shape) for name in ("context", "noise"))
    for call in (critic[0], *teacher):
        assert call["x"].shape[1] == frames + new
        assert torch.equal(call["x"][:, 0], batch.first_latent[:, 0]) and (call["sigma"][:, 0] == 0).all()
        torch.testing.assert_close(call["x"][:, 1:frames], (0.75 * x + 0.25 * context)[:, 1:frames].detach())
        assert (call["sigma"][:, 1:frames] == 0.25).all()
        level = call["sigma"][:, frames:]
        assert (level == level[:, :1]).all()
        bare = level[:, :, None, None, None]
        target = (1 - bare) * x[:, -new:] + bare * noise[:, -new:]
        torch.testing.assert_close(call["x"][:, frames:], target.detach())
        assert call["mask"] is not None and not call["with_grad"]
    noisy, sigma = critic[0]["x"][:, frames:].double(), critic[0]["sigma"][:, frames:, None, None, None].double()
    fake, cond, uncond = (noisy - sigma * call["out"].double()[:, frames:] for call in (critic[0], *teacher))
    real = uncond + long.settings.guidance * (cond - uncond)
    gradient = (fake - real) / (x[:, -new:].double() - real).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(result.loss.double(), 0.5 * gradient.square().mean(), rtol=1e-4, atol=0)
    (found,) = torch.autograd.grad(result.loss, x, retain_graph=True)
    torch.testing.assert_close(found[:, -new:].double(), gradient / gradient.numel(), rtol=1e-3, atol=1e-8)
    assert (found[:, :-new] == 0).all()


def test_the_critic_learns_from_the_same_packed_passes(monkeypatch):
    long = make_long(**IN_CONTEXT)
    batch = make_batch(long.generator.model, [4, 9], HORIZON)
    with torch.no_grad():
        long.loss("critic", batch, 0)
    windows, calls = watched(long, monkeypatch), record(long.critic, monkeypatch)
    result = long.loss("critic", batch, 1)
    x = windows[0].latents
    noise = KeyedRNG(3).noise(1, "critic_noise", batch.indices, x.shape[1:])
    expected = (calls[0]["out"][:, -NEW:] - (noise - x)[:, -NEW:]).square().mean()
    torch.testing.assert_close(result.loss, expected)
    result.loss.backward()
    assert all(p.grad is None for p in long.generator.model.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in long.critic.parameters())


def test_the_past_is_seen():
    """Another past of the same window is another score: what a network that sees the window alone cannot tell."""
    model = make_tiny_model(i2v=True)
    batch = make_batch(model, [4], 9)
    layout, levels = RULES.replay_layout(0, 9 - NEW, 9), torch.zeros(1, 9)
    other = batch.latents.clone()
    other[:, 3:5] += 1
    asked = model, torch.randn(1, 9, model.config.out_channels, HEIGHT, WIDTH), torch.full((1, 9), 0.5), batch.condition
    with torch.no_grad():
        one, two = (score_in(context, levels, layout, NEW)(*asked) for context in (batch.latents, other))
    assert (one - two)[:, -NEW:].abs().max() > 1e-3


def test_the_anchor_compares_the_new_frames_alone(monkeypatch):
    """With the clip's frames at the same places: its first one is a picture, which a later section has none of."""
    long, plain = make_long(anchor=Anchor(weight=2.0), **IN_CONTEXT), make_long(**IN_CONTEXT)
    batch = make_batch(long.generator.model, [4], HORIZON)
    windows = watched(long, monkeypatch)
    with torch.no_grad():
        pairs = [[each.loss("generator", batch, step).loss for each in (long, plain)] for step in range(2)]
    for (found, alone), window, section in zip(pairs, windows, (slice(None), slice(-NEW, None))):
        mine, own = (Statistics.of(video[:, section]) for video in (window.latents, batch.latents))
        torch.testing.assert_close(found, alone + 2.0 * anchor_loss(mine, own))


def test_a_section_like_the_clip_costs_nothing(monkeypatch):
    """What goes on as the row's own clip does is not pulled anywhere, though its picture is of other statistics."""
    long, chunk = make_long(anchor=Anchor(weight=2.0), **IN_CONTEXT), 1
    batch = make_batch(long.generator.model, [4], HORIZON)
    batch.latents[:, 0] *= 3
    with torch.no_grad():
        long.loss("critic", batch, chunk - 1)
        made = long._roll_out(batch, chunk, with_grad=False)
    perfect = torch.cat([made.latents[:, :-NEW], batch.latents[:, -NEW:]], 1).requires_grad_()
    monkeypatch.setattr(long, "_roll_out", lambda *_, **__: replace(made, latents=perfect))
    found = long.loss("generator", batch, chunk).metrics
    assert found["anchor_loss"] == 0 and found["deviation_ratio"] == 1


@pytest.mark.parametrize("step", [0, 1])
def test_what_it_costs_is_counted(step):
    long = make_long(**IN_CONTEXT)
    batch, size = make_batch(long.generator.model, [4, 9], HORIZON), long.critic.config
    with torch.no_grad():
        for before in range(step):
            long.loss("critic", batch, before)
    found = long.passes(step, clips_of(long))
    ran = sum(counted(lambda turn=turn: long.loss(turn, batch, step))[0] for turn in long.turns(step))
    assert ran == total(found, size, "rollout", "scores")
