"""What a call of the transformer may be given: shapes, types, and what belongs together. Must know no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longtake.condition import Condition, MaskLayout
from longtake.errors import ShapeError
from longtake.models.cache import CacheView, KVCache
from longtake.models.context import MaskOverCache, PreparedMask

if TYPE_CHECKING:
    from longtake.models.sizes import DiTConfig


def check_call(
    config: DiTConfig,
    tokens_per_frame: Callable[[int, int], int],
    x: Tensor,
    sigma: Tensor,
    condition: Condition,
    context: MaskLayout | PreparedMask | MaskOverCache | CacheView | KVCache | None,
) -> None:
    """Raises ShapeError unless arguments of `VideoDiT.forward` fit each other and the config."""
    if x.ndim != 5 or x.shape[2] != config.out_channels:
        raise ShapeError(f"x has shape {tuple(x.shape)}; it must be [B, F, {config.out_channels}, H, W]")
    batch, entries = x.shape[:2]
    if sigma.shape not in ((batch,), (batch, entries)):
        raise ShapeError(f"sigma has shape {tuple(sigma.shape)}; it must be [{batch}] or [{batch}, {entries}]")
    if sigma.dtype not in (torch.float32, torch.float64):
        # Mixed-precision wrappers that cast inputs do this silently: 937.5 of Wan's clock would become 936.
        raise ShapeError(f"sigma has type {sigma.dtype}; it must be float32: do not cast the inputs of the model")
    if isinstance(context, (MaskLayout, PreparedMask, MaskOverCache, CacheView)):
        what, count = ("view", context.num_frames) if isinstance(context, CacheView) else ("mask", context.num_entries)
        if count != entries:
            raise ShapeError(f"x has {entries} entries and the {what} {count}; they must be equal")
    tokens = tokens_per_frame(x.shape[3], x.shape[4])
    cache = context.cache if isinstance(context, (CacheView, MaskOverCache)) else context
    if isinstance(cache, KVCache) and (cache.batch_size, cache.tokens_per_frame) != (batch, tokens):
        raise ShapeError(
            f"x has batch {batch} and {tokens} tokens a frame, the cache was made for batch {cache.batch_size} and "
            f"{cache.tokens_per_frame}; make a cache for this size with new_cache"
        )
    if (getattr(context, "later_from", None) is None) != (condition.later_text is None):
        raise ShapeError("condition.later_text is for masks whose later entries read it, and these need it")
    check_condition(config, condition, batch, x.shape[3:])


def check_condition(config: DiTConfig, condition: Condition, batch: int, size: torch.Size) -> None:
    """Raises ShapeError unless a condition fits the config, a batch and latents of `size` (H, W)."""
    if condition.batch_size != batch:
        raise ShapeError(f"the condition has batch {condition.batch_size} and x has {batch}; they must be equal")
    for name in ("text", "later_text"):
        text = getattr(condition, name)
        if text is not None and (text.shape[1] > config.text_len or text.shape[2] != config.text_dim):
            raise ShapeError(
                f"condition.{name} has shape {tuple(text.shape)}; "
                f"it must be [B, M <= {config.text_len}, {config.text_dim}]"
            )
    for name, wanted in (("image", config.image_dim is not None), ("frames", config.condition_channels > 0)):
        given = getattr(condition, name) is not None
        if given != wanted:
            rule = f"needs condition.{name}" if wanted else f"takes no condition.{name}"
            raise ShapeError(f"condition.{name} was {'given' if given else 'not given'}; this model {rule}")
    if condition.image is not None and condition.image.shape[2] != config.image_dim:
        raise ShapeError(f"condition.image has width {condition.image.shape[2]}; the model's is {config.image_dim}")
    frames = condition.frames
    if frames is not None and (frames.shape[2] != config.condition_channels or frames.shape[3:] != size):
        raise ShapeError(
            f"condition.frames has shape {tuple(frames.shape)}; it must be "
            f"[{batch}, F_total, {config.condition_channels}, {size[0]}, {size[1]}]"
        )
