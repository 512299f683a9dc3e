"""Masks whose parts have keys and values of their own, one part after the other, so that all are attended by one call.

A packed call sees most frames several times, some of them at several positions: every key is rotated as it goes to each
of its places, in one pass over memory, and its gradient is the sum over these. On a GPU that is a kernel of its own
(`apart_triton.py`); `plainly` says what it computes. It must know no model and no cache.
"""

# No `from __future__ import annotations`: torch reads the types of an operator from its signature.
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor

from longtake.models import attention
from longtake.models.attention import ONE_THREAD, FrameMask, Run, has_triton, in_parts, make_mask
from longtake.models.layers import rotated
from longtake.models.recompute import made_again
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
    def of(cls, entry: Tensor, tokens: int, entries: int) -> Self:
        """Of slots of some of so many `entries`."""
        first = torch.bincount(entry, minlength=entries).cumsum(0)
        whole = torch.cat([first.new_zeros(1), first])
        return cls(entry.int(), entry.argsort(stable=True).int(), whole.int(), tokens)

    def put(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        """`x` [B, E * tokens, N, K] in its slots [B, S * tokens, N, K], `rotated` there by `turn`."""
        return _put(x, turn, self.entry, self.order, self.first, self.tokens)


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


# Operators of torch, as those of `flash4.py`: a trace without data sees what they take, which is their results alone.
@torch.library.custom_op("longtake::put", mutates_args=())
def _put(x: Tensor, turn: Tensor | None, entry: Tensor, order: Tensor, first: Tensor, tokens: int) -> Tensor:
    """As `Places.put`, of the fields of `Places`."""
    if not x.is_cuda:
        return plainly(Places(entry, order, first, tokens), x, turn)
    from longtake.models.apart_triton import put

    return put(x.contiguous(), turn, entry, tokens)


@_put.register_fake
def _(x: Tensor, turn: Tensor | None, entry: Tensor, order: Tensor, first: Tensor, tokens: int) -> Tensor:
    return x.new_empty(x.shape[0], entry.numel() * tokens, *x.shape[2:])


@torch.library.custom_op("longtake::taken", mutates_args=())
def _taken(grad: Tensor, turn: Tensor | None, order: Tensor, first: Tensor, tokens: int) -> Tensor:
    """The gradient of `x` in `_put`."""
    if not grad.is_cuda:
        back = grad if turn is None else rotated(grad.contiguous(), turn * turn.new_tensor([1, -1]))
        frames, entry = back.unflatten(1, (-1, tokens)), torch.empty_like(order)
        entry[order] = torch.repeat_interleave(first.diff())
        total = frames.new_zeros(frames.shape[0], first.numel() - 1, *frames.shape[2:])
        return total.index_add_(1, entry, frames).flatten(1, 2)
    from longtake.models.apart_triton import taken

    return taken(grad.contiguous(), turn, order, first, tokens)


@_taken.register_fake
def _(grad: Tensor, turn: Tensor | None, order: Tensor, first: Tensor, tokens: int) -> Tensor:
    return grad.new_empty(grad.shape[0], (first.numel() - 1) * tokens, *grad.shape[2:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, turn, _, order, first, ctx.tokens = inputs
    ctx.save_for_backward(turn, order, first)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _taken(grad, *ctx.saved_tensors, ctx.tokens), None, None, None, None, None


_put.register_autograd(_gradients, setup_context=_keep)


def apart(mask: FrameMask) -> tuple[FrameMask, Tensor]:
    """The same mask of slots one part after the other, and which of the slots before each of them is a copy of, [S]."""
    lengths = [(end - start, len(slots)) for start, end, slots in mask.parts]
    own = torch.block_diag(*(torch.ones(length, dtype=torch.bool) for length in lengths)).bool()
    numbers = iter(range(own.shape[1]))
    parts = tuple((start, end, tuple(next(numbers) for _ in slots)) for start, end, slots in mask.parts)
    device = mask.allowed.device
    before = torch.tensor([slot for _, _, slots in mask.parts for slot in slots], device=device)
    return FrameMask(own.to(device), mask.tokens, parts=parts), before


# What a mask that is `apart` becomes, with what attends in all its parts together where there is something
Joins = Callable[[FrameMask], FrameMask]


def joins(device: torch.device, dtype: torch.dtype, head_width: int) -> Joins | None:
    """What joins the parts of masks on a device, where these shall be `apart`. Asked before a call with gradient."""
    if not puts_rightly(device, dtype):
        return None
    _alone(device)  # now: made in a block, it would count as its work, which backward may do again
    return partial(_joined, dtype=dtype, head_width=head_width)


def _joined(mask: FrameMask, dtype: torch.dtype, head_width: int) -> FrameMask:
    """A mask that is `apart`, with what attends in all parts together where that is right and faster."""
    kernel = _together(mask.allowed.device, dtype, head_width)
    return mask if kernel is None else kernel(mask)


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
            truth = plainly(places, leaf.float(), one)
            (wanted,) = torch.autograd.grad(truth, leaf, change.float())
            for put in (places.put, made_again(places.put)):
                made = put(leaf, one)
                yield beside(made, truth)
                yield beside(torch.autograd.grad(made, leaf, change)[0], wanted)


@cache
def _together(device: torch.device, dtype: torch.dtype, head_width: int) -> Joins | None:
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
    return by_flash4 if together * attention.MARGIN < each else None


def by_flash4(mask: FrameMask) -> FrameMask:
    """A mask that is `apart`, whose parts FlashAttention-4 attends together."""
    return replace(mask, together=_flash4(mask))


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
    q, k, v = (torch.cat([t, t.flip(1)]) for t in problem)
    exact = (q.double(), k.double(), v.double())
    truth = attention.results_of(partial(in_parts, mask=mask, plain=attention.defined), exact, gradients=True)
    runs = (_flash4(mask), made_again(_flash4(mask)))
    found = [one for run in runs for one in attention.results_of(run, (q, k, v), gradients=True)]
    return [beside(a, b) for a, b in zip(found, truth * 2, strict=True)]


def _blocks(
    device: torch.device, dtype: torch.dtype, head_width: int, tokens: int, heads: int
) -> tuple[FrameMask, tuple[Tensor, Tensor, Tensor]]:
    """A problem of blocks of [1, 4, 4] frames that see those before them."""
    block = torch.tensor([0, *(1,) * 4, *(2,) * 4])
    mask, _ = apart(make_mask(block[:, None] >= block, tokens, device, flex=False))
    entries, slots = mask.allowed.shape
    return mask, attention.random_problem(device, dtype, head_width, entries * tokens, slots * tokens, heads)
