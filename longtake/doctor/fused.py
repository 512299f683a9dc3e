"""Element-wise work that a GPU's compiler fuses, as a trace without a compiler sees it: what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtake.models.execution import Execution


@dataclass(frozen=True)
class Fused(Execution):
    """An execution whose fused functions are traced: each keeps its inputs, and nothing of what is between. Operators
    of a GPU are those of `longtake`, which say without data what they take.
    """

    def on_a_gpu(self, x: Tensor) -> bool:
        """One is planned for."""
        return True

    def flex(self, device: torch.device, head_width: int) -> bool | None:
        """Masks go part by part: flex attention, which some GPUs are faster by, copies no keys, and takes less."""
        return False

    def fused(self, function: Any) -> Any:
        """As `Execution.fused`, without a compiler."""

        def call(*given: Any) -> Any:
            learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
            return _KeepsInputs.apply(function, *given) if learns else function(*given)

        return call if self.fuses else function


class _KeepsInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *given: Any) -> Any:
        # What needs no gradient is there anyway, and may be written over before backward: a cache.
        learnt = ctx.needs_input_grad[1:]
        ctx.function, ctx.others = function, [None if on else x for x, on in zip(given, learnt, strict=True)]
        ctx.save_for_backward(*(x if on else None for x, on in zip(given, learnt, strict=True)))
        return function(*given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[1:]
        each = zip(ctx.saved_tensors, ctx.others, wanted, strict=True)
        ctx.others = None  # as what is saved is given up: a cache would last as long as the graph
        given = [x.detach().requires_grad_() if on else other for x, other, on in each]
        with torch.enable_grad():
            made = ctx.function(*given)
        leaves = [x for x, on in zip(given, wanted) if on]
        found = iter(torch.autograd.grad(made, leaves, grads, allow_unused=True))
        return None, *(next(found) if on else None for on in wanted)
