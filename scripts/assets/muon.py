"""Muon for the scripts that train the toy assets: orthogonalised momentum, matrices of one shape at once.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the step is scaled to the RMS of
an Adam step (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon takes matrices only, one after the other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For weights of at least two axes, flattened to [out, rest]; `lr` may be a tensor (CUDA graphs)."""

    def __init__(
        self, params: Iterable[Tensor], lr: float | Tensor, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:  # batches of pictures do not reach the temporal convolutions
                    by_shape[p.flatten(1).shape].append(p)
            for shape, weights in by_shape.items():
                gradients = [p.grad for p in weights]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in weights]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                looked_ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates = orthogonalise(torch.stack([u.flatten(1) for u in looked_ahead]))
                scale = 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                updates = updates * (scale * group["lr"])
                torch._foreach_sub_(weights, [u.view_as(p) for u, p in zip(updates, weights)])


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices to [B, m, n], by the quintic Newton-Schulz iteration."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.775 * gram + 2.0315 * gram @ gram) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT
