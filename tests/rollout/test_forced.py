"""Teacher forcing over a change of the caption: one packed forward is what a stream computes that rebuilds its context."""

from itertools import islice

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_plan import tiny_plan

from longtake.condition import Condition
from longtake.errors import ConfigError, ShapeError
from longtake.flow.path import add_noise
from longtake.rollout import stream as streaming
from longtake.rollout.denoise import DenoisedBlock, Denoiser
from longtake.rollout.packed import PackedClip
from longtake.rollout.recache import forced
from longtake.rollout.stream import stream_switched

SIGMAS, SIZE, FRAMES = (1.0, 0.9, 0.75, 0.5), (4, 6), 13
LAWS = {
    "rebuild": {},
    "rebuild beside the sink": {"keep_sink": True},
    "last window": {"recache": "last_window", "keep_sink": True},
    "none": {"recache": "none"},
}


def noise(start, end, step):
    generator = torch.Generator().manual_seed(100 * start + step)
    return torch.randn(2, end - start, 4, *SIZE, generator=generator, dtype=torch.float64)


def problem(plan, i2v=True):
    """A tiny model in float64, both conditions, and clean, stored and noisy latents with their levels."""
    model = make_tiny_model(i2v=i2v).double()
    condition = make_tiny_condition(model, num_frames=FRAMES).to("cpu", torch.float64)
    later = make_tiny_condition(model, seed=9).text.double()
    clean = make_tiny_latents(FRAMES, seed=3).double()
    levels = torch.tensor(plan.context_levels(FRAMES), dtype=torch.float64).expand(2, -1)
    drawn = torch.cat([noise(*block, plan.context_step) for block in plan.blocks(0, FRAMES)], 1)
    context = torch.where(levels[:, :, None, None, None] > 0, add_noise(clean, drawn, levels), clean)
    sigma = torch.rand(2, FRAMES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return model, condition, later, clean, context, levels, make_tiny_latents(FRAMES, seed=4).double(), sigma


def streamed(plan, switch, model, condition, later, clean, context, levels, noisy, sigma, monkeypatch):
    """The velocities of the noisy blocks, each against the cache of a stream that has made the clean ones before it."""
    velocities = []

    def given(denoiser, cache, told, _noise, rules, *, guidance=None, check=None):
        start, end = rules.block_of(cache.position)
        velocities.append(denoiser(noisy[:, start:end], sigma[:, start:end], told, cache))
        seen, level = context[:, start:end], rules.context_level(start)
        return DenoisedBlock(clean[:, start:end], seen, level, seen, level)

    monkeypatch.setattr(streaming, "denoise_block", given)
    cache = model.new_cache(plan, 2, SIZE, max_frames=FRAMES)
    told = [condition, condition.with_text(later)]
    stream = stream_switched(Denoiser(model), cache, told, [switch], clean[:, :1], noise, plan)
    list(islice(stream, plan.num_blocks(FRAMES)))
    return torch.cat(velocities, 1)


def packed(plan, switch, model, condition, later, clean, context, levels, noisy, sigma):
    one = forced(plan, FRAMES, switch)
    both, both_levels = torch.cat([context, noisy], 1), torch.cat([levels, sigma], 1)
    told = Condition(condition.text, condition.image, condition.frames, later)
    with torch.no_grad():
        made = model(both[:, one.source], both_levels[:, one.source], told, one.layout)
    return made[:, one.noisy]


@pytest.mark.parametrize(
    ("window", "sink", "rope"),
    [(None, 0, "relative"), (5, 1, "relative"), (7, 3, "relative"), (7, 3, "absolute"), (4, 0, "relative")],
)
@pytest.mark.parametrize("law", LAWS)
def test_one_packed_forward_is_the_stream_with_its_rebuild_in_float64(law, window, sink, rope, monkeypatch):
    """At the first block, in the middle of the video, and at the last block."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what Wan computes in float32
    plan = tiny_plan(2, 1, window, sink, rope, sigmas=SIGMAS, given_frames=1, **LAWS[law])
    parts = problem(plan)
    for switch in (1, 7, 11):
        with monkeypatch.context() as patch:
            wanted = streamed(plan, switch, *parts, patch)
        mine = packed(plan, switch, *parts)
        assert (mine - wanted).abs().max() < 1e-10, switch


@pytest.mark.parametrize("rope", ["relative", "absolute"])
@pytest.mark.parametrize("given", [0, 1])
def test_without_a_change_it_is_teacher_forcing_of_all_frames(given, rope, monkeypatch):
    """What is left out changes nothing, neither what is predicted nor any gradient; nothing is predicted of a picture."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    plan = tiny_plan(2, 1, 5, 1, rope, sigmas=SIGMAS, given_frames=given)
    model, condition, _, clean, context, levels, noisy, sigma = problem(plan)
    both, both_levels = torch.cat([context, noisy], 1), torch.cat([levels, sigma], 1)
    whole = model(both, both_levels, condition, plan.teacher_forcing_layout(FRAMES))[:, FRAMES + given :]
    mine = PackedClip(plan).velocity(model, condition, (context, levels), noisy, sigma)
    assert mine.shape == noisy.shape and (mine[:, :given] == 0).all()
    assert (mine[:, given:] - whole).abs().max() < 1e-10
    weights = list(model.parameters())
    wanted, found = (torch.autograd.grad(made.square().sum(), weights, allow_unused=True) for made in (whole, mine))
    for one, other in zip(wanted, found, strict=True):
        assert (one is None) == (other is None) and (one is None or (one - other).abs().max() < 1e-8)


@pytest.mark.parametrize("rules", [{"context": "last_step"}, {"context_sigma": 0.25}])
def test_the_rebuilt_context_has_the_level_of_the_plan(rules, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    plan = tiny_plan(2, 1, 5, 1, sigmas=SIGMAS, given_frames=1, **rules)
    parts = problem(plan)
    wanted = streamed(plan, 7, *parts, monkeypatch)
    assert parts[5].any() and (packed(plan, 7, *parts) - wanted).abs().max() < 1e-10


def test_both_captions_and_the_rebuild_matter(monkeypatch):
    """Blocks before the switch know nothing of the later caption; those after it see no context of the first one."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    plan = tiny_plan(2, 1, 5, 1, sigmas=SIGMAS, given_frames=1)
    model, condition, later, *rest = problem(plan)
    made = packed(plan, 7, model, condition, later, *rest)
    other = packed(plan, 7, model, condition, later.flip(-1), *rest)
    assert torch.equal(made[:, :6], other[:, :6]) and ((made - other)[:, 6:].abs().amax((0, 2, 3, 4)) > 1e-3).all()
    first = packed(plan, 7, model, condition.with_text(condition.text.flip(-1)), later, *rest)
    assert torch.equal(made[:, 6:], first[:, 6:]) and ((made - first)[:, :6].abs().amax((0, 2, 3, 4)) > 1e-3).all()
    stale = packed(plan.but(recache="none"), 7, model, condition, later, *rest)
    assert (made - stale)[:, :6].abs().max() < 1e-12 and (made - stale)[:, 6:8].abs().max() > 1e-3


def test_what_nobody_needs_is_not_computed():
    """Of the clean blocks before a switch those that the rebuild keeps come twice, and the last block never; nor is the
    given picture asked about.
    """
    plan = tiny_plan(2, 1, 5, 1, sigmas=SIGMAS, given_frames=1)
    once = forced(plan, FRAMES)
    assert once.source.tolist() == [*range(FRAMES - 2), *range(FRAMES + 1, 2 * FRAMES)]
    assert once.layout.num_entries == len(once.source) and once.source[once.noisy].tolist() == [*range(14, 26)]
    assert forced(plan.with_given(0), 1).source.tolist() == [1]  # one block, which sees itself
    source = forced(plan, FRAMES, 7).source.tolist()
    clean = [frame for frame in source if frame < FRAMES]
    assert clean == [0, 1, 2, 3, 4, 0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert sorted(set(source) - set(clean)) == list(range(FRAMES + 1, 2 * FRAMES))
    with pytest.raises(ConfigError, match="no block boundary"):
        forced(plan, FRAMES, 6)


def test_a_later_text_without_entries_that_read_it_is_refused():
    model = make_tiny_model()
    condition, latents = make_tiny_condition(model), make_tiny_latents(5)
    plan = tiny_plan(2, 1)
    with pytest.raises(ShapeError, match="later_text is for masks"):
        model(latents, torch.zeros(2), Condition(condition.text, later_text=condition.text))
    one = forced(plan, 5, 3)
    with pytest.raises(ShapeError, match="these need it"):
        model(torch.cat([latents] * 2, 1)[:, one.source], torch.zeros(2), condition, one.layout)
