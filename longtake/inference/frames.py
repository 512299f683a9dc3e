"""From what a decoder makes to pictures in this process's memory, checked on the way. Knows no model and no file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """Decoder output [T, 3, h, w] in [-1, 1] as uint8 [T, h, w, 3]; arguments and errors as those of `Frames`."""
    return Frames(video, first).array()


class Fetched(Iterator["NDArray[np.uint8]"]):
    """The frames of each block, uint8 [T, h, w, 3]; `ahead`: when the one after it has been begun.

    Work on a GPU is only queued when it is begun, so that decoding, fetching and writing a block overlap with the next.
    A call that raises loses nothing where `blocks` loses nothing: the next one goes on with the same frames.
    """

    def __init__(self, blocks: Iterable[Frames], *, ahead: bool) -> None:
        self._blocks, self._ahead = iter(blocks), ahead
        self._waiting: list[Frames] = []

    def __next__(self) -> NDArray[np.uint8]:
        while len(self._waiting) <= self._ahead and (begun := next(self._blocks, None)) is not None:
            self._waiting.append(begun)
        if not self._waiting:
            raise StopIteration
        frames = self._waiting[0].array()
        self._waiting = self._waiting[1:]
        return frames


class Frames:
    """Frames on their way to this process's memory: decoder output [T, 3, h, w], the first of which has the number
    `first` in its video.

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

    def cut(self, most: int) -> Frames:
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


def _sent(tensor: Tensor) -> Tensor:
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return here.copy_(tensor, non_blocking=True)
