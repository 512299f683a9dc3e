"""A linear layer with low-rank updates, of which some are on: W x + b + (alpha / rank) B A x, and W frozen.

With gradient the layer is three products. Without, W with its update is one weight, made for the call and dropped after
it: one product of the size of W beside one of the tokens, where two narrow products of all tokens, their sum and what
autocast copies would follow each product of W. A roll-out makes some twenty such calls of hundreds of layers between
two updates; nothing is held between them, so that no weights can be stale and no memory is needed.

Numbers: the sum of W and its update is rounded once to the type of W, where two products of tokens would each be
rounded, and their sum. A test holds that the one is no farther from float64 than the other, also for updates that are
smaller than what W is rounded to. Source of the formula: Hu et al. 2021 (arXiv 2106.09685, eq. 3); names and order of
operations with gradient are those of PEFT (huggingface/peft 0.21 `tuners/lora/layer.py`). Must know no transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Turns:
    """The roles of the entries of one call, one run after the other: (how many entries, whose)."""

    runs: tuple[tuple[int, str], ...]

    @property
    def entries(self) -> int:
        return sum(count for count, _ in self.runs)


Active = str | Turns | None


class Switch(Protocol):
    """What says which updates are on: those of one name, of several for parts of a call, or none (None)."""

    active: Active


class Plain(NamedTuple):
    """A linear layer of one product."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, *self)


class LowRankLinear(nn.Module):
    """`base_layer` with updates by name; the latest of them is on, unless a `Switch` says which (`follow`)."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self._scales: dict[str, float] = {}
        self._switch: Switch | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen one."""
        return self.base_layer.weight

    def add(self, name: str, rank: int, scale: float) -> None:
        """Gives it updates called `name`, of no value yet: float32 on the device of its weight."""
        outputs, inputs = self.weight.shape
        for factors, shape in ((self.lora_A, (rank, inputs)), (self.lora_B, (outputs, rank))):
            factors[name] = factor = nn.Linear(shape[1], shape[0], bias=False, device="meta")
            factor.weight = nn.Parameter(torch.empty(shape, device=self.weight.device))
        self._scales[name] = scale

    def follow(self, switch: Switch) -> None:
        """From now on the updates are on that `switch` says."""
        self._switch = switch

    def factors(self, name: str) -> tuple[nn.Linear, nn.Linear]:
        """A and B of the updates of that name."""
        return cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])

    def plain(self) -> Plain | None:
        """What it computes without gradient, as one product; None where entries take turns and it has their updates."""
        on, weight = self._on, self.weight
        if isinstance(on, Turns):
            return None
        if on is not None:
            a, b = (factor.weight.to(weight.dtype) for factor in self.factors(on))
            weight = torch.addmm(weight, b, a, alpha=self._scales[on])
        return Plain(weight, self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]; [B, E, l, D] or [B, E * l, D] where entries take turns."""
        if not torch.is_grad_enabled() and (once := self.plain()) is not None:
            return once(x)
        on, out = self._on, self.base_layer(x)
        if on is None:
            return out
        if isinstance(on, str):
            return (out + self._update(on, x)).to(out.dtype)
        tokens = x.shape[1] // on.entries  # 1 where x is [B, E, l, D], l where it is [B, E * l, D]
        parts = x.split([count * tokens for count, _ in on.runs], 1)
        made = [self._update(name, part) for part, (_, name) in zip(parts, on.runs)]
        return out + torch.cat(made, 1).to(out.dtype)

    @property
    def _on(self) -> Active:
        """Those of its updates that are on; both factors are there for all roles that take turns."""
        if self._switch is None:
            return next(reversed(self._scales))
        on = self._switch.active
        if isinstance(on, Turns):
            return on if any(name in self._scales for _, name in on.runs) else None
        return on if on in self._scales else None

    def _update(self, name: str, x: Tensor) -> Tensor:
        a, b = self.factors(name)
        if not torch.is_autocast_enabled(x.device.type):
            # Under autocast this cast would be undone at once, and each layer keep a copy of its input for backward.
            x = x.to(a.weight.dtype)
        return b(a(x)) * self._scales[name]
