"""A many-step sampler for the bidirectional teacher. It imports no model: it is given a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrates the flow from `noise` [B, ...] along falling `sigmas` (the last one 0); float32.

    Args: `velocity(x, sigma [B])` gives noise - clean.
    """
    x = noise.float()
    for sigma, following in zip(sigmas, sigmas[1:]):
        level = torch.full((x.shape[0],), sigma, device=x.device)
        x = x + (following - sigma) * velocity(x, level).float()
    return x
