"""Several devices, a worker process each: the same frames, and one that dies takes its own sessions alone with it."""

import multiprocessing
import time
from functools import partial

import numpy as np
from live_server import LiveClient, serving
from tiny_sessions import PICTURE, A, make_generator


def test_two_workers(generator, tmp_path):
    build = partial(make_generator, history_blocks=6)
    with serving([build, build], tmp_path, max_sessions=1) as address:
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
        multiprocessing.active_children()[0].kill()  # that of one session
        until = time.monotonic() + 20
        while len(alive := [one for one in clients if one.request("GET").status_code == 200]) == 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert len(alive) == 1
        assert len(alive[0].watch(41).frames) >= 8
