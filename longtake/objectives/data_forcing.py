"""Real clips in place of the student's as what the teacher is asked about, in a share of the rows.

With the student's video G, the row's clip x and one noise and level for both, the student moves against
p_fake(G_t) - p_real(x_t) instead of p_fake(G_t) - p_real(G_t): where the teacher cannot lead a student that is far off,
data can. Source: Data-Forcing Distillation (arXiv 2606.18478, eq. 8); specification S.

It is a difference of clean latents, as all of `dmd.py` is: one of velocities would have (1 - sigma) (G - x) besides.
And G and x must belong together, by picture and caption: the less they do, the less the student varies, and with
unpaired rows alone it does not vary at all. So the share is at most one half, rows are pairs, and `deviation_ratio` is
logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from longtake.config.base import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.rng import KeyedRNG


class DataForcing(Settings):
    """Asks the teacher about the row's own clip in place of the student's, in some of the student's updates."""

    share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="share of the rows, drawn anew in each update; 0 = off. Rows must then be clips that begin with "
        "the given picture",
    )


def teacher_input(
    noisy: Tensor,
    clip: Tensor,
    noise: Tensor,
    sigma: Tensor,
    share: float,
    *,
    draws: KeyedRNG,
    step: int,
    indices: Sequence[int],
) -> Tensor:
    """`noisy` [B, F, C, H, W], or in a `share` of its samples the real `clip`, noised alike."""
    import torch

    from longtake.flow.path import add_noise

    drawn = draws.uniform(step, "data_forcing", indices, device=noisy.device) < share
    return torch.where(drawn[:, None, None, None, None], add_noise(clip, noise, sigma), noisy)
