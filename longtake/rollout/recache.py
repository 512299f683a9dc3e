"""What a stream keeps of its own past, and the cache made anew from it when the condition changes in mid-stream.

Keys and values depend on the prompt and the picture, so after a change the cache is rebuilt under the new condition:
block by block in causal order at absolute positions, exactly as a stream would have filled it, by one policy for
training and inference. Source: specification H.5 and its rule (LongLive, arXiv 2509.22622, rebuilds in one pass in
which all frames see each other, and leaves the sink empty in training).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.flow.path import add_noise
from longtake.models.cache import KVCache
from longtake.plan import StreamPlan
from longtake.rollout.denoise import Denoiser, commit_block
from longtake.rollout.self_forcing import RollOutNoise


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
    denoiser: Denoiser,
    cache: KVCache,
    condition: Condition,
    kept: LatentHistory,
    noise: RollOutNoise | None = None,
) -> None:
    """Fills the cache anew from `kept` under `condition`, by the law of its plan, and leaves it at `kept.position`.

    Kept latents are clean. Where the plan's context has a noise level (`StreamPlan.context_level`), a block is stored
    at that level, noised by `noise` of its frames and `plan.context_step`: the same numbers whenever it is done, those
    that a pass of its own would have used, and not those of the last denoising step, whose input is not kept.
    With `plan.keep_sink` the keys and values of the sink, up to `cache.position`, stay as the old condition made them.
    `plan.recache` "last_window": beside the kept sink, the other frames of the window are stored in one call, in which
    all see each other; while the window is not full, all frames are, the sink too. Source: LongLive v1
    (NVlabs/LongLive, pipeline/interactive_causal_inference.py; its block mask has no effect there, specification M-05).
    Where it fails it can be called again, with the cache at the same position.
    Raises: CacheError while a pending backward still reads the cache.
    """
    plan, stays = kept.plan, min(cache.sink_frames, cache.position)
    together = plan.recache == "last_window"
    full = plan.window_frames is not None and kept.position > plan.window_frames
    if plan.keep_sink and (full or not together) and cache.holds(0, stays):
        cache.position = stays
    else:
        stays = 0
        cache.clear()
    blocks = [(start, latents) for start, latents in kept.blocks() if start >= stays]
    # Of the blocks that share a call none is in the sink, unless all there is fits into the window.
    alone = sum(start < plan.sink_frames for start, _ in blocks) * full if together else len(blocks)
    for call in [*([block] for block in blocks[:alone]), *([blocks[alone:]] if blocks[alone:] else [])]:
        levels = [plan.context_level(start) for start, latents in call for _ in range(latents.shape[1])]
        cache.skip_to(call[0][0])
        commit_block(denoiser, cache, condition, _context(call, plan, noise), levels if len(call) > 1 else levels[0])
    cache.skip_to(kept.position)


def _context(blocks: Sequence[tuple[int, Tensor]], plan: StreamPlan, noise: RollOutNoise | None) -> Tensor:
    """What the keys and values of finished blocks, one after the other, are made of again."""
    made = []
    for start, latents in blocks:
        if (level := plan.context_level(start)) > 0:
            assert noise is not None, "a plan whose context has a noise level needs noise"
            drawn = noise(start, start + latents.shape[1], plan.context_step)
            latents = add_noise(latents, drawn, torch.full(latents.shape[:1], level, device=latents.device))
        made.append(latents)
    return torch.cat(made, 1)
