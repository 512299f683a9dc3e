"""Masks whose parts have keys and values of their own, one part after the other, so that all are attended by one call.

A packed call sees most frames several times, some of them at several positions: every key is rotated as it goes to each
of its places, in one pass over memory, and its gradient is the sum over these. On a GPU that is a kernel of its own
(`apart_triton.py`); `plainly` says what it computes. It must know no model and no cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from longtake.models import attention
from longtake.models.attention import ONE_THREAD, FrameMask, Run, has_triton, in_parts, make_mask
from longtake.models.layers import rotated
from longtake.models.trial import beside, is_right

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Places:
    """Where frames of `tokens` go: `entry` [S], the entry in each slot, int32; by entry the slots that it is in: entry
    e is in slots `order[first[e] : first[e + 1]]`.
    """

    entry: Tensor
    order: Tensor
    first: Tensor
    tokens: int

    @classmethod
    def of(cls, entry: Tensor, tokens: int, entries: int) -> Places:
        """Of slots of some of so many `entries`."""
        first = torch.bincount(entry, minlength=entries).cumsum(0)
        whole = torch.cat([first.new_zeros(1), first])
        return cls(entry.int(), entry.argsort(stable=True).int(), whole.int(), tokens)

    def put(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        """`x` [B, E * tokens, N, K] in its slots [B, S * tokens, N, K], `rotated` there by `turn`."""
        return _Put.apply(x, turn, self) if x.is_cuda else plainly(self, x, turn)


def plainly(places: Places, x: Tensor, turn: Tensor | None = None) -> Tensor:
    """As `Places.put`."""
    x = x.unflatten(1, (-1, places.tokens)).index_select(1, places.entry).flatten(1, 2)
    return x if turn is None else rotated(x, turn)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """`rotated` [B, E, L, N, K] by `turn` [E, L, 1, K/2, 2], where it is: as one frame in one slot."""
    whole = Places(*_alone(x.device), x.shape[1] * x.shape[2])
    return whole.put(x.flatten(1, 2), turn.flatten(0, 1)).unflatten(1, x.shape[1:3])


@cache
def _alone(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    still = torch.zeros(1, dtype=torch.int32, device=device)
    return still, still, torch.arange(2, dtype=torch.int32, device=device)


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor | None, places: Places) -> Tensor:
        from longtake.models.apart_triton import put

        ctx.turn, ctx.places = turn, places
        return put(x.contiguous(), turn, places.entry, places.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        from longtake.models.apart_triton import taken

        places = ctx.places
        return taken(grads[0].contiguous(), ctx.turn, places.order, places.first, places.tokens), None, None


def apart(mask: FrameMask) -> tuple[FrameMask, Tensor]:
    """The same mask of slots one part after the other, and which of the slots before each of them is a copy of, [S]."""
    lengths = [(end - start, len(slots)) for start, end, slots in mask.parts]
    own = torch.block_diag(*(torch.ones(length, dtype=torch.bool) for length in lengths)).bool()
    numbers = iter(range(own.shape[1]))
    parts = tuple((start, end, tuple(next(numbers) for _ in slots)) for start, end, slots in mask.parts)
    device = mask.allowed.device
    before = torch.tensor([slot for _, _, slots in mask.parts for slot in slots], device=device)
    return FrameMask(own.to(device), mask.tokens, parts=parts), before


def joined(mask: FrameMask, dtype: torch.dtype, head_width: int) -> FrameMask:
    """A mask that is `apart`, with what attends in all parts together where that is right and faster."""
    device = mask.allowed.device
    _alone(device)  # now: made in a block, it would count as its work, which backward may do again
    kernel = _together(device, dtype, head_width) if device.type == "cuda" else None
    return mask if kernel is None else replace(mask, together=kernel(mask))


def of_heads(device: torch.device, head_width: int) -> tuple[torch.dtype, int] | None:
    """Type and width of heads, where masks on a device shall be `apart`. Asked before a call with gradient."""
    dtype = torch.get_autocast_dtype(device.type)
    return (dtype, head_width) if puts_rightly(device, dtype) else None


@cache
def puts_rightly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel of `Places.put` does on a GPU what `plainly` says."""
    if device.type != "cuda" or not has_triton():
        return False
    return is_right("the kernel that puts keys in their places", device, lambda: _off_in_places(device, dtype))


def _off_in_places(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    places = Places.of(torch.tensor([0, 1, 3, 1, 2, 0, 0], device=device), 11, 5)
    generator = torch.Generator(device).manual_seed(0)
    x, grad, angle = (
        torch.randn(shape, device=device, generator=generator)
        for shape in ((2, 55, 3, 64), (2, 77, 3, 64), (77, 1, 32, 1))
    )
    turn = torch.cat([angle.cos(), angle.sin()], -1)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for one in (turn, None):
            leaf, change = x.to(dtype).requires_grad_(), grad.to(dtype)
            made, truth = places.put(leaf, one), plainly(places, leaf.float(), one)
            yield beside(made, truth)
            yield beside(
                torch.autograd.grad(made, leaf, change)[0], torch.autograd.grad(truth, leaf, change.float())[0]
            )


@cache
def _together(device: torch.device, dtype: torch.dtype, head_width: int) -> Callable[[FrameMask], Run] | None:
    """FlashAttention-4 of sequences of several lengths, where it is right and faster than part by part."""
    attention.choose_kernels(device, dtype, head_width)
    if attention.gradient_kernels(device, dtype, head_width, True)[0].name != "FLASH_ATTENTION_4":
        return None
    with ONE_THREAD, torch.enable_grad(), torch.autocast(device.type, enabled=False):
        if not is_right("attention in all parts at once", device, lambda: _off(device, dtype, head_width), 3e-2):
            return None
        mask, problem = _blocks(device, dtype, head_width, 1024, heads=12)
        for tensor in problem:
            tensor.requires_grad_()
        each = attention.milliseconds(partial(in_parts, mask=mask, plain=attention.attend_fastest), problem)
        together = attention.milliseconds(_flash4(mask), problem)
    logger.info("masked attention, forward and backward: part by part %.2f ms, together %.2f ms", each, together)
    return _flash4 if together * attention.MARGIN < each else None


def _flash4(mask: FrameMask) -> Run:
    from longtake.models.flash4 import flash4_joined

    lengths = torch.tensor([(end - start, len(slots)) for start, end, slots in mask.parts]) * mask.tokens
    most_queries, most_keys = lengths.amax(0).tolist()
    ends = torch.cat([lengths.new_zeros(1, 2), lengths.cumsum(0)]).int().T.contiguous().to(mask.allowed.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash4_joined(q, k, v, ends[0], ends[1], most_queries, most_keys)

    return run


def _off(device: torch.device, dtype: torch.dtype, head_width: int) -> list[float]:
    """How far results and gradients of parts together are from the definition, on a small problem of two videos."""
    mask, problem = _blocks(device, dtype, head_width, 70, heads=2)
    both = [torch.cat([t, t.flip(1)]) for t in problem]
    found = attention.results_of(_flash4(mask), (both[0], both[1], both[2]), gradients=True)
    exact = (both[0].double(), both[1].double(), both[2].double())
    truth = attention.results_of(partial(in_parts, mask=mask, plain=attention.defined), exact, gradients=True)
    return [beside(a, b) for a, b in zip(found, truth, strict=True)]


def _blocks(
    device: torch.device, dtype: torch.dtype, head_width: int, tokens: int, heads: int
) -> tuple[FrameMask, tuple[Tensor, Tensor, Tensor]]:
    """A problem of blocks of [1, 4, 4] frames that see those before them."""
    block = torch.tensor([0, *(1,) * 4, *(2,) * 4])
    mask, _ = apart(make_mask(block[:, None] >= block, tokens, device, flex=False))
    entries, slots = mask.allowed.shape
    return mask, attention.random_problem(device, dtype, head_width, entries * tokens, slots * tokens, heads)
