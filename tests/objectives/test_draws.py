"""What an objective draws: under the number of the iteration, each number once, and for nothing else."""

from collections import Counter

import pytest
from test_long_tuning import make_long
from tiny_batches import RULES, make_batch
from tiny_models import make_tiny_model

from longtake.objectives.dmd import DataLoss, Dmd, DmdSettings
from longtake.objectives.flow_matching import FlowMatching
from longtake.objectives.teacher_forcing import ErrorRecycling, TeacherForcing
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser


def forcing(model):
    return TeacherForcing(
        Denoiser(model), KeyedRNG(0), RULES, shift=5.0, caption_dropout=0.5, error_recycling=ErrorRecycling(1.0, 0)
    )


def make(kind):
    if kind == "long":
        return make_long(ratio=1)
    networks = [make_tiny_model(i2v=True, seed=k) for k in range(3)]
    if kind == "teacher":
        return FlowMatching(networks[0], KeyedRNG(0), shift=5.0, caption_dropout=0.5, first_frame_clean=False)
    if kind == "causal":
        return forcing(networks[0])
    settings = DmdSettings(shift=5.0, guidance=4.0, updates_per_generator=1)
    return Dmd(
        Denoiser(networks[0]),
        *networks[1:],
        KeyedRNG(0),
        RULES,
        7,
        settings,
        data_loss=DataLoss(forcing(networks[0]), 0.5),
    )


@pytest.mark.parametrize("kind", ["teacher", "causal", "distill", "long"])
def test_every_iteration_draws_its_own_numbers_and_each_once(kind, monkeypatch):
    drawn, generator = Counter(), KeyedRNG.generator

    def spy(self, step, purpose, index, part=0):
        drawn[step, purpose, index, part] += 1
        return generator(self, step, purpose, index, part)

    objective = make(kind)
    batch = make_batch(objective.networks["generator"], [4, 9])
    monkeypatch.setattr(KeyedRNG, "generator", spy)
    for step in range(5):  # of long tuning one sequence and two chunks of the next
        drawn.clear()
        for turn in objective.turns(step):
            objective.loss(turn, batch, step)
        # What all samples share is asked for where it is needed; sequences are drawn by their own number.
        shared = {key for key in drawn if key[2] == -1}
        keys = [key for key in drawn if not key[1].startswith("long_")]
        assert len(keys) > 3 and {step} == {key[0] for key in keys}
        assert {drawn[key] for key in keys if key not in shared} == {1}
        for purpose in {key[1] for key in keys if key not in shared}:
            by_sample = [{key[3] for key in keys if key[1:3] == (purpose, index)} for index in (4, 9)]
            assert by_sample[0] == by_sample[1] != set()
