"""The anchor of latent statistics: closed forms, what it adds to distribution matching, and when it is off."""

from dataclasses import replace

import pytest
import torch
from test_dmd import FRAMES, make_dmd
from test_long_tuning import HORIZON, settings_of
from tiny_batches import make_batch
from tiny_codec import TinyCodec
from tiny_models import make_tiny_model
from tiny_objectives import parts_of

from longtake.config.stage import TOY_ASSETS
from longtake.encoders.vae import VideoVAE
from longtake.errors import TrainingError
from longtake.evaluation.rows import to_videos
from longtake.objectives.anchor import Anchor, Statistics, anchor_loss, deviation_ratio
from longtake.objectives.dmd_keys import CriticConfig
from longtake.objectives.long_tuning import LongTuning
from longtake.toy.world import sample_world


@pytest.fixture
def real():
    return torch.randn(3, 5, 4, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()


def anchor(made, real):
    return anchor_loss(Statistics.of(made), Statistics.of(real))


def saturation(vae, latents):
    """Mean distance of the strongest colour of a pixel from the weakest, of decoded latents."""
    with torch.no_grad():
        pixels = vae.decode(latents.detach())
    return (pixels.amax(2) - pixels.amin(2)).mean()


def about_the_mean(x, scale):
    mean = x.mean((1, 3, 4), keepdim=True)
    return mean + scale * (x - mean)


@pytest.mark.parametrize("delta", [0.5, -0.25])
def test_a_shift_costs_half_of_it(real, delta):
    assert anchor(real + delta, real).item() == pytest.approx(abs(delta) / 2, rel=1e-5)
    one = real.clone()
    one[:, :, 1] += delta  # of four channels
    assert anchor(one, real).item() == pytest.approx(abs(delta) / 8, rel=1e-5)


@pytest.mark.parametrize("scale", [0.8, 1.5, 0.0])
def test_a_scale_about_the_mean_costs_half_of_what_it_adds_to_the_deviation(real, scale):
    biased = (real - real.mean((1, 3, 4), keepdim=True)).square().mean((1, 3, 4)).sqrt()
    made = about_the_mean(real, scale)
    assert anchor(made, real).item() == pytest.approx(abs(scale - 1) * biased.mean().item() / 2, rel=1e-5)
    ratio = deviation_ratio(Statistics.of(made), Statistics.of(real))
    assert ratio.item() == pytest.approx(scale, rel=1e-5, abs=1e-6)


def test_it_is_zero_for_equal_statistics_in_any_order_of_frames_and_pixels(real):
    assert anchor(real, real).item() == 0
    other = about_the_mean(real, 1.3)[:, [3, 0, 4, 1, 2]].flip(-1)
    torch.testing.assert_close(anchor(other, real), anchor(about_the_mean(real, 1.3), real))
    assert anchor(real[:, [3, 0, 4, 1, 2]].flip(-2), real).item() < 1e-6


def test_it_is_of_each_sample_and_channel(real):
    """Not of the batch: two samples off by as much in opposite ways do not make up for each other."""
    offsets = torch.tensor([0.5, -0.5, 0.0]).view(3, 1, 1, 1, 1)
    assert anchor(real + offsets, real).item() == pytest.approx(0.5 * 1 / 3, rel=1e-5)
    parts = [anchor((real + offsets)[k : k + 1], real[k : k + 1]) for k in range(3)]
    torch.testing.assert_close(sum(parts) / 3, anchor(real + offsets, real))


def test_its_gradient_pulls_and_goes_into_what_was_made_alone(real):
    made = (about_the_mean(real, 1.2) + 0.5).requires_grad_()
    real.requires_grad_()
    anchor(made, real.detach()).backward()
    # of the mean: 1/2 sign / (B C) spread over the F H W numbers of a channel; of the deviation nothing on average
    count = 5 * 6 * 2
    torch.testing.assert_close(made.grad.mean((1, 3, 4)), torch.full((3, 4), 0.5 / 12 / count))
    assert real.grad is None
    with torch.no_grad():
        assert anchor(made - 0.1 * made.grad, real) < anchor(made, real)


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_a_video_that_fades_is_pulled_back_to_the_first_window(real, scale):
    """Faded (or gaudy) by `scale`: means and deviations. A step of r against the gradient, in closed form, moves each
    mean by r / (2 B C n) towards the real one, and each deviation by as much; so it goes until both are there.
    """
    made, batch_channels, count = scale * real, 3 * 4, 5 * 6 * 2
    target, rate = Statistics.of(real), 4.0
    pulls = []
    for _ in range(2):
        made = made.requires_grad_()
        before = Statistics.of(made)
        (gradient,) = torch.autograd.grad(anchor_loss(before, target), made)
        made = (made - rate * gradient).detach()
        after = Statistics.of(made)
        step = rate * 0.5 / batch_channels / count
        for name in ("mean", "deviation"):
            now, then, goal = (getattr(each, name) for each in (before, after, target))
            torch.testing.assert_close(then, now + step * (goal - now).sign(), rtol=1e-4, atol=1e-6)
        pulls.append(anchor_loss(after, target) - anchor_loss(before, target))
    assert all(pull < 0 for pull in pulls)
    towards = Statistics.of(made).deviation - Statistics.of(scale * real).deviation
    assert (towards > 0).all() if scale < 1 else (towards < 0).all()


@pytest.mark.slow
def test_a_pale_video_has_less_deviation_in_latents_and_is_given_its_colours_back():
    """Of the packaged VAE: the law holds latents, and what people see of it are colours."""
    vae = VideoVAE.load(TOY_ASSETS / "vae")
    pixels = to_videos([sample_world(7, world).render(9) for world in range(4)], torch.device("cpu"))
    pale = pixels.mean(2, keepdim=True) + 0.8 * (pixels - pixels.mean(2, keepdim=True))
    with torch.no_grad():
        whole, made = vae.encode(pixels), vae.encode(pale)
    target, before = Statistics.of(whole), made
    for _ in range(60):
        made = made.requires_grad_()
        (gradient,) = torch.autograd.grad(anchor_loss(Statistics.of(made), target), made)
        made = (made - 0.02 * made.numel() * gradient).detach()
    ratios = [deviation_ratio(Statistics.of(latents), target) for latents in (before, made)]
    assert ratios[0] < 0.96 and ratios[1] == pytest.approx(1, abs=0.01)
    first, last, right = (saturation(vae, latents) for latents in (before, made, whole))
    assert first < 0.93 * right and last - first > 0.5 * (right - first)


def test_a_constant_channel_has_no_gradient_that_is_not_finite(real):
    made = torch.zeros_like(real).requires_grad_()
    anchor(made, real).backward()
    assert made.grad.isfinite().all()


# ---- beside distribution matching --------------------------------------------------------------------------------
def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [None if grad is None else grad for grad in found]


def test_it_adds_its_loss_to_the_students_and_nothing_to_the_critics():
    """Compared is the whole window, given picture included, with as much of the row's own clip, which may be longer."""
    plain, dmd = make_dmd(), make_dmd(anchor=Anchor(weight=3.0))
    batch = make_batch(dmd.generator.model, [4, 9], FRAMES + 4)
    found, alone = dmd.loss("generator", batch, 3), plain.loss("generator", batch, 3)
    made = dmd._roll_out(batch, 3, with_grad=True).latents
    expected = anchor(made, batch.latents[:, :FRAMES])
    torch.testing.assert_close(found.metrics["anchor_loss"], expected.detach())
    torch.testing.assert_close(found.loss, alone.loss + 3.0 * expected)
    assert found.metrics["generator_loss"] == alone.metrics["generator_loss"]
    assert found.metrics["deviation_ratio"] > 0 and "deviation_ratio" not in alone.metrics
    pulls = gradients(expected, dmd.generator.model)
    model = dmd.generator.model
    for mine, matched, pulled in zip(gradients(found.loss, model), gradients(alone.loss, plain.generator.model), pulls):
        torch.testing.assert_close(mine, matched + 3.0 * pulled, rtol=1e-4, atol=1e-6)
    assert max(pull.abs().max() for pull in pulls) > 1e-5
    assert torch.equal(dmd.loss("critic", batch, 3).loss, plain.loss("critic", batch, 3).loss)


def test_rows_whose_own_clip_changes_within_the_window_count_for_nothing():
    """Of two such rows the second one's statistics are those of another caption's beginning as well."""
    dmd = make_dmd(anchor=Anchor(weight=1.0))
    batch = make_batch(dmd.generator.model, [4, 9], FRAMES + 4)
    batches = [replace(batch, switch_frames=frames) for frames in ((None, FRAMES - 2), (None, FRAMES), ())]
    with torch.no_grad():
        changed, later, never = (dmd.loss("generator", each, 0).metrics["anchor_loss"] for each in batches)
        made = dmd._roll_out(batch, 0, with_grad=False).latents
    torch.testing.assert_close(changed, anchor(made[:1], batch.latents[:1, :FRAMES]) / 2)
    assert later == never > changed


def test_rows_without_clips_are_refused():
    dmd = make_dmd(anchor=Anchor(weight=1.0))
    with pytest.raises(TrainingError, match="the anchor learns from videos and its data have none"):
        dmd.loss("generator", make_batch(dmd.generator.model, [4], FRAMES, videos=False), 0)


def make_long(switches=(), **settings):
    networks = [make_tiny_model(i2v=True, seed=k) for k in range(3)]
    critic = CriticConfig(updates_per_generator=1)
    settings = settings_of([3], switches, critic=critic, **settings)
    return LongTuning(parts_of(*networks, num_frames=HORIZON, codec=TinyCodec(networks[0].config)), settings)


def test_every_window_is_held_to_the_beginning_of_the_rows_own_clip(monkeypatch):
    long, plain = make_long(anchor=Anchor(weight=2.0)), make_long()
    batch = make_batch(long.generator.model, [4, 9], HORIZON)
    windows, roll_out = [], long._roll_out
    monkeypatch.setattr(long, "_roll_out", lambda *a, **k: windows.append(roll_out(*a, **k)) or windows[-1])
    for step in range(3):
        found, alone = (each.loss("generator", batch, step) for each in (long, plain))
        expected = anchor(windows[-1].latents, batch.latents)
        torch.testing.assert_close(found.loss, alone.loss + 2.0 * expected)
        assert windows[-1].latents.shape[1] == HORIZON and expected > 0.01
        found.loss.backward()


@pytest.mark.parametrize(("switch", "held"), [(5, 0), (9, 1), (11, 2)])
def test_it_is_off_from_the_window_on_in_which_the_prompt_switches(switch, held):
    """Windows of latents up to 7, 11 and 15: a video that shows something else has other colours, and rightly so."""
    long, plain = make_long([switch], anchor=Anchor(weight=2.0)), make_long([switch])
    batch = make_batch(long.generator.model, [4], HORIZON)
    batch = type(batch)(**{**vars(batch), "later_text": batch.condition.text.flip(-1)})
    with torch.no_grad():
        pairs = [[each.loss("generator", batch, step) for each in (long, plain)] for step in range(3)]
    assert [found.loss.item() > alone.loss.item() for found, alone in pairs] == [step < held for step in range(3)]
    assert [torch.equal(found.loss, alone.loss) for found, alone in pairs] == [step >= held for step in range(3)]
    assert ["anchor_loss" in found.metrics for found, _ in pairs] == [step < held for step in range(3)]
