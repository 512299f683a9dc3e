"""What is measured before the first session: nothing of it stays, and what sessions take is counted."""

from types import SimpleNamespace

import pytest
import torch
from page_locks import PageLocks
from tape import Tape
from tiny_sessions import make_generator

from longtake.inference.host_copies import HostCopies
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.serve import capacity
from longtake.serve.capacity import Memory, warm_up


@pytest.mark.parametrize(("history", "kept"), [(6, 0), (0, 1)])
def test_what_warming_up_leaves_can_be_used(history, kept):
    generator = make_generator(history_blocks=history)
    generator.denoiser.graphs = CUDAGraphRunner(Tape())
    warm_up(generator, history)
    assert len(generator.caches._kept) == kept


def test_memory_that_is_told_is_what_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9)
    assert Memory.of(torch.device("cuda")) == Memory(used=5, held=9)
    assert Memory.of(torch.device("cpu")).used > 10**6
    assert Memory(1, 2, 5, 0.5) + Memory(3, 4, 6, 1.0) == Memory(4, 6, 11, 1.5)


@pytest.mark.parametrize(
    ("most", "free", "sessions"), [(None, 10**6, 4), (2, 10**6, 2), (None, 30_000, 3), (None, 0, 4)]
)
def test_the_hosts_memory_is_locked_for_all_who_may_play_and_bounds_them(monkeypatch, most, free, sessions):
    locks, gpu = PageLocks(), torch.device("cuda", 0)
    generator = SimpleNamespace(device=gpu, fps=16, copies=HostCopies(locks))

    def play(generator, kept):
        held = [generator.copies.empty(shape, torch.uint8, gpu) for shape in ((2, 2), (5000,))]
        assert len(held) == 2
        return 80.0, 1000, generator.copies.pool.size_bytes

    monkeypatch.setattr(capacity, "_play", play)
    monkeypatch.setattr(capacity, "warm_up", lambda generator, blocks: None)
    monkeypatch.setattr(capacity, "host_memory", lambda: (0, free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**6))
    found = capacity.measure(generator, most, {"history_blocks": 8})
    assert (found.sessions, found.host_bytes) == (sessions, 12288)
    assert sorted(locks.made) == [4096] * sessions + [8192] * sessions
