"""Page-locked memory of the host: locked once and used again, by sessions and branches alike, in the order of streams."""

import gc
import logging
import mmap
from contextlib import nullcontext
from threading import Thread

import numpy as np
import pytest
import torch
from page_locks import PageLocks
from tiny_sessions import KINDS, OTHER, A, B, C, make_generator, open_session, take

from longtake.inference.host_copies import HostCopies, HostPool
from longtake.rollout.cuda_graphs import CUDAGraphCapture
from longtake.rollout.stream import LatentStream
from longtake.serve.capacity import fill_history

CPU = torch.device("cpu")
KEPT = {"history_blocks": 4, "ready_blocks": 2, "history_caches": 2}


def pooled(**changes):
    """A generator whose sessions keep their past as on a GPU, and the locks of its memory."""
    generator, locks = make_generator(**changes), PageLocks()
    generator.copies = HostCopies(locks)
    return generator, locks


def warnings(caplog):
    return [record for record in caplog.records if record.name == HostPool.__module__]


def test_a_piece_is_used_again_when_no_view_of_it_is_left():
    locks = PageLocks()
    pool = HostPool(locks)
    one = pool.take(10, CPU)
    address, view = one.data_ptr(), one[2:4]
    assert address % mmap.PAGESIZE == 0 and len(one) == 10
    del one
    other = pool.take(20, CPU)  # the view is still there
    assert other.data_ptr() != address and len(locks.made) == 2
    del view
    assert pool.take(mmap.PAGESIZE, CPU).data_ptr() == address
    assert len(pool.take(mmap.PAGESIZE + 1, CPU)) == mmap.PAGESIZE + 1  # of another size
    pool.take(10, torch.device("meta"))  # of another device
    assert locks.made == [mmap.PAGESIZE] * 2 + [2 * mmap.PAGESIZE, mmap.PAGESIZE]
    assert pool.size_bytes == sum(locks.made) and pool.seconds > 0


def test_pages_are_unlocked_behind_the_last_who_needs_them():
    locks = PageLocks()
    pool = HostPool(locks)
    kept, _ = pool.take(10, CPU), pool.take(5000, CPU)
    kept[:] = 7
    del _
    assert len(locks.held) == 2
    del pool
    assert locks.held == {kept.data_ptr()} and kept.tolist() == [7] * 10
    del kept
    assert not locks.held


class Dropped:
    """A pool that only garbage collection finds, as that of a generator whose parts know each other."""

    def __init__(self, locks):
        self.pool, self.mine = HostPool(locks), self
        self.pool.take(10, CPU)


@pytest.mark.parametrize("where", ["in the thread that records", "in another"])
def test_pages_that_nobody_needs_while_a_graph_is_recorded_are_unlocked_behind_that(where, monkeypatch):
    """To unlock them waits for the device, which may not be done then, and nor may another thread be waited for."""
    cuda, locks, held, calls = torch.cuda, PageLocks(), [], []
    for name in ("Stream", "CUDAGraph", "stream", "current_stream", "graph", "graph_pool_handle"):
        monkeypatch.setattr(cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(nullcontext, "replay", None, raising=False)
    monkeypatch.setattr(cuda, "device_count", lambda: 0)

    def work():
        calls.append(1)
        if len(calls) == 2:  # the one that is recorded
            Dropped(locks)
            if where == "in another":
                thread = Thread(target=gc.collect)
                thread.start()
                thread.join(20)
                assert not thread.is_alive()
            gc.collect()
            held.append(len(locks.held))
        return ()

    CUDAGraphCapture()(work)
    assert held == [1] and not locks.held


def test_what_is_made_ready_is_enough_for_as_many_and_more_is_told_once(caplog):
    pool = HostPool(locks := PageLocks())
    [pool.take(10, CPU), pool.take(5000, CPU)]
    pool.make_ready(3)
    assert sorted(locks.made) == [4096] * 3 + [8192] * 3
    with caplog.at_level(logging.WARNING):
        held = [pool.take(size, CPU) for size in (10, 5000) * 3]
        assert len(locks.made) == 6 and not warnings(caplog)
        held += [pool.take(10, CPU), pool.take(10, CPU)]
    assert len(locks.made) == 8 and len(warnings(caplog)) == 1


def test_as_much_is_made_ready_as_the_system_allows(caplog):
    pool = HostPool(locks := PageLocks())
    pool.take(10, CPU)
    locks.most = 3
    with caplog.at_level(logging.WARNING):
        assert pool.make_ready(8) == 3
    assert len(locks.made) == 3 and "can be locked" in caplog.text


def steered(session, number):
    """Changes faster than the history can hold, a cut among them, and a block."""
    if number % 2 == 0:
        session.prompt = (A, B, C)[number // 2 % 3]
    if number == 9 and session.image is not None:
        session.image = OTHER
    return session.next()


@pytest.mark.parametrize("kind", ["plain", "guided, absolute"])
def test_nothing_is_locked_once_a_history_was_full(kind, caplog):
    """Twenty blocks with changes, a cut and ways back."""
    generator, locks = pooled(**KINDS[kind])
    fill_history(open_session(generator, **KEPT))
    gc.collect()
    generator.copies.pool.make_ready(1)
    made, session = len(locks.made), open_session(generator, seed=3, **KEPT)
    for number in range(20):
        steered(session, number)
        if number % 5 == 4:
            session.rewind(min(3, session.rewindable))
    assert len(locks.made) == made and not warnings(caplog)


@pytest.mark.parametrize(("blocks", "changes"), [(4, 2), (5, 0), (3, None)])
def test_a_full_history_takes_what_is_computed(blocks, changes):
    """Each block of it its frames, one more while the next is made, and each cache before a change the frames that its
    first block saw.
    """
    generator, locks = pooled()
    fill_history(open_session(generator, history_blocks=blocks, history_caches=changes))
    plan, fillings = generator.plan, (blocks if changes is None else changes) + 1
    frames = (blocks + 1) * plan.block_frames + fillings * (plan.window_frames - 2 * plan.block_frames)
    assert len(locks.made) == frames


def test_a_branch_needs_as_much_again_at_the_most(caplog):
    generator, locks = pooled()
    fill_history(open_session(generator, **KEPT))
    gc.collect()
    generator.copies.pool.make_ready(2)
    made, session = len(locks.made), open_session(generator, seed=3, **KEPT)
    for number in range(6):
        steered(session, number)
    branch = session.fork()
    for number in range(5):
        steered(session, number)
        steered(branch, number + 1)
    assert len(locks.made) == made and not warnings(caplog)


def test_a_piece_that_cannot_be_had_costs_a_session_nothing():
    generator, locks = pooled()
    session, plain = open_session(generator, seed=3, **KEPT), open_session(make_generator(), seed=3, **KEPT)
    frames = [plain.next() for _ in range(4)]
    assert np.array_equal(session.next(), frames[0])
    locks.refuses = True
    with pytest.raises(MemoryError):
        take(session, 3)
    locks.refuses = False
    while session.num_frames < plain.num_frames:
        last = session.next()
    assert np.array_equal(last, frames[-1])


def test_memory_goes_back_when_sessions_end_and_with_the_generator():
    generator, locks = pooled()
    session = open_session(generator, **KEPT)
    take(session, 8)
    branch, pool = session.fork(), generator.copies.pool
    assert pool.size_bytes >= session.host_bytes > 0
    free = sum(map(len, pool._free.values()))
    del session
    gc.collect()
    assert sum(map(len, pool._free.values())) == free  # the branch holds it
    del branch
    gc.collect()
    assert sum(map(len, pool._free.values())) == len(locks.made) == len(locks.held)
    del generator, pool
    gc.collect()
    assert not locks.held


class Source(torch.Tensor):
    """As a tensor of a GPU, of which a stream may be told."""

    def record_stream(self, stream):
        stream.told.append(f"{stream.name} holds")


class Stream:
    """Notes what waits for what."""

    def __init__(self, name, told):
        self.name, self.told = name, told

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for {other.name}")


def test_copies_follow_what_was_given_before_and_precede_what_overwrites(monkeypatch):
    device, told = torch.device("cuda", 0), []
    main = Stream("main", told)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("beside", told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    copies = HostCopies(PageLocks())
    copies.wait()
    copies.read()
    assert told == []  # nothing to wait for
    source = torch.arange(4.0).as_subclass(Source)
    made = copies.empty(source.shape, source.dtype, device)
    copies.fill([(made, source)], device)
    copies.wait()
    copies.read()
    assert told == ["beside waits for main", "beside holds", "main waits for beside", "beside waits for main"]
    copies.fill([(made, source)], device)
    assert {id(stream) for stream in copies._beside.values()} == {id(next(iter(copies._beside.values())))}
    assert torch.equal(made, torch.arange(4.0))


@pytest.mark.parametrize("kind", ["plain", "last step"])
def test_passes_do_not_wait_for_the_features_of_the_decoder(kind, monkeypatch):
    """Gigabytes, which are copied while the passes run."""
    generator, told = make_generator(**KINDS[kind]), []

    class Noted(HostCopies):
        def of(self, source):
            told.append("features")
            return super().of(source)

        def wait(self):
            told.append("wait")

    def noted(stream, check):
        told.append("passes")
        return following(stream, check)

    following = LatentStream.next
    monkeypatch.setattr(LatentStream, "next", noted)
    generator.copies = Noted()
    session = open_session(generator, **KEPT)
    for number in range(8):
        told.clear()
        session.prompt = B if number > 5 else A
        session.next()
        if number > 2:
            last, passes = told.index("features"), told.index("passes")
            assert set(told[last:passes]) == {"features"} and "wait" in told[passes:]
