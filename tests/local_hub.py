"""A Hugging Face hub on this machine, for its own client: one repository, over HTTP, as slowly as is asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub(ThreadingHTTPServer):
    """`files` of the repository `name`; `gated`, nobody may read them; `pause`, seconds between pieces of `piece` bytes.
    `sent`: files whose contents were asked for.
    """

    daemon_threads = True

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.files, self.gated = name, dict(files), False
        self.pause, self.piece = 0.0, 1 << 16
        self.sent: list[str] = []

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if path.startswith(f"/api/models/{hub.name}"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            if "/tree/" in path:
                listed = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in hub.files.items()]
                return self._send(200, json.dumps(listed).encode(), body=body)
            told = {"id": hub.name, "modelId": hub.name, "sha": COMMIT, "siblings": siblings, "tags": []}
            return self._send(200, json.dumps(told).encode(), body=body)
        name = path.removeprefix(f"/{hub.name}/resolve/").partition("/")[2]
        if not path.startswith(f"/{hub.name}/") or name not in hub.files:
            return self._send(
                404, b"", body=body, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}
            )
        if hub.gated:
            told = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            return self._send(403, b"", body=body, **told)
        data = hub.files[name]
        head = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        begin = 0
        if asked := self.headers.get("Range"):
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
            head["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if body:
            hub.sent.append(name)
        self._send(206 if begin else 200, data[begin:], body=body, **head)

    def _send(self, status: int, data: bytes, *, body: bool, **head: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **head}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(data), self.server.piece) if body else ():
            try:
                self.wfile.write(data[start : start + self.server.piece])
            except OSError:  # the client went away
                return
            time.sleep(self.server.pause)


@contextmanager
def local_hub(name: str, files: Mapping[str, bytes]) -> Iterator[LocalHub]:
    """A hub that answers while the block runs."""
    with LocalHub(name, files) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join(10)
