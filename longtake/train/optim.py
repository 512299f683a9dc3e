"""AdamW of one network: linear warm-up, gradient norm, clipping, and a state that exists from the first step on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longtake.models.weights import clean_name


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW's numbers; `warmup_steps` counts iterations, `max_grad_norm` None means no clipping."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    max_grad_norm: float | None = None


class NetworkOptimizer:
    """Updates the trainable parameters of one network.

    Build it after sharding: the parameters are remembered here, because a sharded module shows other objects while its
    parameters are gathered. Nothing but `tensors()` carries over from one step to the next: the learning rate is a
    function of the iteration.
    """

    def __init__(self, network: nn.Module, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.parameters = {clean_name(n): p for n, p in network.named_parameters() if p.requires_grad}
        self._adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        # AdamW makes its state in the first step; made here, a checkpoint has the same keys at any step.
        for p in self.parameters.values():
            self._adamw.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }

    def learning_rate(self, step: int) -> float:
        """Learning rate of iteration `step`: a linear ramp over `warmup_steps` iterations, then constant."""
        return self.settings.lr * min(1.0, (step + 1) / max(1, self.settings.warmup_steps))

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        """L2 norm over all gradients of all ranks, before clipping."""
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def step(self, step: int, gradient_norm: float) -> None:
        """Clips by `gradient_norm` (of `gradient_norm()`) and updates the parameters for iteration `step`."""
        if self.settings.max_grad_norm is not None and gradient_norm > self.settings.max_grad_norm:
            torch._foreach_mul_(self._gradients(), self.settings.max_grad_norm / gradient_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self._adamw.step()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def tensors(self) -> dict[str, Tensor]:
        """The state by `<parameter>.<moment>`; writing into these tensors restores it."""
        state = self._adamw.state
        return {f"{name}.{key}": value for name, p in self.parameters.items() for key, value in state[p].items()}
