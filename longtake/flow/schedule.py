"""Noise levels: those of a sampler, and the law that training draws from (the student's: `plan.py`). Pure math.

sigma is the noise level in [0, 1]; u is the un-warped fraction. The shift changes where the levels lie, never what
they mean: sigma = timestep / 1000 always, and sigma(0) = 0 exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.plan import warp


def sampling_sigmas(num_steps: int, shift: float) -> list[float]:
    """Levels of a sampler of `num_steps` steps: u = 1 - k/n warped, then 0; `num_steps + 1` values."""
    return [warp(1 - k / num_steps, shift) for k in range(num_steps)] + [0.0]


def training_sigma(u: Tensor, shift: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Levels for training from uniform `u`: warped, then clamped to [low, high] (DMD: 0.02 .. 0.98)."""
    return warp(u.double(), shift).clamp(low, high).to(torch.float32)
