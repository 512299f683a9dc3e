"""Bounded abuse on loopback: the honest viewer gets what it would have got, and everything comes back."""

import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from live_server import LiveClient, png_of, serving
from tiny_sessions import PICTURE, A
from websockets.exceptions import WebSocketException

from longtake.serve.settings import Limits

LIMITS = Limits(connections=64, creates_per_minute=20, queued=4, hello_seconds=1.0, slow_seconds=2.0, idle_seconds=30.0)
KILLED = """
import json, sys
from websockets.sync.client import connect
with connect(sys.argv[1]) as stream:
    stream.send(json.dumps({"secret": sys.argv[2], "format": "png"}))
    print(stream.recv(), flush=True)
    while True:
        stream.recv()
"""


def port_of(client):
    return int(client.address.rpartition(":")[2])


def open_sockets():
    return len(os.listdir("/proc/self/fd"))


def idle_connections(client, count):
    """Connections that say nothing, or half a request."""
    for k in range(count):
        with suppress(OSError):
            one = socket.create_connection(("127.0.0.1", port_of(client)), timeout=1)
            one.sendall(b"GET / HTTP/1.1\r\nhost: 127" if k % 2 else b"\x16\x03\x01" + bytes(50))
            yield one


def garbage(client, chance, count):
    """Requests and messages that mean nothing."""
    for _ in range(count):
        with suppress(OSError, WebSocketException), client.connect() as stream:
            if chance.random() < 0.5:
                stream.send(json.dumps({"secret": client.secret, "format": chance.choice(["png", "h264", "mp4"])}))
            stream.send(
                chance.choice([chance.randbytes(3000), "{" * 3000, json.dumps({"type": "shown", "frame": 2**40})])
            )
        with suppress(OSError), socket.create_connection(("127.0.0.1", port_of(client)), timeout=1) as raw:
            raw.sendall(chance.randbytes(2000) + b"\r\n\r\n")


def killed_viewers(client, count):
    """Viewers whose process ends as by a power cut."""
    address = f"ws://127.0.0.1:{port_of(client)}/api/sessions/{client.name}/stream"
    for _ in range(count):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, address, client.secret], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def creates(client, count):
    """As many sessions as one asks for; their statuses."""
    files = {"image": ("p.png", png_of(PICTURE))}
    return [client.http.post("/api/sessions", data={"prompt": A}, files=files).status_code for _ in range(count)]


def abused(generator, folder, connections, rounds, viewers, sessions):
    with serving(generator, folder, max_sessions=2, limits=LIMITS) as address:
        honest, rude = LiveClient(address), LiveClient(address)
        honest.open(seed=1)
        rude.open(seed=2)
        before, chance = open_sockets(), random.Random(0)
        wrong = []

        def abuse():
            held = list(idle_connections(rude, connections))
            garbage(rude, chance, rounds)
            killed_viewers(rude, viewers)
            wrong.extend(status for status in creates(rude, sessions) if status not in (201, 429, 503))
            for one in held:
                one.close()

        thread = threading.Thread(target=abuse)
        thread.start()
        session, shown = generator.open(PICTURE, A, seed=1), 0
        seen, slowest, last = None, 0.0, time.monotonic()
        while thread.is_alive() or shown < 200:
            seen = honest.watch(shown + 40, from_frame=shown, seen=seen)
            shown += 40
            slowest, last = max(slowest, time.monotonic() - last), time.monotonic()
        thread.join()
        wanted = np.concatenate([session.next() for _ in range(26)])
        assert np.array_equal(seen.pictures()[:201], wanted[:201])
        assert not wrong and "error" not in seen.kinds()
        rude.request("DELETE")
        until = time.monotonic() + 20
        while open_sockets() > before and time.monotonic() < until:
            gc.collect()
            time.sleep(0.1)
        assert open_sockets() <= before, "connections are kept"
        text = honest.http.get("/metrics").text
        assert "longtake_viewers 0.0" in text
        return slowest


@pytest.mark.whole
def test_a_little_abuse(generator, tmp_path):
    abused(generator, tmp_path, connections=20, rounds=10, viewers=1, sessions=30)


@pytest.mark.slow
def test_abuse(generator, tmp_path):
    """40 frames of a network that makes 500 a second never take longer than 2.5 s, their time on the screen."""
    import resource

    slowest = abused(generator, tmp_path, connections=200, rounds=100, viewers=10, sessions=1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest = max(slowest, abused(generator, Path(f"{tmp_path}-again"), 200, 100, 10, 1000))
    assert slowest < 2.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.1 * before
