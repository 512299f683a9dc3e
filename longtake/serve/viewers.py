"""What one viewer is still to be sent: events and pieces of video in order, bounded however slow it is."""

from __future__ import annotations

import asyncio
import json
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.serve.pictures import png

FORMATS = ("h264", "mp4", "png")
_MOST_EVENTS = 256
_HEAD = struct.Struct("<III")


@dataclass(frozen=True)
class Chunk:
    """Frames in all forms in which they are sent: `units` of H.264 and the `fragment` of mp4 that holds them."""

    first: int
    number: int
    frames: NDArray[np.uint8]
    units: list[bytes]
    fragment: bytes

    @property
    def end(self) -> int:
        return self.first + len(self.frames)

    @cached_property
    def _pngs(self) -> list[bytes]:
        return [png(frame) for frame in self.frames]

    def message(self, form: str) -> bytes:
        """The binary message. Takes its time for `png`."""
        parts = {"h264": lambda: _joined(self.units), "mp4": lambda: self.fragment, "png": lambda: _joined(self._pngs)}
        return _HEAD.pack(self.first, len(self.frames), self.number) + parts[form]()


def _joined(parts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def init_message(head: bytes) -> bytes:
    """The binary message of an init segment."""
    return _HEAD.pack(0, 0, 0) + head


@dataclass(eq=False)
class Viewer:
    """One connection. `most_chunks`: a viewer who is further behind misses the oldest; each begins with a keyframe."""

    form: str
    shown: int
    most_chunks: int
    waiting: deque[str | Chunk] = field(default_factory=deque)
    closed: tuple[int, str] | None = None  # code and reason, when all that waits has been sent
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, event: dict[str, Any]) -> None:
        if sum(isinstance(one, str) for one in self.waiting) >= _MOST_EVENTS:
            self.close(1013, "slow")
            return
        self._put(json.dumps(event))

    def send(self, chunk: Chunk) -> None:
        chunks = [one for one in self.waiting if isinstance(one, Chunk)]
        if len(chunks) >= self.most_chunks:
            self.waiting.remove(chunks[0])
        self._put(chunk)

    def forget(self, frame: int) -> None:
        """What begins at `frame` or later and has not been sent is void."""
        gone: Callable[[str | Chunk], bool] = lambda one: isinstance(one, Chunk) and one.first >= frame  # noqa: E731
        self.waiting = deque(one for one in self.waiting if not gone(one))
        self.shown = min(self.shown, frame)

    def close(self, code: int, reason: str) -> None:
        self.closed = self.closed or (code, reason)
        self._news.set()

    def _put(self, item: str | Chunk) -> None:
        if self.closed:  # else who reads slowly would never come to the end
            return
        self.waiting.append(item)
        self._news.set()

    async def next(self) -> str | Chunk | None:
        """What is sent next; None: nothing more, close."""
        while not self.waiting:
            if self.closed:
                return None
            self._news.clear()
            await self._news.wait()
        return self.waiting.popleft()
