"""From what a decoder makes to pictures in this process's memory, checked on the way. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longtake.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def to_bytes(video: Tensor) -> Tensor:
    """Decoder output [T, 3, h, w] in [-1, 1] as uint8 [T, h, w, 3], where it is."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def to_frames(video: Tensor, first: int = 0) -> NDArray[np.uint8]:
    """Decoder output [T, 3, h, w] in [-1, 1] as uint8 [T, h, w, 3]; arguments and errors as those of `Piece`."""
    return Frames(video, first).array()


class Fetched(Iterator["NDArray[np.uint8]"]):
    """The frames of each block, uint8 [T, h, w, 3]; `ahead`: when the one after it has been begun.

    Work on a GPU is only queued when it is begun, so that decoding, fetching and writing a block overlap with the next.
    A block that comes in pieces is waited for by somebody: `ahead` gives each piece as soon as it is here, and begins
    the next block after that, since this takes nearly as long as that block's passes do (a GPU's queue is short).
    A call that raises loses nothing where `blocks` loses nothing: the next one goes on with the same frames.
    """

    def __init__(self, blocks: Iterable[Frames], *, ahead: bool) -> None:
        self._blocks, self._ahead = iter(blocks), ahead
        self._waiting: list[Frames] = []
        self._given = 0  # pieces of the first one that were given out

    def __next__(self) -> NDArray[np.uint8]:
        while self._begins_more() and (begun := next(self._blocks, None)) is not None:
            self._waiting.append(begun)
        if not self._waiting:
            raise StopIteration
        pieces = self._waiting[0].pieces
        if self._ahead and self._given + 1 < len(pieces):
            frames = pieces[self._given].array()
            self._given += 1
        else:
            frames = joined(pieces[self._given :])
            self._waiting, self._given = self._waiting[1:], 0
        return frames

    def _begins_more(self) -> bool:
        alone = len(self._waiting) == 1 and len(self._waiting[0].pieces) == 1
        return not self._waiting or (self._ahead and alone)


class Frames:
    """Frames on their way to this process's memory, in pieces that arrive one after the other.

    Args: as those of `Piece`, of the first one.
    """

    def __init__(self, video: Tensor, first: int = 0) -> None:
        self.pieces = [Piece(video, first)]
        self._end = first + len(video)

    def append(self, video: Tensor) -> None:
        """More decoder output, which follows: a piece of its own."""
        self.pieces.append(Piece(video, self._end))
        self._end += len(video)

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def cut(self, most: int) -> Frames:
        """The same, of which the first `most` (1 or more) at most are given."""
        pieces = []
        for piece in self.pieces:
            if most > 0:
                pieces.append(piece.cut(most))
            most -= len(piece)
        self.pieces = pieces
        return self

    def array(self) -> NDArray[np.uint8]:
        """All of them, uint8 [T, h, w, 3], when they are here. Raises: as `Piece.array`."""
        return joined(self.pieces)


class Piece:
    """Frames that arrive together: decoder output [T, 3, h, w], the first of which has the number `first` in its video.

    From a GPU they are sent at once: behind the next block's work, which is queued before anybody waits for these,
    they would come with that block. Whether all values are finite travels with them, so that nobody waits for it.
    """

    def __init__(self, video: Tensor, first: int = 0) -> None:
        self._first, self._count, self._done = first, len(video), None
        self._finite, self._pixels = video.isfinite().all(), to_bytes(video)
        if video.is_cuda:
            with torch.cuda.device(video.device):
                self._finite, self._pixels = (_sent(tensor) for tensor in (self._finite, self._pixels))
                self._done = torch.cuda.Event()
                self._done.record()

    def __len__(self) -> int:
        return self._count

    def cut(self, most: int) -> Piece:
        """The same, of which `array` gives the first `most` at most."""
        self._count = min(self._count, most)
        return self

    def array(self) -> NDArray[np.uint8]:
        """The frames, uint8 [T, h, w, 3], when they are here.

        Raises: DataError when the decoder's values are not all finite: they would show as black.
        """
        if self._done is not None:
            self._done.synchronize()
        if not self._finite:
            raise DataError(
                f"frames {self._first + 1} to {self._first + len(self._pixels)} are not finite numbers: weights, "
                "guidance or low-rank updates lead the model astray; compare with other weights or values"
            )
        pixels = self._pixels[: self._count].cpu()
        return (pixels if self._done is None else pixels.clone()).numpy()  # pinned memory is little, and reused


def joined(pieces: Sequence[Piece]) -> NDArray[np.uint8]:
    """The frames of all of them."""
    import numpy as np

    arrays = [piece.array() for piece in pieces]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _sent(tensor: Tensor) -> Tensor:
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return here.copy_(tensor, non_blocking=True)
