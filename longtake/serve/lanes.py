"""A session as the scheduler sees it: what of it is made and shown, and when its viewer would run dry."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from longtake.errors import ConfigError
from longtake.inference.session import Session


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
    """A session in its place among others; must be used by one thread.

    Fields: `number`, the change of prompt or picture that the next block follows, and `past`, the one that those before
    `blocks` followed; `shown`, frames that the viewer has seen; `ahead`, frames beyond those from which on it waits;
    `block_seconds` that the latest block took; `dry_at`, the time at which one who watches in real time would have seen
    all there is: a session whose viewer takes frames faster than that does not starve the others.
    """

    name: str
    session: Session
    number: int
    past: int
    ahead: int
    dry_at: float
    shown: int = 0
    block_seconds: float = 0.0
    paused: bool = False
    blocks: list[Block] = field(default_factory=list)  # those that can be taken back, and no others

    @property
    def rewindable(self) -> int:
        return len(self.blocks)

    @property
    def wants(self) -> bool:
        """Whether a block would be made if nobody else wanted one."""
        return not self.paused and self.session.num_frames - self.shown < self.ahead

    def began(self, block: Block, now: float) -> None:
        """A block has been begun."""
        blocks = [*self.blocks, block]
        gone = len(blocks) - self.session.rewindable
        if gone > 0:
            self.past = blocks[gone - 1].number
        self.blocks = blocks[gone:]
        self.dry_at = max(self.dry_at, now) + block.count / self.session.generator.fps

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

    def change(self, kind: str, value: Any, number: int, *, drop: bool) -> bool:
        """As `Engine.do_change`, when no block is on its way; returns whether frames were taken back."""
        unseen = [block for block in self.blocks if drop and block.first >= self.shown + self._bridge()]
        apply(self.session, kind, value)
        if unseen:
            self.rewind(len(unseen), keep_wanted=True)
        self.number = number
        return bool(unseen)

    def _bridge(self) -> int:
        """Frames that a viewer sees while a block is made. Who drops them has nothing to show, and where blocks take
        longer than they last, and are asked for anew before they are there, never has.
        """
        last = self.blocks[-1].count if self.blocks else 0
        return min(last, math.ceil(self.block_seconds * self.session.generator.fps))

    def fork(self, name: str) -> Lane:
        """A branch of this name."""
        return replace(self, name=name, session=self.session.fork(), blocks=list(self.blocks))


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
