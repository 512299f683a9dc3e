"""Nobody waits for a thread, a process or a session that has ended: whoever asks gets an answer."""

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import monotonic, sleep

import numpy as np
import pytest
from live_server import LiveClient, serving
from tiny_sessions import PICTURE, A, B

from longtake.encoders.sessions import DecoderSession
from longtake.errors import ConfigError, LongtakeError, OutputError
from longtake.inference.session import Session
from longtake.lock import LOCK
from longtake.serve import engine as engine_module
from longtake.serve.app import make_app
from longtake.serve.engine import Engine, Lost, Made
from longtake.serve.errors import told
from longtake.serve.run import run_server
from longtake.serve.settings import ServeSettings
from longtake.serve.viewers import Viewer
from longtake.serve.workers import WorkerEngine

SECONDS = 20


class Panic(BaseException):
    """As what a library in Rust raises when it fails."""


@contextmanager
def running(build, out):
    engine = Engine(build, out.append, 2, 2)
    engine.start()
    yield engine
    engine.stop()
    assert not any(thread.is_alive() for thread in engine._threads)


def test_an_engine_whose_weights_cannot_be_read_refuses_what_is_asked():
    def build():
        raise Panic("no weights")

    with running(build, []) as engine:
        with pytest.raises(RuntimeError, match="Panic"):
            engine.ready.result(SECONDS)
        with pytest.raises(ConfigError, match="failed"):
            engine.call("memory").result(SECONDS)


def test_a_thread_that_dies_refuses_what_was_asked_and_loses_its_sessions(generator, monkeypatch):
    out, dead = [], threading.Event()

    def die(lanes):
        if dead.is_set():
            raise Panic("the scheduler")
        return None

    monkeypatch.setattr(engine_module, "next_lane", die)
    with running(lambda: generator, out) as engine:
        engine.ready.result(SECONDS)
        engine.call("open", "one", PICTURE, A, seed=1).result(SECONDS)
        dead.set()
        asked = [engine.call("memory") for _ in range(20)]  # some before it dies, some behind it
        for future in asked:
            assert isinstance(future.exception(SECONDS), ConfigError | None)
        with pytest.raises(ConfigError):
            engine.call("memory").result(SECONDS)
    assert [type(one) for one in out] == [Lost] and out[0].session == "one"


def test_a_panic_ends_what_was_asked_and_nothing_else(generator, monkeypatch):
    def panic(self, *args):
        raise Panic("a tokenizer")

    monkeypatch.setattr(Engine, "do_save", panic)
    out = []
    with running(lambda: generator, out) as engine:
        engine.call("open", "one", PICTURE, A, seed=1).result(SECONDS)
        with pytest.raises(RuntimeError, match="Panic"):
            engine.call("save", "one", None).result(SECONDS)
        monkeypatch.setattr(type(engine._lanes["one"].session), "begin", panic)
        engine.call("open", "two", PICTURE, A, seed=1).result(SECONDS)
        assert engine.call("memory").result(SECONDS).used > 0
    assert {one.session for one in out if isinstance(one, Lost)} >= {"two"}


def test_a_change_does_not_wait_for_a_block_that_it_drops(generator, monkeypatch):
    """It is asked for in the middle of a block; the frames are those of a session that never began that one."""
    out, begun, asked, begin = [], [], [], Session.begin

    def watched(session, check, early):
        begun.append(session.num_frames)

        def check_after_asking():
            if session.num_frames == 9 and not asked:
                asked.append(engine.call("change", "one", "prompt", B, 1, monotonic(), True))
            check()

        return begin(session, check_after_asking, early)

    def frames():
        return [one.frames for one in out if isinstance(one, Made)]

    with running(lambda: generator, out) as engine:
        engine.ready.result(SECONDS)
        monkeypatch.setattr(Session, "begin", watched)
        engine.call("open", "one", PICTURE, A, seed=1).result(SECONDS)
        until = monotonic() + SECONDS
        while sum(map(len, frames())) < 17 and monotonic() < until:
            sleep(0.01)
        assert asked[0].result(SECONDS) == (9, False)  # which was not taken back: it had never been there
    assert begun == [0, 1, 9, 9]
    alone = generator.open(PICTURE, A, seed=1)
    wanted = [alone.next(), alone.next()]
    alone.prompt = B
    assert np.array_equal(np.concatenate(frames()), np.concatenate([*wanted, alone.next()]))


@pytest.mark.parametrize("fails", [False, True])
def test_the_first_frames_come_out_before_the_rest_of_their_block_is_decoded(generator, monkeypatch, fails):
    """On a CPU the call that begins a block decodes it whole. A session that fails then is lost, as at any time."""
    out, calls, decode, seen = [], [], DecoderSession.decode, []

    def lengths():
        return [len(one.frames) for one in out if isinstance(one, Made)]

    def wait(condition):
        until = monotonic() + SECONDS
        while not condition() and monotonic() < until:
            sleep(0.005)

    def watched(decoder, latents):
        calls.append(latents.shape[1])
        if len(calls) == 3:  # after the picture, and one latent frame
            wait(lambda: len(lengths()) == 2)
            seen.extend(lengths())
            if fails:
                raise MemoryError
        return decode(decoder, latents)

    with running(lambda: generator, out) as engine:
        engine.ready.result(SECONDS)
        monkeypatch.setattr(DecoderSession, "decode", watched)
        engine.call("open", "one", PICTURE, A, seed=1).result(SECONDS)
        wait(lambda: len(lengths()) == 3 or any(isinstance(one, Lost) for one in out))
    assert calls[:3] == [1, 1, 1] and seen == [1, 4]
    assert fails == any(isinstance(one, Lost) and isinstance(one.error, MemoryError) for one in out)
    assert [one.block.count for one in out if isinstance(one, Made)][:2] == [1, 8]
    assert fails or lengths()[:3] == [1, 4, 4]


def test_blocks_are_not_waited_for_when_nobody_fetches_them(generator):
    engine = Engine(lambda: generator, lambda output: None, 2, 2)
    engine._threads[0].start()  # and the other one never runs
    engine.call("open", "one", PICTURE, A, seed=1).result(SECONDS)
    with pytest.raises((RuntimeError, ConfigError), match="fetches|failed"):
        engine.call("hold", "one", True).result(SECONDS)
    engine.stop()
    assert not engine._threads[0].is_alive()


def worker():
    """An engine whose process is this test: it, and the other end of its pipe."""
    engine = WorkerEngine(lambda: None, lambda output: None, 2, 2)
    engine._process.start = lambda: None
    engine._process.join = lambda timeout: None
    engine._process.is_alive = lambda: False
    there = engine._there
    engine._there = type("Nothing", (), {"close": lambda self: None})()
    engine.start()
    return engine, there


def test_a_worker_that_has_just_died_is_an_answer_and_no_broken_pipe(monkeypatch):
    engine, there = worker()
    reading = threading.Event()
    monkeypatch.setattr(engine, "_end", lambda: reading.wait(SECONDS))  # who reads the pipe is late
    there.close()
    future = engine.call("memory")
    with pytest.raises(LongtakeError, match="worker"):
        future.result(SECONDS)
    reading.set()
    engine.stop()


def test_an_answer_that_cannot_be_read_ends_the_worker_for_all_who_wait():
    engine, there = worker()
    asked = engine.call("memory")
    there.send_bytes(b"no pickle")
    for future in (asked, engine.ready):
        with pytest.raises(LongtakeError, match="worker") as caught:
            future.result(SECONDS)
        assert told(caught.value).fix == "open a saved session, or another one"
    with pytest.raises(LongtakeError, match="worker"):
        engine.call("memory").result(SECONDS)
    engine.stop()
    there.close()


def test_what_is_asked_of_a_session_that_ends_meanwhile_is_answered(generator, tmp_path, monkeypatch):
    """The engine does it, and by then the session has ended."""
    begun, go, change = threading.Event(), threading.Event(), Engine.do_change

    def late(self, *args):
        begun.set()
        go.wait(SECONDS)
        return change(self, *args)

    monkeypatch.setattr(Engine, "do_change", late)
    with serving(generator, tmp_path, max_sessions=1) as address, ThreadPoolExecutor(1) as pool:
        client = LiveClient(address)
        client.open()
        client.watch(9)
        asked = pool.submit(client.request, "POST", "/prompt", json={"prompt": B}, timeout=SECONDS)
        assert begun.wait(SECONDS)
        other = LiveClient(address)
        other.name, other.secret = client.name, client.secret
        assert other.request("DELETE").status_code == 204
        go.set()
        answer = asked.result(2 * SECONDS)
        assert answer.status_code == 409 and "ended" in answer.text


def test_a_viewer_who_is_closed_is_sent_no_more():
    viewer = Viewer("png", 0, 4)
    viewer.tell({"type": "pong"})
    viewer.close(1008, "too_many")
    viewer.tell({"type": "stats"})
    assert len(viewer.waiting) == 1


def test_a_server_that_cannot_begin_says_why_in_one_line(generator, tmp_path, capfd):
    """A file where its folder should be, weights or a device that cannot be used, an address that is taken."""

    def refused():
        raise ConfigError("device=nosuch cannot be used")

    def run(build, folder, port=0):
        settings = ServeSettings(folder, port=port, max_sessions=1)
        run_server(make_app([build], settings), settings, lambda text: None)

    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is a file; name a folder"):
        run(lambda: generator, tmp_path / "file")
    with pytest.raises(ConfigError, match="nosuch"):
        run(refused, tmp_path / "live")
    told = r"nothing can be served at 127.0.0.1:\d+: Address already in use.*; give another --port"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=told):
        run(lambda: pytest.fail("weights were loaded"), tmp_path / "live", taken.getsockname()[1])
    assert "Traceback" not in "".join(capfd.readouterr())


def test_one_server_a_folder(tmp_path):
    """The second one is refused before it loads anything, and the first one's lock stays."""
    hold = "import sys; from longtake.lock import *\nwith locked(Path(sys.argv[1]), ''): print(1, flush=True), input()"
    command, pipe = [sys.executable, "-c", hold, str(tmp_path)], subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as other:
        assert other.stdout.readline() == "1\n"
        app = make_app([lambda: pytest.fail("weights were loaded")], settings := ServeSettings(tmp_path, port=0))
        told = f"in use already, by process {other.pid} on .*; wait until it ends, or give this server another --folder"
        with pytest.raises(ConfigError, match=told):
            run_server(app, settings, lambda text: None)
        assert (tmp_path / LOCK).is_file()
        other.communicate("\n", timeout=30)
    assert not any(tmp_path.iterdir())
