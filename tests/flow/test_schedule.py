"""Noise levels, the path and the Euler sampler against closed forms (spec D, N.10)."""

import math

import pytest
import torch

from longtake.errors import ConfigError
from longtake.flow.path import add_noise, clean_from_velocity, guided, per_frame, velocity
from longtake.flow.sampler import euler
from longtake.flow.schedule import sampling_sigmas, training_sigma
from longtake.plan import FlowConfig, warp


# Spec D, the table of warped lists on Wan's 0..1000 clock.
@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (3, [1000, 900, 750, 500]),
        (5, [1000, 937.5, 833.3333, 625]),
        (8, [1000, 960, 888.8889, 727.2727]),
        (1, [1000, 750, 500, 250]),
    ],
)
def test_warped_lists_are_those_of_the_published_table(shift, expected):
    clock = [1000 * sigma for sigma in FlowConfig(steps=[1, 0.75, 0.5, 0.25], shift=shift).sigmas]
    assert clock == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shift", [0.5, 1, 3, 5, 8])
def test_the_warp_keeps_the_ends_exactly_and_rises(shift):
    assert warp(0.0, shift) == 0.0 and warp(1.0, shift) == 1.0
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (warp(u, shift).diff() > 0).all()


@pytest.mark.parametrize(
    ("steps", "rule"),
    [
        ([], "at least 1 item"),
        ([0.75, 0.5], "must descend strictly from 1"),
        ([1, 0.5, 0.5], "must descend strictly from 1"),
        ([1, 0.5, 0.75], "must descend strictly from 1"),
        ([1, 0.5, 0], "must be above 0"),
        ([1, -0.5], "must be above 0"),
        ([1000, 750], "divide them by 1000"),
    ],
)
@pytest.mark.parametrize("name", ["steps", "later_steps"])
def test_steps_that_make_no_schedule_are_refused(steps, rule, name):
    with pytest.raises(ConfigError, match=f"{name}.*{rule}"):
        FlowConfig(**{name: steps})


def test_sampling_grid_starts_at_noise_and_ends_at_exactly_zero():
    sigmas = sampling_sigmas(4, 5.0)
    assert sigmas == pytest.approx([1, 0.9375, 0.833333, 0.625, 0], abs=1e-6)
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0 and len(sampling_sigmas(50, 3.0)) == 51


def test_training_levels_are_warped_clamped_float32():
    u = torch.tensor([0.0, 0.001, 0.5, 0.999, 1.0])
    sigma = training_sigma(u, 5.0, 0.02, 0.98)
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma, torch.tensor([0.02, 0.02, 5 / 6, 0.98, 0.98]))
    assert training_sigma(torch.zeros(1), 5.0).item() == 0.0  # t = 0 is sigma = 0 (M-32)
    assert training_sigma(torch.ones(1), 5.0).item() == 1.0
    assert training_sigma(torch.tensor([-0.1, 1.1]), 5.0).tolist() == [0.0, 1.0]


def tensors(*shape, number=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(number)]


@pytest.mark.parametrize("per_entry", [False, True])
def test_path_round_trip(per_entry):
    clean, noise = tensors(2, 3, 4, 2, 2)
    sigma = torch.tensor([0.3, 0.9]) if not per_entry else torch.tensor([[0.0, 0.5, 1.0], [0.1, 0.2, 0.3]])
    noisy = add_noise(clean, noise, sigma)
    torch.testing.assert_close(clean_from_velocity(noisy, velocity(clean, noise), sigma), clean)
    # the velocity is the derivative of the path
    step = 1e-2
    torch.testing.assert_close(
        (add_noise(clean, noise, sigma + step) - noisy) / step, velocity(clean, noise), rtol=0, atol=1e-3
    )
    assert per_frame(sigma).shape == ((2, 3, 1, 1, 1) if per_entry else (2, 1, 1, 1, 1))


def test_sigma_zero_is_exactly_clean_and_one_exactly_noise():
    clean, noise = tensors(2, 3, 4, 2, 2)
    levels = torch.tensor([[0.0, 0.5, 1.0]]).expand(2, -1)
    noisy = add_noise(clean, noise, levels)
    assert torch.equal(noisy[:, 0], clean[:, 0]) and torch.equal(noisy[:, 2], noise[:, 2])


def test_the_path_is_float32_whatever_comes_in():
    clean, noise = tensors(1, 2, 2, 2, 2)
    sigma = torch.tensor([0.937509], dtype=torch.float64)
    for out in (
        add_noise(clean.bfloat16(), noise.bfloat16(), sigma),
        velocity(clean.bfloat16(), noise.bfloat16()),
        clean_from_velocity(clean.bfloat16(), noise.bfloat16(), sigma),
    ):
        assert out.dtype == torch.float32


def test_guidance_is_the_usual_w():
    conditional, unconditional = tensors(2, 3)
    assert torch.equal(guided(conditional, unconditional, 0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 1), conditional)
    # the published form cond + g (cond - uncond) with g = 3 is w = 4 (spec D)
    torch.testing.assert_close(
        guided(conditional, unconditional, 4.0), conditional + 3.0 * (conditional - unconditional)
    )


def test_euler_is_exact_on_the_straight_field():
    """With the velocity noise - clean everywhere, any grid that ends at 0 gives the clean latents."""
    clean, noise = tensors(2, 3, 4)
    seen = []

    def field(x, sigma):
        seen.append(sigma.clone())
        return noise - clean

    for sigmas in (sampling_sigmas(1, 1.0), sampling_sigmas(7, 5.0)):
        seen.clear()
        torch.testing.assert_close(euler(field, noise, sigmas), clean, rtol=0, atol=1e-5)
        assert [s.shape for s in seen] == [(2,)] * (len(sigmas) - 1)
        assert [s[0].item() for s in seen] == pytest.approx(sigmas[:-1])


def test_euler_converges_on_a_field_with_a_known_integral():
    """dx/dsigma = x from sigma 1 to 0 is a factor of 1/e; the error of first order halves with the step."""
    x = torch.tensor([[1.0], [-2.0]])
    errors = []
    for count in (50, 100, 200):
        end = euler(lambda x, sigma: x, x, sampling_sigmas(count, 1.0))
        errors.append((end - x * math.exp(-1)).abs().max().item())
    assert errors[-1] < 3e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_euler_keeps_no_graph():
    weight = torch.ones(1, requires_grad=True)
    assert not euler(lambda x, sigma: x * weight, torch.ones(1, 1), [1.0, 0.0]).requires_grad
