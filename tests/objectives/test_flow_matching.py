"""The teacher's objective: levels, frame 0, caption dropout, and its independence of how a batch is split."""

import pytest
import torch
from tiny_batches import make_batch, record
from tiny_models import make_tiny_model
from tiny_objectives import parts_of

from longtake.errors import TrainingError
from longtake.flow.path import add_noise
from longtake.objectives.batch import EncodedBatch
from longtake.objectives.flow_matching import FlowMatching, FlowMatchingConfig, clip_sigma, drop_captions
from longtake.rng import KeyedRNG


def objective(model, *, dropout=0.0, clean=False, seed=3):
    parts = parts_of(model, seed=seed, shift=3.0, first_frame_clean=clean)
    return FlowMatching(parts, FlowMatchingConfig(caption_dropout=dropout))


def test_clip_sigma_of_both_kinds_of_model():
    sigma = torch.tensor([0.3, 0.8])
    assert torch.equal(clip_sigma(sigma, 3, first_frame_clean=False), sigma[:, None].expand(-1, 3))
    levels = clip_sigma(sigma, 3, first_frame_clean=True)
    assert torch.equal(levels, torch.tensor([[0.0, 0.3, 0.3], [0.0, 0.8, 0.8]]))


@pytest.mark.parametrize("clean", [False, True])
def test_loss_is_the_mean_error_of_the_velocity(clean, monkeypatch):
    """Wan2.1 models: frame 0 noised and scored like the rest. TI2V models: clean, and outside the loss."""
    model = make_tiny_model(i2v=True)
    batch = make_batch(model, [4, 9])
    calls = record(model, monkeypatch)
    result = objective(model, clean=clean).loss("generator", batch, 5)
    (call,) = calls
    noise = KeyedRNG(3).noise(5, "noise", [4, 9], batch.latents.shape[1:])
    sigma = call["sigma"]
    assert sigma.shape == (2, 7) and (sigma[:, 1:] == sigma[:, 1:2]).all() and sigma[0, 1] != sigma[1, 1]
    assert torch.equal(sigma[:, 0], torch.zeros(2) if clean else sigma[:, 1])
    assert torch.equal(call["x"], add_noise(batch.latents, noise, sigma))
    assert torch.equal(call["x"][:, 0], batch.latents[:, 0]) == clean
    assert call["condition"] is batch.condition and call["mask"] is None
    error = (call["out"] - (noise - batch.latents)).square()[:, 1 if clean else 0 :].mean()
    torch.testing.assert_close(result.loss, error)
    assert set(result.metrics) == {"generator_loss"} and not result.metrics["generator_loss"].requires_grad


def test_levels_follow_the_warp_and_change_with_every_step_and_sample(monkeypatch):
    model = make_tiny_model(i2v=True)
    calls = record(model, monkeypatch)
    teacher = objective(model)
    for step in range(40):
        teacher.loss("generator", make_batch(model, [2 * step, 2 * step + 1], 1), step)
    levels = torch.cat([call["sigma"][:, 0] for call in calls])
    assert len(levels.unique()) == 80 and 0 < levels.min() < 0.3 and levels.max() > 0.9
    assert levels.median() == pytest.approx(0.75, abs=0.1)  # the warp of 0.5 at shift 3


def test_draws_do_not_depend_on_how_the_batch_is_split():
    model = make_tiny_model(i2v=True)
    teacher = objective(model, dropout=0.5)
    whole = teacher.loss("generator", make_batch(model, [3, 4, 5, 6]), 2).loss
    parts = [teacher.loss("generator", make_batch(model, part), 2).loss for part in ([3, 4], [5, 6])]
    torch.testing.assert_close(whole, sum(parts) / 2)
    assert torch.equal(whole, teacher.loss("generator", make_batch(model, [3, 4, 5, 6]), 2).loss)
    assert not torch.equal(whole, teacher.loss("generator", make_batch(model, [3, 4, 5, 6]), 3).loss)


def test_caption_dropout_keeps_its_share_and_is_a_function_of_step_and_sample():
    model = make_tiny_model(i2v=True)
    batch = make_batch(model, list(range(400)), 1)
    condition = drop_captions(batch, KeyedRNG(0), 1, 0.25)
    dropped = (condition.text == batch.empty_text).all(2).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(condition.text[~dropped], batch.condition.text[~dropped])
    # the picture stays, whoever loses the caption (guidance keeps y and CLIP tokens)
    assert condition.frames is batch.condition.frames and condition.image is batch.condition.image
    again = drop_captions(make_batch(model, list(range(100, 140)), 1), KeyedRNG(0), 1, 0.25)
    assert torch.equal((again.text == batch.empty_text[:40]).all(2).all(1), dropped[100:140])
    other = drop_captions(batch, KeyedRNG(0), 2, 0.25)
    assert not torch.equal((other.text == batch.empty_text).all(2).all(1), dropped)


@pytest.mark.parametrize(("share", "same"), [(0.0, True), (1.0, False)])
def test_caption_dropout_of_none_and_of_all(share, same):
    model = make_tiny_model(i2v=True)
    batch = make_batch(model, [1, 2, 3])
    text = drop_captions(batch, KeyedRNG(0), 0, share).text
    assert torch.equal(text, batch.condition.text if same else batch.empty_text)


def test_data_without_videos_is_refused():
    model = make_tiny_model(i2v=True)
    batch: EncodedBatch = make_batch(model, [0], videos=False)
    with pytest.raises(TrainingError, match="flow matching learns from videos"):
        objective(model).loss("generator", batch, 0)


def test_one_network_every_iteration():
    model = make_tiny_model(i2v=True)
    teacher = objective(model)
    assert [teacher.turns(step) for step in range(3)] == [["generator"]] * 3
    assert teacher.networks == {"generator": model}
