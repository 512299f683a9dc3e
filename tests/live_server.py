"""A server of tiny random networks on a port of its own, and a client that sees what a viewer sees."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from tiny_sessions import PICTURE, A
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from longtake.inference.generator import Generator
from longtake.serve.app import make_app
from longtake.serve.run import LiveServer
from longtake.serve.settings import ServeSettings

SECONDS = 50  # that anything may take on a busy machine: events come each second, so a silent wait never ends


def png_of(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def until_closed(socket: ClientConnection) -> str | bytes | None:
    """Takes all that comes until the server closes; the last of it. Events come each second, so it has its own end."""
    last, until = None, time.monotonic() + SECONDS
    with suppress(ConnectionClosed):
        while True:
            last = socket.recv(timeout=10)
            assert time.monotonic() < until, "the server has not closed the connection"
    return last


@contextmanager
def serving(
    generator: Generator | list[Callable[[], Generator]], folder: Path, begins_in: float = SECONDS, **settings: Any
) -> Iterator[str]:
    """The address of a server that stops by itself; of a generator, or of what makes one for each device. It must begin
    within so many seconds.
    """
    builds = generator if isinstance(generator, list) else [lambda: generator]
    chosen = ServeSettings(folder, port=0, **settings)
    addresses: list[str] = []
    server = LiveServer(make_app(builds, chosen), chosen, addresses.append)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:  # noqa: BLE001 (the test tells it)
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)  # one that hangs must not keep the tests
    thread.start()
    try:
        until = time.monotonic() + begins_in
        while not addresses and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.02)
        assert addresses, f"the server has not begun: {failed}"
        yield addresses[0]
    finally:
        server.should_exit = True
        thread.join(timeout=SECONDS)
    assert not thread.is_alive(), "the server has not ended"
    assert not failed, failed


@dataclass
class Seen:
    """What a viewer received: payloads by frame, events in order, and the init segment."""

    frames: dict[int, bytes] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    fragments: list[bytes] = field(default_factory=list)

    def pictures(self) -> np.ndarray:
        """Frames of a `png` stream, from 0 on without a gap."""
        assert sorted(self.frames) == list(range(len(self.frames)))
        return np.stack([np.array(Image.open(io.BytesIO(self.frames[k]))) for k in range(len(self.frames))])

    def kinds(self) -> list[str]:
        return [event["type"] for event in self.events]

    def take(self, message: str | bytes, form: str) -> int | None:
        """Notes a message; the end of the frames in it."""
        if isinstance(message, str):
            event = json.loads(message)
            self.events.append(event)
            if event["type"] == "rewound":
                self.frames = {k: one for k, one in self.frames.items() if k < event["from_frame"]}
            return None
        first, count, _ = struct.unpack_from("<III", message)
        payload = message[12:]
        if form == "mp4":
            self.fragments.append(payload)
            return first + count
        for k in range(count):
            (length,) = struct.unpack_from("<I", payload)
            self.frames[first + k], payload = payload[4 : 4 + length], payload[4 + length :]
        assert not payload
        return first + count


class LiveClient:
    """A session over HTTP and its stream."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address, self.token = address, token
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self.http = httpx.Client(base_url=address, headers=headers, timeout=30)
        self.name = self.secret = ""

    def open(self, prompt: str = A, picture: np.ndarray | None = PICTURE, **fields: Any) -> dict[str, Any]:
        files = {} if picture is None else {"image": ("p.png", png_of(picture), "image/png")}
        made = self.http.post("/api/sessions", data={"prompt": prompt, **fields}, files=files or None)
        assert made.status_code == 201, made.text
        self.use(made.json())
        return made.json()

    def use(self, made: dict[str, Any]) -> None:
        self.name, self.secret = made["id"], made["secret"]

    def request(self, method: str, path: str = "", **kwargs: Any) -> httpx.Response:
        headers = {"x-session-secret": self.secret}
        return self.http.request(method, f"/api/sessions/{self.name}{path}", headers=headers, **kwargs)

    def post(self, path: str, **kwargs: Any) -> dict[str, Any]:
        answer = self.request("POST", path, **kwargs)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    def picture(self, path: str, picture: np.ndarray | None, **fields: Any) -> dict[str, Any]:
        files = {} if picture is None else {"image": ("p.png", png_of(picture), "image/png")}
        return self.post(path, data=fields, files=files or None)

    def connect(self) -> ClientConnection:
        return connect(f"{self.address.replace('http', 'ws')}/api/sessions/{self.name}/stream", max_size=None)

    def watch(
        self,
        until: int,
        form: str = "png",
        at: dict[int, Callable[[], object]] | None = None,
        seen: Seen | None = None,
        **hello: Any,
    ) -> Seen:
        """Takes frames as fast as they come until there are `until`; `at`: when so many have come, something is done."""
        seen, due, latest = seen or Seen(), sorted((at or {}).items()), time.monotonic() + SECONDS
        with self.connect() as socket:
            said = {"secret": self.secret, "format": form, **hello}
            socket.send(json.dumps(said if self.token is None else {"token": self.token, **said}))
            while True:
                end = seen.take(socket.recv(timeout=30), form)
                assert time.monotonic() < latest, f"frame {until} has not come: {seen.events[-3:]}"
                if end is None:
                    continue
                if due and end >= due[0][0]:
                    due.pop(0)[1]()
                socket.send(json.dumps({"type": "shown", "frame": end}))
                if end >= until:
                    return seen

    def until_the_end(self) -> Seen:
        """Takes all that comes until the server closes the connection."""
        seen, latest = Seen(), time.monotonic() + SECONDS
        with self.connect() as socket, suppress(ConnectionClosed):
            said = {"secret": self.secret, "format": "h264"}
            socket.send(json.dumps(said if self.token is None else {"token": self.token, **said}))
            while True:
                end = seen.take(socket.recv(timeout=30), "h264")
                assert time.monotonic() < latest, f"the session has not ended: {seen.events[-3:]}"
                if end is not None:
                    with suppress(ConnectionClosed):  # what was sent before is still to be read
                        socket.send(json.dumps({"type": "shown", "frame": end}))
        return seen
