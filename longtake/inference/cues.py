"""The frames of a session up to a length, and changes of prompt and picture that are due on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longtake.inference.frames import Fetched, Frames
from longtake.inference.session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Cue:
    """A change at a pixel frame: another prompt, a cut to another picture (`alone`: to none), a target; pictures are
    uint8 [h, w, 3].
    """

    frame: int
    prompt: str | None
    image: NDArray[np.uint8] | None
    target: NDArray[np.uint8] | None
    alone: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether a new scene begins."""
        return self.image is not None or self.alone

    def undoes(self, before: Cue) -> bool:
        """Whether nothing of a part of `before` is left after this one."""
        scene = self.is_cut and (before.is_cut or before.target is not None)
        target = self.target is not None and before.target is not None
        return scene or target or (self.prompt is not None and before.prompt is not None)

    def apply(self, session: Session) -> None:
        """Has `session` follow it from the next block on."""
        if self.is_cut:
            session.image = self.image
        if self.target is not None:
            session.image_target = self.target
        if self.prompt is not None:
            session.prompt = self.prompt


def play(
    session: Session, num_frames: int | None, cues: Sequence[Cue] = (), *, ahead: bool
) -> Iterator[NDArray[np.uint8]]:
    """Yields the frames from where `session` stands to `num_frames` in all (None: for ever); the last block is cut.

    A cue is handed to the session before the frames that end at or after its frame are given out, so a session that is
    saved between two blocks and resumed goes on with the same frames. `ahead` as in `Generator.stream`.
    """
    return Fetched(_Blocks(session, num_frames, cues), ahead=ahead)


class _Blocks(Iterator[Frames]):
    """The blocks of a session as they are begun; a call that raised can be made again."""

    def __init__(self, session: Session, num_frames: int | None, cues: Sequence[Cue]) -> None:
        self._session, self._num_frames, self._cues = session, num_frames, cues
        self._begun: tuple[int, Frames] | None = None  # pixel frames before a block, and the block

    def __next__(self) -> Frames:
        session, length = self._session, self._num_frames
        if self._begun is None:
            if length is not None and session.num_frames >= length:
                raise StopIteration
            self._begun = session.num_frames, session.begin()
        before, frames = self._begun
        for cue in self._cues:
            if before < cue.frame <= session.num_frames:
                cue.apply(session)
        self._begun = None
        return frames if length is None else frames.cut(length - before)
