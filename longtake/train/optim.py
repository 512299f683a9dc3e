"""AdamW of one network: linear warm-up, gradient norm, clipping, and a state that exists from the first step on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.adamw import adamw

from longtake.models.weights import clean_name
from longtake.randomness import Draws
from longtake.train.moments import Float32Moment, Int8Moment, check_int8, local, suits_int8
from longtake.train.rounding import round_stochastically


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW's numbers; `warmup_steps` counts the optimizer's own steps, `max_grad_norm` None is no clipping. Over the
    last `decay_steps` of `total_steps` iterations the learning rate falls.

    `moments` are kept in "float32" or "int8"; `seed` is that of rounding, where weights are bfloat16.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    total_steps: int = 0
    max_grad_norm: float | None = None
    moments: str = "float32"
    seed: int = 0


class NetworkOptimizer:
    """Updates the trainable parameters of one network.

    Build it after sharding: the parameters are remembered here, because a sharded module shows other objects while its
    parameters are gathered. Nothing but `tensors()` carries over from one step to the next: learning rate and rounding
    are functions of the iteration and of the steps so far.

    float32 weights with float32 moments are updated by one call for all of them, fused on a GPU; others one after the
    other in float32, and bfloat16 weights are rounded stochastically.
    """

    def __init__(self, network: nn.Module, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.parameters = {clean_name(n): p for n, p in network.named_parameters() if p.requires_grad}
        self.steps_done = 0
        self._steps: dict[str, Tensor] = {}
        self._moments: dict[str, tuple[Float32Moment | Int8Moment, Float32Moment | Int8Moment]] = {}
        if settings.moments == "int8":
            check_int8()
        for name, p in self.parameters.items():
            fused = p.device.type == "cuda"
            self._steps[name] = torch.zeros((), device=p.device if fused else "cpu")
            if settings.moments == "int8" and suits_int8(p):
                self._moments[name] = Int8Moment(p, signed=True), Int8Moment(p, signed=False)
            else:
                self._moments[name] = Float32Moment(p), Float32Moment(p)
        self._draws = Draws(settings.seed)

    def restored(self) -> None:
        """Counts the steps so far, after `tensors()` were written into."""
        self.steps_done = max((int(steps.item()) for steps in self._steps.values()), default=0)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the next step, in iteration `step`: a linear ramp over this optimizer's first `warmup_steps`
        steps, then constant; over the last `decay_steps` iterations a linear fall, after which it would be 0.
        """
        settings = self.settings
        factor = min(1.0, (self.steps_done + 1) / max(1, settings.warmup_steps))
        if settings.decay_steps:
            factor *= min(1.0, max(0.0, (settings.total_steps - step) / settings.decay_steps))
        return settings.lr * factor

    def zero_grad(self) -> None:
        """Drops the gradients and their memory."""
        for p in self.parameters.values():
            p.grad = None

    def gradient_norm(self) -> float:
        """L2 norm over all gradients of all ranks, before clipping."""
        norm = torch.nn.utils.get_total_norm(self._gradients())
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    @torch.no_grad()
    def step(self, step: int, gradient_norm: float) -> None:
        """Clips by `gradient_norm` (of `gradient_norm()`) and updates the parameters for iteration `step`."""
        if self.settings.max_grad_norm is not None and gradient_norm > self.settings.max_grad_norm:
            torch._foreach_mul_(self._gradients(), self.settings.max_grad_norm / gradient_norm)
        with_gradient = [name for name, p in self.parameters.items() if p.grad is not None]
        together = [name for name in with_gradient if self._is_plain(name)]
        self._update(together, [local(self.parameters[name]) for name in together], step)
        for name in with_gradient:
            if not self._is_plain(name):
                self._update_alone(name, step)
        self.steps_done += 1

    def tensors(self) -> dict[str, Tensor]:
        """The state by `<parameter>.<moment>`; writing into these tensors restores it."""
        named: dict[str, Tensor] = {}
        for name in self.parameters:
            named[f"{name}.step"] = self._steps[name]
            for key, moment in zip(("exp_avg", "exp_avg_sq"), self._moments[name]):
                named |= {f"{name}.{key}{end}": tensor for end, tensor in moment.tensors.items()}
        return named

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def _is_plain(self, name: str) -> bool:
        is_float = self.parameters[name].dtype == torch.float32
        return is_float and all(isinstance(moment, Float32Moment) for moment in self._moments[name])

    def _update_alone(self, name: str, step: int) -> None:
        p = local(self.parameters[name])
        if not p.numel():
            self._steps[name] += 1  # the same on every rank, also where none of it lies
            return
        value = p.float()
        self._update([name], [value], step)
        if p.dtype == torch.float32:
            return  # `float` copied nothing
        p.copy_(round_stochastically(value, self._generator(name, step)) if p.dtype == torch.bfloat16 else value)

    def _update(self, names: list[str], values: list[Tensor], step: int) -> None:
        """AdamW on this rank's `values` of some parameters."""
        if not names:
            return
        settings = self.settings
        moments = [[moment.load() for moment in self._moments[name]] for name in names]
        gradients = [local(self.parameters[name].grad).float() for name in names]  # type: ignore[arg-type]
        fused = values[0].device.type == "cuda"
        adamw(
            values,
            gradients,
            [first for first, _ in moments],
            [second for _, second in moments],
            [],
            [self._steps[name] for name in names],
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=self.learning_rate(step),
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            maximize=False,
        )
        for name, changed in zip(names, moments):
            for moment, value in zip(self._moments[name], changed):
                moment.store(value)

    def _generator(self, name: str, step: int) -> torch.Generator:
        """Randomness of this rank's part of a parameter: ranks that hold the same part round alike."""
        p, first = self.parameters[name], 0
        if isinstance(p, DTensor):
            first = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1][0]
        seed = self._draws.generator(step, f"round {name}", first).initial_seed()
        return torch.Generator(p.device).manual_seed(seed)
