"""All sessions of a server: who is let in, who waits, who has been idle, and where each lies on the disk."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.serve.engine import Engine, Lost, Output
from longtake.serve.errors import ApiError, not_found, told
from longtake.serve.live import Live, Stage
from longtake.serve.recording import Recording
from longtake.serve.security import Allowance, same
from longtake.serve.settings import ServeSettings
from longtake.serve.timeline import Beginning, Timeline

logger = logging.getLogger(__name__)

_TICK_SECONDS = 1.0


class Hub:
    """Lives in the event loop. Make it there, `start` it, `stop` it.

    Args: `build` makes the generator, in the engine's thread.
    """

    def __init__(self, build: Callable[[], Any], settings: ServeSettings) -> None:
        self.settings = settings
        self.live: dict[str, Live] = {}
        self.waiting: list[str] = []  # names of those that are queued, in order
        self._pictures: dict[str, NDArray[np.uint8] | None] = {}  # of those
        self._creates = Allowance(settings.limits.creates_per_minute, 60)
        self._loop = asyncio.get_running_loop()
        self.engine = Engine(build, self._on_output, settings.blocks_ahead)
        self._refused: dict[str, ApiError] = {}
        self.ending = False
        self.most = settings.max_sessions or 1
        self.memory = 0
        self.stage: Stage | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Returns when sessions can be opened."""
        self.settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.engine.start()
        self.generator = generator = await asyncio.wrap_future(self.engine.ready)
        block = generator.plan.block_frames * generator.encoders.vae.temporal_stride
        size = generator.settings.height, generator.settings.width
        self.stage = await asyncio.to_thread(Stage.of, *size, generator.fps, block, self.settings.blocks_ahead)
        self._tasks.append(asyncio.create_task(self._tick()))

    @property
    def ready(self) -> bool:
        return self.stage is not None and not self.ending

    async def stop(self) -> None:
        """Lets the block in the making come out, and ends all sessions."""
        self.ending = True
        for task in self._tasks:
            task.cancel()
        for live in list(self.live.values()):
            await live.end("ending", 1001)
        await asyncio.to_thread(self.engine.stop)

    def _on_output(self, output: Output) -> None:
        """From the engine's threads."""
        self._loop.call_soon_threadsafe(self._take, output)

    def _take(self, output: Output) -> None:
        live = self.live.get(output.session)
        if live is None:
            return
        if isinstance(output, Lost):
            error = told(output.error)
            live.tell("error", **error.body())
            reason = "out_of_memory" if error.code == "out_of_memory" else "failed"
            asyncio.create_task(self.end(live, reason))
        else:
            live.take(output)

    # ---- finding and letting in -------------------------------------------------------------------------------------
    def find(self, name: str, secret: str | None) -> Live:
        """A session, for who knows its secret. Raises: ApiError."""
        live = self.live.get(name)
        wanted = secrets.token_hex(32) if live is None else live.secret.hex()
        if not same(digest(secret or "").hex(), wanted) or live is None:
            raise not_found()
        live.touched = monotonic()
        return live

    async def create(self, beginning: Beginning, picture: NDArray[np.uint8] | None) -> dict[str, Any]:
        """A new session, which plays as soon as there is room. Raises: ApiError."""
        self._check_room()
        name, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        live = self._new(name, digest(secret), Timeline(beginning))
        self._pictures[name] = picture
        self.waiting.append(name)
        await self._admit()
        if (error := self._refused.pop(name, None)) is not None:
            raise error
        return {"secret": secret, **self.standing(live)}

    def check_ready(self) -> None:
        """Raises ApiError while sessions cannot be opened."""
        if not self.ready:
            raise ApiError(503, "ending", "the server is starting or ending", "ask /ready, and try again")

    def _check_room(self) -> None:
        self.check_ready()
        if not self._creates.take():
            raise ApiError(429, "too_many", "too many sessions were created in the last minute", "wait a minute")
        if len(self.waiting) >= self.settings.limits.queued:
            raise ApiError(503, "full", f"{len(self.waiting)} sessions are waiting already", "come back later")

    def _new(self, name: str, secret: bytes, timeline: Timeline) -> Live:
        assert self.stage is not None
        folder = self.settings.folder / name
        folder.mkdir(mode=0o700)
        recording = Recording(folder, self.stage.head, self.settings.limits.recording_bytes)
        live = Live(name, secret, timeline, recording, self.stage, self.engine, folder)
        self.live[name] = live
        return live

    async def _admit(self) -> None:
        """Opens the sessions that wait as far as there is room."""
        while self.waiting and self.playing < self.most:
            live = self.live[self.waiting.pop(0)]
            begin, picture = live.timeline.beginning, self._pictures.pop(live.name)
            live.state, live.place = "starting", None
            call = self.engine.call("open", live.name, picture, begin.prompt, seed=begin.seed, negative=begin.negative)
            try:
                await asyncio.wrap_future(call)
            except Exception as error:
                if told(error).status_code == 500:
                    logger.exception("session %s cannot be opened", live.name)
                self._refused[live.name] = told(error)
                await self.end(live, "failed")
            else:
                live.tell_state()
        for place, name in enumerate(self.waiting, 1):
            if self.live[name].place != place:
                self.live[name].place = place
                self.live[name].tell_state()

    def info(self, formats: list[str]) -> dict[str, Any]:
        """The body of `GET /api/info`."""
        self.check_ready()
        assert self.stage is not None
        rules, begin, sizes = self.generator.settings, self.generator.beginning, self.generator.model.config
        picture = "needed" if begin.needed else "none" if begin.picture == "none" else "optional"
        stream = self.stage.public("h264")
        return {
            "model": {
                "height": rules.height,
                "width": rules.width,
                "fps": rules.fps,
                "block_frames": self.stage.block_frames,
                "picture": picture,
                "target": sizes.image_dim is not None,
                "guidance": rules.guidance,
                "history_blocks": rules.history_blocks,
            },
            "stream": {key: stream[key] for key in ("height", "width", "codec")} | {"formats": formats},
            "limits": asdict(self.settings.limits) | {"blocks_ahead": self.settings.blocks_ahead},
            "sessions": {"most": self.most, "now": self.playing, "queued": len(self.waiting)},
        }

    @property
    def playing(self) -> int:
        """Sessions that have a place on the device."""
        return len(self.live) - len(self.waiting)

    def standing(self, live: Live) -> dict[str, Any]:
        """What who creates a session is told."""
        return {"id": live.name, "state": live.state, "place": live.place, "estimate_seconds": None}

    async def fork(self, live: Live) -> dict[str, Any]:
        """A branch of a session. Raises: ApiError."""
        raise ApiError(503, "full", "not yet", "")

    async def end(self, live: Live, reason: str, *, forget: bool = False) -> None:
        """Ends a session and lets the next one in; `forget`: what lies on the disk goes, too."""
        if self.live.pop(live.name, None) is None:
            return
        if live.name in self.waiting:
            self.waiting.remove(live.name)
            self._pictures.pop(live.name, None)
        self.engine.call("close", live.name)
        await live.end(reason)
        if forget:
            await asyncio.to_thread(_remove, live.folder)
        await self._admit()

    # ---- each second ------------------------------------------------------------------------------------------------
    async def _tick(self) -> None:
        limits = self.settings.limits
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self.memory = await asyncio.wrap_future(self.engine.call("memory"))
            now = monotonic()
            for live in list(self.live.values()):
                if live.state == "playing":
                    live.tell("stats", **live.stats(self.memory))
                if not live.viewers and now - live.touched > limits.idle_seconds:
                    await self.end(live, "idle")
                elif now - live.created > limits.total_seconds:
                    await self.end(live, "time")


def digest(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
