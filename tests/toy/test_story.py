"""Worlds whose caption changes half-way: exact truth, captions that say it, and the data sets they are written to."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toy_assets import parse_caption, tokenize

from longtake.config.groups import WorldConfig
from longtake.data.formats import open_dataset
from longtake.errors import ConfigError, DataError
from longtake.toy.captions import STILL, STOP_WORDS, VOCABULARY, Clause
from longtake.toy.files import write_world
from longtake.toy.story import sample_story
from longtake.toy.world import sample_world, toroidal_offset

STORIES = [sample_story(5, index, (17, 49)) for index in range(150)]
STOPPING = [sample_story(5, index, (17, 49), stops=True) for index in range(150)]


def test_a_story_is_a_world_up_to_its_first_switch():
    for story in STORIES[:20]:
        world = sample_world(story.seed, story.index)
        assert (story.sprites, story.caption) == (world.sprites, world.caption)
        assert np.array_equal(story.render(17), world.render(17))
        assert np.array_equal(replace(story, switches=()).positions(60), world.positions(60))
        assert not np.array_equal(story.render(19)[18], world.render(19)[18])
    assert sample_story(5, 3, ()).switches == ()


def test_positions_follow_each_segment_and_know_no_length():
    """The oracle adds up one step after the other."""
    for story in STOPPING[:40]:
        expected = [np.array([(s.x, s.y) for s in story.sprites])]
        for frame in range(1, 80):
            segment = [s for s in story.segments if s.frame <= frame][-1]
            expected.append(expected[-1] + [sprite.velocity for sprite in segment.sprites])
        assert np.allclose(story.positions(80, wrap=False), expected)
        assert np.allclose(toroidal_offset(story.positions(80) - expected), 0)
        assert np.array_equal(story.positions(80)[:50], story.positions(50))
        far = story.positions(100_000, wrap=False)[-2:]
        assert np.allclose(far[1] - far[0], story.segments[-1].velocity, atol=1e-6)
    assert np.array_equal(story.visibility(story.positions(80))[:50], story.visibility(story.positions(50)))
    assert np.array_equal(story.render(60)[:50], story.render(50))


def test_time_scale_leaves_the_switches_where_they_are():
    for story in STORIES[:20]:
        half = np.diff(story.positions(60, time_scale=0.5, wrap=False), axis=0)
        assert np.allclose(half * 2, np.diff(story.positions(60, wrap=False), axis=0))
        assert np.ptp(story.positions(60, time_scale=0), axis=0).max() == 0


def test_every_switch_gives_every_sprite_another_motion_and_says_so():
    changes = set()
    for story in STORIES:
        for before, after in zip(story.segments, story.segments[1:]):
            assert parse_caption(after.caption) == [sprite.clause for sprite in after.sprites]
            for a, b in zip(before.sprites, after.sprites):
                assert a.velocity != b.velocity
                assert (a.shape, a.colour, a.size) == (b.shape, b.colour, b.size)
                changes.add((a.direction == b.direction, a.speed == b.speed))
    assert changes == {(True, False), (False, True), (False, False)}
    later = [segment for story in STORIES for segment in story.switches]
    assert 0.1 < np.mean([any(s.is_open for s in segment.sprites) for segment in later]) < 0.3
    assert {word for segment in later for word in tokenize(segment.caption)} <= set(VOCABULARY)


def test_what_a_switch_says_does_not_depend_on_when():
    for index in range(20):
        early, late = sample_story(5, index, (9, 17)), sample_story(5, index, (65, 200))
        assert [s.caption for s in early.segments] == [s.caption for s in late.segments]
        assert sample_story(5, index, (9,)).switches[0].sprites == early.switches[0].sprites


def test_sprites_stop_only_where_asked_for_in_words_of_their_own():
    stopped = [(segment, s) for story in STOPPING for segment in story.switches for s in segment.sprites]
    still = [(segment, s) for segment, s in stopped if s.speed == STILL]
    assert 0.05 < len(still) / len(stopped) < 0.4
    for segment, sprite in still:
        assert sprite.velocity == (0, 0) and not sprite.is_open
        assert sprite.clause == Clause(sprite.size, sprite.shape, sprite.colour, None, STILL)
        assert set(tokenize(segment.caption)) & set(STOP_WORDS)
        assert parse_caption(segment.caption) == [s.clause for s in segment.sprites]
    assert not set(STOP_WORDS) & set(VOCABULARY)
    gone_on = [
        b
        for story in STOPPING
        for a, b in zip(story.switches[0].sprites, story.switches[1].sprites)
        if a.speed == STILL
    ]
    assert gone_on and all(sprite.speed != STILL for sprite in gone_on)


@pytest.mark.parametrize(
    "caption", ["a red circle stops to the right", "a red circle quickly halts", "a red circle stands somewhere still"]
)
def test_a_stop_with_a_motion_is_refused(caption):
    with pytest.raises(DataError, match=r"three|speed"):
        parse_caption(caption)


@pytest.mark.parametrize("frames", [(0,), (9, 9), (17, 9)])
def test_switch_frames_must_ascend(frames):
    with pytest.raises(ConfigError, match="ascend"):
        sample_story(5, 0, frames)


def test_stories_are_written_with_a_prompt_a_segment_and_read_back(tmp_path):
    pytest.importorskip("lmdb")
    asked = WorldConfig(
        num_worlds=6, seed=5, num_frames=17, formats=["images", "lmdb"], switch_frames=[17, 49], stops=True
    )
    folder = write_world(tmp_path / "data", asked)
    captions = [tuple(segment.caption for segment in story.segments) for story in STOPPING[:6]]
    rows = [json.loads(line) for line in (folder / "images/metadata.jsonl").read_text().splitlines()]
    assert [tuple(row["prompts"]) for row in rows] == captions and rows[0]["switch_frames"] == [17, 49]
    for name in ("images", "lmdb"):
        data = open_dataset(folder / name)
        assert [data[k].prompts for k in range(6)] == captions and data[2].prompt == captions[2][0]
    rows = [json.loads(line) for line in (folder / "worlds.jsonl").read_text().splitlines()]
    assert [tuple(row["prompts"]) for row in rows] == captions and rows[5]["switch_frames"] == [17, 49]
    write_world(folder, asked)  # the same request is left as it is
    with pytest.raises(DataError, match="asked for"):
        write_world(folder, asked.model_copy(update={"switch_frames": [17]}))


def test_requests_without_sense_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="give switch_frames"):
        write_world(tmp_path / "a", WorldConfig(num_worlds=1, num_frames=9, stops=True))
    assert not list(tmp_path.iterdir())
