"""What a stream keeps of its own past, and the cache made anew from it when the condition changes in mid-stream.

Keys and values depend on the prompt and the picture, so after a change the cache is rebuilt under the new condition:
block by block in causal order at absolute positions, exactly as a stream would have filled it, by one policy for
training and inference. Source: specification H.5 and its rule (LongLive, arXiv 2509.22622, rebuilds in one pass in
which all frames see each other, and leaves the sink empty in training).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.models.cache import KVCache
from longtake.plan import StreamPlan
from longtake.rollout.denoise import Denoiser, commit_block


class LatentHistory:
    """Clean latents that a cache can be rebuilt from: the sink frames and the latest window - sink frames.

    Without a window everything is kept. Blocks are appended in order, as they are finished; `position` is the end.
    """

    def __init__(self, plan: StreamPlan) -> None:
        self.plan = plan
        self._blocks: dict[int, Tensor] = {}
        self.position = 0

    def append(self, latents: Tensor) -> None:
        """Adds finished blocks [B, f, C, H, W] that begin at `position`; what no rebuild needs any more is dropped."""
        position, blocks = self.position + latents.shape[1], dict(self._blocks)
        for start, end in self.plan.blocks(self.position, position):
            blocks[start] = latents[:, start - self.position : end - self.position].detach()
        window, sink = self.plan.window_frames, self.plan.sink_frames
        if window is not None:
            oldest = position - (window - sink)
            blocks = {s: block for s, block in blocks.items() if s < sink or s >= oldest}
        self._blocks, self.position = blocks, position

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first frame, latents) of the kept blocks, in causal order."""
        yield from sorted(self._blocks.items())

    def copy(self) -> LatentHistory:
        """Another one with the same (never changed) latents."""
        other = LatentHistory(self.plan)
        other._blocks, other.position = dict(self._blocks), self.position
        return other


@torch.no_grad()
def recache(
    denoiser: Denoiser, cache: KVCache, condition: Condition, kept: LatentHistory, *, keep_sink: bool = False
) -> None:
    """Fills the cache anew from `kept` under `condition`, and leaves it at `kept.position`.

    Args: `keep_sink` leaves the keys and values of the sink, up to `cache.position`, as the old condition made them.
    Where it fails it can be called again, with the cache at the same position.
    Raises: CacheError while a pending backward still reads the cache.
    """
    stays = min(cache.sink_frames, cache.position)
    if keep_sink and cache.holds(0, stays):
        cache.position = stays
    else:
        stays = 0
        cache.clear()
    for start, latents in kept.blocks():
        if start >= stays:
            cache.skip_to(start)
            commit_block(denoiser, cache, condition, latents)
    cache.skip_to(kept.position)
