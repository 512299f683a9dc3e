"""What the training loop asks of an objective; teacher, causal and distill each implement it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

# phase(name) -> context manager that a caller times
Phase = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class LossResult:
    """The loss of one micro-batch.

    Fields: `loss`, a scalar with gradient, the mean over the samples of the micro-batch; `metrics`, scalars to log
    under exactly these names (the same names on every rank).
    """

    loss: Tensor
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over one or more networks that are trained in turn.

    `networks` holds the trained networks by name. An iteration calls, for each name in `turns(step)` and each
    micro-batch, `loss(turn, batch, step)`, whose gradient updates `networks[turn]` alone. Every random number must be
    a function of (seed, step, purpose, global sample index), never of earlier calls: this is what makes a resumed run
    equal to an uninterrupted one.
    """

    networks: dict[str, nn.Module]

    def turns(self, step: int) -> list[str]:
        """Names of the networks that iteration `step` updates, in order; the same on every rank."""
        ...

    def loss(self, turn: str, batch: Any, step: int) -> LossResult:
        """Loss of one micro-batch for the network named `turn`."""
        ...

    def discard(self) -> None:
        """Forgets what later iterations would go on with: an update was skipped because something was not finite.

        Called on every rank alike.
        """
        ...
