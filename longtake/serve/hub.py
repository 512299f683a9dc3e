"""All sessions of a server: who is let in, who waits, who has been idle, and which can be opened again."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from longtake.lock import locked
from longtake.outputs import check_output_folder, writing
from longtake.serve import store
from longtake.serve.capacity import Memory
from longtake.serve.counts import Counts
from longtake.serve.devices import Devices
from longtake.serve.engine import Lost, Output
from longtake.serve.errors import ApiError, not_found, told
from longtake.serve.live import Live, Stage
from longtake.serve.recording import Recording
from longtake.serve.security import Allowance, same
from longtake.serve.settings import ServeSettings
from longtake.serve.store import Saved, Stored
from longtake.serve.timeline import Beginning, Timeline

logger = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_OPEN_SECONDS = 60.0  # for which who is let in next waits for a device that does not answer
_SAVE_SECONDS = 20.0  # in which a session that is put away is saved
_MEAN_OF = 16  # sessions over whose lengths a wait is estimated


@dataclass(frozen=True)
class _Waiting:
    """A session that has no place yet, and the engine's operation that will open it."""

    live: Live
    call: tuple[Any, ...]
    values: dict[str, Any] = field(default_factory=dict)


class Hub:
    """Lives in the event loop. Make it there, `start` it, `stop` it.

    Args: `builds` make the generators, one for each device, in the thread or process that will own it.
    """

    def __init__(self, builds: Sequence[Callable[[], Any]], settings: ServeSettings) -> None:
        self.settings = settings
        self.live: dict[str, Live] = {}
        self.stored: dict[str, Stored] = {}
        self.waiting: deque[_Waiting] = deque()
        self.ending = False
        self.memory = Memory()
        self.counts = Counts()
        self.stage: Stage | None = None
        self._lanes: dict[str, Live] = {}
        self._refused: WeakKeyDictionary[Live, ApiError] = WeakKeyDictionary()
        self._lengths: deque[float] = deque(maxlen=_MEAN_OF)
        self._creates = Allowance(settings.limits.creates_per_minute, 60)
        self._loop = asyncio.get_running_loop()
        self._admitting = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ticking: asyncio.Task[Any] | None = None
        self._alone = ExitStack()  # in its folder
        self.devices = Devices(
            builds, self._on_output, settings.blocks_ahead, settings.history_blocks, settings.max_sessions
        )

    async def start(self) -> None:
        """Returns when sessions can be opened. Raises: LongtakeError when they never can."""
        check_output_folder(self.settings.folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._alone.enter_context(locked(self.settings.folder, "give this server another --folder"))
        self.stored = await asyncio.to_thread(store.read_all, self.settings.folder)
        self.model = model = await self.devices.start()
        sizes = model.height, model.width, model.fps, model.block_frames, self.settings.blocks_ahead
        self.stage = await asyncio.to_thread(Stage.of, *sizes)
        self._ticking = self._later(self._tick())

    @property
    def ready(self) -> bool:
        return self.stage is not None and not self.ending and self.devices.most > 0

    async def stop(self) -> None:
        """Saves and ends all sessions when the block in the making has come out; can be called again."""
        if self.ending:
            return
        self.ending = True
        for live in list(self.live.values()):
            await self._put_away(live, "ending", 1001)
        if self._ticking is not None:
            self._ticking.cancel()
        await self.devices.stop()
        self._alone.close()

    def _later(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _on_output(self, output: Output) -> None:
        """From the engine's threads."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._take, output)

    def _take(self, output: Output) -> None:
        live = self._lanes.get(output.session)
        if live is None:
            return
        if isinstance(output, Lost):
            error = told(output.error)
            live.tell("error", **error.body())
            self._later(self.end(live, "out_of_memory" if error.code == "out_of_memory" else "failed"))
        else:
            live.take(output)

    # ---- finding and letting in -------------------------------------------------------------------------------------
    def find(self, name: str, secret: str | None) -> Live:
        """A session, for who knows its secret. Raises: ApiError."""
        live = self.live.get(name)
        if not _knows(live, secret) or live is None:
            raise not_found()
        live.touched = monotonic()
        return live

    async def create(self, beginning: Beginning, picture: NDArray[np.uint8] | None) -> dict[str, Any]:
        """A new session, which plays as soon as there is room. Raises: ApiError."""
        self._check_room()
        name, secret = _new_names()
        live = self._add(name, digest(secret), Timeline(beginning))
        values = {"seed": beginning.seed, "negative": beginning.negative, "guidance": beginning.guidance}
        self.waiting.append(_Waiting(live, ("open", live.lane, picture, beginning.prompt), values))
        await self._begun(live)
        return {"secret": secret, **self.standing(live)}

    async def open(self, name: str, secret: str, save: int | None) -> dict[str, Any]:
        """A session as it was saved, in the place of the one that plays, if it does. Raises: ApiError."""
        async with self._opening:  # two at once would write one folder
            live = await self._reopened(name, secret, save)
        await self._begun(live)
        return {"secret": secret, **self.standing(live)}

    async def _reopened(self, name: str, secret: str, save: int | None) -> Live:
        self.check_ready()
        stored = self._stored(name)
        if not _knows(stored, secret) or stored is None:
            raise not_found()
        chosen = _chosen(stored, save)
        self._check_room()
        if (playing := self.live.get(name)) is not None:
            await self.end(playing, "replaced")
            stored = self.stored.get(name, stored)  # with a save that was on its way
            chosen = _chosen(stored, save)
        live = self._add(name, stored.secret, chosen.timeline.copy())
        live.saves = list(stored.saves)
        try:
            with writing(live.folder):
                await live.stand_at(chosen.frame)
        except BaseException:
            await self.end(live, "failed")
            raise
        file = store.save_file(live.folder, chosen.save)
        self.waiting.append(_Waiting(live, ("restore", live.lane, file, chosen.number, chosen.past)))
        return live

    def _stored(self, name: str) -> Stored | None:
        live = self.live.get(name)
        return self.stored.get(name) if live is None else Stored(live.folder, live.secret, tuple(live.saves))

    async def fork(self, live: Live) -> dict[str, Any]:
        """A branch of a session. Raises: ApiError."""
        self._check_room()
        device = self.devices.of(live.lane)
        if device is None or device.free < 1:
            raise ApiError(503, "full", "there is no room for a branch", "end another session, or come back later")
        name, secret = _new_names()
        branch = self._add(name, digest(secret), live.timeline.copy())
        branch.state, branch.engine = "starting", device.engine
        device.names.add(branch.lane)
        try:
            frame = await live.fork(branch)
        except BaseException:
            await self.end(branch, "failed", forget=True)
            raise
        self.counts.opened += 1
        return {"secret": secret, "frame": frame, **self.standing(branch)}

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

    def _add(self, name: str, secret: bytes, timeline: Timeline) -> Live:
        assert self.stage is not None
        folder, limits = self.settings.folder / name, self.settings.limits
        with writing(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        recording = Recording(folder, self.stage.head, limits.recording_bytes)
        live = Live(name, secret, timeline, recording, self.stage, folder, limits, self.counts)
        self.live[name] = self._lanes[live.lane] = live
        self._later(self._forget_oldest())
        return live

    async def _forget_oldest(self) -> None:
        """Bounds what lies on the disk."""
        folders = await asyncio.to_thread(_oldest_first, self.settings.folder)
        ended = [folder for folder in folders if folder.name not in self.live]
        gone = ended[: max(0, len(ended) - self.settings.limits.kept_sessions)]
        for folder in gone:  # at once, and before anything is removed: what is not listed is not opened meanwhile
            self.stored.pop(folder.name, None)
        for folder in gone:
            await asyncio.to_thread(store.remove, folder)

    async def _begun(self, live: Live) -> None:
        """Lets in who can be. Raises: ApiError when `live` could not be opened."""
        await asyncio.shield(self._later(self._admit()))  # goes on for the others when this one's client has gone
        if (error := self._refused.pop(live, None)) is not None:
            raise error
        if live.state == "ended":
            raise ApiError(409, "conflict", "the session has ended meanwhile", "open it again")

    async def _admit(self) -> None:
        """Opens the sessions that wait as far as there is room."""
        async with self._admitting:
            while self.waiting and (device := self.devices.roomiest()):
                waiting = self.waiting.popleft()
                live = waiting.live
                live.state, live.place, live.estimate = "starting", None, None
                live.engine, live.created = device.engine, monotonic()
                device.names.add(live.lane)
                try:
                    async with asyncio.timeout(_OPEN_SECONDS):
                        await asyncio.wrap_future(device.engine.call(*waiting.call, **waiting.values))
                except Exception as error:
                    if told(error).status_code == 500:
                        logger.exception("session %s cannot be opened", live.name)
                    if self._leave(live, "failed"):
                        self._refused[live] = told(error)
                        await live.end("failed")
                else:
                    self.counts.opened += 1
                    live.tell_state()
            for place, waiting in enumerate(self.waiting, 1):
                waiting.live.wait_at(place, self._estimate(place))

    def _estimate(self, place: int) -> float | None:
        """Seconds until so many places are free, by how long sessions have lasted; None: none has ended yet."""
        if not self._lengths:
            return None
        return round(place / max(1, self.devices.most) * sum(self._lengths) / len(self._lengths), 1)

    def standing(self, live: Live) -> dict[str, Any]:
        """What who opens a session is told."""
        return {"id": live.name, "state": live.state, "place": live.place, "estimate_seconds": live.estimate}

    # ---- letting go -------------------------------------------------------------------------------------------------
    async def end(self, live: Live, reason: str, *, forget: bool = False) -> None:
        """Ends a session and lets the next one in; `forget`: what lies on the disk goes, too."""
        if not self._leave(live, reason, forget=forget):
            return
        listed = list(live.saves)
        await live.end(reason, reopens=bool(live.saves) and not forget)
        if live.saves != listed and not forget and live.name not in self.live:  # one that was on its way is there now
            self.stored[live.name] = Stored(live.folder, live.secret, tuple(live.saves))
        if forget or not live.saves and reason != "ending":
            await asyncio.to_thread(store.remove, live.folder)
        if not self.ending:
            await self._admit()

    def _leave(self, live: Live, reason: str, *, forget: bool = False) -> bool:
        """Takes a session off the list; False when it was off already."""
        if self._lanes.pop(live.lane, None) is None:
            return False
        del self.live[live.name]
        if any(one.live is live for one in self.waiting):
            self.waiting = deque(one for one in self.waiting if one.live is not live)
        else:
            self._lengths.append(monotonic() - live.created)
        self.counts.end(reason)
        if (device := self.devices.of(live.lane)) is not None:
            device.names.discard(live.lane)
            device.engine.call("close", live.lane)
        self.stored.pop(live.name, None)
        if live.saves and not forget:
            self.stored[live.name] = Stored(live.folder, live.secret, tuple(live.saves))
        return True

    async def _put_away(self, live: Live, reason: str, code: int = 1000) -> None:
        """Ends a session that can be opened again where it was."""
        if live.state in ("playing", "paused") and live.made:
            try:
                async with asyncio.timeout(_SAVE_SECONDS):
                    await live.save()
            except Exception:  # whatever it was, it ends; the others that are put away after it must not be lost for it
                logger.exception("session %s cannot be saved", live.name)
        live.code = code
        await self.end(live, reason)

    async def _tick(self) -> None:
        """Each second."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            try:
                await self._look_after()
            except Exception:  # of one session or device; the next second must come
                logger.exception("sessions cannot be looked after")

    async def _look_after(self) -> None:
        """Tells how sessions do, and puts those away that have been idle or have lasted too long."""
        limits = self.settings.limits
        self.memory = await self.devices.measure_memory()
        now = monotonic()
        for live in list(self.live.values()):
            if live.state == "playing":
                live.tell("stats", **live.stats(self.memory.used))
            if not live.viewers and now - live.touched > limits.idle_seconds:
                await self._put_away(live, "idle")
            elif now - live.created > limits.total_seconds:
                await self._put_away(live, "time")

    def rate(self) -> float:
        """Frames a second while making them, over all sessions."""
        rates = [rate for live in self.live.values() if (rate := live.rate())]
        return sum(rates) / len(rates) if rates else 0.0

    def info(self, formats: Iterable[str]) -> dict[str, Any]:
        """The body of `GET /api/info`."""
        self.check_ready()
        assert self.stage is not None
        stream = self.stage.public("h264")
        return {
            "model": asdict(self.model),
            "stream": {key: stream[key] for key in ("height", "width", "codec")} | {"formats": list(formats)},
            "limits": asdict(self.settings.limits) | {"blocks_ahead": self.settings.blocks_ahead},
            "memory": {
                "used_bytes": self.memory.used,
                "held_bytes": self.memory.held,
                "host_bytes": self.memory.host,
                "host_seconds": self.memory.host_seconds,
            },
            "sessions": {
                "most": self.devices.most,
                "now": self.devices.playing,
                "queued": len(self.waiting),
                **self.devices.measured,
            },
        }


def digest(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def _chosen(stored: Stored, save: int | None) -> Saved:
    """A save by its number, None: the latest. Raises: ApiError."""
    if not (found := [one for one in stored.saves if save in (None, one.save)]):
        raise ApiError(404, "not_found", "there is no such save", "leave its number out for the latest")
    return found[-1]


def _knows(session: Live | Stored | None, secret: str | None) -> bool:
    """Whether a secret is that of a session; as long for one that is not there."""
    wanted = secrets.token_bytes(32) if session is None else session.secret
    return same(digest(secret or "").hex(), wanted.hex())


def _new_names() -> tuple[str, str]:
    """A session's name and secret."""
    return store.new_name(), secrets.token_urlsafe(32)


def _oldest_first(parent: Path) -> list[Path]:
    """The folders of sessions in a folder by when they were last changed."""

    def changed(folder: Path) -> float:
        try:
            return folder.stat().st_mtime
        except OSError:
            return 0.0

    try:
        return sorted((path for path in parent.iterdir() if store.is_own(path)), key=changed)
    except OSError:  # somebody has removed it
        return []
