"""Instruments of any video against what was done to it: known motions of a photograph, known defects, slowed worlds."""

import json
import sys
from importlib import import_module
from pathlib import Path

import cv2
import matplotlib.cbook
import numpy as np
import pytest
from PIL import Image
from spoilt_videos import blur, fade, freeze, loop, uniform

from longtake.errors import DataError, ShapeError
from longtake.evaluation.instruments import (
    FADE,
    METRICS,
    Blocks,
    flicker,
    measure,
    measure_beginnings,
    seam_score,
    sharpness,
)
from longtake.evaluation.light import LightMeter
from longtake.evaluation.motion import MotionMeter
from longtake.toy.world import sample_world

ROOT = Path(__file__).parents[2]
FPS = 16


@pytest.fixture(scope="module")
def truth():
    """The videos of the benchmark, whose bars the slow test holds."""
    sys.path.insert(0, str(ROOT))
    try:
        return import_module("benchmarks.instruments")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def photo():
    """A real photograph, uint8 [600, 512, 3], which matplotlib carries."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    assert path.is_file(), matplotlib.cbook.__file__
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def moved(truth, photo):
    """A camera at 1 pixel a frame, 49 frames of 128x192."""
    return truth.translated(photo, 0.8, 0.6, 49, (128, 192))


# ---- motion -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dx", "dy"), [(0.2, 0), (0.3, -0.4), (-2, 0), (0, 4), (6, 5.3)])
def test_motion_of_a_translated_photograph(truth, photo, dx, dy):
    video = truth.translated(photo, dx, dy, 17, (240, 320))
    found = measure(video, FPS)
    speed = np.hypot(dx, dy)
    assert found.metrics["motion_px_s"] == pytest.approx(FPS * speed, rel=0.05)
    assert found.metrics["still_share"] == 0
    assert len(found.curves["motion_px_s"]) == 17 and found.curves["motion_px_s"][0] is None


def test_motion_of_a_zoom(truth, photo):
    """Every point moves away from the centre: the mean is no zero."""
    camera = truth.Camera(0, 0, 1.01, 256, 300)
    video = np.stack([camera.shot(photo, time, (240, 320)) for time in range(17)])
    rows, columns = np.mgrid[:240, :320]
    distance = np.hypot(columns - 159.5, rows - 119.5).mean()
    assert measure(video, FPS).metrics["motion_px_s"] == pytest.approx(FPS * 0.01 * distance, rel=0.05)


def test_motion_does_not_depend_on_the_size_at_which_flow_is_computed(truth, photo):
    large = truth.translated(photo, 4, 3, 9, (720, 1280))
    assert MotionMeter(720, 1280, FPS)._scale < 1
    assert measure(large, FPS).metrics["motion_px_s"] == pytest.approx(FPS * 5, rel=0.05)
    small = truth.translated(photo, 0.4, 0.3, 9, (64, 96))
    assert measure(small, FPS).metrics["motion_px_s"] == pytest.approx(FPS * 0.5, rel=0.05)


def test_a_frozen_video_does_not_move(moved):
    found = measure(np.repeat(moved[:1], 20, 0), FPS)
    assert found.metrics["motion_px_s"] == 0 and found.metrics["still_share"] == 1
    assert found.metrics["dynamic_degree"] == 0 and found.metrics["bad_frames"] == 19
    assert found.metrics["first_frame_similarity"] == pytest.approx(1) and found.defects == ("freeze",)


@pytest.mark.whole
def test_dynamic_degree_counts_pairs_at_eight_frames_a_second(truth, photo):
    """At 480p 11.25 pixels from one sampled frame to the next, here over two frames, in a quarter of the pairs."""
    slow, fast = (truth.translated(photo, speed, 0, 33, (240, 416)) for speed in (2.5, 3.1))
    assert measure(slow, FPS).metrics["dynamic_degree"] == 0 and measure(fast, FPS).metrics["dynamic_degree"] == 1
    # Of 17 sampled frames round(17 / 4) = 4 pairs are needed.
    for pairs, dynamic in ((3, 0), (4, 1)):
        video = np.concatenate([fast[: 2 * pairs + 1], np.repeat(fast[2 * pairs : 2 * pairs + 1], 32 - 2 * pairs, 0)])
        assert len(video) == 33 and measure(video, FPS).metrics["dynamic_degree"] == dynamic


def motion_of(video):
    """As `measure` finds it, without what else it looks at."""
    meter = MotionMeter(*video.shape[1:3], FPS)
    for frame in video:
        meter.add(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))
    return float(np.mean(meter.finish().px)) * FPS


@pytest.mark.whole
def test_motion_of_slowed_worlds_follows_the_exact_ratio():
    scales, seen = np.linspace(0, 1.5, 8), []
    for index, scale in enumerate(scales):
        world = sample_world(1, index)
        whole, slowed = (motion_of(world.render(33, time_scale=s)) for s in (1.0, float(scale)))
        seen.append(slowed / whole)
    assert seen[0] == pytest.approx(0, abs=0.01) and np.corrcoef(scales, seen)[0, 1] >= 0.95


# ---- drift ------------------------------------------------------------------------------------------------------------
def test_drift_is_the_difference_of_the_ends():
    """20 grey frames: the first and the last 15 % are three each."""
    levels = [0.2] * 3 + [0.9] * 14 + [0.5] * 3
    video = np.stack([np.full((32, 48, 3), round(255 * level), np.uint8) for level in levels])
    found = measure(video, FPS)
    assert found.metrics["drift_brightness"] == pytest.approx(0.3, abs=0.003)
    assert found.metrics["drift_saturation"] == found.metrics["drift_contrast"] == 0
    assert found.metrics["drift_histogram"] == pytest.approx(1)
    assert found.curves["brightness"][5] == pytest.approx(0.9, abs=0.003)
    assert set(found.metrics) == set(METRICS) and found.metrics["bad_frames"] == 20


def test_saturation_and_contrast_are_what_they_say():
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = (200, 100, 100)  # saturation 0.5, luma 0.299 * 200 + 0.701 * 100
    found = measure(np.stack([half, half]), FPS)
    assert found.curves["saturation"][0] == pytest.approx(0.25, abs=0.003)
    assert found.curves["contrast"][0] == pytest.approx((129.9 / 255) / 2, abs=0.003)


def test_sharpness_is_blind_to_contrast_and_sees_a_blur(photo):
    luma = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    flat = (luma // 2 + 60).astype(np.uint8)
    assert sharpness(flat) == pytest.approx(sharpness(luma), rel=0.05)
    assert sharpness(cv2.GaussianBlur(luma, (0, 0), 1.0)) < 0.8 * sharpness(luma)
    assert sharpness(np.full((32, 32), 7, np.uint8)) == 0


def test_flicker_is_no_fade():
    assert flicker(np.linspace(0, 1, 9)) == pytest.approx(0)
    assert flicker(np.array([0.5, 0.6] * 4)) == pytest.approx(0.1)


def test_seam_score_by_hand():
    change = np.array([0.0, *[1.0] * 24])
    blocks = Blocks(8, 5)  # begin at 5, 13 and 21
    assert seam_score(change, blocks) == pytest.approx(1)
    change[[5, 13, 21]] = 1.5
    assert seam_score(change, blocks) == pytest.approx(1.5)
    assert seam_score(change, Blocks(8, 8)) < 1 and seam_score(change[:5], blocks) is None


# ---- light ------------------------------------------------------------------------------------------------------------
def light_of(video):
    """The logarithm of the light at the end of a video."""
    motion = MotionMeter(*video.shape[1:3], FPS)
    meter = LightMeter(*video.shape[1:3], motion.points)
    for frame in video:
        luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        meter.add(luma, motion.add(luma))
    assert len(meter.log_light) == len(video) and meter.log_light[0] == 0
    return meter.log_light[-1]


def test_a_sky_with_shades_neither_fades_nor_hides_a_fade(truth, photo):
    """A camera that climbs over a tower before a smooth sky: dense flow follows the shades."""
    sky = np.repeat(np.linspace(120, 40, 600, dtype=np.float32)[:, None, None], 400, 1).repeat(3, 2)
    sky[:, 180:220] = photo[:, 200:240]
    sky = np.rint(sky + np.random.default_rng(0).normal(0, 0.5, sky.shape)).astype(np.uint8)
    camera = truth.Camera(0.2, 1.0, 1.001, 200, 200)
    video = np.stack([camera.shot(sky, time, (128, 192)) for time in range(65)])
    assert abs(light_of(video)) < 0.01
    assert light_of(fade(video)) == pytest.approx(np.log(0.9), abs=0.02)
    assert abs(np.log(video[-1].mean() / video[0].mean())) > FADE  # the mean alone would call it one


def test_white_that_stays_white_does_not_hide_a_fade(moved):
    """Of two thirds of the picture nothing is seen but that they are white."""
    white = moved.copy()
    white[:, :, 64:] = 255
    dark = fade(white)
    dark[:, :, 64:] = 255
    assert light_of(dark) == pytest.approx(np.log(0.9), abs=0.02) and abs(light_of(white)) < 0.01


def test_a_cut_and_an_empty_frame_leave_the_light(moved):
    blank = np.concatenate([moved[:10], np.zeros_like(moved[:2]), moved[12:20], 255 - moved[20:]])
    assert abs(light_of(blank)) < 0.02
    assert light_of(np.full((5, 32, 32, 3), 255, np.uint8)) == 0 == light_of(np.zeros((5, 32, 32, 3), np.uint8))


# ---- defects ----------------------------------------------------------------------------------------------------------
def test_a_moving_camera_is_no_defect(moved):
    found = measure(moved, FPS, Blocks(12, 9))
    assert found.defects == () and found.metrics["bad_frames"] == 0 and found.metrics["sink_returns"] == 0
    assert found.metrics["seam_score"] == pytest.approx(1, abs=0.1) and found.slope < 0


@pytest.mark.parametrize("spoil", [fade, blur, freeze, loop, uniform])
def test_a_defect_is_found_and_no_other(moved, spoil):
    found = measure(spoil(moved), FPS, Blocks(12, 9))
    assert found.defects == (spoil.__name__,)


def test_a_seam_is_found_and_no_other(truth, photo):
    """A camera that leaps at the border of every block as far again as it goes in a frame."""
    frames = np.arange(49)
    leaps = np.where(frames < 9, 0, 1 + (frames - 9) // 12)
    camera = truth.Camera(0.8, 0.6, 1, 256, 300)
    video = np.stack([camera.shot(photo, time, (128, 192)) for time in frames + leaps])
    found = measure(video, FPS, Blocks(12, 9))
    assert found.defects == ("seam",) and 1.4 < found.metrics["seam_score"] < 2.1
    assert measure(video, FPS).metrics["seam_score"] is None


def test_numbers_of_broken_frames_and_returns(moved):
    assert measure(freeze(moved), FPS).metrics["bad_frames"] == 8
    assert measure(uniform(moved), FPS).metrics["bad_frames"] == 1
    assert measure(moved[np.arange(49) % 20], FPS).metrics["sink_returns"] == 2


def test_a_cut_is_the_largest_change_and_no_fade(moved):
    video = np.concatenate([moved[:24], 255 - moved[24:]])
    found = measure(video, FPS)
    assert int(np.argmax(found.curves["change"][1:])) + 1 == 24 and "fade" not in found.defects


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_defects_of_random_videos(truth, photo):
    """The bars of the benchmark, of one photograph and its parts."""
    photos = [photo, photo[:, ::-1], np.ascontiguousarray(photo[:300]), np.ascontiguousarray(photo[300:])]
    bars = truth.as_bars(truth.measure_cases(photos, truth.cases_of(("clean", *truth.DEFECTS), len(photos), 40)))
    assert all(bar["met"] for bar in bars.values()) and bars.keys() == set(truth.DEFECTS), bars


@pytest.mark.slow
def test_motion_of_64_slowed_worlds(truth):
    bar = truth.as_bars(truth.measure_cases([], truth.cases_of(("toy",), 0, 0)))["toy"]
    assert bar["correlation"] >= 0.95 and bar["frozen"] <= 0.01 and bar["of"] == 64 and bar["met"]


def test_the_benchmark_goes_on_where_it_stopped(truth, photo, tmp_path, monkeypatch, capsys):
    """A case that is in the file is not measured again; what is left is said, and fails."""
    Image.fromarray(photo[:200, :200]).save(tmp_path / "one.png")
    monkeypatch.setattr(truth, "SPEEDS", (1.0, 2.0))
    monkeypatch.setattr(truth, "motion_error", lambda _, speed, number: 0.01 * speed)
    monkeypatch.setattr(truth, "found", lambda _, defect, number: () if defect is None else (defect,))
    words = [str(tmp_path), "-o", str(file := tmp_path / "found.json"), "--cases", "2", "--workers", "1"]
    assert truth.main([*words, "--seconds", "0"]) == 1 and "80 of 80 cases are left" in capsys.readouterr().out
    assert truth.main([*words, "--bars", "motion", "clean"]) == 0
    kept = json.loads(file.read_text())
    assert kept["outcomes"] == {"motion": {"1 0": 0.01, "2 0": 0.02}, "clean": {"0": [], "1": []}}
    kept["outcomes"]["motion"]["2 0"] = -0.06  # it would be measured as 0.02
    file.write_text(json.dumps(kept))
    assert truth.main([*words, "--bars", "motion", "fade"]) == 1
    bars = json.loads(file.read_text())["bars"]
    assert bars["motion"] == {"met": False, "worst": {"1": 0.01, "2": -0.06}, "of": 2}
    assert bars["fade"] == {"met": True, "found": 2, "of": 2, "falsely": 0, "of_clean": 2}


# ---- streams and wrong input ------------------------------------------------------------------------------------------
@pytest.mark.whole
def test_frames_are_taken_one_at_a_time(moved):
    """However long the video, no more than a few of its frames are alive."""
    import gc
    import weakref

    alive, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def frames():
        nonlocal most
        for number in range(80):
            frame = moved[number % 49, ::2, ::2].copy().view(Frame)
            alive.add(frame)
            most = max(most, len(alive))
            yield frame
            if number % 40 == 0:
                gc.collect()

    assert measure(frames(), FPS).frames == 80 and most <= 4
    assert measure(iter(moved), FPS).metrics == measure(moved, FPS).metrics


@pytest.mark.whole
def test_beginnings_are_measured_as_videos_of_their_own(truth, photo):
    """Of a slow camera too, whose motion is measured over many frames."""
    video = truth.translated(photo, 0.1, 0.2, 45, (64, 96))
    cuts = {20: None, 33: Blocks(12, 9), 45: Blocks(12, 9)}
    found = measure_beginnings(iter(video), FPS, cuts)
    assert found == {number: measure(video[:number], FPS, blocks) for number, blocks in cuts.items()}
    with pytest.raises(DataError, match="the video has no 46 frames"):
        measure_beginnings(video, FPS, {20: None, 46: None})


@pytest.mark.parametrize(
    ("video", "error", "words"),
    [
        (np.zeros((1, 32, 32, 3), np.uint8), DataError, "has 1 frames; it needs at least 2"),
        (np.zeros((0, 32, 32, 3), np.uint8), DataError, "has 0 frames"),
        (np.zeros((2, 32, 32, 3), np.float32), ShapeError, "float32"),
        (np.zeros((2, 8, 32, 3), np.uint8), ShapeError, "sides >= 16"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((32, 48, 3), np.uint8)], ShapeError, "those before"),
    ],
)
def test_what_is_no_video_is_refused(video, error, words):
    with pytest.raises(error, match=words):
        measure(video, FPS)


def test_blocks_have_two_frames_or_more():
    with pytest.raises(ShapeError, match="2 or more"):
        Blocks(1, 1)
