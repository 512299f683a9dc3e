"""`longtake play`: what is typed, what is shown, and that the mp4 is always complete."""

import io
import os
import pty
import signal
import time

import numpy as np
import pytest
from rich.console import Console
from tiny_sessions import OTHER, PICTURE, A, B
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.generation import generation_settings
from longtake.errors import DataError
from longtake.inference import generator as generator_module
from longtake.inference.play import Keyboard, Player, play
from longtake.inference.video_io import read_video


class Typed:
    """Lines by the block after which they are typed."""

    draft = "half a pro"

    def __init__(self, lines, ended_after=10**9):
        self.lines, self.block, self.ended_after = lines, 0, ended_after

    @property
    def ended(self):
        return self.block >= self.ended_after

    def take(self):
        self.block += 1
        line = self.lines.get(self.block, [])
        if callable(line):
            line()
            return []
        return [line] if isinstance(line, str) else line


def played(generator, lines, **given):
    player = Player(generator.open(PICTURE, A), Typed(lines), **given)
    return player, np.concatenate(list(player.frames()))


# ---- what is typed ---------------------------------------------------------------------------------------------------
def test_lines_change_what_comes_next(generator, pictures):
    lines = {2: f"  {B} ", 3: f"/target {pictures / 'b.png'}", 4: [f"/image {pictures / 'b.png'}", ""], 6: "/quit"}
    _, frames = played(generator, lines)
    session = generator.open(PICTURE, A)
    expected = [session.next(), session.next()]
    session.prompt = B
    expected.append(session.next())
    session.image_target = OTHER
    expected.append(session.next())
    session.image = OTHER
    expected += [session.next(), session.next()]
    assert np.array_equal(frames, np.concatenate(expected))


def test_mistakes_are_said_and_stop_nothing(generator, tmp_path):
    said = []
    player = Player(generator.open(PICTURE, A), Typed({}), num_frames=33)
    lines = ["/image no.png", "/target", "/jump 3", f"/save {tmp_path}/no/s", f"/save {tmp_path}/s"]
    for _, line in zip(player.frames(), lines, strict=True):
        player.obey(line)
        said.append(player.message)
    for message, part in zip(
        said, ["no.png", "cannot be read", "/jump is no command", "cannot be written", "saved as"]
    ):
        assert part in message
    assert player.written == 33
    again = generator.resume(tmp_path / "s")
    assert again.num_frames == 33


def test_saving_overwrites_nothing_but_what_it_saved(generator, pictures):
    player = Player(generator.open(PICTURE, A), Typed({}), output=pictures / "o.mp4")
    before = (pictures / "a.png").read_bytes()
    wrong = {"": "is a folder", ".": "is a folder", pictures / "a.png": "exists already", pictures / "o.mp4": "in use"}
    wrong |= {
        pictures / "a.png" / "x": "Not a directory",
        "n" * 250: "File name too long",
        "/proc/x": "cannot be written",
    }
    for path, message in wrong.items():
        player.obey(f"/save {path}")
        assert message in player.message
    for _ in range(2):
        player.obey(f"/save {pictures / 's'}")
        assert player.message == f"saved as {pictures / 's'}"
    assert (pictures / "a.png").read_bytes() == before


@pytest.mark.parametrize("kind", ["none", "closed", "folder"])
def test_an_input_that_cannot_be_read_has_ended(generator, pictures, monkeypatch, kind):
    stream = None
    handle = os.open(pictures, os.O_RDONLY)
    if kind == "folder":
        stream = io.StringIO()
        stream.fileno = lambda: handle
    elif kind == "closed":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr("sys.stdin", stream)
    report = play(generator, PICTURE, A, pictures / "o.mp4", num_frames=9, console=Console(file=io.StringIO()))
    os.close(handle)
    assert report.num_frames == 9


@pytest.mark.parametrize(
    ("given", "lines", "ended_after", "expected"),
    [
        ({"num_frames": 20}, {}, 2, 20),  # a length: the end of the input is not the end
        ({}, {}, 3, 25),
        ({}, {4: "/quit"}, 10**9, 25),
    ],
)
def test_when_it_ends(generator, given, lines, ended_after, expected):
    player = Player(generator.open(PICTURE, A), Typed(lines, ended_after), **given)
    assert sum(len(chunk) for chunk in player.frames()) == expected == player.written


def test_the_view_shows_speed_position_and_prompt(generator):
    player, _ = played(generator, {2: B, 3: "/quit"})
    console = Console(file=io.StringIO(), width=100)
    console.print(player.view())
    shown = console.file.getvalue()
    for part in ("17 frames, 1.1 s; latent 5 of scene 0", f"{player.rate:.1f} frames/s", B, "half a pro_", "/quit"):
        assert part in shown
    assert player.rate > 0


# ---- the file --------------------------------------------------------------------------------------------------------
def quiet():
    return Console(file=io.StringIO())


def test_the_file_holds_every_frame(generator, pictures):
    lines = Typed({2: B, 4: "/quit"})
    report = play(generator, pictures / "a.png", A, pictures / "out.mp4", lines=lines, console=quiet())
    assert report.num_frames == 25 == len(read_video(pictures / "out.mp4")[0])


def test_an_interrupt_ends_the_video_and_nothing_else(generator, pictures):
    before = signal.getsignal(signal.SIGINT)
    lines = Typed({3: lambda: os.kill(os.getpid(), signal.SIGINT)})
    report = play(generator, pictures / "a.png", A, pictures / "out.mp4", lines=lines, console=quiet())
    assert report.num_frames == 17 == len(read_video(pictures / "out.mp4")[0])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failure_leaves_the_video_so_far(generator, pictures):
    def fail():
        raise MemoryError("no memory")

    lines = Typed({3: fail})
    with pytest.raises(MemoryError):
        play(generator, pictures / "a.png", A, pictures / "out.mp4", lines=lines, console=quiet())
    assert len(read_video(pictures / "out.mp4")[0]) == 17
    with pytest.raises(DataError, match="no.png"):
        play(generator, pictures / "no.png", A, pictures / "other.mp4", lines=lines, console=quiet())
    assert sorted(path.suffix for path in pictures.iterdir()) == [".mp4", ".png", ".png"]


# ---- the keyboard ----------------------------------------------------------------------------------------------------
def wait(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_terminal_gives_lines_and_drafts_and_is_left_as_it_was():
    import termios

    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as stream:
        before = termios.tcgetattr(stream)
        with Keyboard.reading(stream) as keyboard:
            assert not termios.tcgetattr(stream)[3] & termios.ECHO
            os.write(ours, "grüm\x7fn\x1b[A squ".encode()[:4])
            os.write(ours, "grüm\x7fn\x1b[A squ".encode()[4:])
            wait(lambda: keyboard.draft == "grün squ")
            assert keyboard.take() == [] and not keyboard.ended
            os.write(ours, b"are\nnext\n")
            wait(lambda: not keyboard.draft and keyboard._lines.qsize() == 2)
            assert keyboard.take() == ["grün square", "next"]
            os.write(ours, b"\x04")
            wait(lambda: keyboard.ended)
        assert termios.tcgetattr(stream) == before
    os.close(ours)


def test_a_pipe_gives_its_lines_and_its_end_and_can_be_left_open():
    reading, writing = os.pipe()
    with os.fdopen(reading) as stream, Keyboard.reading(stream) as keyboard:
        os.write(writing, b"one\ntwo")
        wait(lambda: keyboard.draft == "two")
        assert keyboard.take() == ["one"] and not keyboard.ended
        os.close(writing)
        wait(lambda: keyboard.ended)
        assert keyboard.take() == ["two"]
    reading, writing = os.pipe()
    with os.fdopen(reading) as stream, Keyboard.reading(stream):
        pass  # nothing came, and nothing waits for it
    os.close(writing)


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_with_piped_input(generator, pictures, monkeypatch):
    source = generator_module.Source(pictures, pictures, generator.settings)
    given = []

    def of_run(cls, run, changes):
        generation_settings(None, changes)  # refuses what is no rule
        given.append(changes)
        return source

    monkeypatch.setattr(generator_module.Source, "of_run", classmethod(of_run))
    monkeypatch.setattr(generator_module.Generator, "build", classmethod(lambda *_, **__: generator))
    command = ["play", "--run", "r", "--image", pictures / "a.png", "--prompt", A, "-o", pictures / "out.mp4"]

    def invoke(*more, typed=""):
        return CliRunner().invoke(app, [str(word) for word in (*command, *more)], input=typed)

    result = invoke("--seconds", 2, typed=f"{B}\n")
    assert result.exit_code == 0, result.output
    assert "32 frames in" in result.output and len(read_video(pictures / "out.mp4")[0]) == 32
    result = invoke(typed=f"{B}\n/quit\n")  # nothing is overwritten unasked
    assert result.exit_code == 0 and len(read_video(pictures / "out-2.mp4")[0]) % 8 == 1
    assert len(read_video(pictures / "out.mp4")[0]) == 32
    result = invoke("--overwrite", typed=f"{B}\n/quit\n")
    assert result.exit_code == 0 and len(read_video(pictures / "out.mp4")[0]) % 8 == 1
    result = invoke("plan.sink_frames=1", typed="/quit\n")
    assert result.exit_code == 0 and given == [{}, {}, {}, {"plan": {"sink_frames": 1}}]
    for wrong in (["plan.windw_frames=9"], ["--model", "m"], ["--seconds", "0"], ["--encoders", "e"]):
        result = invoke(*wrong)
        assert result.exit_code == 2 and "ConfigError" in result.output
