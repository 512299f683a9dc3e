"""A network's weights in the type of its matrix products, beside the network itself, for passes without gradient.

Under autocast a recorded pass would round every weight anew each time that it is replayed: a roll-out makes some twenty
of them between two updates. The numbers are the same. It must know no cache and no graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtake.models.dit import VideoDiT


class Rounded:
    """The network of the same sizes and `dtype` that follows a `model` of float32, all of whose weights are here; it
    takes memory from its first use on.
    """

    def __init__(self, model: VideoDiT, dtype: torch.dtype) -> None:
        self._theirs: list[Tensor] = list(model.parameters())
        with torch.device("meta"):
            twin = type(model)(model.config)
        self._twin = twin.cast(dtype).requires_grad_(False).executed(model.execution)
        self._mine: list[Tensor] = []
        self._versions: list[int] = []

    def changed(self) -> None:
        """The weights are others now, whether they show it or not."""
        self._versions = []

    @torch.no_grad()
    def current(self) -> VideoDiT:
        """It, with the weights of now."""
        if not self._mine:
            self._mine = list(self._twin.to_empty(device=self._theirs[0].device).parameters())
        versions = [parameter._version for parameter in self._theirs]
        if versions != self._versions:
            torch._foreach_copy_(self._mine, self._theirs)
            self._versions = versions
        return self._twin
