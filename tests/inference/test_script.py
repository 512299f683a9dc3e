"""Scripts: what they mean, how they are refused, and that stopping in the middle changes nothing."""

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_sessions import KINDS, OTHER, PICTURE, A, B, C, make_generator
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.generation import generation_settings
from longtake.errors import ConfigError, DataError
from longtake.inference import script as module
from longtake.inference.generator import write_chunks
from longtake.inference.script import generate_story, read_story
from longtake.inference.video_io import read_video

# At 16 frames/s, with blocks of 8 frames after the first frame: boundaries 0, 1, 9, 17, 25, ...
EVENTS = [
    {"seconds": 0.5, "prompt": B},  # frame 8: from 9 on
    {"frame": 25, "target": "b.png"},  # a boundary: from 25 on
    {"frame": 26, "image": "b.png", "prompt": C},  # from 33 on, a cut: boundaries 33, 34, 42, ...
    {"seconds": 2.5, "prompt": A},  # frame 40: from 42 on
]


@pytest.fixture
def write(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    Image.fromarray(OTHER).save(tmp_path / "b.png")

    def write(**changes):
        tree = {"image": "a.png", "prompt": A, "frames": 55, "seed": 3, "events": EVENTS, **changes}
        (tmp_path / "story.yaml").write_text(yaml.safe_dump({k: v for k, v in tree.items() if v is not None}))
        return tmp_path / "story.yaml"

    return write


def by_hand(generator):
    session = generator.open(PICTURE, A, seed=3)
    frames = [session.next(), session.next()]
    session.prompt = B
    frames += [session.next(), session.next()]
    session.image_target = OTHER
    frames.append(session.next())
    session.image, session.prompt = OTHER, C
    frames += [session.next(), session.next()]
    session.prompt = A
    frames += [session.next(), session.next()]
    return np.concatenate(frames)[:55]


def test_changes_come_with_the_first_block_at_or_after_their_time(generator, write):
    story = read_story(write(), generator.settings)
    frames = np.concatenate(list(story.play(story.open(generator))))
    assert np.array_equal(frames, by_hand(generator)) and len(frames) == 55


@pytest.mark.whole
def test_a_script_stopped_anywhere_and_resumed_equals_the_whole(generator, write, tmp_path):
    expected = by_hand(generator)
    story = read_story(write(), generator.settings)
    for num_chunks in (1, 2, 4, 5, 7):
        made = []
        session = story.open(generator)
        for _, chunk in zip(range(num_chunks), story.play(session), strict=False):
            made.append(chunk)
        session.save(tmp_path / "s")
        made += story.play(generator.resume(tmp_path / "s"))
        assert np.array_equal(np.concatenate(made), expected), num_chunks


def test_what_is_given_wins_over_the_file(generator, write):
    story = read_story(write(seconds=None), generator.settings, seconds=4.0, seed=7)
    assert (story.num_frames, story.seed) == (64, 7)
    assert [cue.frame for cue in story.cues] == [8, 25, 26, 40]
    assert read_story(write(frames=None, seconds=3), generator.settings).num_frames == 48  # a whole number is a time
    long = read_story(write(frames=100, events=[]), generation_settings(None, {"height": 64, "width": 96, "fps": 5}))
    assert long.image.shape == (64, 96, 3) and long.num_frames == 100


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"promt": "x"}, ConfigError, "unknown key promt; did you mean prompt"),
        ({"prompt": " "}, ConfigError, "prompt is empty"),
        ({"seconds": 3.0}, ConfigError, "seconds and frames are both given"),
        ({"frames": None}, ConfigError, "does not say how long"),
        ({"negative": "blurred"}, ConfigError, "no effect with guidance=1"),
        ({"image": "c.png"}, DataError, "c.png cannot be read"),
        ({"events": [{"prompt": B}]}, ConfigError, "events.0: an event needs its time"),
        ({"events": [{"frame": 3, "seconds": 1.0, "prompt": B}]}, ConfigError, "either seconds or frame"),
        ({"events": [{"frame": 3}]}, ConfigError, "changes nothing"),
        ({"events": [{"frame": 3, "image": "b.png", "alone": True}]}, ConfigError, "to a picture and to none"),
        ({"events": [{"frame": 3, "prompt": ""}]}, ConfigError, "events.0: the prompt is empty"),
        ({"events": [{"frame": -3, "prompt": B}]}, ConfigError, "events.0.frame: got -3; must be greater than 0"),
        ({"events": [{"frame": 9, "at": 3, "prompt": B}]}, ConfigError, "unknown key events.0.at"),
        ({"events": [{"frame": 9, "target": "c.png"}]}, DataError, "c.png cannot be read"),
        ({"events": [EVENTS[1], EVENTS[0]]}, ConfigError, "event 2 at frame 8 .0.5 s. is not after the one before"),
        ({"events": [{"frame": 55, "prompt": B}]}, ConfigError, "event 1 at frame 55 .* is after the end, frame 55"),
    ],
)
def test_a_wrong_script_is_refused_before_any_work(write, changes, error, message, monkeypatch, tmp_path):
    monkeypatch.setattr(module.Generator, "build", lambda *_, **__: pytest.fail("weights were read"))
    source = module.Source(tmp_path, tmp_path, generation_settings(None, {"height": 32, "width": 32}))
    with pytest.raises(error, match=message):
        generate_story(source, write(**changes), tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_a_target_for_weights_that_take_none_is_refused_before_any_frame(write):
    generator = make_generator(**KINDS["no y, no sink"])
    story = read_story(write(), generator.settings)
    with pytest.raises(ConfigError, match="these weights have none"):
        story.open(generator)


def test_a_file_is_written_by_script(generator, write, tmp_path, monkeypatch):
    written = []

    def recorded(generator, chunks, output, **given):
        return write_chunks(generator, (written.append(chunk) or chunk for chunk in chunks), output, **given)

    monkeypatch.setattr(module, "write_chunks", recorded)
    monkeypatch.setattr(module.Generator, "build", lambda *_, **__: generator)
    source = module.Source(tmp_path, tmp_path, generator.settings)
    report = generate_story(source, write(frames=None), tmp_path / "out.mp4", num_frames=44)
    assert np.array_equal(np.concatenate(written), by_hand(generator)[:44])
    video, fps = read_video(tmp_path / "out.mp4")
    assert report.num_frames == len(video) == 44 and fps == 16


def test_the_command_follows_a_script(generator, write, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Generator, "build", lambda *_, **__: generator)
    source = module.Source(tmp_path, tmp_path, generator.settings)
    monkeypatch.setattr(module.Source, "of_run", classmethod(lambda *_: source))

    def invoke(*more):
        words = ["generate", "--run", "r", "--script", write(), "-o", tmp_path / "out.mp4", *more]
        return CliRunner().invoke(app, [str(word) for word in words])

    result = invoke("--seconds", "3")
    assert result.exit_code == 0 and "48 frames in" in result.output, result.output
    for more in (["--prompt", B], ["--image", "a.png"], ["--inputs", "folder"], ["--samples", 2]):
        result = invoke(*more)
        assert result.exit_code == 2 and "ConfigError" in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Blocks begin at frames 0, 1, 9, 17, ...; after the last of these nothing can change.
        ({"events": [{"frame": 50, "prompt": B}]}, "event 1 at frame 50 .*never shows: .* at frame 49 of 55"),
        ({"events": [{"frame": 2, "prompt": B}, {"frame": 9, "prompt": A}]}, "event 1 at frame 2 .* it and event 2 at"),
        ({"events": [{"frame": 3, "target": "b.png"}, {"frame": 4, "image": "b.png"}]}, "event 1 at frame 3"),
        ({"frames": 9, "events": [{"frame": 2, "prompt": B}]}, "at frame 1 of 9"),
        ({"frames": 1, "events": []}, None),
        ({"events": [{"frame": 2, "image": "b.png"}, {"frame": 3, "prompt": B}, {"frame": 49, "prompt": A}]}, None),
    ],
)
def test_events_that_can_never_show_are_refused(generator, write, changes, message):
    story = read_story(write(**changes), generator.settings)
    if message is None:
        story.open(generator)
    else:
        with pytest.raises(ConfigError, match=message):
            story.open(generator)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": None, "seconds": float("inf")}, "seconds: got inf"),
        ({"frames": 10**9}, "num_frames=1000000000 must be .* at most"),
        ({"seed": -1}, "seed: got -1"),
        ({"events": [{"seconds": float("nan"), "prompt": B}]}, "events.0.seconds: got nan"),
    ],
)
def test_numbers_without_sense_are_refused(generator, write, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_story(write(**changes), generator.settings)
