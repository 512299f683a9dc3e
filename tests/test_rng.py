"""Noise that is made ahead: the same numbers, in a thread where they are expected."""

import threading

import pytest
import torch

from longtake.rng import Ahead, KeyedRNG


def drawn(ahead, plan):
    """What `plan` of (step, samples) draws of one kind, and the names of the threads that made it."""
    threads = {}

    def make(step, indices):
        threads[step, tuple(indices)] = threading.current_thread()
        return torch.tensor([[step, index] for index in indices])

    made = [ahead.made("noise", step, indices, make) for step, indices in plan]
    return made, [threads[step, tuple(indices)] is threading.main_thread() for step, indices in plan]


def test_the_third_step_is_made_ahead():
    plan = [(step, [8 * step, 8 * step + 1]) for step in range(3, 8)]
    made, here = drawn(Ahead(), plan)
    assert [one.tolist() for one in made] == [[[step, index] for index in indices] for step, indices in plan]
    assert here == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("plan", "here"),
    [
        ([(0, [0]), (1, [4]), (2, [9])], [True, True, True]),  # other samples than expected
        ([(0, [0]), (1, [4]), (5, [8])], [True, True, True]),  # steps that are left out
        ([(0, [0]), (1, [4]), (2, [8, 9])], [True, True, True]),  # a larger batch
        ([(0, [0]), (0, [1]), (1, [4]), (1, [5]), (2, [8]), (2, [9])], [True] * 4 + [False, True]),  # micro-batches
    ],
)
def test_a_wrong_guess_changes_no_number(plan, here):
    made, found = drawn(Ahead(), plan)
    assert [one.tolist() for one in made] == [[[step, index] for index in indices] for step, indices in plan]
    assert found == here


def test_kinds_that_do_not_come_again_are_forgotten():
    ahead = Ahead()
    for step in range(6):
        for part in range(3):
            ahead.made(("noise", 3 * step + part), step, [step], lambda step, indices: torch.zeros(1))
    assert len(ahead._seen) <= 6 and not ahead._next


def test_the_same_noise_ahead_or_not(monkeypatch):
    shape, plain, ahead = (4, 16, 40, 40), KeyedRNG(5), KeyedRNG(5, ahead=True)
    made = threading.Event()
    generator = KeyedRNG.generator

    def told(self, *key):
        if self is ahead and threading.current_thread() is not threading.main_thread():
            made.set()
        return generator(self, *key)

    monkeypatch.setattr(KeyedRNG, "generator", told)
    for step in range(5):
        indices = [2 * step, 2 * step + 1]
        for purpose in ("noise", "score_noise"):
            torch.testing.assert_close(
                ahead.noise(step, purpose, indices, shape), plain.noise(step, purpose, indices, shape), rtol=0, atol=0
            )
    assert made.is_set()
