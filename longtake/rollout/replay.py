"""The gradient of a roll-out that ran without one: its exit steps once more, all blocks in one packed forward.

A roll-out leaves what each block was denoised from (noisy latents at the exit step's level) and what it became (clean
latents, the context of later blocks). One forward over [clean | noisy] under the teacher-forcing mask computes the same
exit steps, each noisy block seeing itself and the clean blocks that its cache would have held; and here the keys and
values of that context carry gradient too: it learns to write a better context. Source: Self-Gradient Forcing (arXiv
2607.20368), specification R. It must know no objective and no cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.flow.path import clean_from_velocity
from longtake.models.dit import VideoDiT
from longtake.structs import Condition, MaskLayout


def packed_replay(
    model: VideoDiT, condition: Condition, clean: Tensor, noisy: Tensor, sigma: Tensor, layout: MaskLayout
) -> Tensor:
    """Clean latents [B, F, C, H, W] of the exit steps, with gradient through them and through their context.

    Args: `clean` [B, F, C, H, W], what the roll-out made (a given picture first), read at sigma 0; `noisy` the same,
    what each block's exit step began from, at noise levels `sigma` [B, F]; `layout`, that of `teacher_forcing_layout`
    for the roll-out's window, sink and positions. No gradient goes into the latents.
    """
    frames = clean.shape[1]
    both = torch.cat([clean, noisy], 1).detach()
    levels = torch.cat([torch.zeros_like(sigma), sigma], 1)
    velocity = model(both, levels, condition, mask=layout)[:, frames:]
    return clean_from_velocity(noisy.detach(), velocity, sigma)
