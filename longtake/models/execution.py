"""How a transformer is computed: by which processes, and what backward computes again. What it computes is the same.

Given when a network is made (`VideoDiT`), or to another one of the same weights (`VideoDiT.executed`). It must know no
model and no process group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longtake.models.recompute import Contexts, keep_attention, together
from longtake.models.sequence_parallel import SequenceParallel


@dataclass(frozen=True)
class Execution:
    """Fields: `split`, the processes that compute each call together (their caches hold some of the heads);
    `recompute`, what backward computes again of a block: nothing (False), all (True), all but attention ("selective");
    `around`, contexts of a block's forward and of its recomputation, which may come when another adapter is on.
    """

    split: SequenceParallel | None = None
    recompute: bool | str = False
    around: Callable[[], Contexts] | None = None

    def contexts(self) -> Contexts:
        """One context around a block's forward and one around its recomputation; made before the forward."""
        makers = [keep_attention] if self.recompute == "selective" else []
        return together(makers if self.around is None else [*makers, self.around])


WHOLE_NETWORK = Execution()  # by one process, and nothing is computed again
