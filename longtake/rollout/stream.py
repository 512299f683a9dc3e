"""Streaming: blocks of latents for as long as the caller asks, in constant memory, under conditions that may change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.models.cache import KVCache
from longtake.models.dit import VideoDiT
from longtake.rollout.chunk import Guidance, commit_block, denoise_block
from longtake.rollout.rebuild import KeptLatents, rebuild_cache
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


@torch.no_grad()
def stream_switched(
    model: VideoDiT,
    cache: KVCache,
    conditions: Sequence[Condition],
    switch_frames: Sequence[int],
    first_latent: Tensor | None,
    noise: RollOutNoise,
    rules: RollOutRules,
    *,
    rebuild: bool = True,
) -> Iterator[Tensor]:
    """As `stream_latents`, under another condition from the first block that begins at or after each switch frame.

    Args: `cache`, an empty one; `conditions`, one more than `switch_frames` (latent frames, ascending). At a switch the
    cache is rebuilt under the new condition (`rules.keep_sink`: but for the sink); without `rebuild` it stays as the
    old one made it, for comparison. Raises: ConfigError when conditions and switch frames do not fit.
    """
    ends = [_boundary(rules, frame) for frame in switch_frames]
    if len(conditions) != len(ends) + 1 or any(end <= start for start, end in zip([0, *ends], ends)):
        raise ConfigError(
            f"{len(conditions)} conditions and switch frames {list(switch_frames)} do not fit: there must be one "
            "condition more, and between two switches, and before the first, at least one block"
        )
    kept = KeptLatents.of_rules(rules)
    last: Tensor | None = None
    for number, (condition, end) in enumerate(zip(conditions, [*ends, None])):
        if last is not None and rebuild:
            rebuild_cache(model, cache, condition, kept, keep_sink=rules.keep_sink)
        elif last is not None:
            commit_block(model, cache, conditions[number - 1], last)
        given = first_latent if last is None else None
        for last in stream_latents(model, cache, condition, given, noise, rules):
            kept.append(last)
            yield last
            if kept.position == end:
                break


def _boundary(rules: RollOutRules, frame: int) -> int:
    """The first frame of the first block that begins at or after `frame`."""
    return frame if rules.plan.is_boundary(frame) else rules.plan.block_of(frame)[1]
