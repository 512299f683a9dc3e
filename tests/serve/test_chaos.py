"""Many clients that do everything at once, in no order: nothing fails on the server, and what is left is a session that
its script makes again, bit for bit.
"""

import io
import random
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from live_server import LiveClient, png_of, serving
from tiny_sessions import OTHER, PICTURE, A, B, C

from longtake.inference.script import read_story
from longtake.serve.settings import Limits

EXPECTED = {200, 201, 204, 404, 409, 422, 429, 503}
LIMITS = Limits(creates_per_minute=10_000, changes_per_second=1000, queued=4, idle_seconds=60, slow_seconds=2)


class Chaos:
    """Clients that share what they know of sessions."""

    def __init__(self, address, seconds):
        self.address, self.until = address, time.monotonic() + seconds
        self.known, self.wrong, self.done = [], [], 0

    def run(self, seed):
        chance, client = random.Random(seed), LiveClient(self.address)
        acts = [self.create, self.reopen, self.delete, self.watch, self.watch, self.watch]
        acts += [self.steer] * 6
        client.name = "nothing"
        while time.monotonic() < self.until:
            if self.known:
                client.name, client.secret = chance.choice(self.known[-6:])
            try:
                status = chance.choice(acts)(client, chance)
            except Exception as error:  # noqa: BLE001 (each is told)
                status = repr(error)
            self.done += 1
            if status not in EXPECTED:
                self.wrong.append(status)

    def note(self, answer):
        if answer.status_code == 201:
            self.known.append((answer.json()["id"], answer.json()["secret"]))
        return answer.status_code

    def create(self, client, chance):
        fields = {"prompt": chance.choice((A, B)), "seed": chance.randrange(3)}
        return self.note(client.http.post("/api/sessions", data=fields, files={"image": ("p.png", png_of(PICTURE))}))

    def reopen(self, client, chance):
        body = {"id": client.name, "secret": client.secret, "save": chance.choice((None, 1, 2))}
        body = {name: value for name, value in body.items() if value is not None}
        return client.http.post("/api/sessions/open", data=body).status_code

    def delete(self, client, chance):
        return client.request("DELETE").status_code if chance.random() < 0.3 else 204

    def watch(self, client, chance):
        """For a moment, and says that it has seen something."""
        with client.connect() as socket:
            socket.send(f'{{"secret": "{client.secret}", "format": "{chance.choice(("png", "h264", "mp4"))}"}}')
            try:
                for _ in range(chance.randrange(1, 12)):
                    socket.recv(timeout=0.3)
                    socket.send(f'{{"type": "shown", "frame": {chance.choice((0, 9, 10**6))}}}')
            except (TimeoutError, OSError):
                pass
            except Exception as error:  # noqa: BLE001
                if "ConnectionClosed" not in type(error).__name__:
                    raise
        return 200

    def steer(self, client, chance):
        files = {"image": ("p.png", png_of(chance.choice((PICTURE, OTHER))))}
        path, body = chance.choice(
            [
                ("/prompt", {"json": {"prompt": chance.choice((A, B, C)), "drop": chance.random() < 0.7}}),
                ("/image", {"files": files}),
                ("/target", {"files": files}),
                ("/pause", {}),
                ("/resume", {}),
                ("/rewind", {"json": {"blocks": chance.randrange(1, 5)}}),
                ("/save", {}),
                ("/fork", {}),
            ]
        )
        answer = client.request("POST", path, **body)
        return self.note(answer) if path == "/fork" else answer.status_code


def checked(client, folder, generator):
    """The latest frames of a session against those that its script makes. None: it has ended meanwhile."""
    if client.request("POST", "/pause").status_code != 200:
        return None
    frame = client.request("GET").json()["frame"]
    if not frame:
        return None
    seen = client.watch(frame, from_frame=max(0, frame - 8))
    with zipfile.ZipFile(io.BytesIO(client.request("GET", "/script").content)) as archive:
        archive.extractall(folder)
    story = read_story(folder / "story.yaml", generator.settings)
    frames = np.concatenate(list(story.play(story.open(generator, history_blocks=0))))
    assert len(frames) == frame
    first = min(seen.frames)
    seen.frames = {number - first: one for number, one in seen.frames.items()}
    assert np.array_equal(seen.pictures(), frames[first:])
    return frame


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_everything_at_once(generator, tmp_path):
    with serving(generator, tmp_path / "live", max_sessions=3, limits=LIMITS) as address:
        chaos = Chaos(address, 40)
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(chaos.run, range(6)))
        assert chaos.done > 100 and not chaos.wrong, {str(one)[:300] for one in chaos.wrong}
        left = 0
        for number, (name, secret) in enumerate(dict.fromkeys(chaos.known)):
            client = LiveClient(address)
            client.name, client.secret = name, secret
            if client.request("GET").status_code == 200:
                left += checked(client, tmp_path / str(number), generator) is not None
                client.request("DELETE")
        assert left > 0
        fresh = LiveClient(address)
        fresh.open(seed=7)
        assert len(fresh.watch(17).frames) >= 17
        assert fresh.http.get("/api/info").json()["sessions"]["now"] == 1
