"""A server from its source to its end: weights, address, signals."""

from __future__ import annotations

import logging
import socket as socket_module
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from socket import socket
from typing import Any

import uvicorn

from longtake.errors import ConfigError
from longtake.inference.generator import Generator
from longtake.inference.source import Source
from longtake.serve.app import make_app
from longtake.serve.security import Guard
from longtake.serve.settings import ServeSettings

logger = logging.getLogger(__name__)

_DRAIN_SECONDS = 20


def config_of(app: Any, settings: ServeSettings) -> uvicorn.Config:
    """How uvicorn runs it: no access log (it would name sessions), small messages from clients alone."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_level="warning",
        server_header=False,
        ws="websockets-sansio",
        ws_max_size=settings.limits.message_bytes,
        ws_per_message_deflate=False,
        limit_concurrency=settings.limits.connections,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
    )


def serve(source: Source, devices: Sequence[str | None], settings: ServeSettings, say: Callable[[str], object]) -> None:
    """Serves the student of `source` on these devices until a signal ends it; `say` is told the address.

    Raises: LongtakeError for what cannot be served, before anything listens.
    """
    app = make_app([partial(Generator.build, source, device) for device in devices], settings)
    if not settings.is_local:
        say("what is sent can be read on the way: put a proxy with TLS in front")
    run_server(app, settings, say)


def run_server(app: Guard, settings: ServeSettings, say: Callable[[str], object]) -> None:
    """Serves an application until a signal ends it. Raises: LongtakeError when it cannot begin."""
    _check_address(settings.host, settings.port)
    server = LiveServer(app, settings, say)
    with suppress(KeyboardInterrupt, SystemExit):  # uvicorn raises its signal once more when all is put away, or exits
        server.run()
    if app.refused is not None:
        raise app.refused
    if not server.started:
        raise ConfigError(f"nothing is served at {settings.host}:{settings.port}; the log says why")
    say("ended; sessions are saved and can be opened again")


def _check_address(host: str, port: int) -> None:
    """Before weights are loaded. Raises: ConfigError where nothing can listen there."""
    try:
        family = socket_module.getaddrinfo(host, port, type=socket_module.SOCK_STREAM)[0][0]
        socket_module.create_server((host, port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"nothing can be served at {host}:{port}: {error.strerror}; give another --port, 0 for a free one, or "
            "another --host"
        ) from error


def address_of(host: str, port: int) -> str:
    """That which a browser is given."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class LiveServer(uvicorn.Server):
    """Says its address when it is ready, and ends in order: sessions are saved and viewers told before connections are
    cut.
    """

    def __init__(self, app: Guard, settings: ServeSettings, say: Callable[[str], object]) -> None:
        super().__init__(config_of(app, settings))
        self._app, self._say = app, say
        self._silent_ms = int(2000 * settings.limits.slow_seconds)

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            if hasattr(socket_module, "TCP_USER_TIMEOUT"):  # who takes nothing for so long has no connection any more
                for one in self.servers[0].sockets:
                    one.setsockopt(socket_module.IPPROTO_TCP, socket_module.TCP_USER_TIMEOUT, self._silent_ms)
            port = self.servers[0].sockets[0].getsockname()[1]
            self._say(address_of(self.config.host, port))

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        await self._app.drain()
        await super().shutdown(sockets)
