"""One roll-out for several updates of the critic: which share one, and that they learn what they would learn alone."""

import pytest
import torch
from test_dmd import FRAMES, make_dmd, watched
from tiny_batches import make_batch

from longtake.objectives.held_batches import HeldBatches
from longtake.objectives.roll_out_groups import RollOutGroups


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(("critics", "share"), [(1, 1), (2, 1), (5, 1), (5, 2), (5, 3), (5, 4), (3, 2), (8, 5)])
def test_groups_are_those_of_going_through_the_iterations(warmup, critics, share):
    groups = RollOutGroups(share, critics, warmup)
    number, begin = -1, 0
    for step in range(60):
        updated = step >= warmup and (step - warmup) % critics == 0
        after_one = step > warmup and (step - 1 - warmup) % critics == 0
        if step == 0 or updated or after_one or step - begin == share:
            number, begin = number + 1, step
        assert (groups.number(step), groups.begin(step)) == (number, begin), step
    if share == 1:
        assert [groups.number(step) for step in range(60)] == list(range(60))


def critics_of(steps, batches, monkeypatch=None, share=3, **settings):
    """Losses of the critic in these iterations, of one objective; and its roll-outs."""
    dmd = make_dmd(critic={"updates_per_generator": 5, "updates_per_rollout": share}, **settings)
    made = [] if monkeypatch is None else watched(dmd, monkeypatch)[1]
    return dmd, [dmd.loss("critic", batches[step], step) for step in steps], made


def test_three_updates_learn_from_one_roll_out_each_with_noise_of_its_own(monkeypatch):
    """Iterations 1 to 3 share one, 4 has its own (the generator is updated in 0 and 5); alone each makes the same."""
    held = make_batch(make_dmd().generator.model, [4, 9], FRAMES)
    batches = dict.fromkeys(range(1, 5), held)
    dmd, losses, made = critics_of(range(1, 5), batches, monkeypatch)
    assert len(made) == 2 and dmd._clips == {}
    exits = [loss.metrics["exit_step"] for loss in losses]
    assert exits == [dmd.exit_step(step) for step in (1, 1, 1, 4)]
    for step, loss in enumerate(losses, 1):  # what a run does that goes on in the middle of a group
        _, (alone,), _ = critics_of([step], batches)
        assert torch.equal(alone.loss, loss.loss)
    assert len({loss.loss.item() for loss in losses}) == 4
    # An iteration that makes its own, beside one that learns from the clips of that iteration
    _, (own, kept), _ = critics_of([1, 2], batches)
    _, (first, other), _ = critics_of([1, 2], batches, share=1)
    assert torch.equal(own.loss, first.loss) and not torch.equal(kept.loss, other.loss)


def test_kept_clips_are_of_this_group_and_these_samples_and_hold_no_graph(monkeypatch):
    dmd = make_dmd(critic={"updates_per_generator": 5, "updates_per_rollout": 4})
    made = watched(dmd, monkeypatch)[1]
    one, two = (make_batch(dmd.generator.model, [k], FRAMES) for k in (0, 1))
    for step in (0, 1, 2):
        for turn in dmd.turns(step):
            for batch in (one, two):
                dmd.loss(turn, batch, step)
    assert len(made) == 4  # the generator's own, of both, and those of iteration 1
    assert sorted(dmd._clips) == [(1, (0,)), (1, (1,))]
    assert not any(clip.latents.requires_grad for clip in dmd._clips.values())
    dmd.loss("generator", one, 5)
    dmd.loss("critic", one, 5)
    assert dmd._clips == {}


def test_the_rows_of_a_group_are_the_same_and_none_is_left_out():
    class Counting:
        position = 0

        def seek(self, position):
            self.position = position

        def __next__(self):
            self.position += 8
            return [self.position // 8 - 1]

    dmd = make_dmd(critic={"updates_per_generator": 5, "updates_per_rollout": 2})
    batches = dmd.batches(Counting(), 8)
    assert isinstance(batches, HeldBatches)
    assert [next(batches)[0] for _ in range(11)] == [0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6] and batches.position == 88
    batches.seek(4 * 8)
    assert next(batches) == [2]
    assert isinstance(make_dmd().batches(Counting(), 8), Counting)


@pytest.mark.parametrize(("critics", "share", "fix"), [(5, 5, 4), (2, 2, 1), (1, 3, 1)])
def test_more_than_there_are_between_two_updates_of_the_student_are_refused(critics, share, fix):
    with pytest.raises(ValueError, match=f"updates_per_rollout={share} must be at most the {critics - 1} .* to {fix},"):
        make_dmd(critic={"updates_per_generator": critics, "updates_per_rollout": share})
