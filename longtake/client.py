"""A client of the live server: sessions that are steered from Python, frames as they come.

    with Client("http://127.0.0.1:8765") as client:
        session = client.create("a red circle drifts to the right", image=Path("photo.jpg").read_bytes())
        for chunk in session.frames():          # chunk.frames: uint8 [T, h, w, 3]
            ...
            session.prompt("a red circle climbs")

Knows the protocol of `docs/serving.md` alone, and nothing of the server's code. Needs `longtake[serve]`.
"""

from __future__ import annotations

import io
import json
import secrets
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPSConnection
from time import monotonic
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from longtake.errors import LongtakeError

_HEAD = struct.Struct("<III")
_SECONDS = 120.0


class LiveError(LongtakeError):
    """What the server answered to a request that it did not do; `code` as in `docs/serving.md`."""

    def __init__(self, code: str, message: str, fix: str) -> None:
        super().__init__(f"{message}; {fix}" if fix else message)
        self.code = code


@dataclass(frozen=True)
class Chunk:
    """Frames `first`, `first + 1`, ..., uint8 [T, h, w, 3] (`png`), or as they came, under change `number`."""

    first: int
    count: int
    number: int
    payload: bytes
    form: str

    @property
    def parts(self) -> list[bytes]:
        """A PNG or an access unit of H.264 for each frame."""
        parts, rest = [], memoryview(self.payload)
        while rest:
            (length,) = struct.unpack_from("<I", rest)
            parts.append(bytes(rest[4 : 4 + length]))
            rest = rest[4 + length :]
        return parts

    @property
    def frames(self) -> NDArray[np.uint8]:
        """uint8 [T, h, w, 3] of a `png` stream."""
        from PIL import Image

        return np.stack([np.array(Image.open(io.BytesIO(part))) for part in self.parts])


class Client:
    """A server at an address, with its token where it has one."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self._address, self._token = urlsplit(address), token

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def info(self) -> dict[str, Any]:
        """The model, the limits, how full it is."""
        return json.loads(self.request("GET", "/api/info"))

    def create(self, prompt: str, image: bytes | None = None, **fields: Any) -> LiveSession:
        """A new session. Args: `image`, a picture file; `fields`: seed, guidance, negative. Raises: LiveError."""
        made = json.loads(self.request("POST", "/api/sessions", *_form({"prompt": prompt, **fields}, image)))
        return LiveSession(self, made["id"], made["secret"])

    def open(self, name: str, secret: str, save: int | None = None) -> LiveSession:
        """A session as it was saved. Raises: LiveError."""
        fields = {"id": name, "secret": secret} | ({} if save is None else {"save": save})
        made = json.loads(self.request("POST", "/api/sessions/open", *_form(fields, None)))
        return LiveSession(self, made["id"], made["secret"])

    def request(
        self, method: str, path: str, body: bytes | None = None, kind: str | None = None, secret: str | None = None
    ) -> bytes:
        """The body of an answer. Raises: LiveError for an error, OSError where nothing answers."""
        secure = self._address.scheme == "https"
        connection = (HTTPSConnection if secure else HTTPConnection)(self._address.netloc, timeout=_SECONDS)
        said = {"authorization": self._token and f"Bearer {self._token}", "x-session-secret": secret}
        headers = {name: value for name, value in {**said, "content-type": kind}.items() if value}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            try:
                raise LiveError(**json.loads(data)["error"])
            except (ValueError, KeyError, TypeError):
                raise LiveError("failed", f"the server answered {answer.status}", "") from None
        return data

    def socket(self, path: str) -> Any:
        """A WebSocket."""
        from websockets.sync.client import connect

        scheme = {"http": "ws", "https": "wss"}[self._address.scheme]
        return connect(f"{scheme}://{self._address.netloc}{path}", max_size=None, compression=None)

    @property
    def token(self) -> str | None:
        return self._token


class LiveSession:
    """One session; each method as the route of that name in `docs/serving.md`. Raises: LiveError.

    `events` are those of the stream so far.
    """

    def __init__(self, client: Client, name: str, secret: str) -> None:
        self.client, self.name, self.secret = client, name, secret
        self.events: list[dict[str, Any]] = []
        self._shown = _Shown(None)

    def _ask(self, method: str, path: str = "", body: bytes | None = None, kind: str | None = None) -> bytes:
        return self.client.request(method, f"/api/sessions/{self.name}{path}", body, kind, self.secret)

    def _post(self, path: str, **values: Any) -> dict[str, Any]:
        return json.loads(self._ask("POST", path, json.dumps(values).encode(), "application/json"))

    def state(self) -> dict[str, Any]:
        return json.loads(self._ask("GET"))

    def prompt(self, prompt: str, *, drop: bool = True) -> dict[str, Any]:
        return self._post("/prompt", prompt=prompt, drop=drop)

    def image(self, image: bytes | None, *, drop: bool = True) -> dict[str, Any]:
        return json.loads(self._ask("POST", "/image", *_form({"drop": drop}, image)))

    def target(self, image: bytes | None, *, drop: bool = True) -> dict[str, Any]:
        return json.loads(self._ask("POST", "/target", *_form({"drop": drop}, image)))

    def pause(self) -> dict[str, Any]:
        return self._post("/pause")

    def resume(self) -> dict[str, Any]:
        return self._post("/resume")

    def rewind(self, blocks: int | None = None, *, to_frame: int | None = None) -> dict[str, Any]:
        return self._post("/rewind", **({"to_frame": to_frame} if blocks is None else {"blocks": blocks}))

    def fork(self) -> LiveSession:
        made = self._post("/fork")
        return LiveSession(self.client, made["id"], made["secret"])

    def save(self) -> dict[str, Any]:
        return self._post("/save")

    def delete(self) -> None:
        self._ask("DELETE")

    def recording(self) -> bytes:
        return self._ask("GET", "/recording")

    def script(self) -> bytes:
        return self._ask("GET", "/script")

    @property
    def shown(self) -> int:
        """Frames that count as shown."""
        return self._shown.now()

    @property
    def dry_seconds(self) -> float:
        """For how long there was nothing to show, after the first frames."""
        return self._shown.dry

    def frames(self, form: str = "png", from_frame: int | None = None, *, pace: float | None = None) -> Iterator[Chunk]:
        """Yields what comes, until the session ends. `pace`: frames a second in which they count as shown; None: at
        once, so that the server makes them as fast as it can. After a rewind, and a change that drops frames, `first`
        goes back. Raises: LiveError, and as `websockets`.
        """
        from websockets.exceptions import ConnectionClosed

        with self.client.socket(f"/api/sessions/{self.name}/stream") as socket:
            hello = {"token": self.client.token, "secret": self.secret, "format": form, "from_frame": from_frame}
            socket.send(json.dumps({name: value for name, value in hello.items() if value is not None}))
            self._shown = shown = _Shown(pace)
            while True:
                for frame in shown.due():
                    with suppress(ConnectionClosed):  # what the server has sent before is still to be read
                        socket.send(json.dumps({"type": "shown", "frame": frame}))
                try:
                    message = socket.recv(timeout=shown.wait())
                except TimeoutError:
                    continue
                except ConnectionClosed:
                    return
                if isinstance(message, str):
                    self._note(json.loads(message), shown)
                    continue
                first, count, number = _HEAD.unpack_from(message)
                shown.add(first, count)
                yield Chunk(first, count, number, message[_HEAD.size :], form)

    def _note(self, event: dict[str, Any], shown: _Shown) -> None:
        self.events.append(event)
        if event["type"] == "error":
            raise LiveError(**event["error"])
        if event["type"] == "rewound":
            shown.back(event["from_frame"])


class _Shown:
    """What of the frames that came has been shown, by a clock or at once."""

    def __init__(self, pace: float | None) -> None:
        self._pace = pace
        self._come, self._told = 0, -1
        self._frame, self._at = 0.0, 0.0
        self.dry = 0.0

    def now(self) -> int:
        """Frames shown."""
        self._move()
        return self._come if self._pace is None else int(self._frame)

    def add(self, first: int, count: int) -> None:
        if self._told < 0:
            self._frame = float(first)
        self._move()
        self._come = max(self._come, first + count)

    def back(self, frame: int) -> None:
        self._move()
        self._come, self._frame = min(self._come, frame), min(self._frame, frame)

    def wait(self) -> float | None:
        """Seconds until there is something to say."""
        return None if self._pace is None else 0.1

    def due(self) -> list[int]:
        """The number to be told, where it is another one."""
        now = self.now()
        if now == self._told or self._come == 0:
            return []
        self._told = now
        return [now]

    def _move(self) -> None:
        now = monotonic()
        if self._pace is not None and self._at:
            wanted = self._frame + (now - self._at) * self._pace
            self._frame = min(float(self._come), wanted)
            self.dry += (wanted - self._frame) / self._pace
        self._at = now


def _form(fields: dict[str, Any], image: bytes | None) -> tuple[bytes, str]:
    """A multipart body and its type."""
    edge, parts = secrets.token_hex(16), []
    for name, value in fields.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        parts.append(f'--{edge}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode())
    if image is not None:
        head = (
            'content-disposition: form-data; name="image"; filename="image"\r\ncontent-type: application/octet-stream'
        )
        parts.append(f"--{edge}\r\n{head}\r\n\r\n".encode() + image + b"\r\n")
    return b"".join([*parts, f"--{edge}--\r\n".encode()]), f"multipart/form-data; boundary={edge}"
