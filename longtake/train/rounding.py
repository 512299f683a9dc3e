"""Stochastic rounding to bfloat16: up or down at random, so that the mean of what is kept is the number itself.

Rounding to nearest would drop every update below half of bfloat16's step (1/256 of the weight). Source: Gupta et al.
2015, arXiv 1502.02551, section 4; on the bits as in torchao `optim/quant_utils.py` (checked, not copied).
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 `values` in bfloat16: each one of its two neighbours, the nearer one the more likely.

    A bfloat16 is the upper half of a float32. Adding a random number to the lower half carries into the upper one with
    probability (lower half) / 2^16, also from the largest fraction to the next exponent.
    Args: `generator` on the device of `values`.
    """
    noise = torch.randint(0, 1 << 16, values.shape, device=values.device, dtype=torch.int32, generator=generator)
    bits = values.contiguous().view(torch.int32) + noise
    rounded = (bits & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
