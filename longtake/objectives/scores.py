"""What teacher and critic say of a student's noised clip, and what the student learns from the difference.

Both predictions are clean latents (x0) in float32. Source: DMD2 (arXiv 2405.14867); specification G.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import Condition
    from longtake.models.dit import VideoDiT

# score(network, noisy [B, F, C, H, W], sigma [B, F], condition) -> velocity [B, F, C, H, W]
Score = Callable[["VideoDiT", "Tensor", "Tensor", "Condition"], "Tensor"]


def teacher_velocity(
    score: Score, teacher: VideoDiT, noisy: Tensor, sigma: Tensor, told: tuple[Condition, Condition], guidance: float
) -> Tensor:
    """The velocity of a guided teacher, uncond + w (cond - uncond); it is not asked twice where `guidance`, w, is 1.

    Args: `score`, how a network is asked; `noisy` [B, F, C, H, W] at `sigma` [B, F]; what it is `told`, with the prompt
    and without.
    """
    from longtake.flow.path import guided

    condition, unconditional = told
    conditional = score(teacher, noisy, sigma, condition)
    if guidance == 1:
        return conditional
    return guided(conditional, score(teacher, noisy, sigma, unconditional), guidance)


def dmd_gradient(fake: Tensor, real: Tensor, student: Tensor, counted: Tensor) -> Tensor:
    """The normalised gradient (p_fake - p_real) / mean |x - p_real|, zero outside `counted`.

    Args: clean predictions of the fake and the real score and the student's latents, all [B, F, C, H, W];
    `counted` [F] boolean. The mean runs over the counted frames of each sample. Source: DMD2 eq. 8; specification G.1.
    """
    weight = counted.float()[None, :, None, None, None]
    count = weight.sum() * student[0, 0].numel()
    scale = ((student - real).abs() * weight).sum((1, 2, 3, 4), keepdim=True) / count
    return (fake - real) / scale * weight


def dmd_loss(student: Tensor, gradient: Tensor, counted: Tensor) -> Tensor:
    """0.5 mean (x - sg(x - gradient))^2 over the counted frames: its gradient in x is `gradient / count`."""
    target = (student - gradient).detach()
    return 0.5 * (student - target)[:, counted].square().mean()
