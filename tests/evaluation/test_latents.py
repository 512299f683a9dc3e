"""What latents and image embeddings tell of a video, against values that are known."""

import numpy as np
import pytest
import torch

from longtake.condition import pixel_frames
from longtake.errors import ShapeError
from longtake.evaluation.latents import LATENT_METRICS, LatentMeter, in_pixel_frames
from longtake.evaluation.likeness import LIKENESS_METRICS, LikenessMeter


def clip(frames=12, channels=3, seed=0):
    return torch.randn(frames, channels, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shifts(latents, window=4, num_frames=None, split=(5,)):
    meter = LatentMeter()
    for part in torch.tensor_split(latents, split):
        meter.add(part)
    assert meter.num_frames == len(latents)
    found = meter.shifts(window, num_frames)
    assert tuple(found) == LATENT_METRICS
    return found.values()


def repeated(window, times):
    return window.repeat(times, 1, 1, 1)


def test_what_repeats_its_first_window_has_no_shift():
    mean, deviation = shifts(repeated(clip(4), 3))
    assert len(mean) == 12 and np.abs(mean).max() < 1e-12 and np.abs(deviation).max() < 1e-7


def test_an_added_constant_is_a_shift_of_the_mean_alone():
    later = repeated(clip(4), 3)
    later[8:] += torch.tensor([0.5, -1.0, 0.0]).view(3, 1, 1)
    mean, deviation = shifts(later)
    assert mean[-1] == pytest.approx(0.5) and deviation[-1] == pytest.approx(0, abs=1e-7)
    # The window that ends one frame after the change holds it in one of its four frames.
    assert mean[8] == pytest.approx(0.5 / 4) and np.abs(mean[:8]).max() < 1e-12


def test_a_scale_about_the_mean_is_a_shift_of_the_deviation_alone():
    first = clip(4)
    centre = first.mean((0, 2, 3), keepdim=True)
    mean, deviation = shifts(torch.cat([first, centre + 1.5 * (first - centre)]))
    spread = first.std((0, 2, 3), correction=0).mean()
    assert mean[-1] == pytest.approx(0, abs=1e-12) and deviation[-1] == pytest.approx(float(0.5 * spread))


def test_the_order_of_frames_in_a_window_does_not_count():
    latents = clip(8)
    other = torch.cat([latents[[2, 0, 3, 1]], latents[[5, 7, 4, 6]]])
    for one, two in zip(shifts(latents), shifts(other)):
        assert one[-1] == pytest.approx(two[-1]) and one[-1] > 0


def test_shifts_do_not_depend_on_how_latents_came_and_of_a_beginning_are_its_own():
    latents = clip()
    for one, two in zip(shifts(latents), shifts(latents, split=(1, 2, 9))):
        np.testing.assert_allclose(one, two, atol=1e-12)
    for one, two in zip(shifts(latents, num_frames=7), shifts(latents[:7])):
        np.testing.assert_array_equal(one, two)
    assert all(np.abs(curve).max() == 0 for curve in shifts(latents, window=40))  # shorter than its first window


def test_a_pixel_frame_has_the_value_of_its_latent_frame():
    found = in_pixel_frames(np.arange(3.0), 4)
    assert found.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2] and len(found) == pixel_frames(3, 4)


def test_latents_of_another_shape_are_refused():
    meter = LatentMeter()
    with pytest.raises(ShapeError, match="0 latent frames"):
        meter.shifts(4)
    meter.add(clip())
    for wrong in (clip(channels=4), clip()[0]):
        with pytest.raises(ShapeError, match=r"\[F, C, H, W\]"):
            meter.add(wrong)


def turning(frames, degrees):
    angles = torch.arange(frames) * np.deg2rad(degrees)
    return torch.stack([angles.cos(), angles.sin()], 1) * torch.linspace(1, 9, frames)[:, None]  # of any length


def likeness(frames, picture, split=(2,)):
    meter = LikenessMeter(picture)
    for part in torch.tensor_split(frames, split):
        meter.add(part)
    found = meter.curves()
    assert tuple(found) == LIKENESS_METRICS
    return found.values()


def test_likeness_is_the_cosine_to_the_picture_and_to_the_frame_before():
    frames = turning(7, 10)
    for split in ((2,), (1, 3, 4)):
        to_picture, to_last = likeness(frames, frames[0] * 3, split)
        np.testing.assert_allclose(to_picture, np.cos(np.deg2rad(10 * np.arange(7))), atol=1e-6)
        assert np.isnan(to_last[0])
        np.testing.assert_allclose(to_last[1:], np.cos(np.deg2rad(10)), atol=1e-6)


def test_a_frozen_video_is_like_its_picture_and_a_cut_is_seen_once():
    frames = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)
    to_picture, to_last = likeness(frames, frames[0])
    assert to_picture.tolist() == [1, 1, 1, 0, 0, 0] and to_last[1:].tolist() == [1, 1, 0, 1, 1]


def test_embeddings_of_another_width_are_refused():
    with pytest.raises(ShapeError, match=r"\[T, 2\]"):
        LikenessMeter(torch.ones(2)).add(torch.ones(3, 4))
    with pytest.raises(ShapeError, match=r"\[D\]"):
        LikenessMeter(torch.ones(1, 2))
