"""ODE regression: closed forms, what is compared with what, and the paths themselves."""

from dataclasses import replace

import pytest
import torch
from gaussian_videos import ExactNetwork, GaussianVideos
from tiny_batches import RULES, make_batch, record
from tiny_models import make_tiny_model
from tiny_objectives import parts_of
from tiny_plan import tiny_plan

from longtake.config.objective import TeacherSampling
from longtake.encodings.teacher_data import PathMaker
from longtake.errors import TrainingError
from longtake.objectives.ode_regression import OdeRegression, OdeRegressionConfig
from longtake.rollout.denoise import Denoiser, commit_block

FRAMES = 7
LEVELS = RULES.all_levels
SETTINGS = OdeRegressionConfig(teacher="toy")


def objective(model, **more):
    return OdeRegression(parts_of(model, **more), SETTINGS)


def tiny_batch(model, frames=FRAMES, levels=LEVELS, indices=(4, 9)):
    batch = make_batch(model, list(indices), frames)
    path = torch.randn(
        len(indices), len(levels) + 1, *batch.latents.shape[1:], generator=torch.Generator().manual_seed(6)
    )
    return type(batch)(**vars(batch) | {"path": path})


@pytest.mark.parametrize("given", [0, 1])
def test_with_the_exact_flow_map_the_loss_is_0(given):
    plan = RULES if given else tiny_plan(2, 2, 4, 2, sigmas=RULES.sigmas)
    videos = GaussianVideos(plan.with_given(given), 7 if given else 6)
    batch = videos.batch(8, given=given)
    batch = videos.batch(8, given=given, path=videos.path(batch, LEVELS))
    losses = {}
    for few_step in (True, False):
        student = ExactNetwork(videos, few_step=few_step, i2v=bool(given))
        trained = objective(student, plan=plan, num_frames=videos.num_frames)
        losses[few_step] = float(trained.loss("generator", batch, 3).loss.detach())
    # What a diffusion model says in one step is the mean of the ends, not the end of this path
    assert losses[True] < 1e-10 and losses[False] > 0.02


def test_the_paths_of_a_causal_teacher_come_to_the_exact_ends_as_steps_are_added():
    videos = GaussianVideos(RULES.with_given(1), FRAMES)
    batch, errors = videos.batch(4, given=1), []
    for steps in (12, 24, 48):
        sampling = TeacherSampling("", "", True, steps, 1.0, keeps_path=True)
        maker = PathMaker(
            ExactNetwork(videos, few_step=False), sampling, videos.plan, 5.0, 0, FRAMES, first_frame_clean=False
        )
        path = maker(batch)["path"]
        assert (path[:, :, 0] == batch.latents[:, :1]).all()  # the given picture
        exact = videos.end(videos.mean(batch.latents), path[:, 0], torch.ones(4, FRAMES))
        errors.append(float((path[:, -1] - exact)[:, 1:].square().mean()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.01 * videos.sd**2  # Euler: a quarter each


def test_a_bidirectional_teacher_without_y_sees_the_picture_as_a_clean_first_frame():
    model = make_tiny_model()  # as TI2V: a picture, and no channels for it
    batch = replace(make_batch(model, [4, 9], FRAMES), first_latent=torch.full((2, 1, 4, 4, 6), 0.7))
    seen, forward = [], model.forward

    def spy(x, sigma, condition, context=None):
        assert context is None
        seen.append((x[:, 0], sigma))
        return forward(x, sigma, condition, context)

    model.forward = spy
    sampling = TeacherSampling("", "", False, 4, 2.0, keeps_path=True)
    made = PathMaker(model, sampling, RULES.with_given(1), 1.0, 0, FRAMES, first_frame_clean=True)(batch)
    assert len(seen) == 2 * 5 and made["path"].shape[1] == len(LEVELS) + 1  # 4 steps, and level 0.9 put between them
    for frame, sigma in seen:
        assert (frame == 0.7).all() and (sigma[:, 0] == 0).all() and (sigma[:, 1:] > 0).all()
    assert torch.equal(made["path"][:, -1], made["latents"]) and (made["path"][:, :, 0] == 0.7).all()


@pytest.mark.parametrize("kind", ["i2v", "t2v", "ti2v"])
def test_each_block_begins_at_a_state_of_the_path_after_clean_frames_as_a_cached_call_would(kind, monkeypatch):
    model, given = make_tiny_model(i2v=kind == "i2v"), int(kind != "t2v")
    plan = RULES if given else tiny_plan(2, 2, 4, 2, sigmas=RULES.sigmas)
    frames = 7 if given else 6
    batch = tiny_batch(model, frames)
    with monkeypatch.context() as patch:
        calls = record(model, patch)
        result = objective(model, plan=plan, num_frames=frames, given=given).loss("generator", batch, 5)
    (call,) = calls
    last = plan.block_of(frames - 1)[0]  # which no other block sees clean
    assert torch.equal(call["x"][:, :last], batch.latents[:, :last]) and (call["sigma"][:, :last] == 0).all()
    cache = model.new_cache(plan.with_given(given), 2, (4, 6), max_frames=frames)
    errors = []
    for start, end in plan.blocks(0, frames):
        at = slice(last + start - given, last + end - given)
        x, sigma = call["x"][:, at], call["sigma"][:, at]
        if start >= given:
            for row in range(2):
                (place,) = [k for k, level in enumerate(LEVELS) if (sigma[row] == torch.tensor(level)).all()]
                assert torch.equal(x[row], batch.path[row, place, start:end])
            with torch.no_grad():
                v = Denoiser(model)(x, sigma, batch.condition, cache)
            errors.append((x - sigma[..., None, None, None] * v - batch.path[:, -1, start:end]).square())
        commit_block(Denoiser(model), cache, batch.condition, batch.latents[:, start:end])
    torch.testing.assert_close(result.loss.detach(), torch.cat(errors, 1).mean(), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(result.loss, call["out"])
    assert (grad[:, :last] == 0).all() and (grad[:, last:] != 0).any()


def test_later_blocks_begin_at_the_levels_that_they_have(monkeypatch):
    plan = RULES.but(later_sigmas=(1.0, 0.6))
    assert plan.all_levels == [1.0, 0.9, 0.75, 0.6, 0.5]
    model = make_tiny_model(i2v=True)
    batch, seen = tiny_batch(model, levels=plan.all_levels), {1: set(), 3: set(), 5: set()}
    calls = record(model, monkeypatch)
    for step in range(12):
        objective(model, plan=plan).loss("generator", batch, step)
    for call in calls:
        for start, found in seen.items():
            found |= {round(level, 6) for level in call["sigma"][:, 5 + start - 1].tolist()}
    assert seen == {1: set(RULES.sigmas), 3: {1.0, 0.6}, 5: {1.0, 0.6}}


def test_draws_do_not_depend_on_how_the_batch_is_split():
    model = make_tiny_model(i2v=True)
    whole = tiny_batch(model)
    found = objective(model).loss("generator", whole, 2).loss
    cut = {k: v[:1] if torch.is_tensor(v) else v for k, v in vars(whole).items()}
    one = type(whole)(**cut | {"indices": [4], "condition": whole.condition.rows(slice(1))})
    two = tiny_batch(model)
    cut = {k: v[1:] if torch.is_tensor(v) else v for k, v in vars(two).items()}
    other = type(two)(**cut | {"indices": [9], "condition": make_batch(model, [9], FRAMES).condition})
    parts = [objective(model).loss("generator", part, 2).loss for part in (one, other)]
    torch.testing.assert_close(found, sum(parts) / 2)


def test_rows_without_paths_are_refused():
    model = make_tiny_model(i2v=True)
    with pytest.raises(TrainingError, match="learns from a teacher's paths"):
        objective(model).loss("generator", make_batch(model, [0]), 0)
