"""What an objective draws: under the number of the iteration, each number once, and for nothing else."""

from collections import Counter

import pytest
from test_long_tuning import make_long
from tiny_batches import RULES, make_batch
from tiny_models import make_tiny_model
from tiny_objectives import parts_of, teacher_forcing
from tiny_plan import tiny_plan

from longtake.objectives.dmd import Dmd, DmdConfig
from longtake.objectives.dmd_keys import CriticConfig, DataLoss
from longtake.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from longtake.objectives.teacher_forcing import ErrorRecycling
from longtake.rng import KeyedRNG

# Every block has a context of its own noise, and blocks of one frame leave no number between those of two blocks.
NOISY = tiny_plan(1, 1, 5, 1, sigmas=(1.0, 0.9, 0.5), later_sigmas=(1.0, 0.6), context="last_step")
PLANS = {"clean": RULES, "noisy": NOISY}


def forcing(model, plan):
    recycling = ErrorRecycling(share=1.0, from_step=0)
    return teacher_forcing(model, seed=0, caption_dropout=0.5, recycling=recycling, plan=plan)


def make(kind, plan):
    if kind == "long":
        return make_long(ratio=1, plan=plan)
    networks = [make_tiny_model(i2v=True, seed=k) for k in range(3)]
    if kind == "teacher":
        return FlowMatching(parts_of(networks[0], seed=0, plan=plan), FlowMatchingConfig(caption_dropout=0.5))
    if kind == "causal":
        return forcing(networks[0], plan)
    critic = CriticConfig(updates_per_generator=1)
    settings = DmdConfig(teacher="toy", critic=critic, data_loss=DataLoss(weight=0.5))
    dmd = Dmd(parts_of(*networks, seed=0, plan=plan), settings)
    dmd.data_loss = forcing(networks[0], plan)
    return dmd


@pytest.mark.parametrize("kind", ["teacher", "causal", "distill", "long"])
@pytest.mark.parametrize("context", PLANS)
def test_every_iteration_draws_its_own_numbers_and_each_once(kind, context, monkeypatch):
    drawn, generator = Counter(), KeyedRNG.generator

    def spy(self, step, purpose, index, part=0):
        drawn[step, purpose, index, part] += 1
        return generator(self, step, purpose, index, part)

    objective = make(kind, PLANS[context])
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
