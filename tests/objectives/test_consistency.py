"""Consistency distillation: closed forms, the target and its average, the picture, and what a resumed run goes on with."""

from contextlib import contextmanager

import pytest
import torch
from encoded_files import config_of, weights_of
from gaussian_videos import ExactNetwork, GaussianVideos
from tiny_batches import RULES, make_batch, record
from tiny_models import make_tiny_model
from tiny_objectives import parts_of
from tiny_plan import tiny_plan

from longtake.config.groups import EmaConfig
from longtake.flow.path import add_noise, clean_from_velocity, guided
from longtake.objectives.consistency import Consistency, ConsistencyConfig
from longtake.parallel.mesh import Mesh
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser, commit_block
from longtake.train.ema import EMA
from longtake.train.stage import InPrecision, run_stage

FRAMES = 7


def objective(model, teacher, *, steps=8, guidance=1.0, **more):
    settings = ConsistencyConfig(teacher="toy", teacher_steps=steps, guidance=guidance)
    return Consistency(parts_of(model, teacher=teacher, **more), settings)


@pytest.mark.parametrize("given", [0, 1])
def test_with_the_exact_flow_map_the_loss_falls_to_0_as_the_grid_is_refined(given):
    """The target is off by the error of one Euler step, of the order of its square; its square falls by 16."""
    plan = RULES if given else tiny_plan(2, 2, 4, 2, sigmas=RULES.sigmas)
    videos = GaussianVideos(plan.with_given(given), 7 if given else 6)
    batch, losses = videos.batch(32, given=given), []
    teacher = ExactNetwork(videos, few_step=False)
    for few_step, steps in ((True, 16), (True, 64), (False, 64)):
        student = ExactNetwork(videos, few_step=few_step, i2v=bool(given))
        more = {"plan": plan, "num_frames": videos.num_frames, "shift": 1.0}
        trained = objective(student, teacher, steps=steps, **more)
        losses.append(sum(float(trained.loss("generator", batch, step).loss.detach()) for step in range(4)) / 4)
    coarse, fine, not_a_flow_map = losses
    assert coarse > 100 * fine and fine < 1e-6 and not_a_flow_map > 100 * fine


def test_at_level_0_the_student_is_the_identity_and_the_target_the_teachers_step():
    videos = GaussianVideos(RULES.with_given(1), FRAMES)
    batch = videos.batch(2, given=1)
    student, teacher = (ExactNetwork(videos, few_step=few, i2v=True) for few in (True, False))
    with torch.no_grad():
        student.scale.mul_(7.0)  # whatever it says there counts nothing
    trained = objective(student, teacher, steps=1)  # from 1 to 0 in one step
    loss = trained.loss("generator", batch, 0).loss
    noise = trained.draws.noise(0, "noise", batch.indices, batch.latents.shape[1:])
    mean, level = videos.mean(batch.latents), torch.ones(2, FRAMES)
    target = noise - videos.velocity(mean, noise, level)
    made = noise - 7 * (noise - videos.end(mean, noise, level))
    torch.testing.assert_close(loss, (made - target)[:, 1:].square().mean())


@pytest.mark.parametrize("kind", ["i2v", "t2v", "ti2v"])
def test_the_loss_is_that_of_cached_calls_after_clean_frames(kind, monkeypatch):
    """Teacher with guidance, target by the average, student: block by block against caches."""
    student, teacher, average = (make_tiny_model(i2v=kind == "i2v", seed=k) for k in (0, 1, 2))
    given = int(kind != "t2v")
    plan = RULES if given else tiny_plan(2, 2, 4, 2, sigmas=RULES.sigmas)
    frames = 7 if given else 6
    batch = make_batch(student, [4, 9], frames)
    trained = objective(student, teacher, guidance=3.0, plan=plan, num_frames=frames, given=given)
    trained.take_averages({"generator": swapped(student, average)})
    with monkeypatch.context() as patch:
        calls = record(student, patch)
        result = trained.loss("generator", batch, 5)
    own = calls[-1]
    sigma = own["sigma"][:, frames:]
    noise = KeyedRNG(3).noise(5, "noise", batch.indices, batch.latents.shape[1:])
    noisy = add_noise(batch.latents, noise, sigma)
    assert torch.equal(own["x"], torch.cat([batch.latents, noisy], 1)) and own["with_grad"]
    grid = torch.tensor(trained.grid)
    assert (sigma[:, :given] == 0).all()

    def cached(model, condition, x, level):
        cache, made = model.new_cache(plan.with_given(given), 2, (4, 6), max_frames=frames), []
        for start, end in plan.blocks(0, frames):
            with torch.no_grad():
                made.append(Denoiser(model)(x[:, start:end], level[:, start:end], condition, cache))
            commit_block(Denoiser(model), cache, condition, batch.latents[:, start:end])
        return torch.cat(made, 1)

    place = (sigma[..., None] - grid).abs().argmin(-1)
    following = torch.where(sigma > 0, grid[(place + 1).clamp(max=8)], 0.0)
    velocity = guided(*(cached(teacher, c, noisy, sigma) for c in (batch.condition, batch.unconditional)), 3.0)
    further = noisy + (following - sigma)[..., None, None, None] * velocity
    target = clean_from_velocity(further, cached(average, batch.condition, further, following), following)
    made = clean_from_velocity(noisy, cached(student, batch.condition, noisy, sigma), sigma)
    error = (made - target)[:, given:].square().mean()
    torch.testing.assert_close(result.loss.detach(), error, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(result.loss, own["out"])
    assert (grad[:, : frames + given] == 0).all() and (grad[:, frames + given :] != 0).any()


def swapped(model, average):
    """As `EMA.applied`, with the weights of another model for the average."""

    @contextmanager
    def applied():
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            model.load_state_dict(average.state_dict())
            yield
            model.load_state_dict(own, strict=False)

    return applied


@pytest.mark.parametrize("bf16", [False, True])
def test_the_target_has_no_gradient_and_the_average_leaves_the_students_alone(bf16):
    """Also under autocast, which keeps copies of weights: the student's gradient is that of a given target."""
    student, teacher = make_tiny_model(i2v=True), make_tiny_model(i2v=True, seed=1)
    batch = make_batch(student, [4, 9], FRAMES)
    trained = objective(student, teacher)
    average = EMA(student, EmaConfig())
    for tensor in average.tensors().values():
        tensor.mul_(0.9)
    trained.take_averages({"generator": average.applied})
    made = []
    target = trained._target
    trained._target = lambda *given: made.append(target(*given)) or made[-1]
    whole = InPrecision(trained, Mesh(), bf16=bf16)
    whole.loss("generator", batch, 5).loss.backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters()}
    assert not made[0].requires_grad and all((grad != 0).any() for name, grad in grads.items() if "head" in name)
    student.zero_grad()
    trained._target = lambda *_: made[0]
    whole.loss("generator", batch, 5).loss.backward()
    assert all(torch.equal(grads[name], p.grad) for name, p in student.named_parameters())
    # And the target was made with the average, not with copies of the student's weights
    trained._target, trained.averaged = target, swapped(student, student)
    whole.loss("generator", batch, 5)
    trained._target = lambda *given: made.append(target(*given)) or made[-1]
    whole.loss("generator", batch, 5)
    assert not torch.allclose(made[0], made[1], rtol=0, atol=1e-2)


def test_without_an_average_the_target_is_the_student_itself(monkeypatch):
    student, teacher = make_tiny_model(i2v=True), make_tiny_model(i2v=True, seed=1)
    batch, trained = make_batch(student, [4, 9], FRAMES), objective(student, teacher)
    trained.take_averages({})
    one = trained.loss("generator", batch, 5).loss
    trained.take_averages({"generator": EMA(student, EmaConfig()).applied})
    assert torch.equal(one, trained.loss("generator", batch, 5).loss)


@pytest.mark.whole
def test_resumed_equals_uninterrupted_bit_for_bit(workshop, tmp_path):
    """With the average in the target: it is saved and goes on."""
    whole, resumed = (
        config_of(workshop, tmp_path / name, "consistency", max_steps=2, batch_size=2) for name in ("one", "two")
    )
    run_stage(whole, Mesh())
    run_stage(resumed.model_copy(update={"max_steps": 1}), Mesh())
    run_stage(resumed, Mesh())
    one, two = weights_of(whole), weights_of(resumed)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any("ema" in name for name in one)
