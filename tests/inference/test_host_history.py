"""The way back out of the host's memory: the same frames, one cache of the window alone on the device, bytes as counted."""

import numpy as np
import pytest
import torch
from page_locks import PageLocks
from tiny_sessions import KINDS, OTHER, A, B, C, make_generator, open_session, take

from longtake.inference.host_copies import HostCopies
from longtake.models.cache import KVCache

BLOCKS = 12


def steered(session, number):
    """What is asked before a block, by its number."""
    if number == 5:
        session.prompt = B
    elif number == 7 and session.generator.model.config.image_dim is not None:
        session.image_target = OTHER
    elif number == 9:
        session.prompt = C
    elif number == 10 and session.image is not None:
        session.image = OTHER
    return session.next()


@pytest.mark.parametrize(("kind", "ready"), [*((kind, 3) for kind in KINDS), ("plain", 0)])
def test_all_of_a_history_comes_again_over_changes_and_cuts(kind, ready):
    generator = make_generator(history_blocks=9, **KINDS[kind])
    generator.copies = HostCopies(PageLocks())  # memory that is used again, as with a GPU
    session = open_session(generator, seed=3, ready_blocks=ready)
    frames = [steered(session, number) for number in range(BLOCKS)]
    for back in (3, 9, 2):  # each from the end that was made again
        branch = session.fork()
        session.rewind(back)
        for number in range(BLOCKS - back, BLOCKS):
            assert np.array_equal(steered(session, number), frames[number])
    branch.rewind(8)
    assert np.array_equal(steered(branch, BLOCKS - 8), frames[BLOCKS - 8])


def test_a_saved_session_that_was_rewound_goes_on(tmp_path):
    generator = make_generator(history_blocks=9)
    session = open_session(generator, seed=3)
    frames = [steered(session, number) for number in range(BLOCKS)]
    session.rewind(8)
    session.save(tmp_path / "saved")
    again = generator.resume(tmp_path / "saved")
    for number in range(4, BLOCKS):
        assert np.array_equal(steered(again, number), frames[number])
        assert np.array_equal(steered(session, number), frames[number])


@pytest.mark.parametrize("fails", ["denoise", "decode"])
def test_a_change_that_failed_costs_the_way_back_nothing(monkeypatch, fails):
    """It has filled the cache under another prompt, and the old one is taken again."""
    session = open_session(make_generator(history_blocks=6), seed=3)
    frames = [session.next() for _ in range(8)]
    before = session.fork()
    session.prompt = B
    with monkeypatch.context() as patched:

        def fail(*args, **kwargs):
            raise MemoryError

        where = {"denoise": "longtake.rollout.stream.denoise_block", "decode": "longtake.encoders.sessions.run"}
        patched.setattr(where[fails], fail)
        with pytest.raises(MemoryError):
            session.next()
    session.prompt = A
    assert np.array_equal(take(session, 2), take(before, 2))
    session.rewind(6)
    assert np.array_equal(session.next(), frames[4])


def test_the_device_holds_one_window_and_the_host_what_is_counted():
    """Blocks of the history that the window does not hold, what two changes have left, features of three decoders."""
    generator = make_generator(history_blocks=6)
    session = open_session(generator, seed=3, ready_blocks=3, history_caches=2)
    take(session, BLOCKS)
    (cache,) = {id(state.stream.cache): state.stream.cache for state in (*session._history, session.state)}.values()
    frame = cache.size_bytes // cache.num_slots
    assert cache.num_slots == generator.plan.window_frames
    assert session._past.size_bytes == 6 * generator.plan.block_frames * frame
    decoders = [state.decoder for state in session._history]
    held = session.state.decoder._held
    past = sum(kept.numel() * kept.element_size() for kept in held.past)
    assert [decoder.put_by_bytes for decoder in decoders] == [0] * 3 + [past] * 3 and not held.apart
    assert session.host_bytes == session._past.size_bytes + 3 * past
    for prompt in (B, C, A, B, C, A):
        session.prompt = prompt
        session.next()
        most = 6 * generator.plan.block_frames * frame + 2 * cache.size_bytes
        assert session._past.size_bytes <= most
    assert {id(state.stream.cache) for state in session._history} == {id(cache)}
    copied = session._past.copies.empty((2, 3), torch.float32, cache.device)
    assert not copied.is_pinned()  # there is no GPU here


def test_a_session_at_full_size_takes_a_few_gib_of_a_gpu():
    """Wan 1.3B at 480x832 as its recipes stream it: the cache, beside which the decoder's features take 1.9 GB."""
    sizes = {"num_layers": 30, "num_heads": 12, "head_width": 128, "tokens_per_frame": 30 * 52, "batch_size": 1}
    rules = {"window_frames": 13, "sink_frames": 5, "rope": "relative", "clock": "sigma", "max_frames": None}
    cache = KVCache(**sizes, **rules, spare_frames=0, device=torch.device("meta"), dtype=torch.bfloat16)
    frame = 2 * 30 * 1560 * 1536 * 2
    assert cache.size_bytes == 13 * frame == 3_738_009_600
    assert cache.size_bytes + 1.9e9 < 5.5 * 2**30
