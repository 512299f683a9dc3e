"""The cache after a change of condition: as if the kept frames had been streamed under the new one (N.12, M-04, M-05)."""

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.errors import CacheError, ConfigError
from longtake.models.execution import Execution
from longtake.rollout.denoise import Denoiser, commit_block, denoise_block
from longtake.rollout.recache import LatentHistory, recache

PLAN = tiny_plan(2, 1)


def streamed(model, condition, latents, window, sink, rope="relative"):
    """A cache that saw `latents` block by block."""
    cache = model.new_cache(tiny_plan(2, 1, window, sink, rope), 2, (4, 6), max_frames=None if window else 64)
    for start, end in PLAN.blocks(0, latents.shape[1]):
        commit_block(Denoiser(model), cache, condition, latents[:, start:end])
    return cache


def kept_of(latents, window, sink, together=1, **law):
    """Kept latents, given `together` blocks at a time."""
    kept, blocks = (
        LatentHistory(PLAN.but(window_frames=window, sink_frames=sink, **law)),
        list(PLAN.blocks(0, latents.shape[1])),
    )
    for k in range(0, len(blocks), together):
        kept.append(latents[:, blocks[k][0] : blocks[min(k + together, len(blocks)) - 1][1]])
    return kept


def next_block(model, cache, condition):
    return denoise_block(
        Denoiser(model),
        cache,
        condition,
        lambda step: make_tiny_latents(2, seed=50 + step),
        PLAN.but(sigmas=[1.0, 0.5]),
    ).clean


def frames(cache):
    """Keys and values by absolute frame."""
    return {f: (cache.keys[:, :, cache.slot_of(f)], cache.values[:, :, cache.slot_of(f)]) for f in cache.held_frames}


@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize(
    ("total", "window", "sink", "expected"),
    [
        (11, 5, 1, [0, 7, 8, 9, 10]),
        (11, 7, 3, [0, 1, 2, 7, 8, 9, 10]),
        (5, 7, 1, [0, 1, 2, 3, 4]),  # nothing was evicted yet
        (1, 5, 1, [0]),  # the picture alone
        (3, 7, 3, [0, 1, 2]),  # the sink alone
        (7, 4, 0, [3, 4, 5, 6]),
        (9, None, 1, list(range(9))),
    ],
)
def test_rebuilt_equals_a_fresh_cache_fed_the_kept_frames(rope, total, window, sink, expected):
    model = make_tiny_model(i2v=True)
    old, new = make_tiny_condition(model, seed=1), make_tiny_condition(model, seed=9)
    latents = make_tiny_latents(total)
    cache = streamed(model, old, latents, window, sink, rope)
    kept = kept_of(latents, window, sink, together=2)
    assert [f for start, block in kept.blocks() for f in range(start, start + block.shape[1])] == expected
    recache(Denoiser(model), cache, new, kept)
    # The oracle of the specification: a fresh cache, sink frames, then the last window - sink frames.
    fresh = model.new_cache(tiny_plan(2, 1, window, sink, rope), 2, (4, 6), max_frames=None if window else 64)
    for start, end in PLAN.blocks(0, total):
        if start in expected:
            fresh.position = start
            commit_block(Denoiser(model), fresh, new, latents[:, start:end])
    assert cache.position == fresh.position == total
    assert cache.held_frames == fresh.held_frames == expected
    for frame, pair in frames(fresh).items():
        for mine, truth in zip(frames(cache)[frame], pair):
            assert torch.equal(mine, truth), frame
    assert torch.equal(next_block(model, cache, new), next_block(model, fresh, new))


def test_without_eviction_it_equals_the_whole_stream_under_the_new_prompt():
    model = make_tiny_model(i2v=True)
    old, new = make_tiny_condition(model, seed=1), make_tiny_condition(model, seed=9)
    latents = make_tiny_latents(5)
    cache = streamed(model, old, latents, 7, 1)
    stale = next_block(model, cache, new)
    recache(Denoiser(model), cache, new, kept_of(latents, 7, 1))
    rebuilt = next_block(model, cache, new)
    assert torch.equal(rebuilt, next_block(model, streamed(model, new, latents, 7, 1), new))
    assert (rebuilt - stale).abs().max() > 1e-2, "without a rebuild the past still follows the old prompt"


def test_it_is_causal():
    """A later frame changes nothing of an earlier one (M-05)."""
    model = make_tiny_model(i2v=True)
    condition = make_tiny_condition(model)
    one, other = make_tiny_latents(11), make_tiny_latents(11)
    other[:, 9:] += 1
    caches = []
    for latents in (one, other):
        cache = streamed(model, condition, latents, 7, 1)
        recache(Denoiser(model), cache, condition, kept_of(latents, 7, 1))
        caches.append(frames(cache))
    for frame in (0, 5, 6, 7, 8):
        assert torch.equal(caches[0][frame][0], caches[1][frame][0])
    assert not torch.equal(caches[0][9][0], caches[1][9][0])


def test_the_sink_can_stay_as_the_old_prompt_made_it():
    model = make_tiny_model(i2v=True)
    old, new = make_tiny_condition(model, seed=1), make_tiny_condition(model, seed=9)
    latents = make_tiny_latents(11)
    cache = streamed(model, old, latents, 7, 3)
    before = {f: tuple(t.clone() for t in pair) for f, pair in frames(cache).items()}
    recache(Denoiser(model), cache, new, kept_of(latents, 7, 3, keep_sink=True))
    after = frames(cache)
    assert list(after) == [0, 1, 2, 7, 8, 9, 10] and cache.position == 11
    assert all(torch.equal(after[f][0], before[f][0]) for f in (0, 1, 2))
    assert not any(torch.equal(after[f][0], before[f][0]) for f in (7, 8, 9, 10))
    assert torch.isfinite(next_block(model, cache, new)).all()


@pytest.mark.parametrize("spare", [0, 4])
@pytest.mark.parametrize("committed", [9, 11, 13])
def test_beside_a_kept_sink_nothing_that_the_old_prompt_made_is_seen(spare, committed):
    """Though the cache may still hold frames before the oldest that is kept: a block is pending, or there is room."""
    model = make_tiny_model(i2v=True)
    old, new = make_tiny_condition(model, seed=1), make_tiny_condition(model, seed=9)
    latents = make_tiny_latents(13)
    cache, fresh = (model.new_cache(tiny_plan(2, 1, 7, 3), 2, (4, 6), spare_frames=spare) for _ in range(2))
    for start, end in PLAN.blocks(0, committed):
        commit_block(Denoiser(model), cache, old, latents[:, start:end])
    recache(Denoiser(model), cache, new, kept_of(latents, 7, 3, keep_sink=True))
    for start, condition in ((0, old), (1, old), (9, new), (11, new)):
        fresh.position = start
        commit_block(Denoiser(model), fresh, condition, latents[:, start : start + (2 if start else 1)])
    mine, truth = frames(cache), frames(fresh)
    assert list(mine) == list(truth) == [0, 1, 2, 9, 10, 11, 12] and cache.position == 13
    assert all(torch.equal(a, b) for frame in truth for a, b in zip(mine[frame], truth[frame]))


@pytest.mark.parametrize("committed", [0, 1, 3, 5])
def test_a_kept_sink_is_filled_where_the_stream_has_not_filled_it(committed):
    """The latest block is finished and not in the cache yet: part of the sink may be missing there."""
    model = make_tiny_model(i2v=True)
    old, new = make_tiny_condition(model, seed=1), make_tiny_condition(model, seed=9)
    latents = make_tiny_latents(5)
    cache = model.new_cache(tiny_plan(2, 1, 7, 3), 2, (4, 6))
    for start, end in PLAN.blocks(0, committed):
        commit_block(Denoiser(model), cache, old, latents[:, start:end])
    before = {f: pair[0].clone() for f, pair in frames(cache).items()}
    recache(Denoiser(model), cache, new, kept_of(latents, 7, 3, keep_sink=True))
    after = frames(cache)
    assert list(after) == [0, 1, 2, 3, 4]
    assert [f for f in after if f in before and torch.equal(after[f][0], before[f])] == list(range(min(3, committed)))


def test_only_what_is_needed_is_kept_and_blocks_stay_whole():
    kept = kept_of(make_tiny_latents(201), 7, 3)
    assert kept.position == 201 and [start for start, _ in kept.blocks()] == [0, 1, 197, 199]
    twin = kept.copy()
    twin.append(make_tiny_latents(2))
    assert kept.position == 201 and twin.position == 203 and len(list(kept.blocks())) == 4
    with pytest.raises(ConfigError, match="no block boundary"):
        kept.append(make_tiny_latents(1))


def test_a_pending_backward_is_not_robbed_of_its_context():
    model = make_tiny_model(i2v=True)
    model = model.executed(Execution(recompute=True))  # recomputes from the cache in backward
    condition = make_tiny_condition(model)
    latents = make_tiny_latents(5)
    cache = streamed(model, condition, latents, 7, 1)
    clean = denoise_block(
        Denoiser(model), cache, condition, lambda step: make_tiny_latents(2, seed=step), PLAN, with_grad=True
    ).clean
    with pytest.raises(CacheError, match="pending backward"):
        recache(Denoiser(model), cache, condition, kept_of(latents, 7, 1))
    clean.sum().backward()
    recache(Denoiser(model), cache, condition, kept_of(latents, 7, 1))
