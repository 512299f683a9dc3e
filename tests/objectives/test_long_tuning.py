"""Long tuning: which chunk an iteration trains, what is scored, and that a run stopped in mid-sequence goes on there."""

from collections import Counter

import pytest
import torch
from tiny_batches import RULES, make_batch, record
from tiny_codec import TinyCodec
from tiny_models import make_tiny_model
from tiny_objectives import parts_of

from longtake.errors import ConfigError, DataError
from longtake.models.execution import Execution
from longtake.objectives.dmd import Dmd
from longtake.objectives.dmd_keys import CriticConfig, DataLoss
from longtake.objectives.held_batches import HeldBatches
from longtake.objectives.long_tuning import LongSchedule, LongTuning, LongTuningConfig
from longtake.rng import KeyedRNG

HORIZON, NEW = 7, 4


def settings_of(chunks=(3,), switches=(), **more):
    return LongTuningConfig(
        teacher="toy", num_chunks=list(chunks), new_frames=NEW, switch_frames=list(switches), **more
    )


def schedule_of(chunks, switches=(), seed=0):
    return LongSchedule(KeyedRNG(seed), HORIZON, settings_of(chunks, switches))


def make_long(chunks=(3,), switches=(), ratio=2, critic_warmup_steps=0, weight=0.0, **options):
    networks = [make_tiny_model(i2v=True, seed=k) for k in range(3)]
    critic = CriticConfig(updates_per_generator=ratio, critic_warmup_steps=critic_warmup_steps)
    settings = settings_of(chunks, switches, critic=critic, data_loss=DataLoss(weight=weight))
    parts = parts_of(*networks, num_frames=HORIZON, codec=TinyCodec(networks[0].config), **options)
    return LongTuning(parts, settings)


def batch_of(long, indices=(4, 9), later=False):
    batch = make_batch(long.generator.model, list(indices), HORIZON)
    if later:
        batch = type(batch)(**{**vars(batch), "later_text": batch.condition.text.flip(-1)})
    return batch


def train(long, batch, steps):
    """Losses and gradients (not applied) of these iterations."""
    out = []
    for step in steps:
        for turn in long.turns(step):
            network = long.networks[turn]
            network.zero_grad()
            loss = long.loss(turn, batch, step).loss
            loss.backward()
            grads = [p.grad.clone() for p in network.parameters() if p.grad is not None]
            out.append((turn, loss.item(), grads))
    return out


# ---- the schedule ----------------------------------------------------------------------------------------------------
def test_each_iteration_is_one_chunk_and_sequences_follow_each_other():
    schedule = schedule_of([3])
    places = [schedule.at(step) for step in range(9)]
    assert [(p.sequence, p.chunk, p.begin) for p in places] == [(s, c, 3 * s) for s in range(3) for c in range(3)]
    assert [schedule.end_frame(p.chunk) for p in places] == [7, 11, 15] * 3
    assert {p.length for p in places} == {15} and {p.switch for p in places} == {None}
    assert schedule_of([3]).at(8) == places[8], "nothing depends on what was asked before"


def test_lengths_and_switches_are_drawn_for_each_sequence():
    schedule = schedule_of([1, 2, 4], [5, 9, 13], seed=1)
    starts = [p for p in (schedule.at(step) for step in range(400)) if p.chunk == 0]
    assert {p.length for p in starts} == {7, 11, 19}
    assert all(p.switch in {7: (5,), 11: (5, 9), 19: (5, 9, 13)}[p.length] for p in starts)
    assert {p.switch for p in starts} == {5, 9, 13}
    for one, after in zip(starts, starts[1:]):
        assert after.begin - one.begin == 1 + (one.length - 7) // 4


def test_each_length_and_each_switch_comes_equally_often():
    schedule = schedule_of([1, 2], [3, 5], seed=1)
    starts = [p for p in (schedule.at(step) for step in range(900)) if p.chunk == 0]
    for value in ("length", "switch"):
        counts = Counter(getattr(place, value) for place in starts)
        assert len(counts) == 2 and max(counts.values()) < 0.56 * len(starts), counts


def test_one_chunk_is_the_least():
    assert schedule_of([1]).at(3).sequence == 3
    with pytest.raises(ConfigError, match=r"num_chunks=\[2, 0\] must all be at least 1"):
        settings_of([2, 0])


@pytest.mark.parametrize(("chunks", "ratio"), [(3, 2), (5, 5), (4, 2), (12, 5)])
def test_the_generator_learns_from_every_chunk(chunks, ratio):
    long = make_long(chunks=(chunks,), ratio=ratio)
    turns = [long.turns(step) for step in range(chunks * ratio)]
    assert all(turn[-1] == "critic" for turn in turns)
    trained = [long.schedule.at(step).chunk for step, turn in enumerate(turns) if "generator" in turn]
    assert sorted(trained) == list(range(chunks))
    late = make_long(chunks=(chunks,), ratio=ratio, critic_warmup_steps=4)
    assert [late.turns(step) for step in range(4)] == [["critic"]] * 4
    assert [late.turns(step) for step in range(4, 15)] == [long.turns(step) for step in range(4, 15)]


# ---- the losses ------------------------------------------------------------------------------------------------------
def test_the_scores_see_the_window_under_its_own_picture(monkeypatch):
    long = make_long()
    batch = batch_of(long)
    calls = {name: record(getattr(long, name), monkeypatch) for name in ("critic", "real")}
    for step in range(3):
        for kept in calls.values():
            kept.clear()
        train(long, batch, [step])
        assert ("generator" in long.turns(step)) == bool(calls["real"]) == (step != 1)
        (shown,) = long.codec.pictures[-1:] or [None]
        for call in [*calls["critic"], *calls["real"]]:
            condition = call["condition"]
            assert call["x"].shape[1] == HORIZON
            assert torch.equal(condition.frames, batch.condition.frames) == (step == 0)
            if step:
                picture = TinyCodec(long.generator.model.config).encode(shown)
                assert torch.equal(condition.frames, picture.frames)
                assert torch.equal(condition.image, picture.tokens)
        if calls["real"]:
            conditional, empty = calls["real"]
            assert torch.equal(conditional["condition"].text, batch.condition.text)
            assert torch.equal(empty["condition"].text, batch.empty_text)


def test_only_new_frames_have_a_loss():
    long = make_long()
    batch = batch_of(long)
    for step in range(3):
        made = long._roll_out(batch, step, with_grad=True)
        long._clips.clear()
        assert made.generated.tolist() == ([False] + [True] * 6 if step == 0 else [False] * 3 + [True] * 4)
        condition, _ = long._conditions(batch, made)
        noisy, sigma, noise = long._noised(made.latents, batch, step, "critic")
        predicted = long.critic(noisy, sigma, condition)
        error = (predicted - (noise - made.latents))[:, made.generated].square().mean()
        fresh = make_long()
        for earlier in range(step):
            fresh._roll_out(batch, earlier, with_grad=False)
        torch.testing.assert_close(fresh.loss("critic", batch, step).loss, error, rtol=1e-6, atol=0)


def test_the_first_chunk_is_plain_distillation():
    long = make_long()
    plain = Dmd(long.parts, long.settings)
    batch = batch_of(long)
    for (turn, loss, grads), (other_turn, other, expected) in zip(train(long, batch, [0]), train(plain, batch, [0])):
        assert turn == other_turn and loss == pytest.approx(other, rel=1e-6)
        for mine, theirs in zip(grads, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_the_critic_learns_from_the_videos_of_the_generators_turn(monkeypatch):
    long = make_long()
    batch = batch_of(long)
    calls = record(long.generator.model, monkeypatch)
    train(long, batch, [0])
    assert [call["position"] for call in calls if call["commit"]] == [0, 1, 3]  # one roll-out of [1, 2, 2, 2]


def test_each_iteration_has_an_exit_step_and_noise_of_its_own(monkeypatch):
    """By its own number: the same chunk of the next sequence stops elsewhere and begins from other noise."""
    long = make_long(ratio=100, critic_warmup_steps=100)
    calls, exits, begun = record(long.generator, monkeypatch), [], []
    batch = batch_of(long)
    for step in range(12):
        calls.clear()
        exits.append(long.loss("critic", batch, step).metrics["exit_step"])
        assert exits[-1] == long.draws.integer(step, "exit_step", 0, 4)
        denoised = [call for call in calls if not call["commit"]]
        assert len(denoised) == (exits[-1] + 1) * (3 if step % 3 == 0 else 2)
        begun += [latents for call in denoised if call["sigma"][0] == 1 for latents in call["x"]]
    assert len(set(exits[::3])) > 1, "the same chunk does not always stop at the same step"
    assert len(begun) == 2 * 4 * (3 + 2 + 2) == len({latents.numpy().tobytes() for latents in begun})


# ---- stopping and going on -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stopped_at", [1, 2, 4, 5])
def test_a_stopped_run_goes_on_with_the_same_chunk(stopped_at):
    """With the weights unchanged, what is generated again is what there was; a sequence of 3 chunks, a switch."""
    whole, resumed = make_long(switches=(9,)), make_long(switches=(9,))
    batches = {s: batch_of(whole, (10 * s, 10 * s + 1), later=True) for s in range(2)}
    expected = [train(whole, batches[step // 3], [step]) for step in range(6)]
    found = [train(resumed, batches[step // 3], [step]) for step in range(stopped_at, 6)]
    for mine, truth in zip(found, expected[stopped_at:], strict=True):
        for (turn, loss, grads), (other_turn, other, theirs) in zip(mine, truth, strict=True):
            assert turn == other_turn and loss == other
            assert all(torch.equal(a, b) for a, b in zip(grads, theirs, strict=True))


def test_the_past_is_generated_again_without_gradient(monkeypatch):
    long = make_long(ratio=1)
    calls = record(long.generator, monkeypatch)
    long.loss("generator", batch_of(long), 2)
    assert [call["position"] for call in calls if call["commit"]] == [0, 1, 3, 5, 7, 9, 11]
    assert [call["position"] for call in calls if call["with_grad"]] == [11, 13]


@pytest.mark.parametrize("option", ["recompute", "batched_exit_backward"])
def test_the_cache_is_larger_where_backward_computes_again_and_there_alone(option, monkeypatch):
    found, sizes = [], []
    for recomputed in (False, True):
        long = make_long(ratio=1, chunks=(2,))
        if option == "batched_exit_backward":
            long.generator.batched_exit_backward = recomputed
        else:
            long.generator.model = long.generator.model.executed(Execution(recompute=recomputed))
        new_cache = long.generator.model.new_cache
        monkeypatch.setattr(
            long.generator.model, "new_cache", lambda *a, f=new_cache, **k: sizes.append(f(*a, **k)) or sizes[-1]
        )
        found.append(train(long, batch_of(long), range(2)))
    for (_, loss, grads), (_, other, expected) in zip(found[1], found[0], strict=True):
        assert loss == pytest.approx(other, rel=1e-5)
        for mine, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    frames = [cache.size_bytes / cache.stored([0])[0].nbytes / 2 for cache in sizes]
    assert frames == [RULES.window_frames, RULES.window_frames + HORIZON]


def test_each_micro_batch_has_videos_of_its_own():
    long = make_long()
    one, two = batch_of(long, (0, 1)), batch_of(long, (2, 3))
    together = [(train(long, one, [step]), train(long, two, [step])) for step in range(3)]
    alone = make_long()
    for step in range(3):
        assert [loss for _, loss, _ in train(alone, two, [step])] == [loss for _, loss, _ in together[step][1]]
    assert len(long._streams) == 2


def test_a_switch_needs_a_second_prompt():
    long = make_long(switches=(5,))
    with pytest.raises(DataError, match="give two prompts a row"):
        long.loss("critic", batch_of(long), 0)


class Counting:
    """Two micro-batches an update that say where they are: (update, micro-batch)."""

    def __init__(self):
        self.position = 0

    def seek(self, position):
        self.position = position

    def __next__(self):
        update, self.position = self.position // 8, self.position + 8
        return [(update, 0), (update, 1)]


def test_micro_batches_last_a_sequence():
    schedule = schedule_of([3])

    def make():
        return HeldBatches(Counting(), lambda step: schedule.at(step).sequence, batch_size=8)

    batches, seen, positions = make(), [], []
    for _ in range(7):
        seen.append(next(batches))
        positions.append(batches.position)
    assert seen == [[(s, 0), (s, 1)] for s in (0, 0, 0, 1, 1, 1, 2)]
    assert positions == [8 * k for k in range(1, 8)]
    for step in range(7):  # sought anew, or back and forth in the same object
        for resumed in (make(), batches):
            resumed.seek(8 * step)
            assert next(resumed) == seen[step]
            assert resumed.position == 8 * (step + 1)


def test_real_videos_are_learnt_beside_every_chunk():
    long, plain = make_long(ratio=1, weight=0.5), make_long(ratio=1)
    forced = long.data_loss
    batch = batch_of(long)
    for step in range(3):
        found, alone = (each.loss("generator", batch, step).loss for each in (long, plain))
        torch.testing.assert_close(found, alone + 0.5 * forced.loss("generator", batch, step).loss)
        found.backward(), alone.backward()
