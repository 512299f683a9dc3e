"""A server from its source to its end: weights, address, signals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import uvicorn

from longtake.inference.generator import Generator
from longtake.inference.source import Source
from longtake.serve.app import make_app
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


def serve(source: Source, device: str | None, settings: ServeSettings, say: Callable[[str], object]) -> None:
    """Serves the student of `source` until a signal ends it; `say` is told the address.

    Raises: LongtakeError for what cannot be served, before anything listens.
    """
    app = make_app(lambda: Generator.build(source, device), settings)
    if not settings.is_local:
        say("what is sent can be read on the way: put a proxy with TLS in front")
    say(f"http://{settings.host}:{settings.port}")
    uvicorn.Server(config_of(app, settings)).run()
