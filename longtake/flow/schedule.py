"""Noise levels: the shift warp, the student's steps, and the law that training draws from. Pure math, without torch.

sigma is the noise level in [0, 1]; u is the un-warped fraction. The shift changes where the levels lie, never what
they mean: sigma = timestep / 1000 always, and sigma(0) = 0 exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from longtake.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FloatOrTensor = TypeVar("FloatOrTensor", float, "Tensor")


def warp(u: FloatOrTensor, shift: float) -> FloatOrTensor:
    """sigma = shift u / (1 + (shift - 1) u). Source: Wan2.1's flow schedulers; Esser et al. 2024, eq. 23."""
    return shift * u / (1 + (shift - 1) * u)


def student_sigmas(steps: Sequence[float], shift: float) -> list[float]:
    """Noise levels at which the student is called, from un-warped `steps`.

    Raises: ConfigError unless `steps` starts at 1 and falls strictly, above 0.
    """
    if not steps or steps[0] != 1 or any(b >= a for a, b in zip(steps, steps[1:])) or steps[-1] <= 0:
        raise ConfigError(
            f"flow.steps={list(steps)} must start at 1, fall strictly and stay above 0: [1, 0.75, 0.5, 0.25]"
        )
    return [warp(float(u), shift) for u in steps]


def sampling_sigmas(num_steps: int, shift: float) -> list[float]:
    """Levels of a sampler of `num_steps` steps: u = 1 - k/n warped, then 0; `num_steps + 1` values."""
    return [warp(1 - k / num_steps, shift) for k in range(num_steps)] + [0.0]


def training_sigma(u: Tensor, shift: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Levels for training from uniform `u`: warped, then clamped to [low, high] (DMD: 0.02 .. 0.98)."""
    return warp(u.double(), shift).clamp(low, high).float()
