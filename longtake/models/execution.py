"""How a transformer is computed: by which processes, and what backward computes again. What it computes is the same.

Given when a network is made (`VideoDiT`), or to another one of the same weights (`VideoDiT.executed`). It must know no
model and no process group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch

from longtake.models.attention import VARIANTS, Attention, attend, has_triton, limited
from longtake.models.recompute import Contexts, keep_attention, together
from longtake.models.sequence_parallel import SequenceParallel

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Execution:
    """Fields: `split`, the processes that compute each call together (their caches hold some of the heads);
    `recompute`, what backward computes again of a block: nothing (False), all (True), all but attention ("selective");
    `around`, contexts of a block's forward and of its recomputation, which may come when another adapter is on;
    `attend`, what computes attention; `fuses`, whether each function of element-wise work between matrix products is
    compiled into a kernel of its own, for the shapes that it meets.
    """

    split: SequenceParallel | None = None
    recompute: bool | str = False
    around: Callable[[], Contexts] | None = None
    attend: Attention = attend
    fuses: bool = False

    def fused(self, function: F) -> F:
        """`function` of tensors, compiled where this execution fuses: what runs is one text of the mathematics."""
        return cast(F, _compiled(function)) if self.fuses and has_triton() else function

    def contexts(self) -> Contexts:
        """One context around a block's forward and one around its recomputation; made before the forward."""
        makers = [keep_attention] if self.recompute == "selective" else []
        return together(makers if self.around is None else [*makers, self.around])


WHOLE_NETWORK = Execution()  # by one process, and nothing is computed again


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return limited(torch.compile(function, dynamic=False, fullgraph=True), VARIANTS, f"variants of {function.__name__}")
