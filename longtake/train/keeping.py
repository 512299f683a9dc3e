"""How much of a forward is kept for its backward, where `activation_checkpointing: auto` leaves that to memory.

The first iterations keep all of a network's first block, attention of its second, and recompute the others. What each
of these kept, and the most memory that was held meanwhile, are measured. From then on as many blocks keep as there is
room for: results of attention first, which cost the most to compute again and are the least to keep, then whole blocks.
The mathematics is the same. It must know no objective and no file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longtake.models.execution import Execution
from longtake.models.layers import rms_norm
from longtake.models.recompute import ByBlock, keep_attention
from longtake.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

FEWEST_BLOCKS = 4  # of a network in which the three ways are tried
ROOM = 0.85  # of the memory that this process can have; the rest is for fragments and what comes rarely, as validation
GIB = 2**30


@dataclass(frozen=True)
class Kept:
    """Bytes that a block of each way leaves for the backward of a micro-batch."""

    whole: int
    attention: int
    nothing: int


def plan(kept: Kept, blocks: int, spare: int, *, attention: bool) -> tuple[int, int]:
    """How many of `blocks` are kept whole, and of how many more the results of attention, in `spare` bytes.

    Args: `attention`, whether its results may be kept alone.
    """
    each = max(1, kept.attention - kept.nothing)
    some = min(blocks, max(0, spare) // each) if attention else 0
    if 0 < some < blocks:
        return 0, some
    left, step = max(0, spare) - some * each, max(1, kept.whole - (kept.attention if some else kept.nothing))
    whole = min(blocks, left // step)
    return whole, max(0, some - whole)


def keeps_attention(execution: Execution, device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether the results of attention can be kept alone as networks are computed here; says why not.

    Versions of torch differ in how compiled functions, operators of others and selective recomputation go together.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, 256, 2 * head_width, device=device, generator=generator).to(dtype).requires_grad_()
    weight = torch.ones(2 * head_width, device=device, requires_grad=True)

    def work(x: Tensor) -> Tensor:
        q = execution.fused(rms_norm)(x, weight, 1e-6).unflatten(-1, (2, -1))
        return execution.attend(q, q.sin(), q.cos()).flatten(2)

    def gradients(made: Tensor) -> Tensor:
        return torch.cat([one.flatten() for one in torch.autograd.grad(made.square().sum(), (x, weight))])

    try:
        truth = gradients(work(x))
        found = gradients(checkpoint(work, x, use_reentrant=False, context_fn=keep_attention))
    except (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError) as error:
        logger.warning("results of attention are not kept alone: %s", str(error).splitlines()[0])
        return False
    if float((found - truth).norm() / truth.norm()) < 1e-2:
        return True
    logger.warning("results of attention are not kept alone: gradients were others then")
    return False


@dataclass(eq=False)
class Watched:
    """A network of `blocks`, whose way is `by_block`, and what its first three blocks were seen to keep."""

    name: str
    blocks: nn.ModuleList
    by_block: ByBlock
    now: list[int] = field(default_factory=lambda: [0, 0, 0])
    most: list[int] = field(default_factory=lambda: [0, 0, 0])
    hooks: list[Any] = field(default_factory=list)

    def watch(self, held: Callable[[], int]) -> None:
        """From now on it is measured; `held`, bytes of tensors that there are."""
        for number, block in enumerate(self.blocks[:3]):
            before: list[int] = []

            def begins(*_: Any, before: list[int] = before) -> None:
                if _leaves_something():
                    before[:] = [held()]

            def ends(*_: Any, before: list[int] = before, number: int = number) -> None:
                if before and _leaves_something():
                    self.now[number] += held() - before.pop()

            self.hooks += [block.register_forward_pre_hook(begins), block.register_forward_hook(ends)]

    def passed(self) -> None:
        """An iteration is complete."""
        self.most = [max(pair) for pair in zip(self.now, self.most)]
        self.now = [0, 0, 0]

    def kept(self, micro_batches: int) -> Kept:
        """What was seen of each of so many, in the iteration that kept the most. It is watched no more."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        whole, attention, nothing = (size // micro_batches for size in self.most)
        # Without a block that keeps attention alone, the second recomputes all.
        return Kept(whole, attention if self.by_block.attention else nothing, nothing)


def _leaves_something() -> bool:
    """In a forward that a backward will follow, and that is not made again by one."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


class Memory:
    """That of a GPU, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(self) -> None:
        """From here on the most is counted."""
        torch.cuda.empty_cache()  # what loading left is not held any more
        torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> int:
        """Of all tensors."""
        return torch.cuda.memory_allocated(self.device)

    def most(self) -> int:
        """Held at once, since the count began; what the allocator keeps in fragments counts."""
        return torch.cuda.max_memory_reserved(self.device)

    def all(self) -> int:
        """What this process can have."""
        free, total = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in every version
        return min(total - others, int((1.0 if fraction is None else fraction(self.device)) * total))


class Keeper:
    """Measures the first iterations of all `watched` networks, until `every` update was seen, and decides for each.

    Args: `shown(step)`, the updates whose memory an iteration shows; `micro_batches` of an update; `memory` of the
    mesh's device. `settled`: nothing is to be decided any more; `decided`, by network, how many blocks are kept whole,
    and of how many more attention.
    """

    def __init__(
        self,
        watched: Sequence[Watched],
        mesh: Mesh,
        every: Collection[str],
        shown: Callable[[int], Collection[str]],
        micro_batches: int,
        memory: Memory | None = None,
    ) -> None:
        self.watched, self.mesh, self.shown, self.micro_batches = watched, mesh, shown, micro_batches
        self.settled, self.memory = not watched, memory or Memory(mesh.device)
        self.decided: dict[str, list[int]] = {}
        self._missing, self._peak = set(every), 0
        if not self.settled:
            self.memory.begin()
        for one in watched:
            one.watch(self.memory.now)

    def passed(self, step: int) -> None:
        """Iteration `step` is complete: decides, once each update was seen. All ranks call it."""
        if self.settled:
            return
        self._peak = max(self._peak, self.memory.most())  # rows of the log begin the count anew
        for one in self.watched:
            one.passed()
        self._missing -= set(self.shown(step))
        if not self._missing:
            self.settled = True
            self._decide(int(ROOM * self.memory.all()) - self._peak)

    def _decide(self, spare: int) -> None:
        """Args: `spare`, bytes of this rank beside the most that it held."""
        found = [one.kept(self.micro_batches) for one in self.watched]
        ranks = self.mesh.every(lambda: (spare, found))
        least = min(each for each, _ in ranks)
        for number, one in enumerate(self.watched):
            kept = max((seen[number] for _, seen in ranks), key=lambda seen: seen.whole)
            if kept.whole <= kept.nothing:  # it is differentiated in ways of its own (`rollout/replay.py`)
                one.by_block.keep(0, 0)
                continue
            count = len(one.blocks)
            whole, some = plan(kept, count, least, attention=one.by_block.attention > 0)
            one.by_block.keep(whole, some)
            self.decided[one.name] = [whole, some]
            takes = whole * (kept.whole - kept.nothing) + some * (kept.attention - kept.nothing)
            logger.info(
                "%s: of %d blocks, backward computes nothing again of %d, all but attention of %d, all of %d; that "
                "keeps %.1f GiB more (of a block %.2f, %.2f, %.2f GiB) where %.1f GiB were to spare beside %.1f "
                "(activation_checkpointing=auto)",
                *(one.name, count, whole, some, count - whole - some, takes / GIB),
                *(size / GIB for size in (kept.whole, kept.attention, kept.nothing, least, self._peak)),
            )
