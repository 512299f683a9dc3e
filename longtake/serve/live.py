"""A session as its clients know it: what is made, sent, recorded and remembered of it, in the order in which it holds.

Lives in the event loop. What the engine makes and what clients change goes through one queue and is worked off one by
one, so that a rewind finds nothing half-sent. Must know no request.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.outputs import whole_file, writing
from longtake.serve import store
from longtake.serve.counts import Counts
from longtake.serve.engine import Engine, Made, Turned
from longtake.serve.errors import ApiError
from longtake.serve.h264 import Headers, LiveEncoder, Size
from longtake.serve.lanes import Block
from longtake.serve.mp4 import head
from longtake.serve.pictures import thumbnail
from longtake.serve.recording import Recording
from longtake.serve.security import Allowance
from longtake.serve.settings import Limits
from longtake.serve.store import Saved, Stored
from longtake.serve.timeline import Change, Timeline
from longtake.serve.viewers import Chunk, Viewer
from longtake.serve.workers import WorkerEngine

logger = logging.getLogger(__name__)

_KEPT_CHUNKS = 8  # behind what was shown, for who comes back


@dataclass(frozen=True)
class Stage:
    """What all sessions of a server share: how the model's pictures are sent. Made by `of`."""

    size: Size
    fps: int
    headers: Headers
    head: bytes
    block_frames: int
    blocks_ahead: int

    @classmethod
    def of(cls, height: int, width: int, fps: int, block_frames: int, blocks_ahead: int) -> Stage:
        size = Size.of(height, width)
        headers = Headers.of(size, fps)
        return cls(size, fps, headers, head(headers, size, fps), block_frames, blocks_ahead)

    def public(self, form: str) -> dict[str, Any]:
        factor = self.size.factor if form == "png" else 1
        size = {"height": self.size.height // factor, "width": self.size.width // factor}
        return {"format": form, **size, "fps": self.fps, "codec": self.headers.codec, "block_frames": self.block_frames}


@dataclass
class Rate:
    """Frames made, and the seconds in which they were, over the latest blocks."""

    blocks: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=8))

    def __call__(self) -> float:
        frames, seconds = (sum(values) for values in zip(*self.blocks)) if self.blocks else (0, 0.0)
        return frames / seconds if seconds else 0.0


class Live:
    """One session. Made by the hub, which also ends it.

    Fields: `lane`, what engines call it: never the same for two that follow each other under one name, so that what is
    still on its way from the first is not taken for the second's; `state`, queued, starting, playing, paused or ended;
    `made` and `shown`, frames, of which none was made here before `begins`; `touched`, when a client last wanted
    something of it; `engine`, that of its device, None while it has no place.
    """

    def __init__(
        self,
        name: str,
        secret: bytes,
        timeline: Timeline,
        recording: Recording,
        stage: Stage,
        folder: Path,
        limits: Limits,
        counts: Counts,
    ) -> None:
        self.name, self.secret, self.timeline, self.recording = name, secret, timeline, recording
        self.lane = f"{name}-{secrets.token_hex(4)}"
        self.engine: Engine | WorkerEngine | None = None
        self.stage, self.folder, self.limits = stage, folder, limits
        self._allowance = Allowance(limits.changes_per_second, 1)
        self.state, self.made, self.shown, self.begins, self._counts = "queued", 0, 0, 0, counts
        self.place: int | None = None
        self.estimate: float | None = None
        self.blocks: deque[Block] = deque(maxlen=64)
        self.thumbnails: dict[int, bytes] = {}
        self.rewindable = 0
        self.saves: list[Saved] = []
        self.chunks: deque[Chunk] = deque()
        self.viewers: set[Viewer] = set()
        self.rate = Rate()
        self.code = 1000  # with which connections are closed
        self.created = self.touched = monotonic()
        self.asking = asyncio.Lock()  # requests that change it, one after the other
        self._encoder = LiveEncoder(stage.size, stage.fps)
        self._inbox: asyncio.Queue[Callable[[], Awaitable[None]] | asyncio.Event | None] = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())

    # ---- the queue --------------------------------------------------------------------------------------------------
    async def _work(self) -> None:
        try:
            while (step := await self._inbox.get()) is not None:
                if isinstance(step, asyncio.Event):
                    step.set()
                    continue
                try:
                    await step()
                except Exception as error:
                    logger.exception("session %s: a block could not be sent", self.name)
                    self.tell(
                        "error", error={"code": "failed", "message": type(error).__name__, "fix": "rewind, or reopen"}
                    )
        finally:  # it has ended: nobody may wait for what is never done
            while not self._inbox.empty():
                if isinstance(step := self._inbox.get_nowait(), asyncio.Event):
                    step.set()

    def take(self, output: Made | Turned) -> None:
        """What the engine has made or done."""
        step = partial(self._take, output) if isinstance(output, Made) else partial(self._step, output.result)
        self._inbox.put_nowait(step)

    async def settled(self) -> None:
        """Returns when all that came out so far is sent and recorded, or the session has ended."""
        if not self._worker.done():
            self._inbox.put_nowait(done := asyncio.Event())
            await done.wait()

    async def _turn(self, step: Callable[[Any], Awaitable[None]], operation: str, *args: Any) -> Any:
        """Asks the engine for an operation, and calls `step` with its answer between the blocks where it was done.

        Raises: what either raises; a step that failed (a full disk), or never came since the session ended, must not
        look as if it were done.
        """
        came: list[Exception | None] = []

        async def noted(answer: Any) -> None:
            try:
                with writing(self.folder):
                    await step(answer)
            except Exception as error:
                came.append(error)
                raise
            came.append(None)

        assert self.engine is not None
        self._step = noted
        answer = await asyncio.wrap_future(self.engine.call(operation, self.lane, *args))
        await self.settled()
        if not came:
            raise ApiError(409, "conflict", "the session has ended meanwhile", "open another one")
        if came[0] is not None:
            raise came[0]
        return answer

    async def _take(self, made: Made) -> None:
        block, frames = made.block, made.frames
        if self.state == "ended":
            return
        if made.first == block.first:
            small = await asyncio.to_thread(thumbnail, frames[-1])
            self.blocks.append(block)
            self.thumbnails[block.first] = small
            self._forget_old()
            self.rewindable = made.rewindable
            shown = "data:image/jpeg;base64," + base64.b64encode(small).decode()
            self.tell("block", **block.public(), rewindable=made.rewindable, thumbnail=shown)
            self.state = "playing" if self.state == "starting" else self.state
        was_over = self.recording.is_over
        chunk = await asyncio.to_thread(self._encoded, made.first, block.number, frames)
        if self.recording.is_over and not was_over:
            told = ApiError(507, "failed", f"the recording has ended at frame {made.first}", "download what there is")
            self.tell("recording_ended", frame=made.first, **told.body())
        self.chunks.append(chunk)
        self._counts.frames += len(frames)
        self._counts.stalls += any(0 < viewer.shown == self.made for viewer in self.viewers)
        self.made = chunk.end
        if self.made == block.first + block.count and block.count > 1:  # no given picture
            self.rate.blocks.append((block.count, made.seconds))
        for viewer in self.viewers:
            viewer.send(chunk)

    def _encoded(self, first: int, number: int, frames: NDArray[np.uint8]) -> Chunk:
        units = self._encoder.encode(frames)
        return Chunk(first, number, frames, units, self.recording.append(units, first))

    def _forget_old(self) -> None:
        while len(self.chunks) > _KEPT_CHUNKS and self.chunks[0].end <= self.shown:
            self.chunks.popleft()
        for first in sorted(self.thumbnails)[: -self.blocks.maxlen]:  # type: ignore[operator]
            del self.thumbnails[first]

    def _back(self, frame: int, number: int, reason: str) -> None:
        """Frames from `frame` on are void."""
        self.rewindable -= sum(block.first >= frame for block in self.blocks)
        self.chunks = deque(chunk for chunk in self.chunks if chunk.first < frame)
        self.blocks = deque((block for block in self.blocks if block.first < frame), self.blocks.maxlen)
        self.thumbnails = {first: small for first, small in self.thumbnails.items() if first < frame}
        self.recording.cut(frame)
        self.made, self.shown = frame, min(self.shown, frame)
        for viewer in self.viewers:
            viewer.forget(frame)
        self.tell("rewound", from_frame=frame, number=number, reason=reason)

    # ---- what clients ask for ---------------------------------------------------------------------------------------
    def check_running(self) -> None:
        if self.state not in ("playing", "paused", "starting"):
            raise ApiError(409, "conflict", f"the session is {self.state}", "wait until it plays, or open another one")

    def _check_many(self, picture: bytes | None) -> None:
        """Raises ApiError for changes that come too fast, or of which there have been too many, or whose pictures take
        too much: each is remembered.
        """
        if not self._allowance.take():
            raise ApiError(429, "too_many", "changes come too fast", "wait a second")
        if self.timeline.number >= self.limits.changes:
            raise ApiError(409, "conflict", f"the session has had {self.limits.changes} changes", "open another one")
        if picture is not None and self.timeline.pictures_bytes + len(picture) > self.limits.kept_pictures_bytes:
            told = f"the session's pictures take more than {self.limits.kept_pictures_bytes >> 20} MiB"
            raise ApiError(409, "conflict", told, "open another one")

    async def change(self, kind: str, value: Any, picture: bytes | None, drop: bool) -> dict[str, Any]:
        """Another prompt, image or target; `picture`, its PNG for the script."""
        asked = monotonic()
        async with self.asking:
            self.check_running()
            self._check_many(picture)
            self.timeline.number = number = self.timeline.number + 1

            async def step(answer: tuple[int, bool]) -> None:
                frame, dropped = answer
                if dropped:
                    self._back(frame, number, "drop")
                    self.timeline.cut(frame, keep=True)
                prompt = value if kind == "prompt" else self.timeline.prompt
                self.timeline.add(changed := Change(number, kind, frame, prompt, picture))
                self.tell("change", **changed.public(), dropped=dropped)

            frame, _ = await self._turn(step, "change", kind, value, number, asked, drop)
            return {"from_frame": frame, "number": number}

    async def rewind(self, blocks: int | None, to_frame: int | None) -> dict[str, Any]:
        """Takes back so many blocks, or those that begin at `to_frame` or later."""
        async with self.asking:
            self.check_running()

            async def step(answer: tuple[int, int]) -> None:
                self._back(*answer, "rewind")
                self.timeline.cut(answer[0], keep=False)

            frame, number = await self._turn(step, "rewind", blocks, to_frame)
            return {"from_frame": frame, "number": number}

    async def save(self) -> dict[str, int]:
        """Writes it down, to be opened again; of many saves the latest are kept."""
        async with self.asking:
            self.check_running()
            save = self.saves[-1].save + 1 if self.saves else 1

            async def step(answer: tuple[int, int, int]) -> None:
                saves = [*self.saves, Saved(save, *answer, self.timeline.copy())][-self.limits.saves :]
                await asyncio.to_thread(store.write, Stored(self.folder, self.secret, tuple(saves)))
                self.saves = saves
                self.tell("saved", **saves[-1].public())

            await self._turn(step, "save", store.save_file(self.folder, save))
            return self.saves[-1].public()

    async def fork(self, branch: Live) -> int:
        """`branch`, which was made for it and is as good as new, goes on from here. Returns: its frame."""
        async with self.asking:
            self.check_running()
            copied = asyncio.Event()

            async def wait() -> None:
                await copied.wait()

            async def step(frame: int) -> None:
                branch.recording = await asyncio.to_thread(self.recording.copy, branch.folder)
                branch.chunks, branch.blocks = self.chunks.copy(), self.blocks.copy()
                branch.thumbnails, branch.rewindable = dict(self.thumbnails), self.rewindable
                branch.timeline, branch.begins = self.timeline.copy(), self.begins
                branch.made, branch.shown = self.made, self.shown
                branch.state = self.state
                self.tell("forked", id=branch.name, frame=frame)

            branch._inbox.put_nowait(wait)  # its blocks may come before it knows where it stands
            try:
                return await self._turn(step, "fork", branch.lane)
            finally:
                copied.set()

    async def hold(self, paused: bool) -> None:
        """Pauses, or goes on."""
        async with self.asking:
            self.check_running()

            async def step(answer: None) -> None:
                self.state = "paused" if paused else "playing"
                self.tell_state()

            await self._turn(step, "hold", paused)

    def saw(self, viewer: Viewer, frame: int) -> None:
        """A viewer has shown so many frames: of those that there are, and none before it was opened here."""
        viewer.shown = max(self.begins, min(frame, self.made))
        self.touched = monotonic()
        shown = max(one.shown for one in self.viewers)
        if shown != self.shown:
            self.shown = shown
            if self.engine is not None:
                self.engine.call("shown", self.lane, shown, monotonic())

    def join(self, viewer: Viewer, frame: int | None) -> None:
        """A viewer begins, at the chunk that holds `frame`."""
        self.touched = monotonic()
        start = self.shown if frame is None else frame
        viewer.shown = max(self.begins, min(start, self.made))
        self.viewers.add(viewer)
        for chunk in self.chunks:
            if chunk.end > start:
                viewer.send(chunk)

    def leave(self, viewer: Viewer) -> None:
        self.viewers.discard(viewer)
        self.touched = monotonic()

    # ---- what clients are told --------------------------------------------------------------------------------------
    def tell(self, event: str, /, **fields: Any) -> None:
        """An event for all viewers."""
        for viewer in self.viewers:
            viewer.tell({"type": event, **fields})

    def tell_state(self) -> None:
        self.tell("state", **self.public())

    def public(self) -> dict[str, Any]:
        """The state of `docs/serving.md`."""
        begin, changes = self.timeline.beginning, self.timeline.changes
        scene = next((one for one in changes[::-1] if one.kind == "image"), None)
        target = next((one for one in changes[::-1] if one.kind in ("image", "target")), None)
        return {
            "id": self.name,
            "state": self.state,
            "place": self.place,
            "estimate_seconds": self.estimate,
            "frame": self.made,
            "shown": self.shown,
            "first_prompt": begin.prompt,
            "prompt": self.timeline.prompt,
            "number": changes[-1].number if changes else 0,
            "seed": begin.seed,
            "guidance": begin.guidance,
            "has_picture": (begin.picture if scene is None else scene.picture) is not None,
            "has_target": target is not None and target.kind == "target" and target.picture is not None,
            "rewindable": self.rewindable,
            "blocks": [block.public() for block in list(self.blocks)[-self.rewindable :] if self.rewindable],
            "changes": [change.public() for change in changes],
            "saves": [one.public() for one in self.saves],
            "recording_ended": self.recording.is_over,
            "recording_seconds": round((self.recording.end - self.recording.first) / self.stage.fps, 3),
        }

    def stats(self, memory: int) -> dict[str, Any]:
        """The fields of the event `stats`."""
        rate = self.rate()
        return {
            "frames_per_second": round(rate, 2),
            "real_time_factor": round(rate / self.stage.fps, 3),
            "blocks_ahead": round((self.made - self.shown) / self.stage.block_frames, 2),
            "memory_bytes": memory,
        }

    def wait_at(self, place: int, estimate: float | None) -> None:
        """It is queued there."""
        if (self.place, self.estimate) != (place, estimate):
            self.place, self.estimate = place, estimate
            self.tell_state()

    async def stand_at(self, frame: int) -> None:
        """It goes on from a save, and with it the recording; frames behind it are kept as `earlier.mp4`."""
        self.made = self.shown = self.begins = frame
        await asyncio.to_thread(self._cut_recording, frame)

    def _cut_recording(self, frame: int) -> None:
        if self.recording.end > frame:
            with whole_file(self.folder / "earlier.mp4") as earlier, earlier.open("wb") as file:
                file.writelines(self.recording.read())
        self.recording.cut(frame)

    async def end(self, reason: str, *, reopens: bool = False) -> None:
        """Ends it for all viewers; what was made is in the recording."""
        if self.state != "ended":
            self._inbox.put_nowait(None)
            await asyncio.wait([self._worker])
            self.state = "ended"
            self.tell("bye", reason=reason, reopens=reopens)
        for viewer in list(self.viewers):
            viewer.close(self.code, reason)
