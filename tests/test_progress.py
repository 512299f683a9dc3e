"""What is said while something works: lines in a pipe, a bar on a terminal, nothing on stdout."""

import logging
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from longtake import progress as module
from longtake.config.stage import TOY_ASSETS
from longtake.encoders.text import TextEncoder
from longtake.errors import OutputError
from longtake.outputs import check_space
from longtake.progress import BAR, Progress, duration, shown, track
from longtake.weights.load import load_dit


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_pace_and_what_is_left(clock, caplog):
    caplog.set_level(logging.INFO, "longtake")
    progress = Progress("a.mp4", 100, "frames")
    assert progress.state == "0/100 frames (0%)" and progress.remaining is None
    clock(4)
    progress.update(8)
    assert progress.state == "8/100 frames (8%), 2.0 frames/s, 46 s left" and not caplog.records
    clock(6)
    progress.update(20)
    assert [r.getMessage() for r in caplog.records] == ["a.mp4: 20/100 frames (20%), 2.0 frames/s, 40 s left"]
    clock(9)
    progress.update(22)
    assert len(caplog.records) == 1
    clock(81)
    progress.update(100)
    assert progress.state == "100/100 frames (100%), 1.0 frames/s" and len(caplog.records) == 2
    slow = Progress("x", None, "rows")
    clock(8)
    slow.update(2)
    assert slow.state == "2 rows, 4.0 s each"
    assert [duration(s) for s in (0.4, 59.7, 200, 7500)] == ["0 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"]


def test_bytes_are_told_as_sizes(clock, caplog):
    caplog.set_level(logging.INFO, "longtake")
    for _ in track(["a", "bb"], "loading", "bytes", 3_000_000_000, size=lambda item: len(item) * 10**9):
        clock(10)
    assert [r.message for r in caplog.records] == [  # as it was said: progress goes on
        "loading: 1.0 GB of 3.0 GB (33%), 0.1 GB/s, 20 s left",
        "loading: 3.0 GB of 3.0 GB (100%), 0.1 GB/s",
    ]


def test_loading_tells_how_much_is_there(caplog):
    caplog.set_level(BAR, "longtake")
    model = load_dit(TOY_ASSETS / "student")
    TextEncoder.load(TOY_ASSETS / "text_encoder")
    whole = sum(p.nbytes for p in model.parameters())
    told = [r.progress for r in caplog.records if hasattr(r, "progress")]
    assert {(p.what, p.done, p.total, p.unit) for p in told} == {
        ("loading the transformer", whole, whole, "bytes"),
        ("loading UMT5EncoderModel", told[-1].total, told[-1].total, "tensors"),
    }
    assert (
        told[-1].total > 5 and f"loading the transformer (7.9 MB) from {TOY_ASSETS}/student to cpu" in caplog.messages
    )


def test_track_ends_its_bar_whatever_happens(caplog):
    caplog.set_level(BAR, "longtake")
    with pytest.raises(KeyError):
        for item in track([1, 2, 3], "rows", "row"):
            if item == 2:
                raise KeyError
    assert [getattr(r, "is_last", False) for r in caplog.records][-1] and caplog.records[0].progress.total == 3


def test_a_library_is_silent_and_a_command_is_not(capsys):
    root, own = logging.getLogger(), logging.getLogger("longtake")
    handlers, level = root.handlers[:], own.level
    root.handlers[:] = []
    try:
        for quiet in (False, True):
            with shown(quiet=quiet):
                logging.getLogger("longtake.x").info("runs")
                logging.getLogger("other").info("not ours")
                logging.getLogger("longtake.x").warning("hm")
            out, err = capsys.readouterr()
            assert not out and err == "INFO longtake.x: runs\n" * (not quiet) + "WARNING longtake.x: hm\n"
        assert root.handlers == []
    finally:
        root.handlers[:], own.level = handlers, level


SCRIPT = """
import logging, sys, time
from longtake.progress import shown, track
with shown(quiet="quiet" in sys.argv):
    for _ in track(range(8), "a.mp4", "frames"):
        time.sleep(0.1)
        if _ == 4:
            logging.getLogger("longtake").warning("careful [1]")
print("the result")
"""


def on_a_terminal(*words: str) -> tuple[str, str]:
    """What a process writes to stdout, a pipe, and to stderr, a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    text = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # its end
            break
        if not data:
            break
        text += data
    os.close(ours)
    out = process.communicate()[0]
    assert process.returncode == 0, text
    return out, text.decode()


@pytest.mark.whole
def test_a_terminal_shows_a_bar_below_the_lines():
    out, err = on_a_terminal("-c", SCRIPT)
    assert out == "the result\n"
    assert re.search(r"a\.mp4.*[━╸╺].*\d/8 frames \(\d+%\), \d\.\d frames/s, \d s left", err), err
    assert "warning: careful [1]" in err
    out, err = on_a_terminal("-c", SCRIPT, "quiet")
    assert out == "the result\n" and err.strip().endswith("careful [1]") and "frames" not in err


def test_space_is_checked_before_any_work(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    check_space(tmp_path / "no" / "a.mp4", 0.9e9)
    with pytest.raises(OutputError, match=r"a\.mp4 will take about 2\.0 GB while it is made, .* has 1\.0 GB"):
        check_space(tmp_path / "a.mp4", 2e9)


@pytest.mark.whole
def test_generate_says_what_runs_and_refuses_before_it_loads(tmp_path):
    Image.new("RGB", (64, 64), (200, 60, 30)).save(tmp_path / "photo.png")
    words = [sys.executable, "-m", "longtake", "generate", "--model", "toy", "--prompt", "a red circle drifts"]
    words += ["--image", str(tmp_path / "photo.png"), "--device", "cpu"]

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*words, *more], capture_output=True, text=True)

    made = run("--frames", "17", "--seed", "3", "-o", str(tmp_path / "a.mp4"))
    assert made.returncode == 0 and re.fullmatch(r".*a\.mp4: 17 frames in .*\n", made.stdout)
    for said in (
        "loading the transformer (7.9 MB) from",
        "to cpu",
        "loading the encoders (VAE 5.1 MB, text encoder 0.3 MB, image encoder 0.3 MB) from",
        "loaded in",
        "17 frames of 64x64, 1.1 s, seed 3, on cpu",
    ):
        assert said in made.stderr, made.stderr
    quiet = run("--frames", "17", "-o", str(tmp_path / "b.mp4"), "--quiet")
    assert quiet.returncode == 0 and quiet.stderr == "" and "17 frames in" in quiet.stdout
    long = run("--frames", "9999999", "--scale", "16", "-o", str(tmp_path / "c.mp4"))
    assert long.returncode == 1 and "will take about" in long.stderr and "loading" not in long.stderr
    for more, message in (
        (["-o", str(tmp_path / "c.avi")], "must end in"),
        (["--image", "no.png", "-o", "d.mp4"], "no.png"),
    ):
        refused = run("--frames", "5", *more)
        assert refused.returncode and message in refused.stderr and "loading" not in refused.stderr
