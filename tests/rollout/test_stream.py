"""A stream of latents far from its beginning: nothing ends, and positions mean what they meant."""

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error

from longtake.models.cache import KVCache
from longtake.rollout.chunk import Guidance, commit_block
from longtake.rollout.self_forcing import RollOutRules
from longtake.rollout.stream import LatentStream
from longtake.structs import BlockPlan

PLAN = BlockPlan(2, 1)


def stream_from(model, condition, frame, rules, sink):
    """A stream at `frame` whose cache holds the sink and the four frames before."""
    cache = model.new_cache(2, 4, 6, rules.window_frames, rules.sink_frames, rules.rope)
    past = make_tiny_latents(5)
    if sink:
        commit_block(model, cache, condition, past[:, :1])
    for start in (frame - 4, frame - 2):
        cache.position = start
        commit_block(model, cache, condition, past[:, 1:3] if start == frame - 4 else past[:, 3:])
    return LatentStream(
        model, cache, condition, None, lambda s, e, k: make_tiny_latents(2, seed=s - frame + 50 * k + 100), rules
    )


@pytest.mark.parametrize(("rope", "sink"), [("relative", 1), ("relative", 0), ("absolute", 0)])
@pytest.mark.parametrize("far", [10**6 + 1, 10**9 + 1])
def test_far_frames_equal_near_ones(rope, sink, far):
    """Past the end of `y` a block depends on what it sees alone; absolute positions but for their rounding."""
    model = make_tiny_model(i2v=True)
    condition = make_tiny_condition(model, num_frames=7)
    rules = RollOutRules(PLAN, [1.0, 0.5], 4 + 2 + sink, sink, rope)
    near_by, far_away = (stream_from(model, condition, frame, rules, sink) for frame in (13, far))
    other = make_tiny_condition(model, num_frames=7, seed=9)
    for block in range(6):
        if block == 4:
            near_by.change(other)
            far_away.change(other)
        a, b = near_by.next(), far_away.next()
        tolerance = 0 if rope == "relative" else 1e-4
        assert relative_error(b, a) <= tolerance, block
    assert far_away.position == far + 12 and far_away.cache.position == far + 10


def test_absolute_positions_with_a_sink_stay_finite_for_ever():
    model = make_tiny_model(i2v=True)
    condition = make_tiny_condition(model)
    rules = RollOutRules(PLAN, [1.0, 0.5], 7, 1, "absolute")
    stream = stream_from(model, condition, 10**6 + 1, rules, sink=1)
    assert all(torch.isfinite(stream.next()).all() for _ in range(3))
    assert stream.cache.held_frames[0] == 0


def new_stream(model, condition, guided=False, spare_frames=6):
    rules = RollOutRules(PLAN, [1.0, 0.5], 5, 1, "relative")
    caches = [model.new_cache(2, 4, 6, 5, 1, spare_frames=spare_frames) for _ in range(2)]
    guidance = Guidance(2.0, make_tiny_condition(model, seed=4), caches[1]) if guided else None

    def noise(start, end, step):
        return make_tiny_latents(end - start, seed=10 * start + step)

    return LatentStream(model, caches[0], condition, make_tiny_latents(1), noise, rules, guidance=guidance)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_copies_with_one_cache_take_turns_and_those_with_another_need_not(changed, guided):
    """Also right after a change."""
    model = make_tiny_model(i2v=True)
    stream = new_stream(model, make_tiny_condition(model), guided)
    for _ in range(3):
        stream.next()
    if changed:
        stream.change(make_tiny_condition(model, seed=9), make_tiny_condition(model, seed=8))
    twin, other = stream.copy(), stream.copy(KVCache.copy)
    assert all(a is b for a, b in zip(twin.caches, stream.caches))
    assert not any(a is b for a, b in zip(other.caches, stream.caches)) and len(other.caches) == 1 + guided
    expected = [twin.next(), twin.next()]
    assert stream.position == 5 and other.position == 5 and twin.position == 9
    stream.return_to_cache()
    for block in expected:
        assert torch.equal(stream.next(), block) and torch.equal(other.next(), block)
    stream.return_to_cache()
    assert all(cache.position == 7 for cache in stream.caches)


@pytest.mark.parametrize("guided", [False, True])
def test_a_change_makes_the_cache_anew_or_takes_another(guided):
    model = make_tiny_model(i2v=True)
    stream = new_stream(model, make_tiny_condition(model), guided)
    for _ in range(3):
        stream.next()
    change = make_tiny_condition(model, seed=9), make_tiny_condition(model, seed=8)
    other = stream.copy()
    caches, before = stream.caches, [cache.keys.clone() for cache in stream.caches]
    other.change(*change, in_place=False)
    assert all(torch.equal(cache.keys, keys) for cache, keys in zip(caches, before))
    assert stream.caches == caches and not any(cache in caches for cache in other.caches)
    stream.change(*change)
    assert torch.equal(stream.next(), other.next())
    assert stream.caches == caches and not any(torch.equal(c.keys, keys) for c, keys in zip(caches, before))


def test_a_block_that_fails_can_be_asked_for_again():
    """The context pass of the block before is not run twice."""
    model = make_tiny_model(i2v=True)
    condition = make_tiny_condition(model)
    rules = RollOutRules(PLAN, [1.0], 5, 1, "relative")
    fail = []

    def noise(start, end, step):
        if fail:
            fail.pop()
            raise MemoryError
        return make_tiny_latents(end - start, seed=start)

    streams = [
        LatentStream(model, model.new_cache(2, 4, 6, 5, 1), condition, make_tiny_latents(1), noise, rules)
        for _ in range(2)
    ]
    expected = [streams[0].next() for _ in range(4)]
    made = [streams[1].next(), streams[1].next()]
    fail.append(True)
    with pytest.raises(MemoryError):
        streams[1].next()
    made += [streams[1].next(), streams[1].next()]
    assert all(torch.equal(a, b) for a, b in zip(made, expected))
