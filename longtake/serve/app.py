"""The application: routes, pages, the layer around them, and a hub for as long as it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from longtake.errors import LongtakeError
from longtake.serve import routes, stream
from longtake.serve.errors import not_found, tell_errors
from longtake.serve.hub import Hub
from longtake.serve.metrics import CONTENT_TYPE, text_of
from longtake.serve.security import Guard
from longtake.serve.settings import ServeSettings

STATIC = Path(__file__).parent / "static"


def make_app(builds: Sequence[Callable[[], Any]], settings: ServeSettings) -> Guard:
    """The application that serves the generators which `builds` make, as those of `Hub`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.hub = hub = Hub(builds, settings)
        try:
            await hub.start()
            yield
        except LongtakeError as error:
            guard.refuse(error)
            raise
        finally:
            await hub.stop()

    app = FastAPI(title="Longtake live", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(routes.router)
    app.include_router(stream.router)
    tell_errors(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(request: Request) -> JSONResponse:
        """Sessions can be opened."""
        is_ready = request.app.state.hub.ready
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Numbers for Prometheus."""
        return Response(text_of(request.app.state.hub), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        if not (STATIC / "index.html").is_file():
            raise not_found()
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/static", StaticFiles(directory=STATIC, check_dir=False), "static")

    async def drain() -> None:
        await app.state.hub.stop()

    guard = Guard(app, settings, drain)
    return guard
