"""What teacher and critic say of a student's noised clip, and what the student learns from the difference.

Both predictions are clean latents (x0) in float32. Source: DMD2 (arXiv 2405.14867); specification G.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longtake.plan import unwarp

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import Condition
    from longtake.models.dit import VideoDiT

# score(network, noisy [B, F, C, H, W], sigma [B, F], condition) -> velocity [B, F, C, H, W]
Score = Callable[["VideoDiT", "Tensor", "Tensor", "Condition"], "Tensor"]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a teacher, uncond + `weight` (cond - uncond), at levels within `interval`, its ends
    included (None: at all levels); at others, and where `weight` is 1, it is asked with the prompt alone.

    Source of the interval: Kynkaanniemi et al. 2024, arXiv 2404.07724, eq. 5.
    """

    weight: float
    interval: tuple[float, float] | None = None

    def velocity(
        self,
        score: Score,
        teacher: VideoDiT,
        noisy: Tensor,
        sigma: Tensor,
        told: tuple[Condition, Condition],
        *,
        always: bool = False,
    ) -> Tensor:
        """The velocity of a clip. A second call is made if any sample's level lies in the interval, or `always`: where
        weights are sharded, all ranks must make the same calls.

        Args: `score`, how a network is asked; `noisy` [B, F, C, H, W] at `sigma` [B, F], one level but for a clean
        first frame; what the teacher is `told`, with the prompt and without.
        """
        from longtake.flow.path import guided

        conditional = score(teacher, noisy, sigma, told[0])
        if self.weight == 1:
            return conditional
        if self.interval is None:
            return guided(conditional, score(teacher, noisy, sigma, told[1]), self.weight)
        low, high = self.interval
        level = sigma[:, -1]
        inside = (level >= low) & (level <= high)
        if not (always or inside.any()):
            return conditional
        both = guided(conditional, score(teacher, noisy, sigma, told[1]), self.weight)
        return both.where(inside[:, None, None, None, None], conditional)

    def calls(self, shift: float, sigma_min: float, sigma_max: float, *, always: bool = False) -> float:
        """How many calls `velocity` makes of a clip on average, of levels that are drawn by `training_sigma`."""
        if self.weight == 1 or self.interval is None or always:
            return 1.0 if self.weight == 1 else 2.0
        low, high = self.interval
        # Levels are clamped: what is drawn beyond an end lies on it.
        below = 0.0 if low <= sigma_min else unwarp(low, shift)
        return 1.0 + max(0.0, (1.0 if high >= sigma_max else unwarp(high, shift)) - below)


def dmd_gradient(fake: Tensor, real: Tensor, student: Tensor, counted: Tensor) -> Tensor:
    """The normalised gradient (p_fake - p_real) / mean |x - p_real|, zero outside `counted`.

    Args: clean predictions of the fake and the real score and the student's latents, all [B, F, C, H, W];
    `counted` [F] boolean. The mean runs over the counted frames of each sample. Source: DMD2 eq. 8; specification G.1.
    """
    weight = counted.float()[None, :, None, None, None]
    count = weight.sum() * student[0, 0].numel()
    scale = ((student - real).abs() * weight).sum((1, 2, 3, 4), keepdim=True) / count
    return (fake - real) / scale * weight


def dmd_loss(student: Tensor, gradient: Tensor, begin: int) -> Tensor:
    """0.5 mean (x - sg(x - gradient))^2 over the frames from `begin` on: its gradient in x is `gradient / count`."""
    target = (student - gradient).detach()
    return 0.5 * (student - target)[:, begin:].square().mean()
