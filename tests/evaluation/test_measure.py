"""Folders of videos: table, intervals, JSON and the page; input that is wrong is refused before anything is measured."""

import html.parser
import json
import re
from pathlib import Path
from urllib.parse import unquote

import chromium
import numpy as np
import pytest
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.errors import ConfigError
from longtake.evaluation import measure as measuring
from longtake.evaluation.instruments import METRICS, Blocks
from longtake.evaluation.measure import measure_folders, parse_blocks, parse_folders, summarise
from longtake.inference.video_io import VideoWriter
from longtake.toy.world import sample_world


def write(path, video, fps=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps, *video.shape[1:3]) as writer:
        writer.write(video)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`good` with three toy worlds, `frozen` with the same ones standing still; one lies in a sub-folder."""
    root = tmp_path_factory.mktemp("videos & more")
    for index in range(3):
        world = sample_world(3, index)
        below = "below/" if index == 2 else ""
        write(root / "good" / f"{below}world {index}.mp4", world.render(25))
        write(root / "frozen" / f"{below}world {index}.mp4", world.render(25, time_scale=0))
    (root / "good" / "notes.txt").write_text("no video")
    return root


def run(*arguments):
    return CliRunner().invoke(app, ["measure", *map(str, arguments)])


class Page(html.parser.HTMLParser):
    """Tags with their attributes; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_table_json_and_page(folders, tmp_path):
    out, page = tmp_path / "numbers.json", tmp_path / "page.html"
    good, frozen = folders / "good", folders / "frozen"
    result = run(f"good={good}", f"frozen={frozen}", "--json", out, "--html", page, "--block", "9+12")
    assert result.exit_code == 0, result.output
    assert result.output.count("\n") == len(METRICS) + 2 and "| good (3)" in result.output

    found = json.loads(out.read_text())
    assert list(found["rows"]) == ["good", "frozen"] and len(found["videos"]) == 6
    for row in found["rows"].values():
        assert list(row) == list(METRICS) and all(set(cell) == {"mean", "low", "high"} for cell in row.values())
        assert all(cell["low"] <= cell["mean"] <= cell["high"] for cell in row.values())
    assert found["rows"]["good"]["motion_px_s"]["low"] > 1 > found["rows"]["frozen"]["motion_px_s"]["high"]
    first = found["videos"][0]
    assert first["path"] == str(good / "below" / "world 2.mp4") and (first["frames"], first["fps"]) == (25, 16)
    assert set(first["metrics"]) == set(METRICS) and {len(curve) for curve in first["curves"].values()} == {25}
    assert found["videos"][3]["defects"] == ["freeze"]

    text = page.read_text()
    tags = Page(text).found
    videos = [attributes for tag, attributes in tags if tag == "video"]
    assert len(videos) == 6 and all(video["poster"].startswith("data:image/jpeg;base64,") for video in videos)
    assert all((tmp_path / unquote(video["src"])).resolve().is_file() for video in videos)
    assert not any("://" in str(value) for _, attributes in tags for value in attributes.values())
    assert not re.search(r"<script|<link|@import|url\(", text) and "nan" not in text.lower()
    assert sum(tag == "svg" for tag, _ in tags) == 9 * (1 + 3)  # the means, and each group of one name
    assert sum(tag == "polyline" for tag, _ in tags) == 2 * 9 * (1 + 3)


def test_the_worst_come_first(folders, tmp_path):
    mixed = tmp_path / "mixed"
    for index, scale in enumerate((1, 0, 1)):
        write(mixed / f"v{index}.mp4", sample_world(3, index).render(25, time_scale=scale))
    page = tmp_path / "page.html"
    assert run(f"mixed={mixed}", "--html", page).exit_code == 0
    assert re.findall("<h3>(v.)</h3>", page.read_text())[0] == "v1"


@pytest.mark.slow
def test_a_browser_shows_the_page_without_network_and_plays_its_videos(folders, tmp_path):
    """Opened as a file, with the network cut: nothing else is asked for, every video plays."""
    page, asked = tmp_path / "page.html", []
    assert run(f"good={folders / 'good'}", f"frozen={folders / 'frozen'}", "--html", page).exit_code == 0
    with chromium.browser() as browser:
        context = browser.new_context(offline=True)
        opened = context.new_page()
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(page.as_uri())
        played = opened.evaluate(chromium.PLAYED)
        drawn = opened.evaluate("[...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect().width)")
    assert [size for _, *size in played] == [[64, 64]] * 6 and all(seconds > 0 for seconds, *_ in played), played
    assert len(drawn) == 9 * (1 + 3) and min(drawn) > 100
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"} and sum(".mp4" in url for url in asked) >= 6


def test_names_are_no_markup(folders, tmp_path):
    page = tmp_path / "page.html"
    assert run(f"<b>&={folders / 'good'}", "--html", page).exit_code == 0
    Page(page.read_text())
    assert "<b>&" not in page.read_text() and "&lt;b&gt;&amp;" in page.read_text()


def test_intervals_are_of_the_mean_over_videos(folders):
    videos = measure_folders({"good": folders / "good"})
    assert summarise(videos) == summarise(videos)
    alone = summarise(videos[:1])["good"]["motion_px_s"]
    assert alone["mean"] == videos[0].measured.metrics["motion_px_s"] and alone["low"] is alone["high"] is None
    assert summarise(videos)["good"]["seam_score"] == {"mean": None, "low": None, "high": None}


def test_the_interval_holds_the_true_mean_nineteen_times_of_twenty():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        cell = measuring._interval(list(rng.normal(3, 1, 40)))
        held += cell["low"] <= 3 <= cell["high"]
    assert 180 <= held <= 198


def broken(folder):
    write(folder / "a.mp4", sample_world(0, 0).render(9))
    (folder / "b.mp4").write_bytes(b"no video at all")


def cut(folder):
    write(folder / "a.mp4", sample_world(0, 0).render(9))
    data = (folder / "a.mp4").read_bytes()
    (folder / "b.mp4").write_bytes(data[: len(data) // 2])


def short(folder):
    write(folder / "b.mp4", sample_world(0, 0).render(1))


def strange(folder):
    write(folder / "b.mp4", sample_world(0, 0).render(9))
    data = (folder / "b.mp4").read_bytes()
    assert b"avc1" in data
    (folder / "b.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))


def nothing(folder):
    folder.mkdir()


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (broken, 1, "b.mp4"),
        (cut, 1, "b.mp4"),
        (strange, 1, "names a codec that is not known here"),
        (short, 1, "fewer than 2 frames"),
        (nothing, 2, "there is no video in it"),
        (None, 2, "there is no such folder"),
    ],
)
def test_bad_folders_are_refused_before_anything_is_measured(folders, tmp_path, monkeypatch, make, code, words):
    bad = tmp_path / "bad"
    if make is not None:
        make(bad)
    monkeypatch.setattr(measuring, "measure_video", lambda *_: pytest.fail("work had begun"))
    result = run(f"good={folders / 'good'}", f"bad={bad}", "--json", tmp_path / "out.json")
    assert result.exit_code == code and words in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a=x", "a=y"], "the name a is given twice"),
        (["folder"], "is no NAME=FOLDER"),
        (["=folder"], "is no NAME=FOLDER"),
        (["a=x", "--block", "1"], "--block 1"),
        (["a=x", "--block", "9+"], "--block 9+"),
        (["a=x", "--html", "page.txt"], "must end in .html"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.output and result.output.count("\n") == 1


def test_an_existing_file_is_kept(folders, tmp_path):
    (out := tmp_path / "out.json").write_text("mine")
    assert run(f"good={folders / 'good'}", "--json", out).exit_code == 2 and out.read_text() == "mine"
    assert run(f"good={folders / 'good'}", "--json", out, "--overwrite").exit_code == 0 and out.read_text() != "mine"


def test_names_and_blocks_are_read():
    assert parse_folders(["a=x/y=z", "b c=w"]) == {"a": Path("x/y=z"), "b c": Path("w")}
    assert parse_blocks("12") == Blocks(12, 12) and parse_blocks("9+12") == Blocks(12, 9) and parse_blocks(None) is None
    with pytest.raises(ConfigError, match="no length of blocks"):
        parse_blocks("x")
