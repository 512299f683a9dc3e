"""The repairs of the first image-to-video port that concern training; each test is named after its letter.

(b) is in tests/models/test_streaming.py, (c) in tests/test_structs.py and tests/test_config.py, (e) in tests/test_cli.py.
"""

from dataclasses import replace

import pytest
import torch
from test_dmd import make_dmd, watched
from tiny_batches import RULES, make_batch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model
from tiny_objectives import teacher_forcing
from tiny_plan import causal_layout, tiny_plan
from toy_assets import random_encoders

from longtake.condition import Condition
from longtake.rollout.denoise import Denoiser


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_both_conditions_reach_the_generator_in_every_call_and_both_scores_in_both_losses(batch_size, monkeypatch):
    dmd = make_dmd()
    calls, _ = watched(dmd, monkeypatch)
    batch = make_batch(dmd.generator.model, list(range(4, 4 + batch_size)))
    step = next(step for step in range(100) if dmd.exit_step(step) == 3)

    dmd.loss("generator", batch, step)
    generator = calls["generator"]
    kinds = [("context" if c["commit"] else "exit" if c["with_grad"] else "denoise", c["position"]) for c in generator]
    blocks = [[("denoise", start)] * 3 + [("exit", start)] for start in (1, 3, 5)]
    assert kinds == [
        ("context", 0),
        *blocks[0],
        ("context", 1),
        *blocks[1],
        ("context", 3),
        *blocks[2],
    ]
    everywhere = generator + calls["critic"] + calls["real"][:1]
    assert all(call["condition"] is batch.condition for call in everywhere)  # text, CLIP tokens and y
    unconditional = calls["real"][1]["condition"]
    assert unconditional.image is batch.condition.image and unconditional.frames is batch.condition.frames

    for shared in (True, False):  # the critic's loss on the generator's videos, and on its own roll-out
        for recorded in calls.values():
            recorded.clear()
        dmd.loss("critic", batch, step)
        assert bool(calls["generator"]) != shared and len(calls["critic"]) == 1
        assert all(call["condition"] is batch.condition for call in calls["generator"] + calls["critic"])


@pytest.mark.parametrize("broken", range(8))
def test_a_y_is_cut_by_absolute_index(broken):
    """Another y in one frame reaches the block that holds this frame, what follows it, and nothing before."""
    dmd = make_dmd()
    batch = make_batch(
        dmd.generator.model, [4, 9], num_frames=9
    )  # y is longer than the roll-out: frames 7 and 8 are not read
    frames = batch.condition.frames.clone()
    frames[:, broken] += 1
    other = replace(batch, condition=Condition(batch.condition.text, batch.condition.image, frames))
    step = next(step for step in range(100) if dmd.exit_step(step) == 1)
    a, b = (dmd._roll_out(one, step, with_grad=False).latents for one in (batch, other))
    changed = (a != b).flatten(2).any(2)
    first = 7 if broken > 6 else 1 if broken == 0 else 1 + (broken - 1) // 2 * 2
    expected = torch.arange(7) >= first
    assert torch.equal(changed, expected.expand(2, -1))


@pytest.mark.parametrize("broken", range(8))
def test_a_y_reaches_both_scores_at_its_own_frame(broken):
    """Bidirectional: with self-attention silenced only the frame itself changes."""
    model = make_tiny_model(i2v=True)
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.o.weight.zero_()
    batch = make_batch(model, [4, 9], num_frames=9)
    frames = batch.condition.frames.clone()
    frames[:, broken] += 1
    other = replace(batch.condition, frames=frames)
    x, sigma = make_tiny_latents(7), torch.full((2,), 0.6)
    changed = (model(x, sigma, batch.condition) != model(x, sigma, other)).flatten(2).any(2)
    assert torch.equal(changed, (torch.arange(7) == broken).expand(2, -1))


def test_a_the_last_frame_of_y_stands_for_all_later_ones():
    dmd = make_dmd()
    batch = make_batch(dmd.generator.model, [4, 9])
    condition = batch.condition
    short = Condition(condition.text, condition.image, condition.frames[:, :4])
    long = Condition(
        condition.text,
        condition.image,
        torch.cat([condition.frames[:, :4], condition.frames[:, 3:4].expand(-1, 6, -1, -1, -1)], 1),
    )
    a, b = (dmd._roll_out(replace(batch, condition=one), 3, with_grad=False).latents for one in (short, long))
    assert torch.equal(a, b)


@pytest.mark.parametrize("broken", range(7))
def test_a_y_goes_to_both_halves_of_teacher_forcing(broken, monkeypatch):
    """J.3 for 36 channels: the clean and the noisy copy of a frame both see this frame's y. The picture has no noisy one,
    the last block no clean one.
    """
    model = make_tiny_model(i2v=True)
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.o.weight.zero_()
    outputs = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **o: outputs.append(forward(*a, **o)) or outputs[-1])
    batch = make_batch(model, [4, 9])
    frames = batch.condition.frames.clone()
    frames[:, broken] += 1
    objective = teacher_forcing(model, seed=0, shift=3.0)
    for condition in (batch.condition, replace(batch.condition, frames=frames)):
        objective.loss("generator", replace(batch, condition=condition), 0)
    changed = (outputs[0] != outputs[1]).flatten(2).any(2)
    assert torch.equal(changed, (torch.tensor([*range(5), *range(1, 7)]) == broken).expand(2, -1))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_d_clip_tokens_keep_the_batch_dimension(batch_size):
    images = torch.rand(batch_size, 3, 64, 64) * 2 - 1
    encoder = random_encoders().image
    tokens = encoder.encode(images)
    assert tokens.shape == (batch_size, encoder.num_tokens, encoder.width)
    for k in range(batch_size):
        torch.testing.assert_close(encoder.encode(images[k : k + 1]), tokens[k : k + 1])


# ---- bar 3 -----------------------------------------------------------------------------------------------------------
def broken_conditions(condition):
    """Each part of the condition zeroed, and given to the other sample."""
    parts = {"text": condition.text, "image": condition.image, "frames": condition.frames}
    for name, tensor in parts.items():
        yield f"zeroed {name}", Condition(**parts | {name: torch.zeros_like(tensor)})
        yield f"swapped {name}", Condition(**parts | {name: tensor.roll(1, 0)})


@pytest.mark.parametrize("way", ["bidirectional", "masked", "cached", "with_grad"])
def test_breaking_each_condition_changes_the_velocity(way):
    """Bar 3: neither text, nor CLIP tokens, nor y can be bypassed, in any of the ways the model is called."""
    model = make_tiny_model(i2v=True)
    condition = make_tiny_condition(model)
    x, sigma, picture = make_tiny_latents(4), torch.full((2,), 0.6), make_tiny_latents(1, seed=9)

    def velocity(condition):
        if way == "bidirectional":
            return model(x, sigma, condition)
        if way == "masked":
            layout = causal_layout(RULES, 5)
            return model(torch.cat([picture, x], 1), sigma, condition, layout)[:, 1:]
        cache = model.new_cache(tiny_plan(2, 1, 5, 1), 2, (4, 6))
        with torch.no_grad():
            Denoiser(model)(picture, torch.zeros(2), condition, cache, commit=True)
        with torch.set_grad_enabled(way == "with_grad"):
            return Denoiser(model)(x, sigma, condition, cache)

    right = velocity(condition).detach()
    assert torch.equal(velocity(Condition(condition.text, condition.image, condition.frames)).detach(), right)
    for name, broken in broken_conditions(condition):
        change = (velocity(broken).detach() - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)
        assert (change > 1e-3).all(), f"{name} changes the velocity by {change.tolist()}"


def test_breaking_each_condition_changes_both_losses():
    dmd = make_dmd()
    batch = make_batch(dmd.generator.model, [4, 9])
    for turn, step in (("generator", 0), ("critic", 1)):
        right = dmd.loss(turn, batch, step).loss.item()
        assert dmd.loss(turn, batch, step).loss.item() == right
        for name, broken in broken_conditions(batch.condition):
            wrong = dmd.loss(turn, replace(batch, condition=broken), step).loss.item()
            assert abs(wrong / right - 1) > 1e-4, f"{name} changes the {turn} loss from {right} to {wrong}"
            dmd._clips.clear()
