"""What the networks of a video VAE remember between two calls: a value that goes into a call and comes out of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The last input frames of each layer that reads frames before its own, a slot each: [B, 1 or 2, H, W, C], or None
# before there are any, which means zeros.
Past = Sequence[Tensor | None]


class Call:
    """One call's look at the past, and what it leaves for the next one.

    Args: `into`, where the new past goes, slot by slot, which can be `past` itself; None makes new tensors and leaves
    `past` as it is. `first`: the call has the first frame of the video and no other. `on_host`: the past lies in this
    process's memory, pinned, and not on the GPU that works.
    """

    def __init__(self, past: Past, into: Past | None, *, first: bool, on_host: bool = False) -> None:
        self._past, self._into, self.first, self._on_host = past, into, first, on_host
        self.new: list[Tensor | None] = list(past)

    def past(self, slot: int, device: torch.device) -> Tensor | int:
        """What a convolution remembers, [B, frames, H, W, C], or 0 at the beginning of a video.

        That is of this call's own frames, where the finest level takes some at a time.
        """
        kept = self.new[slot]
        return 0 if kept is None else kept.to(device, non_blocking=True)

    def keep(self, slot: int, frames: Tensor) -> None:
        """Remembers `frames`."""
        place = self.new[slot]
        if place is self._past[slot]:
            place = None if self._into is None else self._into[slot]
        if place is None:
            given = {"device": "cpu", "pin_memory": frames.is_cuda} if self._on_host else {"device": frames.device}
            place = torch.empty(frames.shape, dtype=frames.dtype, **given)
        wide(place).copy_(wide(frames), non_blocking=True)
        self.new[slot] = place


def wide(x: Tensor) -> Tensor:
    """The same memory in elements of eight bytes, if its last axis has whole ones: torch copies them as fast as two."""
    return x if x.shape[-1] * x.element_size() % 8 else x.view(torch.int64)
