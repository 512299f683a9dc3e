"""A server that is told to end, and one that is killed: what is left, and what can be opened again."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from live_server import LiveClient
from tiny_sessions import PICTURE, A, make_generator

TESTS = Path(__file__).parents[1]


@contextmanager
def process(folder):
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, str(Path(__file__).with_name("serve_tiny.py")), str(folder)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            yield running, running.stdout.readline().strip()
        finally:
            if running.poll() is None:
                running.kill()


@pytest.mark.slow  # in one process: the tests of restarts and of what a killed server leaves
def test_a_killed_and_an_ended_server(tmp_path):
    with process(tmp_path) as (running, address):
        client = LiveClient(address)
        client.open(seed=1)
        client.watch(17)
        client.post("/pause")
        saved = client.post("/save")
        client.post("/resume")
        client.watch(saved["frame"] + 16)
        running.send_signal(signal.SIGKILL)
        running.wait()
    (recording,) = tmp_path.glob("*/recording-*.mp4")
    with av.open(str(recording)) as file:
        assert len(list(file.decode(video=0))) >= saved["frame"] + 8
    with process(tmp_path) as (running, address):
        again = LiveClient(address)
        opened = again.http.post("/api/sessions/open", data={"id": client.name, "secret": client.secret})
        again.use(opened.json())
        seen = again.watch(saved["frame"] + 8)
        running.send_signal(signal.SIGTERM)
        assert again.until_the_end().events[-1]["reason"] == "ending" or running.wait(timeout=30) == 0
        assert running.wait(timeout=30) == 0
        assert "ended" in running.stdout.read()
    assert [path.name for path in tmp_path.glob("*/save-2.safetensors")] == ["save-2.safetensors"]
    session = make_generator(history_blocks=8).open(PICTURE, A, seed=1)
    frames = []
    while session.num_frames < saved["frame"] + 8:
        frames.append(session.next())
    wanted = np.concatenate(frames)[saved["frame"] :]
    first = sorted(seen.frames)[0]
    assert first == saved["frame"]
    seen.frames = {k - first: one for k, one in seen.frames.items()}
    assert np.array_equal(seen.pictures()[:8], wanted[:8])
