"""Several devices, a worker each: the same frames, and one that dies takes its own sessions alone with it."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import pytest
from live_server import LiveClient, serving
from tiny_sessions import PICTURE, A, make_generator


class _Process:
    """A worker that is a thread of this process, at the other end of the same pipe."""

    running: list = []

    def __init__(self, target, args, daemon):
        build, pipe, *rest = args
        self.pipe = Connection(os.dup(pipe.fileno()))  # whoever starts a process closes what it gave away
        self._thread = threading.Thread(target=target, args=(build, self.pipe, *rest), daemon=daemon)

    def start(self):
        self.running.append(self)
        self._thread.start()

    def join(self, timeout):
        self._thread.join(timeout)

    def is_alive(self):
        return self._thread.is_alive()

    def kill(self):
        with socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)


def played(builds, folder, generator, kill):
    """Two workers with a session each, of which one dies."""
    with serving(builds, folder, max_sessions=1) as address:
        clients = [LiveClient(address) for _ in range(2)]
        for seed, client in enumerate(clients):
            assert client.open(seed=seed)["state"] == "starting"
        assert clients[0].http.get("/api/info").json()["sessions"].items() >= {"most": 2, "now": 2, "queued": 0}.items()
        for seed, client in enumerate(clients):
            session = generator.open(PICTURE, A, seed=seed)
            wanted = np.concatenate([session.next() for _ in range(4)])
            assert np.array_equal(client.watch(25).pictures()[:25], wanted)
        assert clients[0].post("/rewind", json={"blocks": 1})["number"] == 0
        clients[0].post("/save")
        kill()
        until = time.monotonic() + 20
        while len(alive := [one for one in clients if one.request("GET").status_code == 200]) == 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert len(alive) == 1
        assert len(alive[0].watch(41).frames) >= 8


def test_two_workers(generator, tmp_path, monkeypatch):
    """All but that they are processes."""
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(type(context), "Process", _Process)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of the main thread alone
    monkeypatch.setattr(_Process, "running", [])
    played([lambda: generator] * 2, tmp_path, generator, lambda: _Process.running[0].kill())


@pytest.mark.slow
def test_two_processes(generator, tmp_path):
    build = partial(make_generator, history_blocks=6)
    played([build, build], tmp_path, generator, lambda: multiprocessing.active_children()[0].kill())
