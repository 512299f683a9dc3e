"""Contact sheets that name what they show and fit a screen; curves that are told apart."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import ImageDraw

from longtake.evaluation import pictures
from longtake.evaluation.pictures import Scene, Strip, contact_sheet, curves, frame_numbers, scenes, strip


@pytest.fixture
def texts(monkeypatch):
    """What is written on a sheet: text and (x, y)."""
    written = []
    draw = ImageDraw.ImageDraw.text

    def noted(self, place, text, *args, **kwargs):
        written.append((text, place))
        draw(self, place, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    return written


def video(level: int, frames: int = 33, height: int = 64, width: int = 64):
    """A video of one colour, which no letter has."""
    return np.broadcast_to(np.array([200, level, 0], np.uint8), (frames, height, width, 3))


def shown(sheet, level: int):
    """[n, 2] pixels (y, x) of a sheet that are of `video(level)`."""
    return np.argwhere((sheet == (200, level, 0)).all(-1))


def test_frames_are_evenly_spread():
    assert frame_numbers(33) == (0, 4, 8, 12, 16, 20, 24, 28, 32)
    assert frame_numbers(81)[1:3] == (10, 20) and frame_numbers(3) == (0, 1, 2) and frame_numbers(1) == (0,)
    counted = np.arange(81, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    assert strip(counted).frames[:, 0, 0, 0].tolist() == list(frame_numbers(81))


def test_a_sheet_has_captions_names_numbers_and_every_frame(texts):
    rows = {"truth": [video(40), video(80), video(120)], "student": [video(50), video(90)]}
    sheet = contact_sheet(scenes(rows, ["a red circle", "a blue square", "not of every row"]))
    said = [text for text, _ in texts]
    assert said.count("truth") == said.count("student") == 2 and "not of every row" not in said
    assert said.index("a red circle") < said.index("student") < said.index("a blue square")
    assert [text for text in said if text.isdigit()] == 2 * [str(number) for number in range(0, 33, 4)]
    names = [y for text, (_, y) in texts if text in rows]
    for level, y in zip((40, 50, 80, 90), names):
        places = shown(sheet, level)
        assert len(places) == 9 * 128 * 128 and abs(places[:, 0].mean() - y) < 1  # nothing in the way, beside its name
    assert sheet.shape[1] <= pictures.WIDEST


@pytest.mark.parametrize("size", [(64, 64), (88, 160), (480, 832), (1280, 720), (100, 5000)])
def test_a_sheet_is_never_wider_than_a_screen(size):
    sheet = contact_sheet([Scene("a long caption, " * 200, {"a student with a long name": strip(video(9, 9, *size))})])
    assert 600 < sheet.shape[1] <= 1600
    high, wide = (np.ptp(shown(sheet, 9), 0) + 1).tolist()
    cell = (wide + 2) / 9 - 2
    assert high == pytest.approx(cell * size[0] / size[1], abs=1)


def test_captions_are_wrapped_and_names_are_cut(texts):
    sheet = contact_sheet([Scene("word " * 500, {"n" * 500: strip(video(9))})])
    assert sheet.shape[1] <= 1600 and ("n" * 39 + "…") in [text for text, _ in texts]
    lines = [text for text, _ in texts if "word" in text]
    assert len(lines) == 3 and lines[-1].endswith("…")


def test_other_frames_have_numbers_of_their_own(texts):
    short, long = strip(video(1)), strip(video(2, 161))
    contact_sheet([Scene("", {"teacher": short, "student": short, "long": long})])
    numbers = [text for text, _ in texts if text.isdigit()]
    assert numbers == [str(number) for number in (*short.numbers, *long.numbers)]
    contact_sheet([Scene("", {"one": Strip(short.frames[:2], (0, 4))})])
    assert [text for text, _ in texts if text.isdigit()][-2:] == ["0", "4"]


def summaries(names, values=(None, 0.1, 0.3, 0.35, 0.9)):
    scores = dict.fromkeys((score for drawn in pictures._CURVES.values() for score in drawn), values)
    return {name: dict.fromkeys(pictures._CURVES, scores) for name in names}


@pytest.mark.parametrize("part", ["curves", "looks", "windows"])
def test_curves_name_their_units_and_differ(part, monkeypatch):
    lines, titles = [], []
    plot, title = Axes.plot, Axes.set_title
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: lines.append(k) or plot(self, *a, **k))
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **k: titles.append(text) or title(self, text, **k))
    picture = curves(summaries([f"row {number}" for number in range(12)]), part)
    assert picture.dtype == np.uint8 and 700 < picture.shape[1] <= 1600 and picture.std() > 10
    assert len(titles) == len(pictures._CURVES[part]) and len(lines) == 12 * len(titles)
    assert len({(line["color"], line["linestyle"]) for line in lines}) == 12
    assert len({line["color"] for line in lines[:7]}) == 7
    units = ("px", "px/s", "%", "distance", "0 to 1", "window's", "frame")
    assert all(text.endswith(units) for text in titles)


def test_names_take_nothing_from_the_plots():
    few, many = (curves(summaries([f"a student of a long name {k}" for k in range(count)])) for count in (1, 20))
    assert few.shape[1] == many.shape[1] and many.shape[0] - few.shape[0] == 22 * 6
    axes = [np.flatnonzero((picture < 100).all(-1).sum(1) > 400) for picture in (few, many)]  # lines that are axes
    assert 2 <= len(axes[0]) <= 4 and np.ptp(axes[0]) > 250 and abs(np.ptp(axes[0]) - np.ptp(axes[1])) <= 3


def test_a_single_window_is_seen():
    one, none = (curves(summaries(["a"], start), "windows") for start in ([0.5], [None]))
    assert (one != none).any()
