"""The server on a GPU: the frames of a stream that is made alone, with captured graphs, and a history."""

import numpy as np
import pytest
from live_server import LiveClient, serving
from tiny_sessions import A, B

from longtake.inference.generator import Generator
from longtake.inference.source import Source
from longtake.toy.world import sample_world

pytestmark = pytest.mark.gpu


def test_sessions_are_those_of_python(tmp_path):
    generator = Generator.build(Source.of_model("toy"), "cuda")
    picture = sample_world(3, 0).render(1)[0]
    sessions = {seed: generator.open(picture, A, seed=seed, history_blocks=8) for seed in (1, 2)}
    wanted = {seed: [np.concatenate([session.next() for _ in range(5)])] for seed, session in sessions.items()}
    for seed, session in sessions.items():
        session.prompt = B
        wanted[seed].append(np.concatenate([session.next() for _ in range(3)]))
    with serving(generator, tmp_path, max_sessions=2) as address:
        for seed in sessions:
            client = LiveClient(address)
            client.open(A, picture, seed=seed)
            seen = client.watch(65)
            client.post("/pause")
            blocks = (client.request("GET").json()["frame"] - 65) // 16
            if blocks:
                client.post("/rewind", json={"to_frame": 65})
            client.post("/prompt", json={"prompt": B})
            client.post("/resume")
            seen = client.watch(113, seen=seen)
            assert np.array_equal(seen.pictures()[:113], np.concatenate(wanted[seed]))
