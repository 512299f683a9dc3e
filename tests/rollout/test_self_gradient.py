"""Self-Gradient Forcing: roll-outs whose replay is the roll-out, with the gradient of brute force, context included.

The judge is the oracle, which streams block by block in float64 and keeps the graph of what it remembers: a graded
context pass of each block's detached latents, then later exit steps through it.
"""

import pytest
import torch
from brute_force import HORIZON, SIZE, calls_of, compare, exit_steps, noise
from brute_force import _layouts as _layouts
from brute_force import double as double
from tiny_codec import TinyCodec
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error
from tiny_plan import tiny_plan

from longtake.condition import MaskLayout
from longtake.errors import CacheError
from longtake.models.execution import Execution
from longtake.plan import StreamPlan
from longtake.rollout import replay
from longtake.rollout.denoise import Denoiser
from longtake.rollout.long_video import LongStream, Switch
from longtake.rollout.self_forcing import roll_out

SIGMAS = (1.0, 0.9, 0.75, 0.5)
I2V = tiny_plan(2, 1, 5, 1, sigmas=SIGMAS)
LAWS = {
    "window": I2V,
    "absolute": I2V.but(rope="absolute"),
    "no window": tiny_plan(2, 1, sigmas=SIGMAS),
    "no picture": tiny_plan(2, 2, 6, 2, sigmas=SIGMAS),
    "last step": I2V.but(context="last_step", sigmas=SIGMAS[:3]),
    "last step, later": I2V.but(context="last_step"),  # the exit is before it: noised again
    "level, later two": I2V.but(context_sigma=0.3, later_sigmas=(1.0, 0.6)),
}


def problem(law, frames=7, recompute=False):
    plan = LAWS[law]
    model = make_tiny_model(i2v=plan.first_frames == 1)
    condition = make_tiny_condition(model, 1, num_frames=frames, size=SIZE)
    picture = make_tiny_latents(1, seed=7)[:1, ..., :2] if plan.first_frames == 1 else None
    return model.executed(Execution(recompute=recompute)), condition, picture, plan


def brute_force(model, condition, plan, calls, blocks, exit_step, **options):
    """(clean latents of exit steps, weights with a graph) of what `calls` had, by the oracle."""
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return exit_steps(model.config, state, condition, plan, calls, blocks, exit_step, **options), state


@pytest.mark.parametrize(
    ("law", "bits"),
    [
        *((law, 64) for law in LAWS),
        *(pytest.param(law, 32, marks=[] if law == "window" else pytest.mark.slow) for law in LAWS),
    ],
)
def test_the_replay_is_the_roll_out_and_its_gradient_that_of_brute_force(law, bits, monkeypatch, request):
    if bits == 64:
        request.getfixturevalue("double")
    model, condition, picture, plan = problem(law, 9, recompute=bits == 32)
    model.double() if bits == 64 else None
    frames, exit_step = (10 if picture is None else 9), 2
    calls = calls_of(model, monkeypatch)
    options = {"exit_step": exit_step, "with_grad": True}
    plain = roll_out(Denoiser(model), condition, picture, noise, plan, frames, SIZE, exit_step=exit_step)
    calls.clear()
    made = roll_out(Denoiser(model, replays=True), condition, picture, noise, plan, frames, SIZE, **options)
    assert torch.equal(made.generated, plain.generated)
    given = 0 if picture is None else 1
    tolerance = 1e-10 if bits == 64 else 1e-5
    assert relative_error(made.latents.detach(), plain.latents) < tolerance
    blocks = list(plan.with_given(given).blocks(0, frames))
    wanted, state = brute_force(model, condition, plan.with_given(given), calls, blocks, exit_step, exits_from=given)
    compare(dict(model.named_parameters()), made.latents[:, given:], wanted, state, tolerance)


@pytest.mark.parametrize(
    ("law", "recompute"),
    [
        ("window", True),
        ("last step", False),
        *(pytest.param(law, True, marks=pytest.mark.slow) for law in ("absolute", "no window", "no picture")),
    ],
)
def test_a_part_of_a_long_video_has_gradient_into_what_it_stored_itself(law, recompute, double, monkeypatch):
    """The block before is stored by this call's weights; what the cache held before is without."""
    model, condition, picture, plan = problem(law, 13, recompute)
    model.double()
    denoiser = Denoiser(model, replays=True)
    given = 0 if picture is None else 1
    ends = [5, 9, 13] if given else [6, 10, 14]
    calls = calls_of(model, monkeypatch)
    stream = LongStream(
        *(denoiser, condition, picture, plan, SIZE, TinyCodec(model.config)),
        horizon=ends[0],
        max_frames=40,
        spare_frames=HORIZON,
    )
    plain = LongStream(
        *(Denoiser(model), condition, picture, plan, SIZE, TinyCodec(model.config)), horizon=ends[0], max_frames=40
    )
    plan, start, every = plan.with_given(given), given, {}
    for end in ends:
        expected = plain.advance(end, noise, exit_step=2)
        calls.clear()
        made = stream.advance(end, noise, exit_step=2, with_grad=True)
        assert relative_error(made.latents.detach(), expected.latents) < 1e-10
        blocks, first = list(plan.blocks(0, end)), plan.block_of(start - 1)[0] if start else 0
        every |= calls
        if end > ends[0]:
            wanted, state = brute_force(model, condition, plan, every, blocks, 2, detached=first, exits_from=start)
            compare(dict(model.named_parameters()), made.latents[:, start - end :], wanted, state)
        start = end


@pytest.mark.parametrize("recache", ["rebuild", "none"])
@pytest.mark.parametrize("switch", [7, 9])
def test_the_prompt_changes_and_the_replay_begins_there(switch, recache, double, monkeypatch):
    """In mid-part, and where a part begins: what the old prompt stored, or the rebuilt cache, is without gradient."""
    model, condition, picture, plan = problem("window", 13, recompute=True)
    model.double()
    later = make_tiny_condition(model, 1, seed=8).text
    plan = plan.but(recache=recache)
    stream = LongStream(
        *(Denoiser(model, replays=True), condition, picture, plan, SIZE, TinyCodec(model.config)),
        horizon=HORIZON,
        max_frames=40,
        spare_frames=HORIZON,
        switch=Switch(switch, later),
    )
    ends = (5, 9) if switch < 9 else (5, 9, 13)
    for end in ends[:-1]:
        stream.advance(end, noise, exit_step=1)
    calls = calls_of(model, monkeypatch)
    begins, begin, end = [], replay.Replay.begin, ends[-1]
    monkeypatch.setattr(replay.Replay, "begin", lambda self: begins.append(begin(self)))
    made = stream.advance(end, noise, exit_step=1, with_grad=True)
    assert len(begins) == 2 and made.generated.tolist()[switch - end :] == [True] * (end - switch)
    if recache == "none":  # keys and values of two prompts, which the oracle does not have
        made.latents.sum().backward()
        return
    kept = [(0, 1), *((start, start + 2) for start in range(switch - 4, end, 2))]
    wanted, state = brute_force(
        *(model, condition.with_text(later), plan.with_given(1), calls, kept, 1), detached=switch, exits_from=switch
    )
    compare(dict(model.named_parameters()), made.latents[:, switch - end :], wanted, state)


def entries_with_gradient(model, run_it):
    """Which entries of the replay have gradient in their keys of the first layer, by a loss on the last block."""
    keys = []

    def keep(_layer, _inputs, out):
        if out.requires_grad:
            out.retain_grad()
            keys.append(out)

    hook = model.blocks[0].self_attn.k.register_forward_hook(keep)
    made = run_it()
    hook.remove()
    made[:, -2:].square().sum().backward()
    return (keys[-1].grad.abs().amax((0, 2, 3)) > 0).tolist()


def test_every_block_that_the_last_one_sees_learns_what_to_leave_it():
    """Blocks [1, 2, 2, 2], sink 1, window 5: frame 0 and the block before; and by these the blocks in between."""
    model, condition, picture, plan = problem("window")
    denoiser = Denoiser(model, replays=True)
    made = lambda: roll_out(denoiser, condition, picture, noise, plan, 7, SIZE, exit_step=1, with_grad=True).latents  # noqa: E731
    # context of frames 0 | 1 2 | 3 4, then the exit steps of 1 2 | 3 4 | 5 6
    assert entries_with_gradient(model, made) == [True] * 5 + [False] * 4 + [True] * 2


@pytest.mark.parametrize("fault", ["own clean copy", "clean sees noisy", "no sink"])
def test_a_mask_with_a_fault_is_no_roll_out(fault, monkeypatch):
    model, condition, picture, plan = problem("window")
    layout_of = StreamPlan.replay_layout

    def faulty(self, first, exits_from, end):
        layout = layout_of(self, first, exits_from, end)
        allowed = layout.allowed.clone()
        if fault == "own clean copy":
            allowed[5:7, 1:3] = True  # the exit step of frames 1 2
        elif fault == "clean sees noisy":
            allowed[3:5, 5:7] = True
        else:
            allowed[9:11, layout.key_entry == 0] = False
        return MaskLayout(layout.frame_index, layout.key_entry, layout.key_position, allowed)

    monkeypatch.setattr(StreamPlan, "replay_layout", faulty)
    plain = roll_out(Denoiser(model), condition, picture, noise, plan, 7, SIZE, exit_step=1).latents
    options = {"exit_step": 1, "with_grad": True}
    made = roll_out(Denoiser(model, replays=True), condition, picture, noise, plan, 7, SIZE, **options).latents
    assert relative_error(made.detach(), plain) > 1e-3


def test_late_parts_of_a_long_video_share_one_mask_and_one_that_lost_its_past_says_so():
    model, condition, picture, plan = problem("window", recompute=True)
    stream = LongStream(
        *(Denoiser(model, replays=True), condition, picture, plan, SIZE, TinyCodec(model.config)),
        horizon=HORIZON,
        max_frames=60,
        spare_frames=HORIZON,
    )
    for end in range(HORIZON, 40, 4):
        stream.advance(end, noise, exit_step=0, with_grad=True).latents.sum().backward()
        assert not stream._cache.is_held
    assert replay._layout.cache_info().currsize == len(model._masks) == 3
    short = LongStream(
        *(Denoiser(model, replays=True), condition, picture, plan, SIZE, TinyCodec(model.config)),
        horizon=HORIZON,
        max_frames=60,
    )
    short.advance(5, noise, exit_step=0)
    with pytest.raises(CacheError, match=r"frames \[1, 2\] are not held any more.*raise spare_frames"):
        short.advance(9, noise, exit_step=0, with_grad=True)
