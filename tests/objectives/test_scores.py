"""When a teacher is guided, on numbers and in the loss of the student."""

import pytest
import torch
from test_dmd import FRAMES, make_dmd, watched
from tiny_batches import make_batch

from longtake.flow.schedule import training_sigma
from longtake.objectives.scores import Guidance

LEVELS = torch.tensor([0.2, 0.5, 0.9])


def asked(guidance, level=LEVELS, **options):
    """Velocities of a teacher that says 1 with the prompt and 3 without, and what it was told."""
    told = []

    def score(network, noisy, sigma, condition):
        told.append(condition)
        return torch.full_like(noisy, condition)

    sigma = level[:, None].repeat(1, 4)
    sigma[:, 0] = 0  # a clean first frame has no say
    found = guidance.velocity(score, None, torch.zeros(len(level), 4, 1, 1, 1), sigma, (1.0, 3.0), **options)
    assert all((row == row[0]).all() for row in found.flatten(1))
    return found[:, 0].flatten().tolist(), told


@pytest.mark.parametrize(
    ("interval", "values", "calls"),
    [
        (None, [-5.0, -5.0, -5.0], 2),  # 3 + 4 (1 - 3)
        ((0.3, 0.6), [1.0, -5.0, 1.0], 2),
        ((0.5, 0.9), [1.0, -5.0, -5.0], 2),  # its ends are inside
        ((0.6, 0.8), [1.0, 1.0, 1.0], 1),
    ],
)
def test_guidance_on_numbers(interval, values, calls):
    found, told = asked(Guidance(4.0, interval))
    assert found == pytest.approx(values) and told == [1.0, 3.0][:calls]


def test_all_ranks_make_the_same_calls_where_they_must():
    found, told = asked(Guidance(4.0, (0.6, 0.8)), always=True)
    assert found == [1.0, 1.0, 1.0] and told == [1.0, 3.0]
    assert asked(Guidance(1.0), always=True) == ([1.0, 1.0, 1.0], [1.0])


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.3, 0.6), (0.5, 1.0), (0.9, 0.98), (0.02, 0.98), (0.0, 0.01)])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_calls_are_the_mean_over_the_levels_that_are_drawn(interval, shift):
    levels = training_sigma((torch.arange(20000) + 0.5) / 20000, shift, 0.02, 0.98)
    inside = (levels >= interval[0]) & (levels <= interval[1])
    guidance = Guidance(4.0, interval)
    if interval[1] > 0.02:  # another one is refused
        assert guidance.calls(shift, 0.02, 0.98) == pytest.approx(1 + inside.double().mean().item(), abs=2e-4)
    assert guidance.calls(shift, 0.02, 0.98, always=True) == 2 and Guidance(1.0).calls(shift, 0.02, 0.98) == 1


def test_the_student_learns_as_guided_inside_and_as_unguided_outside(monkeypatch):
    """Samples of one batch on both sides of the interval: each gets the gradient of its side."""
    plain, unguided = make_dmd(), make_dmd(guidance=1.0)
    batch = make_batch(plain.generator.model, [4, 9, 2], FRAMES)
    level = plain._noised(batch.latents, batch, 0, "generator")[1][:, -1]
    low, high = level.min().item(), level.sort().values[1].item()  # two of three are inside
    mixed = make_dmd(guidance_interval=[low, high])

    def gradient(dmd):
        made = watched(dmd, monkeypatch)[1]
        loss = dmd.loss("generator", batch, 0).loss
        return torch.autograd.grad(loss, made[0].latents)[0]

    with_it, without, found = gradient(plain), gradient(unguided), gradient(mixed)
    for row in range(3):
        side = with_it if level[row] <= high else without
        torch.testing.assert_close(found[row], side[row], rtol=1e-5, atol=1e-9)
    assert not torch.equal(with_it, without)
    everywhere = gradient(make_dmd(guidance_interval=[0.0, 1.0]))
    assert torch.equal(everywhere, with_it)


@pytest.mark.parametrize("interval", [[0.5, 0.5], [0.6, 0.3], [0.99, 1.0], [0.0, 0.01]])
def test_an_interval_that_holds_no_level_is_refused(interval):
    with pytest.raises(ValueError, match=r"guidance_interval=.* must rise and meet \[sigma_min, sigma_max\]"):
        make_dmd(guidance_interval=interval)


def test_an_interval_without_guidance_is_refused():
    with pytest.raises(ValueError, match="guidance_interval=.* is read with guidance other than 1"):
        make_dmd(guidance_interval=[0.2, 0.8], guidance=1.0)
