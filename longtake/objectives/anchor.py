"""Statistics of generated latents beside those of real ones, and a loss that holds them together.

Distribution matching on windows of a running video sees no window's past: colours and contrast may fade by a little in
each. The anchor compares every window with the clip that the row begins with. Source: Context-Matched Distillation
(nv-tlabs/cmd, model/context_matched_distillation.py); specification S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from longtake.config.base import Settings

if TYPE_CHECKING:
    from torch import Tensor


class Anchor(Settings):
    """Holds mean and deviation of each latent channel to those of the beginning of the row's own clip, until the video
    shows something else; against colours and contrast that fade over a long video.
    """

    weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of its loss in the student's updates; 0 = off. Rows must then be clips",
    )


@dataclass(frozen=True)
class Statistics:
    """Means and biased standard deviations [B, C] of latents over frames and pixels."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, latents: Tensor) -> Statistics:
        """Those of latents [B, F, C, H, W], in float32. A constant channel has deviation 0 with gradient 0."""
        x = latents.float()
        return cls(x.mean((1, 3, 4)), x.std((1, 3, 4), correction=0))

    def except_in(self, rows: Sequence[bool], made: Statistics) -> Statistics:
        """These, but in some rows those of `made`, which then count for nothing."""
        import torch

        left = torch.tensor(rows, device=self.mean.device)[:, None]
        parts = ((made.mean, self.mean), (made.deviation, self.deviation))
        return Statistics(*(torch.where(left, theirs.detach(), own) for theirs, own in parts))


def anchor_loss(made: Statistics, real: Statistics) -> Tensor:
    """Half the mean |difference| of the means plus half that of the deviations, over samples and channels."""
    means, deviations = made.mean - real.mean, made.deviation - real.deviation
    return 0.5 * means.abs().mean() + 0.5 * deviations.abs().mean()


def deviation_ratio(made: Statistics, real: Statistics) -> Tensor:
    """Deviation of the made latents over that of the real ones, each summed over channels; the mean over samples."""
    return (made.deviation.detach().sum(1) / real.deviation.sum(1)).mean()
