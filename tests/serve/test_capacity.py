"""What is measured before the first session: nothing of it stays, and what sessions take is counted."""

import pytest
import torch
from tape import Tape
from tiny_sessions import make_generator

from longtake.rollout.cuda_graphs import CUDAGraphRunner
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
