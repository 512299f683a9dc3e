"""How much of a forward is kept for its backward, where `activation_checkpointing: auto` leaves that to memory.

In the first iterations one block of a network keeps all, one the results of attention and matrix products, one those of
attention alone, and the others nothing. What each of these kept, and the most memory that was held meanwhile, are
measured; what products take without the first one of an MLP, the widest, is reckoned. From then on as much is kept as
there is room for: first what costs the most to compute again beside what it takes to keep, which is attention. The
mathematics is the same. It must know no objective and no file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.errors import is_out_of_memory
from longtake.models.execution import Execution
from longtake.models.layers import MLP, rms_norm
from longtake.models.recompute import Again, ByBlock, made_again
from longtake.models.trial import beside, is_right
from longtake.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

# What backward may compute again of a block, each less than the one before it, and which block tries it first; all
# others begin as the first way says.
TRIALS: dict[Again, int] = {True: 2, "selective": -1, "products": 1, False: 0}
FEWEST_BLOCKS = len(TRIALS)  # of a network
ROOM = 0.85  # of the memory that this process can have; the rest is for fragments and what comes rarely, as validation
GIB = 2**30
_WORDS: dict[Again, str] = {  # from the least that is kept on
    True: "all",
    "selective": "all but attention",
    "narrow": "wide products and element-wise work",
    "products": "element-wise work",
    False: "nothing",
}


def first_ways(blocks: int, *, selective: bool) -> list[Again]:
    """Of each of `blocks` while it is measured. Args: `selective`, whether some results may be kept without others."""
    ways: list[Again] = [True] * blocks
    for way, block in TRIALS.items():
        if selective or not isinstance(way, str):
            ways[block] = way
    return ways


def plan(kept: Mapping[Again, int], blocks: int, spare: int) -> dict[Again, int]:
    """How many of `blocks` keep how much in `spare` bytes, beyond what the first way leaves.

    Args: `kept`, bytes of a block by way, from the least on.
    """
    least, *others = kept
    found, before = {least: blocks}, least
    for way in others:
        step = max(1, kept[way] - kept[before])
        count = min(blocks, max(0, spare) // step)
        found[before], found[way] = blocks - count, count
        if count < blocks:
            break
        spare, before = spare - count * step, way
    return {way: count for way, count in found.items() if count}


def tried_first(kept: Mapping[Again, int]) -> int:
    """Bytes that the first block kept, because it tried to, beyond what the first way leaves: part of the most that was
    held, and gone with the trial. It still had them whenever another block's backward held the most. What others tried
    is not counted: it makes up for the last block, which is computed again in full beside all others once it tries
    nothing. Args: `kept`, bytes of a block by way.
    """
    return kept[False] - kept[True]


def keeps_some(execution: Execution, device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether some results can be kept without others, as networks are computed here; says of what not, and why.

    Versions of torch differ in how compiled functions, operators of others and selective recomputation go together.
    Kernels of ours for norms and masks are tried so before they are chosen.
    """
    generator, width = torch.Generator(device).manual_seed(0), 2 * head_width

    def random(*shape: int, over: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device, generator=generator) / over).to(dtype).requires_grad_()

    x, weight = random(1, 256, width), torch.ones(width, device=device, requires_grad=True)
    matrix = torch.eye(width, device=device, dtype=dtype)
    with torch.device("meta"):  # which draws nothing
        layers = MLP(width, width)
    values = {name: random(*one.shape, over=one.shape[0] ** 0.5) for name, one in layers.named_parameters()}
    layers.load_state_dict(values, assign=True)

    def attends(x: Tensor, weight: Tensor) -> Tensor:
        q = execution.fused(rms_norm)(F.linear(x, matrix), weight, 1e-6).unflatten(-1, (2, -1))
        return execution.attend(q, q.sin(), q.cos()).flatten(2)

    def within(x: Tensor, *_: Tensor) -> Tensor:
        return layers(x.sin(), execution)

    works: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
        "attention": (attends, (x, weight)),
        "the MLP": (within, (x, *layers.parameters())),
    }
    return all(
        is_right(f"keeping some results of {what}", device, partial(_off, *how, alone=execution.fused_shards))
        for what, how in works.items()
    )


def _off(work: Callable[..., Tensor], given: Sequence[Tensor], *, alone: bool) -> list[float]:
    """How far gradients are from what they are otherwise where `work` keeps products alone, and narrow ones alone.
    Args: as `made_again`.
    """
    runs = work, made_again(work, alone=alone), made_again(work, "narrow", alone=alone)
    truth, *others = (torch.autograd.grad(run(*given).float().square().sum(), given) for run in runs)
    return [beside(one, other) for found in others for one, other in zip(found, truth, strict=True)]


@dataclass(eq=False)
class Watched:
    """A network of `blocks`, whose ways are `by_block`, and what those that try each were seen to keep; `forms()`, how
    many kinds of its calls are to be recorded and keep that for good (`rollout/recorded_calls.py`).
    """

    name: str
    blocks: nn.ModuleList
    by_block: ByBlock
    forms: Callable[[], int] = lambda: 0
    now: dict[Again, int] = field(default_factory=lambda: dict.fromkeys(TRIALS, 0))
    most: dict[Again, int] = field(default_factory=lambda: dict.fromkeys(TRIALS, 0))
    wide: list[int] = field(default_factory=lambda: [0, 0])  # of these the first products of MLPs: now, and the most
    hooks: list[Any] = field(default_factory=list)

    def watch(self, held: Callable[[], int]) -> None:
        """From now on it is measured; `held`, bytes of tensors that there are."""
        for way, number in TRIALS.items():
            if self.by_block.ways[number] != way:
                continue
            before: list[int] = []

            def begins(*_: Any, before: list[int] = before) -> None:
                if _leaves_something():
                    before[:] = [held()]

            def ends(*_: Any, before: list[int] = before, way: Again = way) -> None:
                if before and _leaves_something():
                    self.now[way] += held() - before.pop()

            block = self.blocks[number]
            self.hooks += [block.register_forward_pre_hook(begins), block.register_forward_hook(ends)]
            if way == "products":
                layers = [layer for layer in block.modules() if isinstance(layer, MLP)]
                self.hooks += [layer.register_forward_hook(self._widens) for layer in layers]

    def _widens(self, layers: Any, _inputs: Any, out: Tensor) -> None:
        if _leaves_something():
            self.wide[0] += out.numel() // out.shape[-1] * layers[0].out_features * out.element_size()

    def passed(self) -> None:
        """An iteration is complete."""
        self.most = {way: max(size, self.now[way]) for way, size in self.most.items()}
        self.now = dict.fromkeys(TRIALS, 0)
        self.wide = [0, max(self.wide)]

    def kept(self, micro_batches: int) -> dict[Again, int]:
        """Bytes that a block left for the backward of one of so many, by way, in the iteration that kept the most. It
        is watched no more.
        """
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        tried = [way for way, number in TRIALS.items() if self.by_block.ways[number] == way]
        found = {way: self.most[way] // micro_batches for way in tried}
        if "products" in found:
            found["narrow"] = max(found["selective"], found["products"] - self.wide[1] // micro_batches)
        return {way: found[way] for way in _WORDS if way in found}


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
    mesh's device. `settled`: nothing is to be decided any more; `decided`, by network, what is computed again of how
    many blocks.
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
        self.decided: dict[str, dict[str, int]] = {}
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
            forms = sum(one.forms() for one in self.watched)
            self._decide(self._each(int(ROOM * self.memory.all()) - self._peak, forms), recorded=forms > 0)

    def _each(self, spare: int, forms: int) -> int:
        """What each call may keep of so many bytes beside the most that was held. Calls come one after the other, and
        what one kept is gone when the next begins; but where they will be recorded, each kind holds what it works in
        and what it keeps as long as the recording, beside one more kind that is not recorded.
        """
        return (spare - forms * (self._peak - self.memory.now())) // (1 + forms)

    def _decide(self, spare: int, *, recorded: bool) -> None:
        """Args: `spare`, bytes of this rank that a call may keep beside the most that was held; `recorded`, whether
        calls are.
        """
        found = [one.kept(self.micro_batches) for one in self.watched]
        own = [spare + (0 if recorded else tried_first(kept)) for kept in found]
        ranks = self.mesh.every(lambda: (own, found))
        for number, one in enumerate(self.watched):
            kept = {way: max(seen[number][way] for _, seen in ranks) for way in found[number]}
            least = min(each[number] for each, _ in ranks)
            count, base = len(one.blocks), kept[True]
            if kept[False] <= base:  # it is differentiated in ways of its own (`rollout/replay.py`)
                one.by_block.follow([True] * count)
                continue
            chosen = plan(kept, count, least)
            one.by_block.follow([way for way in reversed(_WORDS) for _ in range(chosen.get(way, 0))])
            self.decided[one.name] = {_WORDS[way]: each for way, each in chosen.items()}
            logger.info(
                "%s: backward computes again %s; that keeps %.1f GiB more where %.1f were to spare beside %.1f "
                "(a block leaves %s GiB; activation_checkpointing=auto)",
                one.name,
                ", ".join(f"{_WORDS[way]} of {each} blocks" for way, each in chosen.items()),
                sum(each * (kept[way] - base) for way, each in chosen.items()) / GIB,
                *(least / GIB, self._peak / GIB),
                ", ".join(f"{size / GIB:.2f}" for size in kept.values()),
            )


@contextmanager
def told_to_keep_less(ways: Sequence[str]) -> Iterator[None]:
    """Where a device's memory runs out inside, `ways` to take less of it are told with that."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) and "CPUAllocator" not in str(error):  # they take no less of the host's
            listed = "; ".join(ways)
            error.add_note(f"any of these takes less: {listed}; `longtake doctor CONFIG KEY=VALUE ...` tells how much")
            error.add_note("started again, it goes on from its last checkpoint")
        raise
