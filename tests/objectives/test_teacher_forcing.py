"""Teacher forcing: the picture is clean and outside the loss, and each block sees what its cache would hold (N.4)."""

from dataclasses import replace

import pytest
import torch
from tiny_batches import RULES, make_batch, record
from tiny_models import make_tiny_model
from tiny_objectives import teacher_forcing
from tiny_plan import tiny_plan

from longtake.errors import TrainingError
from longtake.flow.path import add_noise, clean_from_velocity
from longtake.objectives.teacher_forcing import ErrorRecycling, filled
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser, commit_block
from longtake.rollout.self_forcing import recycle, roll_out


def objective(model, rules=RULES, **options):
    return teacher_forcing(model, plan=rules, **{"shift": 3.0} | options)


def one_call(model, monkeypatch, *, rules=RULES, indices=(4, 9), frames=7, step=5, **options):
    batch = make_batch(model, list(indices), frames)
    calls = record(model, monkeypatch)
    result = objective(model, rules, **options).loss("generator", batch, step)
    (call,) = calls
    return batch, call, result


def test_the_given_picture_is_context_alone_and_the_last_block_none(monkeypatch):
    """Nobody would see the last block clean, and nobody is asked about the picture: 5 + 6 entries of 7 frames."""
    model = make_tiny_model(i2v=True)
    batch, call, result = one_call(model, monkeypatch)
    clean = batch.latents
    x, sigma = call["x"], call["sigma"]
    assert x.shape[1] == 11 and torch.equal(x[:, :5], clean[:, :5]) and (sigma[:, :5] == 0).all()
    noise = KeyedRNG(3).noise(5, "noise", batch.indices, clean.shape[1:])
    assert torch.equal(x[:, 5:], add_noise(clean[:, 1:], noise[:, 1:], sigma[:, 5:]))
    error = (call["out"][:, 5:] - (noise - clean)[:, 1:]).square().mean()
    torch.testing.assert_close(result.loss, error)
    (grad,) = torch.autograd.grad(result.loss, call["out"])
    assert (grad[:, :5] == 0).all() and (grad[:, 5:] != 0).any()


@pytest.mark.parametrize("recycled", [False, True])
def test_the_context_has_the_level_that_the_student_stores(recycled, monkeypatch):
    """The picture and the first block clean, later ones at the last level of theirs; by noise of its own."""
    model, rules = make_tiny_model(i2v=True), RULES.but(context="last_step", later_sigmas=(1.0, 0.6))
    batch, calls = make_batch(model, [4, 9], 7), record(model, monkeypatch)
    causal = objective(model, rules, recycling=OWN if recycled else None)
    causal.loss("generator", batch, 5)
    call, own = calls[-1], calls[:-1]
    assert call["sigma"][:, :5].tolist() == [pytest.approx([0.0] * 3 + [0.6] * 2)] * 2
    draws = KeyedRNG(3)
    fresh = draws.noise(5, "context_noise", batch.indices, batch.latents.shape[1:])
    clean = batch.latents
    assert bool(own) is recycled
    if recycled:
        with torch.no_grad():
            clean = causal._history(clean, batch.condition, batch, 5)
        assert not torch.equal(clean[:, 1:5], batch.latents[:, 1:5])
    assert torch.equal(call["x"][:, :5], add_noise(clean[:, :5], fresh[:, :5], call["sigma"][:, :5]))
    noise = draws.noise(5, "noise", batch.indices, clean.shape[1:])
    assert torch.equal(call["x"][:, 5:], add_noise(batch.latents[:, 1:], noise[:, 1:], call["sigma"][:, 5:]))


def test_text_to_video_scores_every_frame(monkeypatch):
    model = make_tiny_model()
    rules = tiny_plan(2, 2, 4, 2, sigmas=RULES.sigmas)
    batch, call, result = one_call(model, monkeypatch, rules=rules, frames=6)
    noise = KeyedRNG(3).noise(5, "noise", batch.indices, batch.latents.shape[1:])
    assert call["x"].shape[1] == 4 + 6 and (call["sigma"][:, 4:] > 0).all()
    torch.testing.assert_close(result.loss, (call["out"][:, 4:] - (noise - batch.latents)).square().mean())


def test_one_level_a_block_drawn_for_each_sample(monkeypatch):
    model = make_tiny_model(i2v=True)
    _, call, _ = one_call(model, monkeypatch)
    noisy = call["sigma"][:, 5:]
    assert noisy[0].unique().numel() == 3 and noisy.unique().numel() == 6
    for start in (0, 2, 4):
        assert torch.equal(noisy[:, start], noisy[:, start + 1])


@pytest.mark.parametrize("i2v", [True, False])
@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (5, 1), (4, 0)])
def test_each_block_is_what_a_cached_forward_after_clean_blocks_gives(i2v, rope, window, sink, monkeypatch):
    """N.4, for [1, n, n, ...] with 36-channel conditions and for [n, n, ...], with and without eviction."""
    model = make_tiny_model(i2v=i2v)
    first = 1 if i2v else 2
    rules = tiny_plan(2, first, window, 0 if not i2v else sink, rope, sigmas=RULES.sigmas)
    frames = 9 if i2v else 8
    batch, call, result = one_call(model, monkeypatch, rules=rules, frames=frames)
    noise = KeyedRNG(3).noise(5, "noise", batch.indices, batch.latents.shape[1:])
    cache = model.new_cache(tiny_plan(2, 1, window, rules.sink_frames, rope), 2, (4, 6), max_frames=frames)
    errors = []
    given, last = int(i2v), rules.block_of(frames - 1)[0]
    for start, end in rules.blocks(0, frames):
        at = slice(last + start - given, last + end - given)
        if start >= given:
            with torch.no_grad():
                out = Denoiser(model)(call["x"][:, at], call["sigma"][:, at], batch.condition, cache)
            torch.testing.assert_close(out, call["out"][:, at].detach(), rtol=0, atol=2e-5)
            errors.append((out - (noise - batch.latents)[:, start:end]).square().mean((2, 3, 4)))
        commit_block(Denoiser(model), cache, batch.condition, batch.latents[:, start:end])
    expected = torch.cat(errors, 1).mean()
    torch.testing.assert_close(result.loss.detach(), expected, rtol=1e-5, atol=1e-6)


def test_draws_do_not_depend_on_how_the_batch_is_split():
    model = make_tiny_model(i2v=True)
    causal = objective(model, caption_dropout=0.5)
    whole = causal.loss("generator", make_batch(model, [3, 4, 5, 6]), 2).loss
    parts = [causal.loss("generator", make_batch(model, part), 2).loss for part in ([3, 4], [5, 6])]
    torch.testing.assert_close(whole, sum(parts) / 2)
    assert not torch.equal(whole, causal.loss("generator", make_batch(model, [3, 4, 5, 6]), 3).loss)


def test_all_captions_dropped_changes_the_condition_and_nothing_else(monkeypatch):
    model = make_tiny_model(i2v=True)
    with monkeypatch.context() as patch:
        batch, kept, _ = one_call(model, patch)
    _, dropped, _ = one_call(model, monkeypatch, caption_dropout=1.0)
    assert torch.equal(dropped["condition"].text, batch.empty_text)
    assert torch.equal(dropped["x"], kept["x"]) and torch.equal(dropped["sigma"], kept["sigma"])
    assert not torch.equal(dropped["out"], kept["out"])


def test_data_without_videos_is_refused():
    model = make_tiny_model(i2v=True)
    with pytest.raises(TrainingError, match="teacher forcing learns from videos"):
        objective(model).loss("generator", make_batch(model, [0], videos=False), 0)


# ---- the student's own version as context ------------------------------------------------------------------------------
OWN = ErrorRecycling(share=1.0, from_step=0)


def test_error_recycling_is_the_context_and_the_real_video_the_target(monkeypatch):
    model = make_tiny_model(i2v=True)
    batch = make_batch(model, [4, 9], 7)
    own = objective(model, recycling=OWN)
    calls = record(model, monkeypatch)
    result = own.loss("generator", batch, 5)
    call, clean = calls[-1], batch.latents
    assert len(calls) > 1 and call["x"].shape[1] == 11
    context, noisy = call["x"][:, :5], call["x"][:, 5:]
    assert torch.equal(context[:, 0], clean[:, 0])  # the picture
    assert ((context - clean[:, :5])[:, 1:].abs().amax((2, 3, 4)) > 1e-3).all() and not context.requires_grad
    noise = KeyedRNG(3).noise(5, "noise", batch.indices, clean.shape[1:])
    assert torch.equal(noisy, add_noise(clean[:, 1:], noise[:, 1:], call["sigma"][:, 5:]))
    error = (call["out"][:, 5:] - (noise - clean)[:, 1:]).square().mean()
    torch.testing.assert_close(result.loss, error)


@pytest.mark.parametrize("window", [None, 5])
def test_the_own_version_is_what_denoising_from_those_levels_after_it_gives(window):
    """By hand, without the code of roll-outs: one block from step 1 and one from step 2, each after the ones before."""
    model = make_tiny_model(i2v=True)
    rules = tiny_plan(2, 1, window, 0 if window is None else 1, sigmas=(1.0, 0.8, 0.5), given_frames=1)
    batch = make_batch(model, [4, 9], 7)
    clean, condition = batch.latents, batch.condition

    def noise(start, end, step):
        generator = torch.Generator().manual_seed(10 * start + step)
        return torch.randn(2, end - start, *clean.shape[2:], generator=generator)

    made = recycle(Denoiser(model), condition, clean, noise, rules, [0, 1, 2, 0])
    with torch.no_grad():
        cache = model.new_cache(tiny_plan(2, 1, window, rules.sink_frames), 2, (4, 6), max_frames=7)
        commit_block(Denoiser(model), cache, condition, clean[:, :1])
        for (start, end), first in (((1, 3), 1), ((3, 5), 2)):
            x = clean[:, start:end]
            for step in range(first, 3):
                level = torch.full((2,), rules.sigmas[step])
                x = add_noise(x, noise(start, end, step), level)
                x = clean_from_velocity(x, Denoiser(model)(x, level, condition, cache), level)
            torch.testing.assert_close(made[:, start:end], x)
            commit_block(Denoiser(model), cache, condition, x)
    assert torch.equal(made[:, 5:], clean[:, 5:])


@pytest.mark.parametrize("law", [{}, {"context": "last_step", "later_sigmas": (1.0, 0.6)}, {"context_sigma": 0.3}])
def test_from_noise_alone_the_own_version_is_a_roll_out(law):
    rules = RULES.but(given_frames=1, **law)
    model = make_tiny_model(i2v=True)
    batch = make_batch(model, [4, 9], 7)

    def noise(start, end, step):
        generator = torch.Generator().manual_seed(10 * start + step)
        return torch.randn(2, end - start, *batch.latents.shape[2:], generator=generator)

    made = recycle(Denoiser(model), batch.condition, batch.latents, noise, rules, [0] * 4)
    rolled = roll_out(Denoiser(model), batch.condition, batch.first_latent, noise, rules, 7, (4, 6)).latents
    torch.testing.assert_close(made[:, :5], rolled[:, :5])


def test_shares_and_first_steps_are_the_same_for_all_samples_and_keep_their_numbers():
    causal = objective(make_tiny_model(i2v=True), recycling=ErrorRecycling(share=0.3, from_step=0))
    share = sum(causal.remakes(step) for step in range(2000)) / 2000
    assert abs(share - 0.3) < 0.04
    starts = torch.tensor([causal.starts(step, 7) for step in range(300)])
    steps = len(RULES.sigmas)
    assert set(starts[:, 1].tolist()) == set(range(1, steps))  # what is open is decided by the real video
    assert set(starts[:, 2].tolist()) == set(range(steps))
    late = objective(make_tiny_model(i2v=True), recycling=ErrorRecycling(share=1.0, from_step=steps - 1))
    assert {tuple(late.starts(step, 7)) for step in range(50)} == {(steps - 1,) * 4}
    assert not any(objective(make_tiny_model(i2v=True)).remakes(step) for step in range(100))


@pytest.mark.parametrize("i2v", [True, False])
def test_the_first_generated_block_of_error_recycling_never_begins_from_noise_alone(i2v, monkeypatch):
    model = make_tiny_model(i2v=i2v)
    rules = RULES if i2v else tiny_plan(2, 2, 4, 0, sigmas=RULES.sigmas)
    causal, calls, begun = objective(model, rules, recycling=OWN), record(model, monkeypatch), []
    batch = make_batch(model, [4], 7 if i2v else 6)
    for step in range(12):
        calls.clear()
        causal.loss("generator", batch, step)
        levels = {}
        for call in calls[:-1]:
            if not call["commit"]:
                levels.setdefault(call["position"], call["sigma"][0].item())
        begun.append(list(levels.values()))
    assert all(first < 1 for first, _ in begun) and any(later == 1 for _, later in begun)


def test_a_share_of_none_is_never_and_of_all_is_always():
    class Lowest:
        def integer(self, step, purpose, low, high, part=0):
            return low if step == 0 else high - 1

    model = make_tiny_model(i2v=True)
    for share, expected in ((0.0, [False, False]), (5e-7, [True, False]), (1.0, [True, True])):
        causal = objective(model, draws=Lowest(), recycling=ErrorRecycling(share=share))
        assert [causal.remakes(step) for step in (0, 1)] == expected


def test_error_recycling_does_not_depend_on_how_the_batch_is_split():
    model = make_tiny_model(i2v=True)
    causal = objective(model, recycling=OWN)
    whole = causal.loss("generator", make_batch(model, [3, 4, 5, 6]), 2).loss
    parts = [causal.loss("generator", make_batch(model, part), 2).loss for part in ([3, 4], [5, 6])]
    torch.testing.assert_close(whole, sum(parts) / 2)


# ---- captions that change on the way -----------------------------------------------------------------------------------
def switched(model, switches, indices=(4, 9), frames=7):
    batch = make_batch(model, list(indices), frames)
    return replace(batch, later_text=batch.condition.text.flip(-1), switch_frames=list(switches))


def test_rows_that_change_at_other_frames_are_learnt_as_each_alone(monkeypatch):
    """One call for those that change together; a change within a block takes effect with the next one."""
    model = make_tiny_model(i2v=True)
    causal, batch = objective(model), switched(model, [3, None, 2, 7], indices=(3, 4, 5, 6))
    calls = record(model, monkeypatch)
    whole = causal.loss("generator", batch, 2).loss
    assert [len(call["x"]) for call in calls] == [2, 2]
    assert [call["mask"].later_from for call in calls] == [3, None]
    assert calls[0]["condition"].later_text.shape[0] == 2 and calls[1]["condition"].later_text is None
    alone = [causal.loss("generator", switched(model, [at], [k]), 2).loss for at, k in ((3, 3), (None, 4), (3, 5))]
    alone.append(causal.loss("generator", make_batch(model, [6]), 2).loss)
    torch.testing.assert_close(whole, sum(alone) / 4)
    assert (alone[0] - causal.loss("generator", make_batch(model, [3]), 2).loss).abs() > 1e-3


def test_a_dropped_caption_is_dropped_before_and_after_the_change(monkeypatch):
    model = make_tiny_model(i2v=True)
    batch, calls = switched(model, [3, 3]), record(model, monkeypatch)
    objective(model, caption_dropout=1.0).loss("generator", batch, 5)
    (call,) = calls
    assert torch.equal(call["condition"].text, batch.empty_text)
    assert torch.equal(call["condition"].later_text, batch.empty_text)


def test_what_cannot_be_learnt_of_a_change_is_refused():
    model = make_tiny_model(i2v=True)
    with pytest.raises(TrainingError, match="micro_batch_size=1"):
        objective(model, sharded=True).loss("generator", switched(model, [3, 5]), 5)
    objective(model, sharded=True).loss("generator", switched(model, [3, 3]), 5)
    with pytest.raises(TrainingError, match="error_recycling"):
        objective(model, recycling=OWN).loss("generator", switched(model, [3, None]), 5)


def test_on_a_gpu_calls_have_few_sizes():
    """Each compiles its masked attention; what is repeated changes no row."""
    assert (
        filled([3, 5, 7], 8) == [3, 5, 7, 7]
        and filled([1], 8) == [1, 1]
        and filled([*range(5)], 8) == [*range(5), 4, 4, 4]
    )
    assert {len(filled([*range(k)], 64)) for k in range(1, 65)} == {16, 32, 64} and filled([0], 1) == [0]
