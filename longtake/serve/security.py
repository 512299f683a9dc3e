"""Who may ask at all: names by which the server is called, pages that may call it, the token, sizes and rates.

A layer around the whole application, so that no route can be forgotten. Must know no session.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from longtake.errors import LongtakeError
from longtake.serve.errors import ApiError
from longtake.serve.settings import LOCAL_HOSTS, ServeSettings

# Of a page: all from here, nothing inline, in nobody's frame. Blobs are what MediaSource plays.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; font-src 'self'; manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_PRIVATE = ("/api", "/openapi.json")


def same(given: str | None, wanted: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell how far they are."""
    return hmac.compare_digest((given or "").encode("utf-8", "surrogateescape"), wanted.encode())


class Guard:
    """The layer. Refuses foreign hosts and origins, requests without the token, and bodies that are too large.

    `drain` puts all sessions of the application away. `refused`: why it cannot begin, in words for who started it.
    """

    def __init__(self, app: Any, settings: ServeSettings, drain: Callable[[], Awaitable[None]]) -> None:
        self._app, self._settings, self.drain = app, settings, drain
        self.refused: LongtakeError | None = None
        self._hosts = {*LOCAL_HOSTS, *(name.lower() for name in (settings.host, *settings.hosts))}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, self._without_traceback(send))
            return
        try:
            self._check(scope)
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), _with_headers(send, scope["path"]))

    def _check(self, scope: dict[str, Any]) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _name(host) not in self._hosts:
            raise ApiError(403, "forbidden", "the server is not called by this name", "start it with --allow-host NAME")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, "forbidden", "another page asks", "open the page that this server gives")
        path, token = scope["path"], self._settings.token
        if scope["type"] == "http" and token is not None and self._is_private(path):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not same(given.strip(), token):
                raise ApiError(401, "unauthorized", "the token is missing or wrong", "send Authorization: Bearer TOKEN")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > self._settings.limits.body_bytes:
            raise _too_large(self._settings.limits.body_bytes)

    def _is_private(self, path: str) -> bool:
        return path.startswith(_PRIVATE) or (path.startswith("/metrics") and not self._settings.is_local)

    def _limited(self, receive: Any) -> Any:
        """Chunked bodies say no length before they come."""
        most, seen = self._settings.limits.body_bytes, 0

        async def limited() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise _too_large(most)
            return message

        return limited

    def refuse(self, error: LongtakeError) -> None:
        """The application cannot begin, for that reason."""
        self.refused = error

    def _without_traceback(self, send: Any) -> Any:
        """What cannot begin for a reason that is known ends in one line, which `refused` is."""

        async def without(message: dict[str, Any]) -> None:
            await send(message if self.refused is None else {**message, "message": ""})

        return without

    async def _refuse(self, error: ApiError, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            return
        await JSONResponse(error.body(), error.status_code)(scope, receive, _with_headers(send, scope["path"]))


def _name(host: str) -> str:
    """A host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _too_large(most: int) -> ApiError:
    return ApiError(413, "too_large", f"the request is larger than {most} bytes", "send a smaller picture")


def _with_headers(send: Any, path: str) -> Any:
    async def with_headers(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            for name, value in _HEADERS.items():
                headers[name] = value
            if path.startswith("/api"):
                headers["cache-control"] = "no-store"
            message["headers"] = headers.raw
        await send(message)

    return with_headers


class Allowance:
    """At most `count` of something in any `seconds`."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count, self._seconds = count, seconds
        self._times: deque[float] = deque(maxlen=count)

    def take(self) -> bool:
        """Whether one more is allowed now; it counts if it is."""
        now = monotonic()
        if len(self._times) == self._count and now - self._times[0] < self._seconds:
            return False
        self._times.append(now)
        return True
