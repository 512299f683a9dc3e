"""Exponential moving average of one network's weights: float32, sharded like the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from longtake.config.groups import EmaConfig
from longtake.parallel.materialize import local
from longtake.weights.names import clean_name


class EMA:
    """The average of a network's trainable parameters. Build it after sharding, like the optimizer."""

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self._parameters = {clean_name(n): p for n, p in network.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after the update of iteration `step`; up to `start_step` the average is the weights."""
        decay = self.config.decay if step > self.config.start_step else 0.0
        averages = [local(self._average[name]) for name in self._parameters]
        weights = [local(p).to(torch.float32) for p in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network computes with the average; afterwards its own weights are back, bit for bit."""
        own = {name: local(p).detach().clone() for name, p in self._parameters.items()}
        try:
            self._write(self._average)
            yield
        finally:
            self._write(own)

    # Into the shards in place. Under FSDP2 they are seen because the root, too, is resharded after each forward
    # (`fsdp.parallelize`): parameters left gathered would hide the change from the next forward.
    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            local(p).copy_(local(values[name]))

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter name; writing into these tensors restores it."""
        return dict(self._average)
