"""A film with cuts is as many rows as it has scenes: each a clip of its own, and none reaches over a cut."""

import json

import numpy as np
import pytest

from longtake.data.formats import open_dataset
from longtake.errors import DataError
from longtake.inference.video_io import VideoWriter
from longtake.toy.world import sample_world

CUT = 13
PARTS = [sample_world(3, k).render(length) for k, length in ((0, CUT), (1, 11))]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """13 frames of one world, then 11 of another."""
    folder = tmp_path_factory.mktemp("film")
    with VideoWriter(folder / "film.mp4", 16, 64, 64) as writer:
        writer.write(np.concatenate(PARTS))
    return folder


def rows_of(film, folder, num_frames, fps=16, **row):
    (folder / "rows.jsonl").write_text(json.dumps({"file_name": str(film / "film.mp4"), **row}))
    return open_dataset(folder / "rows.jsonl", kind="clips", num_frames=num_frames, fps=fps)


def near(frames, truth):
    return np.abs(frames.astype(int) - truth).mean() < 4  # H.264 with half the colour


@pytest.mark.parametrize("fps", [16, None])
def test_each_scene_is_a_row_that_begins_with_its_own_picture(film, tmp_path, fps):
    rows = rows_of(film, tmp_path, 9, fps, prompts=["a red circle", "a blue square"], cut_frames=[CUT])
    assert [rows[k].prompt for k in range(len(rows))] == ["a red circle", "a blue square"]
    assert [rows[k].name for k in range(2)] == ["film", "film_13"]
    for row, part in zip((rows[0], rows[1]), PARTS):
        assert row.video.shape == (9, 64, 64, 3) and near(row.video, part[:9]) and near(row.image, part[0])
        assert row.prompts == (row.prompt,) and row.switch_frames == ()
    assert len(set(rows.identities())) == 2


def test_no_clip_reaches_over_a_cut_or_beyond_the_film(film, tmp_path):
    rows = rows_of(film, tmp_path, 13, text="one prompt for all", cut_frames=[CUT])
    assert near(rows[0].video, PARTS[0]) and rows[0].prompt == "one prompt for all"
    with pytest.raises(DataError, match="has 11 frames at 16 frames a second from frame 13 on and 13 are needed"):
        rows[1]
    with pytest.raises(DataError, match="has 13 frames at 16 frames a second, before the cut at 13, and 17 are needed"):
        rows_of(film, tmp_path, 17, text="p", cut_frames=[CUT])[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompts": ["a", "b", "c"], "cut_frames": [5]}, "one less than prompts"),
        ({"text": "a", "cut_frames": [9, 5]}, "must be ascending"),
        ({"prompts": ["a", "b"], "cut_frames": [5], "switch_frames": [9]}, "has switch_frames and cut_frames"),
    ],
)
def test_cuts_that_do_not_fit_make_a_bad_row(film, tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        rows_of(film, tmp_path, 5, **row)[0]
