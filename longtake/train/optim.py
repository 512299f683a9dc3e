"""AdamW of one network: linear warm-up, gradient norm, clipping, and a state that exists from the first step on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from longtake.config.groups import OptimConfig
from longtake.parallel.materialize import local
from longtake.weights.names import clean_name

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"


class NetworkOptimizer:
    """Updates the trainable parameters of one network, all of them float32, by one call, fused on a GPU.

    Build it after sharding: the parameters are remembered here, because a sharded module shows other objects while its
    parameters are gathered. Nothing but `tensors()` carries over from one step to the next: the learning rate is a
    function of the iteration and of the steps so far. With `beta1` 0 the first moment is the gradient of the step, and
    is not kept.

    Args: `max_steps`, iterations of the run, over the last of which the learning rate may fall.
    """

    def __init__(self, network: nn.Module, config: OptimConfig, max_steps: int) -> None:
        self.config, self.max_steps = config, max_steps
        self.parameters = {clean_name(n): p for n, p in network.named_parameters() if p.requires_grad}
        self.steps_done = 0
        self._state: dict[str, dict[str, Tensor]] = {}
        for name, p in self.parameters.items():
            assert p.dtype == torch.float32, f"{name} is trained and {p.dtype}"
            step = torch.zeros((), device=p.device if p.device.type == "cuda" else "cpu")
            kept = (_FIRST, _SECOND) if config.beta1 else (_SECOND,)
            moments = {key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in kept}
            self._state[name] = {"step": step, **moments}

    def restored(self) -> None:
        """Counts the steps so far, after `tensors()` were written into."""
        self.steps_done = max((int(state["step"].item()) for state in self._state.values()), default=0)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the next step, in iteration `step`: a linear ramp over this optimizer's first `warmup_steps`
        steps, then constant; over the last `decay_steps` iterations a linear fall, after which it would be 0.
        """
        config = self.config
        factor = min(1.0, (self.steps_done + 1) / max(1, config.warmup_steps))
        if config.decay_steps:
            factor *= min(1.0, max(0.0, (self.max_steps - step) / config.decay_steps))
        return config.lr * factor

    def zero_grad(self) -> None:
        """Drops the gradients and their memory."""
        for p in self.parameters.values():
            p.grad = None

    def gradient_norm(self) -> Tensor:
        """L2 norm over all gradients of all ranks, before clipping; a scalar that nobody has waited for."""
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def step(self, step: int, gradient_norm: float) -> None:
        """Clips by `gradient_norm` (of `gradient_norm()`) and updates the parameters for iteration `step`.

        The norm is that over all ranks, so that all shards of a network are scaled alike.
        """
        if gradient_norm > (limit := self.config.max_grad_norm):
            torch._foreach_mul_(self._gradients(), limit / gradient_norm)
        names = [name for name, p in self.parameters.items() if p.grad is not None]
        if names:
            self._update(names, step)
        self.steps_done += 1

    def _update(self, names: list[str], step: int) -> None:
        config = self.config
        parameters = [self.parameters[name] for name in names]
        values, gradients = [local(p) for p in parameters], [local(p.grad) for p in parameters]  # type: ignore[arg-type]
        second = [local(self._state[name][_SECOND]) for name in names]
        # Written over by 0 first + 1 gradient: by itself.
        first = [local(self._state[name][_FIRST]) for name in names] if config.beta1 else gradients
        fused = values[0].device.type == "cuda"
        adamw(
            values,
            gradients,
            first,
            second,
            [],
            [self._state[name]["step"] for name in names],
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=self.learning_rate(step),
            weight_decay=config.weight_decay,
            eps=config.eps,
            maximize=False,
        )
        torch.autograd.graph.increment_version(values)  # which fused kernels leave out: who follows weights looks there

    def tensors(self) -> dict[str, Tensor]:
        """The state by `<parameter>.<moment>`; writing into these tensors restores it."""
        return {f"{name}.{key}": tensor for name, state in self._state.items() for key, tensor in state.items()}

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]
