"""A stream whose condition changes: at the right block, with the cache that the new condition makes, or without."""

from itertools import islice

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.errors import ConfigError
from longtake.rollout.denoise import Denoiser, commit_block, denoise_block
from longtake.rollout.recache import LatentHistory, recache
from longtake.rollout.self_forcing import block_noise_at
from longtake.rollout.stream import LatentStream, stream_switched

PLAN = tiny_plan(2, 1)
RULES = PLAN.but(window_frames=7, sink_frames=3, sigmas=[1.0, 0.5])
BLOCKS = 7


def noise(start, end, step):
    return make_tiny_latents(end - start, seed=100 * start + step)


@pytest.fixture(scope="module")
def model():
    return make_tiny_model(i2v=True)


@pytest.fixture(scope="module")
def conditions(model):
    return [make_tiny_condition(model, seed=seed) for seed in (1, 9, 17)]


def new_cache(model, rules=RULES):
    return model.new_cache(rules, 2, (4, 6))


def switched(model, conditions, switch_frames, **law):
    rules = RULES.but(**law)
    first = make_tiny_latents(1)
    stream = stream_switched(Denoiser(model), new_cache(model), conditions, switch_frames, first, noise, rules)
    return torch.cat(list(islice(stream, BLOCKS)), 1)


def plain(model, condition):
    stream = LatentStream(Denoiser(model), new_cache(model), condition, make_tiny_latents(1), noise, RULES)
    return torch.cat(list(islice(stream, BLOCKS)), 1)


def by_hand(model, conditions, switch, policy):
    """Block by block, with the cache rebuilt, kept or rebuilt but for the sink at frame `switch`."""
    cache, kept, made = new_cache(model), LatentHistory(RULES.but(keep_sink=policy == "keep sink")), []
    for start, end in list(PLAN.blocks(0, 2 * BLOCKS - 1)):
        condition = conditions[start >= switch]
        if start == switch and policy != "none":
            recache(Denoiser(model), cache, condition, kept)
        block = make_tiny_latents(1)
        if start:
            block = denoise_block(Denoiser(model), cache, condition, block_noise_at(noise, start, end), RULES).clean
        commit_block(Denoiser(model), cache, condition, block)
        kept.append(block)
        made.append(block)
    return torch.cat(made, 1)


def test_without_a_switch_it_is_the_plain_stream(model, conditions):
    assert torch.equal(switched(model, conditions[:1], []), plain(model, conditions[0]))


@pytest.mark.parametrize("policy", ["rebuild", "keep sink", "none"])
def test_it_does_what_is_done_by_hand(model, conditions, policy):
    options = {"recache": "none" if policy == "none" else "rebuild", "keep_sink": policy == "keep sink"}
    assert torch.equal(switched(model, conditions[:2], [9], **options), by_hand(model, conditions, 9, policy))


def test_the_policies_differ_from_the_switch_on_and_nowhere_before(model, conditions):
    videos = [
        plain(model, conditions[0]),
        switched(model, conditions[:2], [9]),
        switched(model, conditions[:2], [9], keep_sink=True),
        switched(model, conditions[:2], [9], recache="none"),
    ]
    for k, one in enumerate(videos):
        for other in videos[:k]:
            assert torch.equal(one[:, :9], other[:, :9])
            assert (one[:, 9:] - other[:, 9:]).abs().max() > 1e-4


def test_a_switch_inside_a_block_waits_for_the_next_one(model, conditions):
    assert torch.equal(switched(model, conditions[:2], [8]), switched(model, conditions[:2], [9]))


def test_a_switch_right_after_the_picture_is_a_stream_under_the_new_condition(model, conditions):
    assert torch.equal(switched(model, conditions[:2], [1]), plain(model, conditions[1]))


def test_two_switches(model, conditions):
    one, two = switched(model, conditions[:2], [5]), switched(model, conditions, [5, 9])
    assert torch.equal(one[:, :9], two[:, :9]) and not torch.equal(one[:, 9:11], two[:, 9:11])


@pytest.mark.parametrize(("number", "frames"), [(1, [5]), (2, []), (3, [5, 5]), (3, [8, 9]), (2, [0])])
def test_conditions_and_switches_must_fit(model, conditions, number, frames):
    with pytest.raises(ConfigError, match="do not fit"):
        switched(model, conditions[:number], frames)
