"""PEFT's linear layer with low-rank updates, W x + b + (alpha / rank) B A x, and what is added to it: passes without
gradient merge an update into its weight.

With gradient PEFT's own forward runs: three products. Without, W with its update is one weight, made for the call and
dropped after it: one product of the size of W beside one of the tokens, where two narrow products of all tokens, their
sum and what autocast copies would follow each product of W. A roll-out makes some twenty such calls of hundreds of
layers between two updates; nothing is held between them, so that no weights can be stale and no memory is needed.

Numbers: the sum of W and its update is rounded once to the type of W, where two products of tokens would each be
rounded, and their sum. A test holds that the one is no farther from float64 than the other, also for updates that are
smaller than what W is rounded to. Source of the formula: Hu et al. 2021 (arXiv 2106.09685, eq. 3); of the layer:
huggingface/peft 0.21 `tuners/lora/layer.py`, `LoraConfig._register_custom_module`. Must know no transformer.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Switch(Protocol):
    """Says which updates are on: of one name, none (None), or something else where parts of a call have their own."""

    @property
    def active(self) -> Any: ...


class Plain(NamedTuple):
    """A linear layer of one product."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, *self)


class Merging(nn.Module):
    """What `low_rank_linear` puts before PEFT's layer, whose attributes these are."""

    base_layer: nn.Linear
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    scaling: dict[str, float]
    active_adapters: list[str]
    _switch: Switch | None = None

    def follow(self, switch: Switch) -> None:
        """From now on `switch` says which updates are on, also where nobody calls the layer, as its hooks do."""
        self._switch = switch

    def plain(self) -> Plain | None:
        """What it computes without gradient, as one product; None where parts of a call have updates of their own."""
        on = self.active_adapters if self._switch is None else self._switch.active or []
        if not isinstance(on, str | list):
            return None
        weight: Tensor = self.base_layer.weight
        for name in [on] if isinstance(on, str) else on:
            if name in self.lora_A:
                a, b = (cast(nn.Linear, each[name]).weight.to(weight.dtype) for each in (self.lora_A, self.lora_B))
                weight = torch.addmm(weight, b, a, alpha=self.scaling[name])
        return Plain(weight, self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        once = None if torch.is_grad_enabled() else self.plain()
        return super().forward(x) if once is None else once(x)


@cache
def low_rank_linear() -> type[nn.Module]:
    """PEFT's layer, merging. PEFT is imported by who asks for it: that takes seconds."""
    from peft.tuners.lora import Linear

    return type("LowRankLinear", (Merging, Linear), {})
