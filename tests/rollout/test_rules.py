"""The rules of a student (specification T): levels by block, context by the last step or at a level, laws of re-caching."""

from collections import Counter
from itertools import islice

import oracle
import pytest
import torch
from axes import pairwise
from tape import Tape
from tiny_batches import record
from tiny_codec import TinyCodec
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error
from tiny_plan import tiny_plan

from longtake.errors import ConfigError
from longtake.flow.path import add_noise
from longtake.models.execution import Execution
from longtake.rng import KeyedRNG
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser, Guidance, commit_block
from longtake.rollout.long_video import LongStream, Switch
from longtake.rollout.recache import LatentHistory, recache
from longtake.rollout.self_forcing import roll_out
from longtake.rollout.stream import LatentStream, stream_switched

SIZE, FOUR, TWO = (4, 6), (1.0, 0.9, 0.75, 0.5), (1.0, 0.6)
# Blocks [1, 2, 2, ...] of image-to-video, [2, 2, ...] of text-to-video
I2V, T2V = tiny_plan(2, 1, 5, 1, sigmas=FOUR), tiny_plan(2, 2, 6, 2, sigmas=FOUR)
LAST = {"context": "last_step"}
LAWS = {
    "last step": LAST,
    "last step from the first": {**LAST, "context_from": 0},
    "last step, four then two": {**LAST, "later_sigmas": TWO},
    "four then two": {"later_sigmas": TWO},
    "four then one": {"later_sigmas": (1.0,)},
    "context at a level": {"context_sigma": 0.3},
    "start below one": {"sigmas": (1600 / 1601, *FOUR[1:]), "later_sigmas": (1600 / 1601, 0.6)},
}


def noise(start, end, step):
    return KeyedRNG(5).noise(0, "noise", [0, 1], (end - start, 4, *SIZE), part=10 * start + step)


def scene(i2v=True, **changes):
    model = make_tiny_model(i2v=i2v, **changes)
    return model, make_tiny_condition(model), make_tiny_latents(1, seed=7) if i2v else None


def plan_of(i2v, law="last step", **changes):
    return (I2V if i2v else T2V).but(**LAWS[law], **changes)


def unroll(model, condition, picture, frames, plan, monkeypatch, batched=False, **options):
    """A roll-out, and the cache that it filled."""
    caches, new_cache = [], model.new_cache
    with monkeypatch.context() as patch:
        patch.setattr(model, "new_cache", lambda *sizes: caches.append(new_cache(*sizes)) or caches[-1])
        denoiser = Denoiser(model, batched_exit_backward=batched)
        made = roll_out(denoiser, condition, picture, noise, plan, frames, SIZE, **options)
    return made.latents, caches[0]


def stream_of(model, condition, picture, plan, blocks, denoiser=None):
    cache = model.new_cache(plan, 2, SIZE, max_frames=64)
    stream = LatentStream(denoiser or Denoiser(model), cache, condition, picture, noise, plan)
    return torch.cat([stream.next() for _ in range(blocks)], 1), stream


# ---- the plan ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("i2v", [True, False])
def test_blocks_are_counted_from_the_first_generated_one(i2v):
    """The picture is none: the first block that is made has the long list and the clean pass, with or without it."""
    plan = plan_of(i2v, "last step, four then two").with_given(1 if i2v else 0)
    starts = [start for start, _ in plan.blocks(0, 7 if i2v else 6)]
    levels, itself = [plan.levels(start) for start in starts], [plan.stores_itself(start) for start in starts]
    assert levels[-3:] == [FOUR, TWO, TWO] and itself[-3:] == [False, True, True]
    assert [plan.context_level(start) for start in starts][-3:] == [0.0, 0.6, 0.6]
    assert plan.context_levels(7 if i2v else 6) == [0.0] * (3 if i2v else 2) + [0.6] * 4
    noisy = plan.but(context="pass", context_sigma=0.2)
    assert noisy.context_levels(7 if i2v else 6) == ([0.0] if i2v else []) + [0.2] * 6
    assert plan.with_given(plan.given_frames) is plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": "append"}, "context: got 'append'; must be 'pass' or 'last_step'"),
        ({"recache": "recompute"}, "recache: got 'recompute'; must be 'rebuild', 'last_window' or 'none'"),
        ({"commit_role": "memory"}, "commit_role='memory' is not implemented"),
        ({"sink_law": "ema"}, "sink_law='ema' is not implemented"),
        ({"context_sigma": 1.0}, "context_sigma: got 1.0; must be less than 1"),
        ({"context_from": -1}, "context_from: got -1; must be greater than or equal to 0"),
        ({"later_sigmas": (1.0, 0.9, 0.8, 0.7, 0.6)}, "no more than that"),
        ({"later_sigmas": ()}, "at least one"),
        ({**LAST, "sigmas": (1.0,)}, "one noise level that is noise alone"),
        ({**LAST, "later_sigmas": (1.0,)}, "one noise level that is noise alone"),
        ({**LAST, "sigmas": (1.0,), "later_sigmas": (1.0,)}, "one noise level"),
        ({"given_frames": 2}, "must be 0 or the first block, first_frames=1"),
        ({"recache": "last_window"}, "not implemented with keep_sink=false"),
    ],
)
def test_what_is_not_implemented_or_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        I2V.but(**changes)


# ---- what is called, and how often -------------------------------------------------------------------------------------
@pytest.mark.parametrize("i2v", [True, False])
@pytest.mark.parametrize(
    ("law", "passes"),
    [
        # of the first generated block, of the second, of each later one; the pass of a block comes with the next one
        ("last step", [4, 1 + 4, 4, 4]),
        ("last step from the first", [4, 4, 4, 4]),
        ("last step, four then two", [4, 1 + 2, 2, 2]),
        ("four then two", [4, 1 + 2, 1 + 2, 1 + 2]),
        ("four then one", [4, 1 + 1, 1 + 1, 1 + 1]),
        ("context at a level", [4, 1 + 4, 1 + 4, 1 + 4]),
    ],
)
def test_the_calls_of_each_block(i2v, law, passes, monkeypatch):
    model, condition, picture = scene(i2v)
    calls, plan = record(model, monkeypatch), plan_of(i2v, law)
    stream = LatentStream(Denoiser(model), model.new_cache(plan, 2, SIZE), condition, picture, noise, plan)
    if i2v:
        assert torch.equal(next(stream), picture) and not calls
    counted = []
    for _ in passes:
        calls.clear()
        next(stream)
        counted.append(len(calls))
    assert counted == [passes[0] + i2v, *passes[1:]]
    # of a settled block: the levels in order, and who stores
    plan = plan.with_given(int(i2v))
    start = stream.position - 2
    steps = [(level, plan.stores_itself(start) and level == plan.levels(start)[-1]) for level in plan.levels(start)]
    context = [] if plan.stores_itself(start) else [(plan.context_sigma, True)]
    assert [(pytest.approx(call["sigma"][0].item()), call["commit"]) for call in calls] == context + steps


def test_a_block_begins_with_noise_times_its_first_level(monkeypatch):
    model, condition, picture = scene()
    calls = record(model, monkeypatch)
    stream_of(model, condition, picture, plan_of(True, "start below one"), 3)
    begun = [call for call in calls if call["sigma"][0] > 0.99]
    assert [call["position"] for call in begun] == [1, 3]
    for call in begun:
        start = call["position"]
        torch.testing.assert_close(call["x"], noise(start, start + 2, 0) * (1600 / 1601), rtol=0, atol=0)


def test_both_sides_of_guidance_store_the_same_latents(monkeypatch):
    model, condition, picture = scene()
    plan, other = plan_of(True), make_tiny_condition(model, seed=9)
    caches = [model.new_cache(plan, 2, SIZE) for _ in range(2)]
    guidance = Guidance(2.0, other, caches[1])
    stream = LatentStream(Denoiser(model), caches[0], condition, picture, noise, plan, guidance=guidance)
    calls = record(model, monkeypatch)
    for _ in range(4):
        stream.next()
    stored = [call for call in calls if call["commit"] and call["sigma"][0] > 0]
    assert len(stored) == 2 * 2 and len(calls) == 2 * (4 + 4 + 4 + 2)
    for one, two in zip(stored[::2], stored[1::2]):
        assert torch.equal(one["x"], two["x"]) and (one["condition"], two["condition"]) == (condition, other)
    assert caches[0].position == caches[1].position == 7 and not torch.equal(caches[0].keys, caches[1].keys)


# ---- what the cache holds ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("i2v", "rope", "law"), pairwise((True, False), ("relative", "absolute"), LAWS))
def test_streamed_keys_and_values_are_those_of_brute_force_in_float64(law, rope, i2v, monkeypatch):
    """Layer by layer, and the velocities of the last steps: the oracle gets what was stored, at its levels."""
    model, condition, picture = scene(i2v)
    plan, frames = plan_of(i2v, law, rope=rope, window_frames=7 if i2v else 6), 9 if i2v else 10
    calls = record(model, monkeypatch)
    latents, stream = stream_of(model, condition, picture, plan, 5)
    stream.commit()
    plan = stream.plan
    stored = {call["position"]: call for call in calls if call["commit"]}
    last = {call["position"]: call for call in calls if call["sigma"][0] == plan.levels(call["position"])[-1]}
    starts = [start for start, _ in plan.blocks(0, frames)]
    assert sorted(stored) == starts
    for start in starts:  # the level of the plan, and exactly the latents that it names
        own = stored[start]
        assert own["sigma"].tolist() == [pytest.approx(plan.context_level(start))] * 2
        clean = latents[:, start : start + own["x"].shape[1]]
        if plan.stores_itself(start):
            assert own is last[start] and not torch.equal(own["x"], clean)
        elif plan.context_level(start) > 0:
            fresh = noise(start, start + clean.shape[1], plan.context_step)
            assert torch.equal(own["x"], add_noise(clean, fresh, own["sigma"]))
        else:
            assert torch.equal(own["x"], clean)

    def joined(of, key):
        return torch.cat([of[start][key] for start in starts if start in of], 1)

    given = int(i2v)
    levels = torch.tensor([plan.levels(start)[-1] for start, end in plan.blocks(0, frames) for _ in range(start, end)])
    noisy = torch.cat([*([picture] if i2v else []), joined(last, "x")], 1)
    truth = oracle.run(
        model.state_dict(),
        joined(stored, "x"),
        torch.tensor(plan.context_levels(frames)).expand(2, -1),
        condition.text,
        condition.image,
        condition.frames,
        num_heads=model.config.num_heads,
        text_len=model.config.text_len,
        blocks=list(plan.blocks(0, frames)),
        window=plan.window_frames,
        sink=plan.sink_frames,
        rope=rope,
        noisy=noisy,
        noisy_sigma=levels.expand(2, -1),
    )
    assert relative_error(joined(last, "out"), truth.noisy[:, given:]) < 1e-5
    for frame in stream.cache.held_frames:
        for mine, wanted in zip(stream.cache.stored([frame]), (truth.keys, truth.values)):
            for layer in range(model.config.num_layers):
                assert relative_error(mine[layer][:, 0], wanted[layer][frame]) < 1e-5


@pytest.mark.parametrize("i2v", [True, False])
def test_the_first_generated_block_and_the_later_ones_stop_at_steps_of_their_own(i2v, monkeypatch):
    """Causal-Forcing++; one step for all is clamped to the shorter list (Causal-rCM)."""
    model, condition, picture = scene(i2v)
    plan, frames = plan_of(i2v, "four then two"), 7 if i2v else 8
    for exits, wanted in (((1, 0), [2, 1, 1]), ((0, 1), [1, 2, 2]), (2, [3, 2, 2]), (0, [1, 1, 1]), (None, [4, 2, 2])):
        with monkeypatch.context() as patch:
            calls = record(model, patch)
            unroll(model, condition, picture, frames, plan, patch, exit_step=exits)
        counts = Counter(call["position"] for call in calls if not call["commit"])
        assert [counts[start] for start in sorted(counts)] == wanted[: len(counts)] + wanted[-1:] * (len(counts) - 3)
    one = plan_of(i2v, "four then one").with_given(int(i2v))
    starts = [start for start, _ in one.blocks(0, frames)][int(i2v) :]
    assert [one.exit_step(start, (3, 0)) for start in starts] == [3] + [0] * (len(starts) - 1)


@pytest.mark.parametrize(
    ("way", "i2v", "law"), pairwise(("no gradient", "one by one", "recomputed", "together"), (True, False), LAWS)
)
def test_the_stream_holds_what_the_roll_out_held(law, i2v, way, monkeypatch):
    """With the last exit step: latents, and every frame's keys and values in every layer."""
    model, condition, picture = scene(i2v)
    model = model.executed(Execution(recompute=way in ("recomputed", "together")))
    plan, frames = plan_of(i2v, law), 7 if i2v else 8
    options = {"exit_step": 3, "with_grad": way != "no gradient", "batched": way == "together"}
    made, cache = unroll(model, condition, picture, frames, plan, monkeypatch, **options)
    latents, stream = stream_of(model, condition, picture, plan, 4)
    exact = way == "no gradient"
    assert made.requires_grad is not exact
    torch.testing.assert_close(latents, made.detach(), rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    held = [frame for frame in cache.held_frames if frame in stream.cache.held_frames]
    assert held[-1] == frames - 3 and len(held) >= 3
    for mine, theirs in zip(stream.cache.stored(held), cache.stored(held)):
        torch.testing.assert_close(mine, theirs, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("exit_step", [0, 1, 2, (0, 1), (3, 0)])
@pytest.mark.parametrize("law", ["last step", "last step, four then two"])
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_block_that_stops_early_is_stored_as_its_clean_latents_noised_again(law, exit_step, with_grad, monkeypatch):
    model, condition, picture = scene()
    plan, calls = plan_of(True, law).with_given(1), record(model, monkeypatch)
    made, cache = unroll(model, condition, picture, 9, plan, monkeypatch, exit_step=exit_step, with_grad=with_grad)
    other = model.new_cache(plan, 2, SIZE)
    stored = {call["position"]: call for call in calls if call["commit"]}
    assert sorted(stored) == [0, 1, 3, 5]
    for start, end in plan.blocks(0, 7):
        asked = exit_step if isinstance(exit_step, int) else exit_step[start > 1]
        stops = asked < len(plan.levels(start)) - 1
        level, context = plan.context_level(start), stored[start]["x"]
        if stops:
            fresh = noise(start, end, plan.context_step) if level else None
            clean = made[:, start:end].detach()
            wanted = clean if fresh is None else add_noise(clean, fresh, torch.full((2,), level))
            assert torch.equal(context, wanted)
        commit_block(Denoiser(model), other, condition, context, level)
    for mine, theirs in zip(cache.stored(cache.held_frames), other.stored(cache.held_frames)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("exit_step", [1, 3])
def test_ways_to_the_gradient_agree(law, exit_step, monkeypatch):
    """With eviction: steps one by one, recomputed, and all blocks together."""
    gradients = []
    for recompute, batched in ((False, False), (True, False), (True, True)):
        model, condition, picture = scene()
        model = model.executed(Execution(recompute=recompute))
        made, _ = unroll(
            model, condition, picture, 9, plan_of(True, law), monkeypatch, batched, exit_step=exit_step, with_grad=True
        )
        made.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("law", ["last step", "last step, four then two", "context at a level"])
def test_replayed_passes_equal_those_that_python_makes(law):
    """Storing passes that give a velocity are recorded, too."""
    model, condition, picture = scene()
    plan, other = plan_of(True, law), make_tiny_condition(model, seed=8)

    def unrolled(graphs=None):
        denoiser = Denoiser(model, graphs=graphs)
        made, stream = stream_of(model, condition, picture, plan, 12, denoiser)
        stream.change(other)
        return torch.cat([made, *(stream.next() for _ in range(3))], 1)

    tape = Tape()
    expected = unrolled()
    assert torch.equal(unrolled(CUDAGraphRunner(tape)), expected)
    assert tape.recorded >= 2 and tape.replayed >= 3 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("law", ["last step", "last step, four then two"])
def test_cuda_graphs_of_passes_that_store_give_the_same_latents(law, monkeypatch):
    """Also after a change of prompt. Uncompiled: for these sizes compiling takes minutes, and says nothing of graphs."""
    monkeypatch.setattr("longtake.models.execution.has_triton", lambda: False)
    model = make_tiny_model(i2v=True).cuda()
    condition, other = (make_tiny_condition(model, seed=seed).to("cuda") for seed in (1, 8))
    plan = plan_of(True, law)

    def run(graphs):
        denoiser, cache = Denoiser(model, graphs=graphs), model.new_cache(plan, 2, SIZE)
        picture = make_tiny_latents(1, seed=7).cuda()
        stream = LatentStream(denoiser, cache, condition, picture, lambda *key: noise(*key).cuda(), plan)
        made = [stream.next() for _ in range(14)]
        stream.change(other)
        return torch.cat([*made, *(stream.next() for _ in range(4))], 1), cache

    def refuse(work):
        raise RuntimeError("not recorded")

    expected, _ = run(CUDAGraphRunner(refuse))
    graphs = CUDAGraphRunner()
    made, cache = run(graphs)
    assert graphs.captured(cache) >= 2 and not graphs._broken
    torch.testing.assert_close(made, expected, rtol=0, atol=0)


@pytest.mark.parametrize("law", LAWS)
def test_a_long_video_is_the_stream(law):
    model, condition, picture = scene()
    codec, plan = TinyCodec(model.config), plan_of(True, law)
    long = LongStream(Denoiser(model), condition, picture, plan, SIZE, codec, horizon=7, max_frames=40)
    windows = [long.advance(end, noise) for end in (7, 13, 17)]
    made = torch.cat([windows[0].latents, windows[1].latents[:, 1:], windows[2].latents[:, 3:]], 1)
    assert torch.equal(made, stream_of(model, condition, picture, plan, 9)[0])


# ---- changes of the condition ------------------------------------------------------------------------------------------
def history(plan, latents):
    kept = LatentHistory(plan)
    for start, end in plan.blocks(0, latents.shape[1]):
        kept.append(latents[:, start:end])
    return kept


def filled(model, plan, condition, latents):
    cache = model.new_cache(plan, 2, SIZE)
    for start, end in plan.blocks(0, latents.shape[1]):
        commit_block(Denoiser(model), cache, condition, latents[:, start:end])
    return cache


@pytest.mark.parametrize("law", ["last step", "context at a level"])
def test_a_rebuilt_cache_holds_kept_latents_at_the_level_of_the_plan(law):
    """Noised by numbers of their frames alone: the same again, in another order or after a restart."""
    model, condition, _ = scene()
    plan, latents = plan_of(True, law).with_given(1), make_tiny_latents(9)
    caches = [filled(model, plan, make_tiny_condition(model, seed=9), latents) for _ in range(2)]
    for cache in caches:
        recache(Denoiser(model), cache, condition, history(plan, latents), noise)
    truth = model.new_cache(plan, 2, SIZE)
    for start, end in ((0, 1), (5, 7), (7, 9)):
        level, fresh = plan.context_level(start), noise(start, end, len(FOUR))
        x = latents[:, start:end] if start == 0 else add_noise(latents[:, start:end], fresh, torch.full((2,), level))
        truth.skip_to(start)
        commit_block(Denoiser(model), truth, condition, x, level)
    assert caches[0].held_frames == truth.held_frames == [0, 5, 6, 7, 8]
    for cache in caches:
        for mine, wanted in zip(cache.stored(cache.held_frames), truth.stored(truth.held_frames)):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("recache_law", ["rebuild", "last_window", "none"])
def test_long_videos_and_streams_switch_alike(law, recache_law):
    """Also where the switch comes in the middle of a chunk."""
    model, condition, picture = scene()
    plan = plan_of(True, law, recache=recache_law, keep_sink=recache_law == "last_window")
    later = make_tiny_condition(model, seed=8).text
    codec, switch = TinyCodec(model.config), Switch(9, later)
    long = LongStream(Denoiser(model), condition, picture, plan, SIZE, codec, horizon=7, max_frames=40, switch=switch)
    windows = [long.advance(end, noise) for end in (7, 13)]
    made = torch.cat([windows[0].latents, windows[1].latents[:, 1:]], 1)
    conditions, cache = [condition, condition.with_text(later)], model.new_cache(plan, 2, SIZE)
    stream = stream_switched(Denoiser(model), cache, conditions, [9], picture, noise, plan)
    assert torch.equal(made, torch.cat(list(islice(stream, 7)), 1))


def test_last_window_rebuilds_the_window_in_one_call_beside_the_old_sink():
    """LongLive: all frames of the call see each other, those of the sink stay as the old prompt made them."""
    model, condition, _ = scene()
    old = make_tiny_condition(model, seed=9)
    plan = I2V.but(window_frames=7, sink_frames=3, keep_sink=True, recache="last_window", given_frames=1)
    latents = make_tiny_latents(11)
    cache = filled(model, plan, old, latents)
    sink = [t.clone() for t in cache.stored([0, 1, 2])]
    recache(Denoiser(model), cache, condition, history(plan, latents))
    assert cache.held_frames == [0, 1, 2, 7, 8, 9, 10] and cache.position == 11
    assert all(torch.equal(a, b) for a, b in zip(cache.stored([0, 1, 2]), sink))
    truth = filled(model, plan, old, latents[:, :3])
    truth.skip_to(7)
    commit_block(Denoiser(model), truth, condition, latents[:, 7:11])
    assert all(torch.equal(a, b) for a, b in zip(cache.stored([7, 8, 9, 10]), truth.stored([7, 8, 9, 10])))
    changed = latents.clone()
    changed[:, 10] += 1
    for law, moves in (("last_window", True), ("rebuild", False)):
        twin = filled(model, plan, old, latents)
        one = plan.but(recache=law)
        recache(Denoiser(model), twin, condition, history(one, latents))
        before = twin.stored([7])[0][1].clone()
        recache(Denoiser(model), twin, condition, history(one, changed))
        assert torch.equal(before, twin.stored([7])[0][1]) is not moves


@pytest.mark.parametrize("total", [5, 7])
def test_last_window_takes_all_frames_while_the_window_is_not_full(total):
    """In one call, the sink too, against brute force in float64."""
    model, condition, _ = scene()
    plan = I2V.but(window_frames=7, sink_frames=3, keep_sink=True, recache="last_window", given_frames=1)
    latents = make_tiny_latents(total)
    cache = filled(model, plan, make_tiny_condition(model, seed=9), latents)
    recache(Denoiser(model), cache, condition, history(plan, latents))
    truth = oracle.run(
        model.state_dict(),
        latents,
        torch.zeros(2, total),
        condition.text,
        condition.image,
        condition.frames,
        num_heads=model.config.num_heads,
        text_len=model.config.text_len,
        blocks=[(0, total)],
        rope="relative",
    )
    assert cache.held_frames == list(range(total)) and cache.position == total
    for frame in range(total):
        for mine, wanted in zip(cache.stored([frame]), (truth.keys, truth.values)):
            for layer in range(model.config.num_layers):
                assert relative_error(mine[layer][:, 0], wanted[layer][frame]) < 1e-5


@pytest.mark.parametrize("guided", [False, True])
def test_without_a_recache_old_keys_and_values_stay_and_the_latest_block_is_stored_under_the_old_prompt(guided):
    model, condition, picture = scene()
    plan = I2V.but(recache="none")
    new, empty, none = (make_tiny_condition(model, seed=seed) for seed in (9, 4, 8))
    caches = [model.new_cache(plan, 2, SIZE) for _ in range(2)]
    guidance = Guidance(2.0, empty, caches[1]) if guided else None
    stream = LatentStream(Denoiser(model), caches[0], condition, picture, noise, plan, guidance=guidance)
    latents = torch.cat([stream.next() for _ in range(3)], 1)
    stream.change(new, none if guided else None)
    assert stream.caches == caches[: 1 + guided] and stream.cache.position == 5
    for cache, old in zip(stream.caches, (condition, empty)):
        truth = filled(model, plan, old, latents)
        assert all(torch.equal(a, b) for a, b in zip(cache.stored([0, 3, 4]), truth.stored([0, 3, 4])))
    assert torch.isfinite(stream.next()).all() and stream.condition is new
