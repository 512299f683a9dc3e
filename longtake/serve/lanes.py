"""A session as the scheduler sees it: what of it is made and shown, and when its viewer would run dry."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from longtake.errors import ConfigError
from longtake.inference.session import Session

_TURN = 1.5  # blocks that a change takes, as long as none was measured: its own, and a rebuilt cache
_SENDING_SECONDS = 0.04  # from when the first frames after a change are there until they have come to the viewer
_REPORT_SECONDS = 0.5  # a viewer that plays says within this what it has seen


@dataclass(frozen=True)
class Block:
    """Frames that one call made: `count` from `first` on, following change `number`."""

    first: int
    count: int
    number: int

    def public(self) -> dict[str, int]:
        return {"first_frame": self.first, "count": self.count, "number": self.number}


@dataclass
class Lane:
    """A session in its place among others; must be used by one thread, but for
    `came`, which the one that fetches calls while a block is on its way.

    Fields: `number`, the change of prompt or picture that the next block follows, and `past`, the one that those before
    `blocks` followed; `shown`, frames that the viewer had seen at `shown_at` (None: it has not said yet); `ahead`,
    frames beyond those from which on it waits; `block_seconds` that the latest block took; `turns`, seconds from the
    latest changes until the first block that followed each, others' blocks between included; `dry_at`, the time at
    which one who watches in real time would have seen all there is: a session whose viewer takes frames faster than
    that does not starve the others.
    """

    name: str
    session: Session
    number: int
    past: int
    ahead: int
    dry_at: float
    shown: int = 0
    shown_at: float | None = None
    block_seconds: float = 0.0
    turns: deque[float] = field(default_factory=lambda: deque(maxlen=4))
    paused: bool = False
    blocks: list[Block] = field(default_factory=list)  # those that can be taken back, and no others
    _changed: tuple[int, float] | None = None  # the latest change, and when; until a block that follows it has come

    @property
    def rewindable(self) -> int:
        return len(self.blocks)

    @property
    def wants(self) -> bool:
        """Whether a block would be made if nobody else wanted one."""
        return not self.paused and self.session.num_frames - self.shown < self.ahead

    @property
    def is_changing(self) -> bool:
        """Whether the first block that follows a change is still to come."""
        return self._changed is not None

    def began(self, block: Block, now: float) -> None:
        """A block has been begun."""
        blocks = [*self.blocks, block]
        gone = len(blocks) - self.session.rewindable
        if gone > 0:
            self.past = blocks[gone - 1].number
        self.blocks = blocks[gone:]
        self.dry_at = max(self.dry_at, now) + block.count / self.session.generator.fps

    def came(self, block: Block, seconds: float, now: float) -> None:
        """A block has come out, so many seconds after it was begun; `now`: since then a viewer can watch it without a
        wait, though its last frames may have come later.
        """
        self.block_seconds = seconds
        if self._changed is not None and block.number >= self._changed[0]:
            self.turns.append(now - self._changed[1])
            self._changed = None

    def hold(self, paused: bool, now: float) -> None:
        """No more blocks are made of it, or they are again."""
        self.paused, self.dry_at, self._changed = paused, max(self.dry_at, now), None

    def saw(self, frame: int, at: float) -> None:
        """A viewer has said at that time that it has seen so many frames."""
        self.shown, self.shown_at = min(frame, self.session.num_frames), at

    def blocks_from(self, frame: int | None) -> int:
        """Blocks that begin at a frame or later."""
        return sum(frame is None or block.first >= frame for block in self.blocks)

    def rewind(self, blocks: int, *, keep_wanted: bool = False) -> None:
        """Takes back blocks; `keep_wanted` as that of `Session.rewind`. Raises: ConfigError when there are too few."""
        self.session.rewind(blocks, keep_wanted=keep_wanted)
        gone, self.blocks = self.blocks[-blocks:], self.blocks[:-blocks]
        self.number = self.blocks[-1].number if self.blocks else self.past
        self.dry_at -= sum(block.count for block in gone) / self.session.generator.fps
        self.shown = min(self.shown, self.session.num_frames)

    def change(
        self, kind: str, value: Any, number: int, asked: float, now: float, *, drop: bool, others: float = 0.0
    ) -> bool:
        """As `Engine.do_change`, when no block is on its way; returns whether frames were taken back. Args: `others`,
        seconds of another session's block, which may be made before the next one of this.
        """
        needed = self._needed(asked, now, others)
        unseen = [block for block in self.blocks if drop and block.first >= needed]
        apply(self.session, kind, value)
        if unseen:
            self.rewind(len(unseen), keep_wanted=True)
        self.number = number
        self._changed = (number, now) if self.wants else None  # else it waits for its viewer first
        return bool(unseen)

    def can_drop(self, now: float, others: float) -> bool:
        """Whether a change that is asked for now would take back the block in the making; arguments as of `change`."""
        return self.session.num_frames >= self._needed(now, now, others)

    def _needed(self, asked: float, now: float, others: float) -> int:
        """The first frame that a viewer will not have seen when the first block after a change comes."""
        return self._seen(asked, now) + self._bridge(others)

    def _seen(self, asked: float, now: float) -> int:
        """Frames that a viewer will have seen by now, when a change is made that was `asked` for some time ago: blocks
        on their way were waited for, in which what it says of them was not read. It says whole frames: hence no less.
        """
        plays = self.shown_at is not None and asked - self.shown_at <= _REPORT_SECONDS
        since = now - self.shown_at if plays and self.shown_at is not None else 0.0
        return min(self.session.num_frames, self.shown + math.ceil(since * self.session.generator.fps))

    def _bridge(self, others: float) -> int:
        """Frames that a viewer sees until the first block after a change has come. Who drops them has nothing to show,
        and where blocks take longer than they last, and are asked for anew before they are there, never has.
        """
        last = self.blocks[-1].count if self.blocks else 0
        shortest, longest = (each(self.turns, default=_TURN * self.block_seconds) for each in (min, max))
        # None of the latest ones may have had another session's block between.
        seconds = max(longest, shortest + others) + _SENDING_SECONDS
        return min(last, math.ceil(seconds * self.session.generator.fps))

    def fork(self, name: str) -> Lane:
        """A branch of this name, which nobody watches yet."""
        session, blocks, turns = self.session.fork(), list(self.blocks), self.turns.copy()
        return replace(self, name=name, session=session, blocks=blocks, turns=turns, shown_at=None)


def apply(session: Session, kind: str, value: Any) -> None:
    """Has `session` follow another prompt, image or target from its next block on. Raises: LongtakeError."""
    if kind == "prompt":
        session.prompt = value
    elif kind == "image":
        session.image = value
    elif kind == "target":
        session.image_target = value
    else:
        raise ConfigError(f"{kind} is no kind of change; use prompt, image or target")


def next_lane(lanes: Iterable[Lane]) -> Lane | None:
    """Whose block is made next: of those that want one, the one that runs dry first."""
    return min((lane for lane in lanes if lane.wants), key=lambda lane: lane.dry_at, default=None)
