"""Whatever raises, wherever: the call made again gives what it would have given; every equality is of bits."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_sessions import KINDS, OTHER, PICTURE, A, B, make_generator, open_session, take
from torch.nn.modules.module import register_module_forward_pre_hook

from longtake.inference import frames as frames_module
from longtake.inference.script import Cue, Story
from longtake.models.cache import KVCache

CACHE_CALLS = ("begin_commit", "write", "end_commit", "set_cross", "clear", "skip_to", "copy")


@contextmanager
def raising_at(number, error=KeyboardInterrupt):
    """Raises at call `number` of any module, of the cache and of what makes bytes of frames; counts the calls."""
    calls = [0]

    def count(*_):
        calls[0] += 1
        if calls[0] == number:
            raise error

    def counted(function):
        def call(*args, **given):
            count()
            return function(*args, **given)

        return call

    hook = register_module_forward_pre_hook(count)
    with pytest.MonkeyPatch.context() as patch:
        for name in CACHE_CALLS:
            patch.setattr(KVCache, name, counted(getattr(KVCache, name)))
        patch.setattr(frames_module, "to_bytes", counted(frames_module.to_bytes))
        try:
            yield calls
        finally:
            hook.remove()


def places(make, most, seed=0):
    """Up to `most` numbers of the calls that `make` makes, the last one among them."""
    with raising_at(0) as calls:
        make()
    order = torch.randperm(calls[0] - 1, generator=torch.Generator().manual_seed(seed)) + 1
    return [*order[: most - 1].tolist(), calls[0]]


def interrupt(make, number, error=KeyboardInterrupt):
    with raising_at(number, error), pytest.raises(error):
        make()


CHANGES = {
    "block": lambda session: None,
    "prompt": lambda session: setattr(session, "prompt", B),
    "target": lambda session: setattr(session, "image_target", OTHER),
    "cut": lambda session: setattr(session, "image", OTHER),
    "cut with a target": lambda session: (setattr(session, "image", OTHER), setattr(session, "image_target", PICTURE)),
}


def interrupted_everywhere(generator, change, before, history_blocks, most):
    session = open_session(generator, history_blocks=history_blocks)
    for _ in range(before):
        session.next()
    CHANGES[change](session)
    expected = take(session.fork(), 3)
    for index, number in enumerate(places(session.fork().next, most)):
        tried, error = session.fork(), (KeyboardInterrupt, MemoryError)[index % 2]
        interrupt(tried.next, number, error)
        assert (tried.num_frames, tried.rewindable) == (session.num_frames, session.rewindable), number
        if index % 3 == 2:
            interrupt(tried.next, 1 + number // 2)
        assert np.array_equal(take(tried, 3), expected), number


@pytest.mark.parametrize(("change", "history_blocks"), [(change, 2 * (k % 2)) for k, change in enumerate(CHANGES)])
def test_a_call_that_failed_gives_the_same_frames(change, history_blocks):
    interrupted_everywhere(make_generator(), change, 3, history_blocks, most=4)


def stopping_at(number):
    """A function whose call `number` raises."""
    calls = iter(range(1, number + 1))

    def stop():
        if next(calls) == number:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_can_be_let_go_between_its_steps(kind):
    generator = make_generator(**KINDS[kind])
    session = open_session(generator)
    take(session, 3)
    expected = take(session.fork(), 2)
    for number in range(1, len(generator.plan.levels(3)) + 1):
        tried = session.fork()
        with pytest.raises(KeyboardInterrupt):
            tried.begin(stopping_at(number))
        assert tried.num_frames == session.num_frames
        again = tried.fork()
        assert np.array_equal(take(again, 2), expected), number
        for one in (tried, (other := session.fork())):
            one.prompt = B
        assert np.array_equal(take(tried, 2), take(other, 2)), number


@pytest.mark.parametrize(("kind", "change"), [(k, ("block", "prompt")[n % 2]) for n, k in enumerate(list(KINDS)[1:])])
def test_so_does_every_kind_of_stream(kind, change):
    interrupted_everywhere(make_generator(**KINDS[kind]), change, 2 + len(kind) % 2, 0, most=4)


@pytest.mark.slow
@pytest.mark.parametrize("history_blocks", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [0, 1, 4])
def test_wherever_it_failed(change, kind, before, history_blocks):
    generator = make_generator(**KINDS[kind])
    if "target" in change and generator.model.config.image_dim is None:
        pytest.skip("these weights take no target")
    interrupted_everywhere(generator, change, before, history_blocks, most=12)


@pytest.mark.whole
@pytest.mark.parametrize("history_blocks", [1, 3])
@pytest.mark.parametrize("change", ["block", "prompt"])
def test_a_failed_call_leaves_the_way_back_as_it_was(change, history_blocks, tmp_path):
    generator = make_generator()
    straight = take(open_session(generator), 7)
    session = open_session(generator, history_blocks=history_blocks)
    take(session, 6)
    CHANGES[change](session)
    for number in places(session.fork().next, 6):
        back, saved = session.fork(), session.fork()
        interrupt(back.next, number)
        back.rewind(history_blocks)
        assert np.array_equal(take(back, history_blocks + 1), straight[-8 * (history_blocks + 1) :]), number
        interrupt(saved.next, number)
        saved.save(tmp_path / "s.safetensors")
        resumed = generator.resume(tmp_path / "s.safetensors")
        assert np.array_equal(take(resumed, 2), take(session.fork(), 2)), number


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["plain", "kept sink"])
def test_a_change_that_failed_in_place_can_be_taken_back(kind):
    """Without a history its cache is gone: it is made anew under the prompt that there was, never used half made."""
    generator = make_generator(**KINDS[kind])
    session = open_session(generator, history_blocks=0)
    take(session, 4)
    untouched, anew = take(session.fork(), 2), session.fork()
    stream = anew.state.stream
    stream.change(stream.condition)
    again = take(anew, 2)  # of two layers and this window the same frames, but for rounding
    session.prompt = B
    for number in places(session.fork().next, 16, seed=1):
        tried = session.fork()
        interrupt(tried.next, number)
        tried.prompt = A
        made = take(tried, 2)
        assert np.array_equal(made, untouched) or np.array_equal(made, again), number


@pytest.mark.whole
@pytest.mark.parametrize("ahead", [False, True])
def test_a_stream_and_a_story_go_on_after_an_interruption(ahead):
    generator = make_generator()
    story = Story(PICTURE, A, 45, 0, None, (Cue(10, B, None, None), Cue(20, None, OTHER, None)))

    def ways():
        return (
            generator.stream(PICTURE, A, num_frames=33, ahead=ahead),
            story.play(story.open(generator, history_blocks=0), ahead=ahead),
        )

    expected = [np.concatenate(list(frames)) for frames in ways()]
    with raising_at(0) as calls:
        next(ways()[0])
    for number in (3, calls[0]):
        for frames, whole in zip(ways(), expected, strict=True):
            made = []
            for _ in range(12):
                with raising_at(number):
                    try:
                        made.append(next(frames))
                        continue
                    except StopIteration:
                        break
                    except KeyboardInterrupt:
                        pass
                made.append(next(frames))
            assert np.array_equal(np.concatenate(made), whole)


@pytest.mark.parametrize("kind", ["plain", "last step"])
def test_a_block_that_fails_in_the_end_takes_nothing_of_the_history(kind):
    """Though it may have been stored by then: what the oldest block that can be taken back attends to is still there."""
    generator = make_generator(**KINDS[kind])
    session = open_session(generator, history_blocks=2)
    made = [take(session, 1) for _ in range(9)]
    twin = session.fork()
    with raising_at(0) as calls:
        twin.next()
    interrupt(session.next, calls[0])
    session.rewind(2)
    assert np.array_equal(take(session, 2), np.concatenate(made[-2:]))
