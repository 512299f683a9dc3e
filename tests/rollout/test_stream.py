"""A stream of latents far from its beginning: nothing ends, and positions mean what they meant."""

from contextlib import contextmanager

import pytest
import torch
from tape import Tape
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error
from tiny_plan import tiny_plan
from torch.nn.modules.module import register_module_forward_pre_hook

from longtake.errors import CacheError
from longtake.models.cache import KVCache
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser, Guidance, commit_block
from longtake.rollout.stream import LatentStream, stream_switched

PLAN = tiny_plan(2, 1)


def stream_from(model, condition, frame, rules, sink):
    """A stream at `frame` whose cache holds the sink and the four frames before."""
    cache = model.new_cache(rules, 2, (4, 6))
    past = make_tiny_latents(5)
    if sink:
        commit_block(Denoiser(model), cache, condition, past[:, :1])
    for start in (frame - 4, frame - 2):
        cache.position = start
        commit_block(Denoiser(model), cache, condition, past[:, 1:3] if start == frame - 4 else past[:, 3:])
    return LatentStream(
        Denoiser(model),
        cache,
        condition,
        None,
        lambda s, e, k: make_tiny_latents(2, seed=s - frame + 50 * k + 100),
        rules,
    )


@pytest.mark.parametrize(("rope", "sink"), [("relative", 1), ("relative", 0), ("absolute", 0)])
@pytest.mark.parametrize("far", [10**6 + 1, 10**9 + 1])
def test_far_frames_equal_near_ones(rope, sink, far):
    """Past the end of `y` a block depends on what it sees alone; absolute positions but for their rounding."""
    model = make_tiny_model(i2v=True)
    condition = make_tiny_condition(model, num_frames=7)
    rules = PLAN.but(window_frames=4 + 2 + sink, sink_frames=sink, rope=rope, sigmas=[1.0, 0.5])
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
    rules = PLAN.but(window_frames=7, sink_frames=1, rope="absolute", sigmas=[1.0, 0.5])
    stream = stream_from(model, condition, 10**6 + 1, rules, sink=1)
    assert all(torch.isfinite(stream.next()).all() for _ in range(3))
    assert stream.cache.held_frames[0] == 0


@contextmanager
def raising_at(number):
    """Raises Ctrl-C at call `number` of any module and of the cache, and counts them."""
    calls = [0]

    def count(*_):
        calls[0] += 1
        if calls[0] == number:
            raise KeyboardInterrupt

    def counted(function):
        return lambda *args, **given: (count(), function(*args, **given))[1]

    hook = register_module_forward_pre_hook(count)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("begin_commit", "write", "end_commit", "set_cross", "cross_is_for", "clear", "skip_to", "copy"):
            patch.setattr(KVCache, name, counted(getattr(KVCache, name)))
        try:
            yield calls
        finally:
            hook.remove()


@pytest.mark.whole
@pytest.mark.parametrize("step", [None, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize(
    ("guided", "keep_sink", "recorded", "context"),
    [
        pytest.param(False, False, False, "pass", marks=pytest.mark.slow),
        (True, True, False, "pass"),
        pytest.param(False, True, True, "pass", marks=pytest.mark.slow),
        (True, False, False, "last_step"),
        (False, False, True, "last_step"),
    ],
)
def test_a_call_that_was_interrupted_anywhere_can_be_made_again(guided, keep_sink, recorded, context, step):
    """Three blocks, of which the middle one comes after a change: denoising, context, both sides, rebuild. At every call
    of a module or the cache (`step` 1), or at some of them.
    """
    denoiser = Denoiser(make_tiny_model(i2v=True))
    model = denoiser.model
    one, other, empty, none = (make_tiny_condition(model, seed=seed) for seed in range(1, 5))
    rules = PLAN.but(window_frames=7, sink_frames=3, keep_sink=keep_sink, sigmas=[1.0, 0.5], context=context)

    def noise(start, end, step):
        return make_tiny_latents(end - start, seed=start + 50 * step)

    def begun():
        caches = [model.new_cache(tiny_plan(2, 1, 7, 3), 2, (4, 6)) for _ in range(2)]
        guidance = Guidance(2.0, empty, caches[1]) if guided else None
        stream = LatentStream(denoiser, caches[0], one, make_tiny_latents(1), noise, rules, guidance=guidance)
        for _ in range(2 if recorded else 4):
            stream.next()
        return stream

    calls = [
        lambda stream: stream.next(),
        lambda stream: stream.change(other, none if guided else None),
        lambda stream: stream.next(),
        lambda stream: stream.commit(),
        lambda stream: stream.next(),
    ]
    stream = begun()
    expected = [call(stream) for call in calls]
    with raising_at(0) as counted:
        stream = begun()
        before, ends = counted[0], []
        for call in calls:
            call(stream)
            ends.append(counted[0] - before)
    if recorded:
        denoiser.graphs = CUDAGraphRunner(Tape())
    for number in [*range(1, ends[-1], step or max(1, ends[-1] // 16)), *ends]:
        stream = begun()
        with raising_at(number) as counted:
            for call, result in zip(calls, expected, strict=True):
                try:
                    made = call(stream)
                except KeyboardInterrupt:
                    made = call(stream)
                assert result is None or torch.equal(made, result), number
        assert counted[0] >= number


@pytest.mark.parametrize("recache", ["rebuild", "none"])
def test_a_switched_stream_goes_on_after_an_interruption(recache):
    model = make_tiny_model(i2v=True)
    conditions = [make_tiny_condition(model, seed=seed) for seed in (1, 2, 3)]
    rules = PLAN.but(window_frames=5, sink_frames=1, sigmas=[1.0, 0.5], recache=recache)

    def made(number):
        cache, latents = model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6)), []
        stream = stream_switched(
            Denoiser(model),
            cache,
            conditions,
            [3, 6],
            make_tiny_latents(1),
            lambda s, e, k: make_tiny_latents(e - s, seed=s + 50 * k),
            rules,
        )
        with raising_at(number) as counted:
            while len(latents) < 5:
                try:
                    latents.append(next(stream))
                except KeyboardInterrupt:
                    latents.append(next(stream))
        return torch.cat(latents, 1), counted[0]

    expected, count = made(0)
    assert all(torch.equal(made(number)[0], expected) for number in range(1, count + 1, count // 10))


@pytest.mark.parametrize("window", [7, None])
def test_a_hole_in_the_cache_is_an_error(window):
    """Whoever moves a cache past frames that it does not hold, or back to where some were overwritten, is told."""
    model = make_tiny_model(i2v=True)
    condition, sink = make_tiny_condition(model), 1 if window else 0
    cache = model.new_cache(tiny_plan(2, 1, window, sink), 2, (4, 6), max_frames=None if window else 32)
    latents = make_tiny_latents(13)
    for start, end in PLAN.blocks(0, 13):
        commit_block(Denoiser(model), cache, condition, latents[:, start:end])
    cache.position = 15
    with pytest.raises(CacheError, match=r"attends to frames \[13, 14\], which this cache does not hold"):
        commit_block(Denoiser(model), cache, condition, latents[:, 1:3])
    cache.position = 13
    commit_block(Denoiser(model), cache, condition, latents[:, 1:3])
    cache.position = 9
    if window:
        with pytest.raises(CacheError, match=r"attends to frames \[5, 6, 7, 8\]"):
            commit_block(Denoiser(model), cache, condition, latents[:, 9:11])
    else:
        commit_block(Denoiser(model), cache, condition, latents[:, 9:11])


def new_stream(model, condition, guided=False, spare_frames=6):
    rules = PLAN.but(window_frames=5, sink_frames=1, sigmas=[1.0, 0.5])
    caches = [model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6), spare_frames=spare_frames) for _ in range(2)]
    guidance = Guidance(2.0, make_tiny_condition(model, seed=4), caches[1]) if guided else None

    def noise(start, end, step):
        return make_tiny_latents(end - start, seed=10 * start + step)

    return LatentStream(Denoiser(model), caches[0], condition, make_tiny_latents(1), noise, rules, guidance=guidance)


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
def test_a_change_makes_the_cache_anew_in_its_place(guided):
    model = make_tiny_model(i2v=True)
    stream = new_stream(model, make_tiny_condition(model), guided)
    for _ in range(3):
        stream.next()
    change = make_tiny_condition(model, seed=9), make_tiny_condition(model, seed=8)
    other = stream.copy(KVCache.copy)
    caches, before = stream.caches, [cache.keys.clone() for cache in stream.caches]
    stream.change(*change)
    other.change(*change)
    assert torch.equal(stream.next(), other.next())
    assert stream.caches == caches and not any(torch.equal(c.keys, keys) for c, keys in zip(caches, before))


def test_a_block_that_fails_can_be_asked_for_again():
    """The context pass of the block before is not run twice."""
    model = make_tiny_model(i2v=True)
    condition = make_tiny_condition(model)
    rules = PLAN.but(window_frames=5, sink_frames=1, sigmas=[1.0])
    fail = []

    def noise(start, end, step):
        if fail:
            fail.pop()
            raise MemoryError
        return make_tiny_latents(end - start, seed=start)

    streams = [
        LatentStream(
            Denoiser(model),
            model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6)),
            condition,
            make_tiny_latents(1),
            noise,
            rules,
        )
        for _ in range(2)
    ]
    expected = [streams[0].next() for _ in range(4)]
    made = [streams[1].next(), streams[1].next()]
    fail.append(True)
    with pytest.raises(MemoryError):
        streams[1].next()
    made += [streams[1].next(), streams[1].next()]
    assert all(torch.equal(a, b) for a, b in zip(made, expected))
