"""The roll-out in training and the stream at inference: one behaviour, block by block (spec F, M-03, M-06, N.6, N.13)."""

from itertools import islice

import pytest
import torch
from tiny_batches import record
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.condition import pixel_frames
from longtake.errors import CacheError, ConfigError
from longtake.models.execution import Execution
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser, denoise_block
from longtake.rollout.self_forcing import roll_out
from longtake.rollout.stream import LatentStream

SIGMAS = (1.0, 0.9, 0.75, 0.5)
SIZE = (4, 6)


def rules(first=1, window=5, sink=1, rope="relative", sigmas=SIGMAS):
    return tiny_plan(2, first, window, sink, rope, sigmas=sigmas)


def noise_at(start, end, step):
    """Noise of absolute frames and a denoising step, two samples."""
    return KeyedRNG(5).noise(0, "noise", [0, 1], (end - start, 4, *SIZE), part=10 * start + step)


def scene(i2v=True, **changes):
    model = make_tiny_model(i2v=i2v, **changes)
    return model, make_tiny_condition(model), make_tiny_latents(1, seed=7) if i2v else None


def unroll(model, condition, picture, frames=7, *, rules=rules(), noise=noise_at, batched=False, **options):  # noqa: B008
    return roll_out(
        Denoiser(model, batched_exit_backward=batched), condition, picture, noise, rules, frames, SIZE, **options
    )


def test_the_given_picture_is_frame_zero_committed_clean_and_never_generated(monkeypatch):
    model, condition, picture = scene()
    calls, asked = record(model, monkeypatch), []

    def noise(start, end, step):
        asked.append((start, end))
        return noise_at(start, end, step)

    made = unroll(model, condition, picture, noise=noise)
    assert torch.equal(made.latents[:, :1], picture) and made.latents.shape == (2, 7, 4, *SIZE)
    assert made.generated.tolist() == [False] + [True] * 6
    first = calls[0]
    assert first["commit"] and torch.equal(first["x"], picture) and first["sigma"].tolist() == [0.0, 0.0]
    assert not first["with_grad"]
    assert {start for start, _ in asked} == {1, 3, 5}  # no noise for frame 0: nothing generates it


def test_text_to_video_generates_frame_zero():
    model, condition, _ = scene(i2v=False)
    made = unroll(model, condition, None, 6, rules=rules(first=2, window=6, sink=2))
    assert made.generated.all() and made.latents.shape[1] == 6


@pytest.mark.parametrize("exit_step", [None, 0, 2])
def test_number_and_order_of_the_calls(exit_step, monkeypatch):
    """Picture; then per block its steps, and the context pass of every block but the last, which nobody reads."""
    model, condition, picture = scene()
    calls = record(model, monkeypatch)
    unroll(model, condition, picture, exit_step=exit_step, with_grad=True)
    last = 3 if exit_step is None else exit_step
    steps = [(False, sigma, step == last) for step, sigma in enumerate(SIGMAS[: last + 1])]
    commit = (True, 0.0, False)
    expected = [commit, *steps, commit, *steps, commit, *steps]
    seen = [(call["commit"], pytest.approx(call["sigma"][0].item()), call["with_grad"]) for call in calls]
    assert expected == seen


def test_the_context_of_a_block_is_its_own_clean_prediction(monkeypatch):
    model, condition, picture = scene()
    calls = record(model, monkeypatch)
    made = unroll(model, condition, picture, exit_step=1, with_grad=True)
    committed = [call["x"] for call in calls if call["commit"]]
    assert torch.equal(torch.cat(committed, 1), made.latents[:, :5].detach())
    assert not any(x.requires_grad for x in committed)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [5, None])
def test_gradient_stays_inside_its_own_block(checkpointing, window):
    """M-03: the loss of block j sends nothing into block i != j, and nothing into earlier steps of its own block."""
    model, condition, picture = scene()
    model = model.executed(Execution(recompute=checkpointing))
    leaves = {}

    def noise(start, end, step):
        leaves[start, step] = noise_at(start, end, step).requires_grad_()
        return leaves[start, step]

    # With the exit at step 0 the noise itself is the input of the call with gradient.
    made = unroll(model, condition, picture, rules=rules(window=window), noise=noise, exit_step=0, with_grad=True)
    for start in (1, 3, 5):
        loss = made.latents[:, start : start + 2].square().sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        reached = {key for key, grad in zip(leaves, grads) if grad is not None and grad.abs().max() > 0}
        assert reached == {(start, 0)}
    leaves.clear()
    made = unroll(model, condition, picture, rules=rules(window=window), noise=noise, exit_step=2, with_grad=True)
    grads = torch.autograd.grad(made.latents.square().sum(), list(leaves.values()), allow_unused=True)
    assert all(grad is None for grad in grads) and len(leaves) == 9


@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_recomputation_gives_the_same_gradient_with_eviction(rope):  # spec N.7
    gradients, videos = [], []
    for checkpointing, together in ((False, False), (True, False), (True, True), (False, True)):
        model, condition, picture = scene()
        model = model.executed(Execution(recompute=checkpointing))
        options = {"rules": rules(window=5, rope=rope), "batched": together}
        made = unroll(model, condition, picture, 9, **options, exit_step=1, with_grad=True)
        made.latents.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        videos.append(made.latents.detach())
    for other in (1, 2, 3):
        torch.testing.assert_close(videos[other], videos[0])
        for a, b in zip(gradients[other], gradients[0], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("option", "with_grad", "spare"),
    [
        (None, True, 0),
        ("activation_checkpointing", False, 0),
        ("activation_checkpointing", True, 1),
        ("batched_exit_backward", True, 1),
    ],
)
@pytest.mark.parametrize(("window", "evicted"), [(9, 0), (8, 0), (5, 0), (3, 2), (None, 0)])  # of the first 5 of 7
def test_the_cache_keeps_what_is_evicted_for_a_backward_that_computes_again(
    option, with_grad, spare, window, evicted, monkeypatch
):
    model, condition, picture = scene(num_layers=1)
    model = model.executed(Execution(recompute=option == "activation_checkpointing"))
    caches, new_cache = [], model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda *sizes: caches.append(new_cache(*sizes)) or caches[-1])
    made = unroll(
        model,
        condition,
        picture,
        7,
        rules=rules(window=window),
        batched=option == "batched_exit_backward",
        exit_step=0,
        with_grad=with_grad,
    )
    (cache,) = caches
    frames = cache.size_bytes // cache.stored([0])[0].nbytes // 2
    assert frames == (window or 7) + spare * evicted and made.latents.requires_grad == with_grad


@pytest.mark.parametrize("i2v", [True, False])
def test_exit_steps_that_have_their_gradient_together(i2v, monkeypatch):
    """One with_grad call of all blocks in the end, at their own steps; the video is that of the steps without gradient."""
    model, condition, picture = scene(i2v)
    model = model.executed(Execution(recompute=True))
    plan = rules(first=1 if i2v else 2)
    frames = 7 if i2v else 6
    plain = unroll(model, condition, picture, frames, rules=plan, exit_step=1).latents
    calls = record(model, monkeypatch)
    made = unroll(model, condition, picture, frames, rules=plan, batched=True, exit_step=1, with_grad=True).latents
    assert torch.equal(made.detach(), plain) and made.requires_grad
    assert [call["with_grad"] for call in calls] == [False] * (len(calls) - 1) + [True]
    *plain_calls, last = calls
    steps = [call for call in plain_calls if call["sigma"][0] == SIGMAS[1]]
    assert last["blocks"] == 3 and torch.equal(last["x"], torch.cat([call["x"] for call in steps], 1))
    assert last["sigma"].shape == (2, 6) and (last["sigma"] == SIGMAS[1]).all()


def test_what_blocks_read_together_is_kept_until_backward():
    """A cache that would lose it refuses; afterwards it may be lost, and is when the roll-out is dropped."""
    model, condition, picture = scene()
    denoiser = Denoiser(model, batched_exit_backward=True)
    cache = model.new_cache(tiny_plan(2, 1, 5, 1), 2, SIZE)
    sigma, block = torch.full((2,), 0.5), make_tiny_latents(2)

    def commit():
        with torch.no_grad():
            denoiser(block, sigma * 0, condition, cache, commit=True)

    with torch.no_grad():
        denoiser(picture, sigma * 0, condition, cache, commit=True)
    commit()
    commit()
    for backward in (True, False):
        exits = []
        denoise_block(denoiser, cache, condition, lambda step: block, rules(), exits=exits)
        commit()
        with pytest.raises(CacheError, match="pending backward"):
            commit()
        made = denoiser.exits_with_grad(condition, exits)
        del exits
        with pytest.raises(CacheError, match="pending backward"):
            commit()
        if backward:
            made.sum().backward()
        del made
        commit()


def test_graded_and_plain_roll_outs_make_the_same_video():
    model, condition, picture = scene()
    plain = unroll(model, condition, picture, exit_step=2)
    with_grad = unroll(model, condition, picture, exit_step=2, with_grad=True)
    assert not plain.latents.requires_grad and with_grad.latents.requires_grad
    torch.testing.assert_close(with_grad.latents.detach(), plain.latents)


def test_the_picture_receives_no_gradient():
    model, condition, picture = scene()
    picture = picture.requires_grad_()
    made = unroll(model, condition, picture, exit_step=0, with_grad=True)
    (grad,) = torch.autograd.grad(made.latents[:, 1:].sum(), picture, allow_unused=True)
    assert grad is None or grad.abs().max() == 0


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_a_length_off_the_block_plan_is_refused(frames):
    model, condition, picture = scene()
    with pytest.raises(ConfigError, match="does not fit the block plan"):
        unroll(model, condition, picture, frames)


def stream(model, condition, picture, number, rules, noise=noise_at):
    cache = model.new_cache(rules, 2, SIZE, max_frames=99)
    return torch.cat(list(islice(LatentStream(Denoiser(model), cache, condition, picture, noise, rules), number)), 1)


@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize(("window", "sink"), [(5, 1), (7, 3), (4, 0), (None, 0)])
def test_streaming_equals_the_roll_out_with_the_last_exit_step(rope, window, sink):
    model, condition, picture = scene()
    chosen = rules(window=window, sink=sink, rope=rope)
    whole = unroll(model, condition, picture, 9, rules=chosen, exit_step=3)
    assert torch.equal(stream(model, condition, picture, 5, chosen), whole.latents)


def test_streaming_text_to_video_equals_its_roll_out():
    model, condition, _ = scene(i2v=False)
    chosen = rules(first=2, window=4, sink=2)
    whole = unroll(model, condition, None, 8, rules=chosen)
    assert torch.equal(stream(model, condition, None, 4, chosen), whole.latents)


def test_the_stream_commits_a_block_only_when_the_next_one_is_asked_for(monkeypatch):
    model, condition, picture = scene()
    calls = record(model, monkeypatch)
    cache = model.new_cache(tiny_plan(2, 1, 5, 1), 2, SIZE)
    blocks = LatentStream(Denoiser(model), cache, condition, picture, noise_at, rules())
    assert torch.equal(next(blocks), picture) and calls == []
    next(blocks)
    assert [bool(call["commit"]) for call in calls] == [True, False, False, False, False]
    assert cache.position == 1
    next(blocks)
    assert cache.position == 3 and len(calls) == 10


@pytest.mark.parametrize("rope", ["relative", "absolute"])
def test_a_hundred_blocks(rope):  # spec N.13
    model, condition, picture = scene(num_layers=1)
    chosen = rules(rope=rope, sigmas=(1.0, 0.5))
    cache = model.new_cache(chosen, 2, SIZE)
    size = cache.size_bytes
    frames = 0
    for number, block in enumerate(
        islice(LatentStream(Denoiser(model), cache, condition, picture, noise_at, chosen), 101)
    ):
        assert block.shape[1] == (2 if number else 1) and block.isfinite().all()
        frames += block.shape[1]
    assert frames == 201 and pixel_frames(frames) == 4 * (frames - 1) + 1 == 801
    assert cache.position == 199 and len(cache.held_frames) <= 5 and cache.held_frames[0] == 0
    assert cache.size_bytes == size
