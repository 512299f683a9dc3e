"""How a transformer is computed: by which processes, and what backward computes again. What it computes is the same.

Given when a network is made (`VideoDiT`), or to another one of the same weights (`VideoDiT.executed`). It must know no
model and no process group.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from longtake.models.attention import (
    VARIANTS,
    Attention,
    FrameMask,
    attend,
    attend_fastest,
    flex_is_faster,
    has_triton,
    limited,
)
from longtake.models.recompute import KEEPERS, Again, ByBlock, Contexts, kept_as, together
from longtake.models.sequence_parallel import SequenceParallel

F = TypeVar("F", bound=Callable[..., Any])

# Width from which on a GPU takes longer for a network than Python takes to start its kernels. A smaller one waits for
# Python: compiling its element-wise work, which takes a minute once, would bring nothing, and its calls are recorded.
LARGE_WIDTH = 1024


# (entries of a call one after the other, which updates are theirs, the context in which these are on)
Run = tuple[int, object, AbstractContextManager]


class Updates(Protocol):
    """Low-rank updates of a network, of which some are on (`shared_base.py`), as far as this file knows them."""

    def contexts(self) -> Contexts:
        """Contexts of a block's forward and of its recomputation, which may come when others are on."""
        ...

    def runs(self) -> list[Run] | None:
        """Where the entries of the present call have several; None: all have the same."""
        ...


class Calls(Protocol):
    """Makes calls of networks, in place of their own forward: by `VideoDiT.computed`, or what was recorded of that."""

    def __call__(self, model: Any, x: Tensor, sigma: Tensor, condition: Any, context: Any) -> Tensor: ...


@dataclass(frozen=True)
class Execution:
    """Fields: `split`, the processes that compute each call together (their caches hold some of the heads);
    `recompute`, what backward computes again of a block: nothing (False), all (True), all but self-attention
    ("selective"), or but self-attention and matrix products ("products"; "narrow", without those that are wider than
    what they are made of), or of each block another of these;
    `recompute_from`, the type in which tokens that enter a block are kept for that, None for their own; `updates`,
    low-rank ones that are switched between calls; `attend`, what computes attention; `fuses`, whether each function of
    element-wise work between matrix products is compiled into a kernel of its own, for the shapes that it meets, and
    `by_rows`, whether norms that are learnt through are kernels of ours instead (`norms.py`); `joins`, what joins the
    parts of masks whose keys lie apart, None where they do not (`apart.py`); `calls`, what makes the network's calls,
    None where Python does; `fused_shards`, whether weights are sharded and yet computed as whole ones: what is kept of
    a forward is then in an account that gathering does not change (`recompute.py`).
    """

    split: SequenceParallel | None = None
    recompute: Again | ByBlock = False
    recompute_from: torch.dtype | None = None
    updates: Updates | None = None
    attend: Attention = attend
    fuses: bool = False
    by_rows: bool = False
    joins: Callable[[FrameMask], FrameMask] | None = None
    calls: Calls | None = None
    fused_shards: bool = False

    def fused(self, function: F) -> F:
        """`function` of tensors, compiled where this execution fuses: what runs is one text of the mathematics."""
        return cast(F, _compiled(function)) if self.fuses and has_triton() else function

    def on_a_gpu(self, x: Tensor) -> bool:
        """Whether what is done with `x` is done there."""
        return x.is_cuda

    def entering(self, weight: Tensor) -> torch.dtype:
        """The type in which is written what enters a product with `weight`: where work is fused, autocast finds it in
        the type to which it would round it, for each product anew.
        """
        kind = weight.device.type
        rounds = self.fuses and weight.dtype == torch.float32 and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if rounds else weight.dtype

    def flex(self, device: torch.device, head_width: int) -> bool | None:
        """Whether masks are flex attention's, as `make_mask` takes it. Asked before any block runs."""
        if self.made_by is not None:  # recorded, a mask's parts wait for no Python, and flex's compiler takes longer
            return False
        if self.attend is not attend_fastest or device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
            return None
        return flex_is_faster(device, torch.get_autocast_dtype("cuda"), head_width)

    def again(self, layer: int) -> Again:
        """What backward computes again of one block."""
        return self.recompute.of(layer) if isinstance(self.recompute, ByBlock) else self.recompute

    @property
    def made_by(self) -> Calls | None:
        """`calls`, but of networks whose calls processes share, or whose updates are switched: Python makes these."""
        return self.calls if self.split is None and self.updates is None else None

    @property
    def settled(self) -> bool:
        """Whether what backward computes again stays as it is."""
        return not isinstance(self.recompute, ByBlock) or self.recompute.settled

    def keeping(self, tokens: Tensor) -> AbstractContextManager:
        """Around the call of a block that backward computes again from these `tokens`."""
        kept = self.recompute_from
        return nullcontext() if kept is None else kept_as(kept, tokens)

    def contexts(self, again: Again = True) -> Contexts:
        """One context around a block's forward and one around its recomputation, of as much as `again` of that block
        says; made before the forward.
        """
        makers = [partial(KEEPERS[again], alone=self.fused_shards)] if isinstance(again, str) else []
        return together(makers if self.updates is None else [*makers, self.updates.contexts])

    def runs(self) -> list[Run] | None:
        """As `Updates.runs`."""
        return None if self.updates is None else self.updates.runs()


WHOLE_NETWORK = Execution()  # by one process, and nothing is computed again


@dataclass(frozen=True)
class Compilations:
    """What this process has compiled: graphs of functions, one for each kind and size of tensors; how many of them were
    found in torch's cache on disk; and the seconds of all that.
    """

    graphs: int
    from_cache: int
    seconds: float

    def since(self, before: Compilations) -> Compilations:
        """What came after `before`."""
        return Compilations(
            self.graphs - before.graphs, self.from_cache - before.from_cache, self.seconds - before.seconds
        )

    def __str__(self) -> str:
        return f"{self.graphs} graphs compiled in {self.seconds:.1f} s, {self.from_cache} of them found on disk"


def compilations() -> Compilations:
    """What this process has compiled so far, by torch's own count."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    if utils is None:  # nothing was compiled
        return Compilations(0, 0, 0.0)
    counters, seconds = utils.counters, sum(utils.compilation_time_metrics.get("_compile.compile_inner", ()))
    # What the cache of whole functions has is not asked for in that of their graphs.
    found = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    return Compilations(counters["stats"]["unique_graphs"], found, seconds)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return limited(torch.compile(function, dynamic=False, fullgraph=True), VARIANTS, f"variants of {function.__name__}")
