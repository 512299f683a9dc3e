"""What a rewound session needs of its past and its cache no longer holds, in the memory of the host.

A cache has room for what its next block attends to and nothing else: keys and values that the next block overwrites,
and all of them where another prompt or scene begins, are copied here first, and put back when a session goes back to
them, so that the same frames come again, bit for bit. Must know no picture, prompt or file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from longtake.inference.host_copies import HostCopies
from longtake.models.cache import KVCache
from longtake.rollout.stream import LatentStream

# Whose keys and values (the content of a cache), in which of a session's caches, of which latent frame
_Key = tuple[object, int, int]


class HostHistory:
    """The keys and values of a session's past. Methods are called between two blocks, by the session's thread."""

    def __init__(self, copies: HostCopies) -> None:
        self.copies = copies
        self._kept: dict[_Key, Tensor] = {}  # [2, layers, B, tokens, N, K]: keys, and values
        self._first: dict[tuple[object, int], int] = {}

    @property
    def size_bytes(self) -> int:
        """What it takes of the host's memory."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept.values())

    def copy(self) -> HostHistory:
        """That of a branch: what is kept is never changed, and shared."""
        other = copy.copy(self)
        other._kept, other._first = dict(self._kept), dict(self._first)
        return other

    def save_overwritten(self, stream: LatentStream, states: Iterable[LatentStream]) -> None:
        """Copies what `stream`'s next block writes over, as far as one of `states` needs it."""
        if any(cache.content is not stream.content for cache in stream.caches):
            self.save_all(stream.caches, states)
            return
        wanted, end = _wanted(states), stream.plan.block_of(stream.position)[1]
        for start, stop in ((stream.committed, stream.position), (stream.position, end)):
            for side, cache in enumerate(stream.caches):
                self._save(side, cache, cache.overwritten(start, stop), wanted)
            # What the block itself writes over is copied while it is made, unless it writes in its last step.
            if stop < end or stream.plan.context == "last_step":
                self.copies.wait()

    def save_all(self, caches: Sequence[KVCache], states: Iterable[LatentStream]) -> None:
        """Copies all that caches hold, as far as one of `states` needs it."""
        wanted = _wanted(states)
        for side, cache in enumerate(caches):
            self._save(side, cache, cache.held_frames, wanted)
        self.copies.wait()

    def _save(self, side: int, cache: KVCache, frames: Sequence[int], wanted: set[_Key]) -> None:
        keys = [(cache.content, side, frame) for frame in frames]
        layers, batch, _, *rest = cache.keys.shape
        shape, dtype = (2, layers, batch, *rest), cache.keys.dtype
        new = {
            key: self.copies.empty(shape, dtype, cache.device)
            for key in keys
            if key in wanted and key not in self._kept
        }
        if not new:
            return
        self.copies.fill(
            (
                (kept[which], source[:, :, cache.slot_of(frame)])
                for (_, _, frame), kept in new.items()
                for which, source in enumerate((cache.keys, cache.values))
            ),
            cache.device,
        )
        self._kept |= new
        self._first[cache.content, side] = cache.first

    def bring_back(self, stream: LatentStream) -> None:
        """Has the caches of `stream` hold what its next block attends to, where they have gone on since.

        Whatever else they hold is lost; `save_overwritten` with all states comes before.
        """
        self.copies.wait()
        for side, cache in enumerate(stream.caches):
            needed = set(_needed(stream, cache))
            mine = {
                frame: kept
                for (content, at, frame), kept in self._kept.items()
                if (content, at) == (stream.content, side)
            }
            if cache.content is not stream.content:
                if not needed & mine.keys():
                    continue  # the stream makes it anew, as it does with one that was never filled
                cache.clear()
                cache.content = stream.content
                missing = needed & mine.keys()
            elif missing := {frame for frame in needed & mine.keys() if not cache.holds(frame, frame + 1)}:
                cache.position = stream.committed
            if missing:
                cache.hold(
                    {frame: (mine[frame][0], mine[frame][1]) for frame in sorted(missing)},
                    stream.committed,
                    self._first[stream.content, side],
                )
        self.copies.read()

    def forget(self, stream: LatentStream) -> None:
        """Of what `stream` may make otherwise from here on nothing is kept."""
        self._kept = {
            key: kept for key, kept in self._kept.items() if key[0] is not stream.content or key[2] < stream.committed
        }

    def keep_only(self, states: Iterable[LatentStream]) -> None:
        """Gives back what none of these streams needs."""
        wanted = _wanted(states)
        self._kept = {key: kept for key, kept in self._kept.items() if key in wanted}
        contents = {(content, side) for content, side, _ in self._kept}
        self._first = {key: first for key, first in self._first.items() if key in contents}


def _wanted(states: Iterable[LatentStream]) -> set[_Key]:
    return {
        (stream.content, side, frame)
        for stream in states
        for side, cache in enumerate(stream.caches)
        for frame in _needed(stream, cache)
    }


def _needed(stream: LatentStream, cache: KVCache) -> Iterator[int]:
    """Frames that a stream's next pass attends to, whether they are there or not: the sink and the window."""
    end = stream.committed
    sink = min(cache.sink_frames, end)
    yield from range(sink)
    block = stream.position - end or stream.plan.block_of(stream.position)[1] - stream.position
    oldest = 0 if cache.window_frames is None else end + block - (cache.window_frames - cache.sink_frames)
    yield from range(max(sink, oldest), end)
