"""Streaming: blocks of latents for as long as the caller asks, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longtake.models.cache import KVCache
from longtake.models.dit import VideoDiT
from longtake.rollout.chunk import Guidance, commit_block, denoise_block
from longtake.rollout.self_forcing import RollOutNoise, RollOutRules, block_noise_at
from longtake.structs import Condition


@torch.no_grad()
def stream_latents(
    model: VideoDiT,
    cache: KVCache,
    condition: Condition,
    first_latent: Tensor | None,
    noise: RollOutNoise,
    rules: RollOutRules,
    *,
    guidance: Guidance | None = None,
) -> Iterator[Tensor]:
    """Yields clean latents block by block, for ever: first the given picture [B, 1, ...], then generated blocks.

    The caller makes the cache (`model.new_cache`; with `guidance` a second one like it) and stops when it has enough;
    the context pass of a block runs only when the next block is asked for.
    """
    pending: Tensor | None = None
    if first_latent is not None:
        yield first_latent.float()
        pending = first_latent
    position = cache.position if pending is None else cache.position + pending.shape[1]
    for start, end in rules.plan.blocks(position):
        if pending is not None:
            commit_block(model, cache, condition, pending, guidance=guidance)
        block_noise = block_noise_at(noise, start, end)
        pending = denoise_block(model, cache, condition, block_noise, rules.sigmas, guidance=guidance)
        yield pending
