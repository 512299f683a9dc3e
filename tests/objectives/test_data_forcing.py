"""Data-forcing: which rows the teacher sees real clips of, the fixed point of a Gaussian toy, and long videos."""

from dataclasses import replace
from math import pi, sqrt
from types import SimpleNamespace

import pytest
import torch
from test_anchor import make_long
from test_dmd import FRAMES, make_dmd, watched
from test_long_tuning import HORIZON
from tiny_batches import make_batch, record

from longtake.objectives.data_forcing import DataForcing
from longtake.rng import KeyedRNG
from longtake.rollout.self_forcing import RollOut


def forced_rows(indices, step, share, seed=3):
    return (KeyedRNG(seed).uniform(step, "data_forcing", indices) < share).tolist()


def test_the_teacher_alone_sees_real_clips_noised_alike_in_a_share_of_the_rows(monkeypatch):
    share, indices = 0.5, [0, 1, 2]
    dmd = make_dmd(data_forcing=DataForcing(share=share))
    calls, made = watched(dmd, monkeypatch)
    batch = make_batch(dmd.generator.model, indices, FRAMES + 4)
    found = dmd.loss("generator", batch, 2)
    (critic,), teacher, rows = calls["critic"], calls["real"], forced_rows(indices, 2, share)
    assert set(rows) == {True, False}
    noise = KeyedRNG(3).noise(2, "generator_noise", indices, (FRAMES, *batch.latents.shape[2:]))
    level = critic["sigma"][:, :, None, None, None]
    for call in teacher:
        assert torch.equal(call["sigma"], critic["sigma"])
        for k, forced in enumerate(rows):
            video = batch.latents[k, :FRAMES] if forced else made[0].latents[k].detach()
            torch.testing.assert_close(call["x"][k], (1 - level[k]) * video + level[k] * noise[k])
    plain = make_dmd().loss("generator", batch, 2)
    assert found.loss != plain.loss and "deviation_ratio" in found.metrics and "anchor_loss" not in found.metrics
    assert torch.equal(dmd.loss("critic", batch, 2).loss, make_dmd().loss("critic", batch, 2).loss)


def test_rows_are_drawn_by_update_and_sample():
    counts = [sum(forced_rows(range(400), step, 0.3)) for step in range(2)]
    assert all(90 < count < 150 for count in counts)
    assert forced_rows(range(40), 0, 0.3) != forced_rows(range(40), 1, 0.3)


def test_loss_does_not_depend_on_how_the_batch_is_split():
    """Micro-batches and ranks: each row's share of loss and gradient is its own, also that of its statistics."""
    totals = []
    for parts in ([[3, 4, 5, 6]], [[3, 4], [5, 6]]):
        dmd = make_dmd(data_forcing=DataForcing(share=0.5), anchor={"weight": 0.5})
        losses = [dmd.loss("generator", make_batch(dmd.generator.model, part), 5).loss / len(parts) for part in parts]
        sum(losses).backward()
        totals.append((sum(losses).item(), [p.grad for p in dmd.generator.model.parameters()]))
    assert totals[1][0] == pytest.approx(totals[0][0], rel=1e-5)
    for a, b in zip(totals[0][1], totals[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_of_a_long_video_its_first_window_alone_is_a_pair(monkeypatch):
    """Later windows begin with another picture than the row's clip does."""
    long = make_long(data_forcing=DataForcing(share=0.5))
    indices = [4, 9]
    batch = make_batch(long.generator.model, indices, HORIZON)
    critic, teacher = record(long.critic, monkeypatch), record(long.real, monkeypatch)
    with torch.no_grad():
        for step in range(2):
            long.loss("generator", batch, step)
    same = [[torch.equal(a, b) for a, b in zip(one["x"], other["x"])] for one, other in zip(critic, teacher[::2])]
    assert same[0] == [not forced for forced in forced_rows(indices, 0, 0.5)] and False in same[0]
    assert all(same[1]) and any(forced_rows(indices, 1, 0.5))


# ---- Gaussians: where it ends ------------------------------------------------------------------------------------
SIGMA, ROWS = 0.4, 192


def shrink(deviation):
    """Factor k of the exact clean prediction k y of a Gaussian of this deviation, noised at SIGMA."""
    signal = (1 - SIGMA) * deviation
    return signal * deviation / (signal**2 + SIGMA**2)


class Exact:
    """The exact score of a Gaussian, as the velocity that Dmd asks for."""

    def __init__(self, deviation):
        self.deviation = deviation

    def __call__(self, noisy, sigma, condition):
        return (noisy - shrink(self.deviation) * noisy) / sigma[:, :, None, None, None]


def pull(ratio, correlation, share):
    """dL/da of a student a z beside clips of deviation 1, of which the correlation with z is given; and the share of
    rows that were forced.
    """
    dmd = make_dmd(guidance=1.0, sigma_min=SIGMA, sigma_max=SIGMA + 1e-6, data_forcing=DataForcing(share=share))
    indices = list(range(ROWS))
    drawn = torch.randn(2, ROWS, FRAMES, 2, 2, 4, generator=torch.Generator().manual_seed(1))
    z, clip = drawn[0], correlation * drawn[0] + sqrt(1 - correlation**2) * drawn[1]
    scale = torch.tensor(ratio, requires_grad=True)
    dmd._roll_out = lambda *args, **options: RollOut(scale * z, 0)
    dmd.critic, dmd.real = Exact(ratio), Exact(1.0)
    batch = replace(make_batch(dmd.generator.model, [0]), indices=indices, latents=clip)
    (gradient,) = torch.autograd.grad(dmd.loss("generator", batch, 0).loss, scale)
    return SimpleNamespace(gradient=gradient.item(), forced=sum(forced_rows(indices, 0, share)) / ROWS)


def expected(a, correlation, share):
    """The same in closed form: E[(x_fake - x_real) z] over the mean |x - x_real| of each kind of row."""
    alpha, fake, real = 1 - SIGMA, shrink(a), shrink(1.0)
    noise = (real * SIGMA) ** 2
    own = sqrt(2 / pi) * sqrt((a - real * alpha * a) ** 2 + noise)
    other = sqrt(2 / pi) * sqrt(
        (a - real * alpha * correlation) ** 2 + (real * alpha) ** 2 * (1 - correlation**2) + noise
    )
    return alpha * ((1 - share) * (fake - real) * a / own + share * (fake * a - real * correlation) / other)


def root(function, low=0.02, high=1.6):
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return middle


def test_paired_rows_end_at_the_deviation_of_the_data():
    """The spec's fixed point: at ratio 1 nothing moves, in no row, and from both sides it is where the student goes."""
    assert pull(1.0, 1.0, 0.5).gradient == pytest.approx(0, abs=1e-6)
    assert pull(0.8, 1.0, 0.5).gradient < -0.01 and pull(1.25, 1.0, 0.5).gradient > 0.01
    assert root(lambda a: expected(a, 1.0, 0.5)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("correlation", "least", "most"), [(0.5, 0.7, 0.9), (0.0, 0.2, 0.6)])
def test_what_is_not_paired_takes_variance(correlation, least, most):
    """At the closed form's fixed point the real loss has no gradient, and it leads there from both sides."""
    share = pull(1.0, correlation, 0.5).forced
    ratio = root(lambda a: expected(a, correlation, share))
    assert least < ratio < most
    assert pull(0.93 * ratio, correlation, 0.5).gradient < 0 < pull(1.07 * ratio, correlation, 0.5).gradient
    for a in (0.5 * ratio, 1.0):
        found = pull(a, correlation, 0.5).gradient
        assert found == pytest.approx(expected(a, correlation, share), rel=0.06)
