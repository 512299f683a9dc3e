"""Videos in memory, sessions in loops, and what public objects say of themselves and of misspelt names."""

import base64
import re

import numpy as np
import pytest
from tiny_sessions import OTHER, PICTURE, A, B, make_generator

from longtake.errors import ConfigError
from longtake.inference.video import Video
from longtake.inference.video_io import read_video

KEEPS_ALL = {"block_frames": 2, "window_frames": None, "sink_frames": 0}


def embedded(html, tmp_path):
    """The frames of the preview in a page, and its size in bytes."""
    (data,) = re.findall(r'src="data:video/mp4;base64,([^"]+)"', html)
    (tmp_path / "preview.mp4").write_bytes(base64.b64decode(data))
    return read_video(tmp_path / "preview.mp4")[0], len(data)


# ---- Generator.video --------------------------------------------------------------------------------------------------
def test_a_video_is_the_stream_and_the_file(generator, tmp_path):
    file = tmp_path / "out.mp4"
    video = generator.video(PICTURE, A, seconds=1.5, output=file, seed=3)
    streamed = np.concatenate(list(generator.stream(PICTURE, A, num_frames=24, seed=3)))
    assert np.array_equal(video.frames, streamed) and video.frames.shape == (24, 32, 32, 3)
    assert (video.fps, len(video), video.seconds, video.path) == (16, 24, 1.5, file)
    assert read_video(file)[0].shape == video.frames.shape
    with pytest.raises(ConfigError, match="exists already"):
        generator.video(PICTURE, A, seconds=1, output=file)
    unwritten = generator.video(PICTURE, A)  # as long as the training clips: 5 latent frames
    assert unwritten.path is None and len(unwritten) == 17 and not list(tmp_path.glob("*[!4]"))
    saved = unwritten.save(tmp_path / "late.mp4")
    assert saved == unwritten.path and len(read_video(saved)[0]) == 17
    with pytest.raises(ConfigError, match="exists already"):
        unwritten.save(file)
    assert unwritten.save(file, overwrite=True) == file
    with pytest.raises(ConfigError, match="seconds"):
        generator.video(PICTURE, A, seconds=1, num_frames=3)


def test_a_notebook_shows_it(generator, tmp_path):
    html = generator.video(PICTURE, A, num_frames=9)._repr_html_()
    frames, _ = embedded(html, tmp_path)
    assert (
        frames.shape == (9, 32, 32, 3) and 'width="256"' in html and "9 frames of 32x32 at 16 frames/s, 0.6 s" in html
    )


@pytest.mark.whole
def test_the_preview_of_a_long_and_large_video_is_short_and_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 360, 640, 3), np.uint8)
    video = Video(np.concatenate([noise] * 6), 16)
    html = video._repr_html_()
    assert len(html) < 1.5 * 2**20 and "the first 10 s, smaller" in html
    frames, _ = embedded(html, tmp_path)
    assert len(frames) == 160 and max(frames.shape[1:3]) <= 320 and frames.shape[1] % 2 == frames.shape[2] % 2 == 0


def test_the_name_of_a_file_cannot_break_the_page(tmp_path):
    video = Video(np.zeros((2, 32, 32, 3), np.uint8), 16)
    video.save(tmp_path / "<script>&.mp4")
    assert "<script>" not in video._repr_html_() and "&lt;script&gt;&amp;.mp4" in video._repr_html_()


# ---- sessions -------------------------------------------------------------------------------------------------------
def test_a_loop_over_a_session_gives_its_blocks_and_goes_on(generator):
    session, other = generator.open(PICTURE, A, seed=1), generator.open(PICTURE, A, seed=1)
    blocks = []
    for block in session:
        blocks.append(block)
        if len(blocks) == 2:
            session.prompt = B
        if len(blocks) == 4:
            break
    expected = [other.next() for _ in range(2)]
    other.prompt = B
    expected += [other.next() for _ in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip([*blocks, next(iter(session))], expected, strict=True))


def test_a_loop_ends_with_the_length_that_was_asked_for():
    generator = make_generator(plan=KEEPS_ALL)
    session = generator.open(PICTURE, A, max_frames=17)
    assert sum(len(block) for block in session) == 17 and session.is_complete
    assert list(session) == []
    with pytest.raises(ConfigError, match="which have been made"):
        session.next()
    session.image = OTHER  # a new scene
    assert not session.is_complete and sum(len(block) for block in session) == 17


def test_a_misspelt_attribute_is_an_error_with_the_nearest_name(generator):
    session = generator.open(PICTURE, A)
    for wrong, near in (("promt", "prompt"), ("image_traget", "image_target"), ("Image", "image")):
        with pytest.raises(AttributeError, match=f"no attribute '{wrong}'; did you mean {near}"):
            setattr(session, wrong, B)
    session.next()
    fork = session.fork()
    with pytest.raises(AttributeError, match="can be set"):
        fork.speed = 2
    fork.prompt = B
    assert (session.prompt, fork.prompt) == (A, B)


# ---- what they say ----------------------------------------------------------------------------------------------------
def test_representations_are_one_short_line(generator, tmp_path, workshop):
    from longtake.data.formats import open_dataset

    session = generator.open(PICTURE, A * 5, seed=4)
    session.next()
    rows = open_dataset(workshop / "data" / "images")
    video = Video(np.zeros((17, 32, 32, 3), np.uint8), 16, tmp_path / "a.mp4")
    shown = [repr(one) for one in (generator, session, video, session.state.stream.condition, rows, rows[0])]
    assert all(len(line) < 250 and "\n" not in line and " object at " not in line for line in shown), shown
    assert shown[0].startswith("Generator(") and "32x32 at 16 frames/s, fp32 on cpu" in shown[0]
    assert shown[1].startswith("Session('a red circle") and shown[1].endswith("...', 1 frames so far, scene 0, seed 4)")
    assert shown[2] == f"Video(17 frames of 32x32 at 16 frames/s, 1.1 s, {tmp_path / 'a.mp4'})"
    assert shown[3].startswith("Condition(text=[1, ") and shown[4] == f"ImageFolder('{rows.path}', 6 rows)"
    assert shown[5].startswith("Sample('000000', '") and "image [64, 64, 3]" in shown[5]
