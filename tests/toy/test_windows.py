"""Scores window by window and after switches give the numbers that closed-form videos must have."""

import json
from dataclasses import replace

import numpy as np
import pytest

from longtake.errors import ShapeError
from longtake.toy.captions import STILL
from longtake.toy.locate import Located
from longtake.toy.metrics import MISSING_PX, measure, summarise
from longtake.toy.story import sample_story
from longtake.toy.truth import (
    anchored_truth,
    measured_velocity,
    nearest_motion,
    resolve_open,
    tracked_truth,
)
from longtake.toy.windows import WindowRule, summarise_windows
from longtake.toy.world import DIRECTIONS, SIZE, SPEEDS, Segment, motion_velocity, sample_world

RULE = WindowRule(33, 32)
FRAMES, SWITCH = 129, 49
STORIES = [sample_story(5, index, (SWITCH,)) for index in range(14)]
CLOSED = [s for s in STORIES if not any(sprite.is_open for g in s.segments for sprite in g.sprites)][:6]
OPEN = next(s for s in STORIES if any(sprite.is_open for sprite in s.switches[0].sprites))


def windows(stories, video_of):
    return summarise([measure(story, video_of(story), RULE) for story in stories])["windows"]


def lonely(**changes):
    """A story of one sprite that no caption leaves open."""
    story = next(w for w in (sample_story(5, k, (SWITCH,)) for k in range(99)) if len(w.sprites) == 1)
    segments = [tuple(replace(s, is_open=False, **changes) for s in group) for group in
                (story.sprites, story.switches[0].sprites)]  # fmt: skip
    return replace(story, sprites=segments[0], switches=(replace(story.switches[0], sprites=segments[1]),))


def told(world, direction, speed, **options):
    """The story with this motion after its switch."""
    sprite = replace(world.sprites[0], direction=direction, speed=speed, **options)
    return replace(world, switches=(Segment(SWITCH, (sprite,), ""),))


# ---- whole videos ----------------------------------------------------------------------------------------------------
@pytest.mark.whole
def test_truth_is_perfect_in_every_window():
    scores = [measure(story, story.render(FRAMES), RULE) for story in STORIES]
    summary = summarise(scores)
    assert summary["position_error_px"] < 0.05 and summary["stop_rate"] == 0
    assert summary["motion_ratio"] == pytest.approx(1, abs=0.01)
    found = summary["windows"]
    assert found["motion_ratio"] == pytest.approx([1] * 4, abs=0.01)
    for name in ("shape_kept", "colour_kept", "count_kept"):
        assert found[name] == [1] * 4
    assert found["saturation"][0] == found["contrast"][0] == 1
    assert found["follow_share"] == 1 and found["follow_shares"] == [1]
    assert found["num_followers"] > 20
    json.dumps(summary, allow_nan=False)


@pytest.mark.whole
def test_a_frozen_video_follows_nothing():
    found = windows(STORIES, lambda story: story.render(FRAMES, time_scale=0))
    assert found["motion_ratio"] == pytest.approx([0] * 4, abs=0.01)
    assert found["follow_share"] == 0, "not even where the caption leaves the motion open"
    assert found["saturation"] == found["contrast"] == [1] * 4


def test_half_the_speed_has_half_the_motion_and_follows_only_the_direction():
    found = windows(CLOSED, lambda story: story.render(FRAMES, time_scale=0.5))
    assert found["motion_ratio"] == pytest.approx([0.5] * 4, abs=0.02)
    world = lonely()
    for speed in ("medium", "fast"):
        story = told(world, "left", speed)
        assert windows([story], lambda w: w.render(FRAMES, time_scale=0.5))["follow_share"] == 0


def test_a_video_that_ignores_the_switch_follows_nothing_but_open_captions():
    found = windows(CLOSED, lambda story: replace(story, switches=()).render(FRAMES))
    assert found["follow_share"] == 0 and found["motion_ratio"][0] == pytest.approx(1, abs=0.01)
    assert found["motion_ratio"][-1] < 0.7
    score = measure(OPEN, replace(OPEN, switches=()).render(FRAMES), RULE)
    assert score.windows.follows[0].tolist() == [float(s.is_open) for s in OPEN.switches[0].sprites]


@pytest.mark.parametrize("late", [0, 16, 31, 34])
def test_two_blocks_are_the_time_to_follow(late):
    """A video that switches later by fewer than two blocks follows; its motion suffers in the window of the switch."""
    world = told(lonely(), "left", "fast")
    world = replace(world, sprites=(replace(world.sprites[0], direction="right", speed="fast"),))
    delayed = replace(world, switches=(replace(world.switches[0], frame=SWITCH + late),))
    found = measure(world, delayed.render(SWITCH + 32 + 12), RULE)
    assert found.windows.follows[0, 0] == (late < 32)
    # Frame 48 is the last of the old motion: 16 steps of window 2 go back instead of on until `late` has passed.
    assert found.windows.motion_ratio[1, 0] == pytest.approx(1 - 2 * min(late, 16) / 32, abs=0.02)


def test_a_stop_is_followed_by_standing_still_alone():
    world = told(lonely(), "left", STILL)
    assert measure(world, world.render(FRAMES), RULE).windows.follows[0, 0] == 1
    assert measure(world, replace(world, switches=()).render(FRAMES), RULE).windows.follows[0, 0] == 0
    score = measure(world, world.render(FRAMES), RULE)
    assert np.isnan(score.windows.motion_ratio[2:]).all() and score.sprite_motion_ratio[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_motion_is_told_from_all_others_over_the_edge(direction):
    """Fast sprites cross the edge more than once."""
    for speed in SPEEDS:
        truth = told(lonely(), direction, speed)
        video = truth.render(FRAMES)
        for other in [*((d, speed) for d in DIRECTIONS), *((direction, s) for s in SPEEDS)]:
            follows = measure_follow(told(truth, *other), truth, video)
            assert follows == float(other == (direction, speed)), (direction, speed, other)


def measure_follow(story, truth, video):
    """Without looking for the sprites again: they were drawn where the truth has them."""
    from longtake.toy.windows import follow_switch

    seen = perfect(truth, len(video))
    return follow_switch(story, seen, tracked_truth(story, seen), 1, RULE)[0]


def perfect(world, frames, hidden=()):
    """What is located in a true video; in the frames `hidden` nothing is found."""
    positions = world.positions(frames)
    positions[list(hidden)] = np.nan
    kinds = np.zeros(positions.shape[:2], np.intp)
    return Located(positions, kinds, kinds, np.zeros(frames))


def test_hidden_sprites_are_not_scored_and_vanished_ones_do_not_follow():
    world = lonely(shape="circle", size="small", colour="red", direction="right", speed="slow")
    back = world.sprites[0]
    both = (back, replace(back, size="large", shape="square", colour="blue"))
    covered = replace(world, sprites=both, switches=(Segment(SWITCH, both, ""),))
    score = measure(covered, covered.render(FRAMES), RULE)
    assert np.isnan(score.windows.follows[0, 0]) and score.windows.follows[0, 1] == 1
    # Half-way the video loses its sprite: after the switch it is missing, not excused.
    video = world.render(FRAMES)
    video[SWITCH + 20 :] = world.background
    score = measure(world, video, RULE)
    assert score.windows.follows[0, 0] == 0 and score.windows.count_kept[-1] == score.windows.shape_kept[-1] == 0
    assert score.position_error[-1, 0] == pytest.approx(MISSING_PX)
    # Too short after the switch to be told
    assert np.isnan(measure(world, world.render(SWITCH + 34), RULE).windows.follows).all()


def test_a_drift_is_not_blamed_again():
    """A student at 0.9 of the speed: far from the truth at the end, and 10 % off in each window."""
    slow = [measure(story, story.render(FRAMES, time_scale=0.9), RULE) for story in CLOSED]
    found = summarise(slow)["windows"]
    assert found["motion_ratio"] == pytest.approx([0.9] * 4, abs=0.01)
    assert min(found["count_kept"] + found["shape_kept"]) == 1, "hidden where the true one is not, and not missed"
    # From the switch on the error starts anew: after n steps it is a tenth of n true steps.
    for story, score in zip(CLOSED, slow):
        speed = np.hypot(*story.switches[0].velocity.T)
        steps = np.arange(1, FRAMES - SWITCH + 1)[:, None]
        error = score.position_error[SWITCH:]
        placed = np.isfinite(error) & (error != MISSING_PX)  # some are hidden where the true one is not
        assert placed.mean() > 0.9
        np.testing.assert_allclose(error[placed], (0.1 * speed * steps)[placed], atol=0.2)


def test_a_shifted_video_is_blamed_up_to_the_switch():
    story = CLOSED[0]
    error = measure(story, story.shifted(6, 0).render(FRAMES)).position_error
    assert np.nanmin(error[:SWITCH]) > 5.8 and np.nanmax(error[SWITCH:]) < 0.2


def test_there_and_back_is_no_stop():
    world = told(replace(lonely(), sprites=(replace(lonely().sprites[0], direction="right"),)), "left", "medium")
    world = replace(world, sprites=(replace(world.sprites[0], speed="medium"),))
    score = measure(world, world.render(2 * SWITCH - 1))
    assert score.sprite_stopped[0] == 0 and np.nanmax(score.stopped) == 0
    assert score.sprite_motion_ratio[0] == pytest.approx(1, abs=0.01)


def test_saturation_and_contrast_are_relative_to_the_first_window():
    story = CLOSED[0]
    video = story.render(97).astype(np.float32)
    grey = video.mean(-1, keepdims=True)
    video[33:] = grey[33:] + 0.5 * (video[33:] - grey[33:])
    found = summarise([measure(story, video.astype(np.uint8), RULE)])["windows"]
    assert found["saturation"][0] == 1 and max(found["saturation"][1:]) < 0.7
    dark = story.render(97)
    dark[33:] //= 2
    assert max(summarise([measure(story, dark, RULE)])["windows"]["contrast"][1:]) < 0.55


# ---- parts -----------------------------------------------------------------------------------------------------------
def test_windows_share_their_ends_and_leave_the_rest():
    assert RULE.starts(33) == [0] and RULE.starts(32) == [] and RULE.starts(129) == [0, 32, 64, 96]
    assert RULE.starts(128) == [0, 32, 64]
    with pytest.raises(ShapeError, match="cannot be measured"):
        WindowRule(1, 0)


def test_velocity_is_measured_over_the_edge_and_over_gaps():
    frames = np.arange(40)[:, None]
    for motion in [("lower right", "fast"), ("up", "slow")]:
        velocity = np.array(motion_velocity(*motion))
        positions = (np.array([60.0, 2.0]) + frames * velocity) % SIZE
        positions[5:20] = np.nan
        assert measured_velocity(positions) == pytest.approx(velocity)
        assert nearest_motion(measured_velocity(positions)) == motion
        positions[5:25] = np.nan  # 21 steps may be the other way round: what lies on both sides counts
        assert measured_velocity(positions) == pytest.approx(velocity)
    assert measured_velocity(np.full((9, 2), np.nan)) is None and nearest_motion(None) is None
    assert nearest_motion(np.zeros(2)) == ("", STILL) and nearest_motion(np.zeros(2), still=False)[1] == "slow"


def test_open_motions_are_those_that_are_seen():
    for direction in DIRECTIONS:
        seen = told(lonely(), direction, "fast")
        story = told(lonely(), "left", "slow", is_open=True)
        resolved = resolve_open(story, seen.positions(FRAMES), num_frames=33, settle=32)
        assert resolved.switches[0].sprites[0].direction == direction
        assert resolved.switches[0].sprites[0].speed == "fast"
    blind = resolve_open(story, np.full((FRAMES, 1, 2), np.nan))
    assert blind.switches == story.switches


def test_the_anchor_is_where_a_sprite_was_last_seen():
    world = told(lonely(), "up", "slow")
    seen = perfect(world.shifted(4, 0), FRAMES, hidden=range(40, 60))  # not seen at the switch
    anchored = anchored_truth(world, seen)
    assert np.allclose(anchored.positions[:SWITCH], world.positions(FRAMES)[:SWITCH])
    assert np.allclose(anchored.positions[SWITCH:], world.shifted(4, 0).positions(FRAMES)[SWITCH:])
    tracked = tracked_truth(world, seen)
    assert np.allclose(tracked.positions, world.shifted(4, 0).positions(FRAMES))
    unseen = anchored_truth(world, perfect(world.shifted(4, 0), FRAMES, hidden=range(FRAMES)))
    assert np.allclose(unseen.positions, world.positions(FRAMES))


def test_scores_of_other_shapes_are_not_averaged():
    one = measure(STORIES[0], STORIES[0].render(33), RULE).windows
    two = measure(STORIES[0], STORIES[0].render(65), RULE).windows
    with pytest.raises(ShapeError, match="must agree"):
        summarise_windows([one, two])
    assert "windows" not in summarise([measure(sample_world(1, 1), sample_world(1, 1).render(9))])
