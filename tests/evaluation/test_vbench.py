"""Names of files as VBench-I2V and VBench-Long read them, by their own rules (Vchitect/VBench at 45e79ec)."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longtake.evaluation.vbench import LaidVideo, lay_out

PLAIN = "a squirrel sitting on the ground eating a piece of bread"
PROMPTS = {
    "plain": PLAIN,
    "also": "a field of orange flowers near the ocean'",
    "twin": PLAIN,
    "case": PLAIN.upper(),
    "path": "up/down, snake_case\nand new.mp4 lines",
    "scene": "take-Scene-3, a countdown from 10-1",
    "long": "ein Mädchen läuft über die Straße " * 20,
    "empty": "__",
}


def prompt_from_filename(path):
    """vbench/utils.py, get_prompt_from_filename."""
    return re.sub(r"-\d+$", "", Path(path).stem)


def long_name(clip):
    """vbench2_beta_long/utils.py, reorganize_clips_results: the video that a clip counts for."""
    return os.path.basename(clip).split("_")[0]


@pytest.fixture
def laid(tmp_path):
    videos = []
    for number, (row, prompt) in enumerate(PROMPTS.items()):
        for index in range(2):
            path = tmp_path / "made" / f"{row} {index}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(f"{row} {index}".encode())
            videos.append(LaidVideo(path, row, prompt, np.full((4, 6, 3), number, np.uint8), index))
    lay_out(videos, tmp_path / "vbench")
    return tmp_path / "vbench"


def test_custom_mode_of_vbench_i2v_finds_the_picture_of_each_video(laid):
    images = {os.path.splitext(name)[0]: name for name in os.listdir(laid / "i2v/images")}
    videos = os.listdir(laid / "i2v/videos")
    assert len(videos) == 2 * len(images) == 2 * len(PROMPTS)
    for video in videos:
        assert Path(video).suffix == ".mp4"
        row, index = (laid / "i2v/videos" / video).read_text().split()
        assert video.endswith(f"-{index}.mp4")
        picture = np.asarray(Image.open(laid / "i2v/images" / images[prompt_from_filename(video)]))
        assert picture.shape == (4, 6, 3) and (picture == list(PROMPTS).index(row)).all()


def test_standard_mode_finds_the_prompts_of_its_suite(laid):
    videos = os.listdir(laid / "i2v/videos")
    for row in ("plain", "also"):
        for index in range(2):
            name = f"{PROMPTS[row]}-{index}.mp4"  # VBench.build_full_info_json
            assert name in videos and (laid / "i2v/videos" / name).read_text() == f"{row} {index}"


def test_vbench_long_keeps_videos_apart(laid):
    names = os.listdir(laid / "long")
    assert len(names) == 2 * len(PROMPTS)
    found = set()
    for name in names:
        stem = name.split(".mp4")[0]  # split_video_into_clips
        assert f"{stem}.mp4" == name and stem.split("-Scene")[0] == stem and re.search(r"-\d+$", stem)
        clip = f"{stem}-Scene-100_000.mp4"
        assert len(clip.encode()) <= 255
        found.add(long_name(f"{stem}_000.mp4"))
    assert len(found) == len(names)


def test_what_cannot_be_linked_is_copied(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"video")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    lay_out([LaidVideo(tmp_path / "a.mp4", "a", "a cat", np.zeros((4, 6, 3), np.uint8))], tmp_path / "out")
    for folder in ("i2v/videos", "long"):
        assert (tmp_path / "out" / folder / "a cat-0.mp4").read_bytes() == b"video"
