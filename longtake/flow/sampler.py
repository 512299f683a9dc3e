"""A many-step sampler for the bidirectional teacher. It imports no model: it is given a function."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def euler_states(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Sequence[float]
) -> Iterator[Tensor]:
    """Yields the states at falling `sigmas` of the flow from `noise` [B, ...] at the first of them; float32.

    Args: `velocity(x, sigma [B])` gives noise - clean.
    """
    x = noise.float()
    yield x
    for sigma, following in zip(sigmas, sigmas[1:]):
        level = torch.full((x.shape[0],), sigma, device=x.device)
        x = x + (following - sigma) * velocity(x, level).float()
        yield x


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrates the flow as `euler_states`, whose last `sigmas` is 0; the last state."""
    return deque(euler_states(velocity, noise, sigmas), maxlen=1)[0]
