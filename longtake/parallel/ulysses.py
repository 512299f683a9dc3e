"""Sequence parallelism: a group of ranks computes one model call together, each some of the tokens of every frame.

Around attention an all-to-all gives each rank all tokens of some of the heads, and another one takes the result back
(DeepSpeed Ulysses, arXiv 2309.14509). So everything that attention knows - masks, rotary positions, the key/value cache
of streaming - is as for one process, with fewer heads. Tokens are split within each frame: a block of one frame is
shared as evenly as a clip, and what a frame has of its own (noise level, modulation) needs no split.

Gradients: all ranks of a group compute the same loss from the whole result, and the gradients of parameters are
averaged over the ranks of the group too (`Mesh.fsdp_mesh`). Each rank's are those of its tokens alone, so that the mean
would be too small by the size of the group; `whole` makes up for it in backward, where the split ends. This file must
know no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longtake.errors import ShapeError

_TOKENS = 2  # the axis of [B, E, L, ...]


class Ulysses:
    """The `size` ranks of a one-dimensional mesh, of which this is number `rank`."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()
        self._shards: dict[int, UlyssesShard] = {}

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for the group."""
        return self.rank == 0

    @property
    def group(self) -> ProcessGroup:
        """The process group of these ranks."""
        return self._mesh.get_group()

    def agree(self, fine: bool) -> bool:
        """Whether all ranks are `fine`. Over gloo: nothing is started on a GPU."""
        found = torch.tensor(int(fine))
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return bool(found)

    def shard(self, tokens: int) -> UlyssesShard:
        """This rank's part of calls with `tokens` tokens a frame. Raises: ShapeError when they are too few."""
        if tokens not in self._shards:
            self._shards[tokens] = UlyssesShard(self, tokens)
        return self._shards[tokens]


class UlyssesShard:
    """This rank's part of calls with `tokens` tokens a frame; the first ranks have one more where it is uneven."""

    def __init__(self, ranks: Ulysses, tokens: int) -> None:
        if tokens < ranks.size:
            raise ShapeError(
                f"{tokens} tokens a frame cannot be split over {ranks.size} ranks; lower parallel.sequence to {tokens} "
                "or less"
            )
        least, more = divmod(tokens, ranks.size)
        self.ranks = ranks
        self.sizes = [least + (rank < more) for rank in range(ranks.size)]
        self.start, self.size = sum(self.sizes[: ranks.rank]), self.sizes[ranks.rank]

    def shard(self, x: Tensor) -> Tensor:
        """[B, E, L, ...] -> [B, E, l, ...]."""
        return _Shard.apply(x, self)

    def all_gather(self, x: Tensor) -> Tensor:
        """[B, E, l, ...] -> [B, E, L, ...] on every rank."""
        return _AllGather.apply(x, self)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three of [B, E, l, N, K] -> three of [B, E, L, n, K], in one exchange."""
        return _ToHeads.apply(self, q, k, v)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, E, L, n, K] -> [B, E, l, N, K]."""
        return _ToTokens.apply(self, x)[0]

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.ranks.size) if rank != self.ranks.rank]

    def _tokens(self, x: Tensor, rank: int) -> Tensor:
        """The tokens of one rank, a view of x [..., L, n, K]."""
        return x.narrow(-3, sum(self.sizes[:rank]), self.sizes[rank])

    def _heads(self, x: Tensor, rank: int) -> Tensor:
        """The heads of one rank, a view of x [..., N, K]."""
        number = x.shape[-2] // self.ranks.size
        return x.narrow(-2, rank * number, number)


class _ToHeads(torch.autograd.Function):
    """Some tokens of all heads -> all tokens of some heads, of several tensors in one exchange; gradients go back."""

    @staticmethod
    def forward(ctx: Any, shard: UlyssesShard, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shard = shard
        return _to_heads(tensors, shard)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *_to_tokens(grads, ctx.shard)


class _ToTokens(torch.autograd.Function):
    """The way back."""

    @staticmethod
    def forward(ctx: Any, shard: UlyssesShard, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.shard = shard
        return _to_tokens(tensors, shard)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *_to_heads(grads, ctx.shard)


def _to_heads(tensors: Sequence[Tensor], shard: UlyssesShard) -> tuple[Tensor, ...]:
    """[B, E, l, N, K] of some tokens -> [B, E, L, n, K] of some heads, each."""
    batch, entries, _, heads, width = tensors[0].shape
    shape = (batch, entries, sum(shard.sizes), heads // shard.ranks.size, width)
    return _exchange(tensors, shape, shard, shard._heads, shard._tokens)


def _to_tokens(tensors: Sequence[Tensor], shard: UlyssesShard) -> tuple[Tensor, ...]:
    """[B, E, L, n, K] of some heads -> [B, E, l, N, K] of some tokens, each."""
    batch, entries, _, heads, width = tensors[0].shape
    shape = (batch, entries, shard.size, heads * shard.ranks.size, width)
    return _exchange(tensors, shape, shard, shard._tokens, shard._heads)


# part(x, rank) -> what one rank sends or has of x, a view
_Part = Callable[[Tensor, int], Tensor]


def _exchange(
    tensors: Sequence[Tensor], shape: tuple[int, ...], shard: UlyssesShard, sent: _Part, got: _Part
) -> tuple[Tensor, ...]:
    """Rank r gets `sent(x, r)` of each tensor; what comes from it goes to `got(out, r)` of a tensor of `shape` each.

    A rank's own part is copied once, while the others travel. Each result has memory of its own: backward keeps one of
    three, and should not keep the others with it.
    """
    ranks, others = shard.ranks, shard._others
    out = tuple(x.new_empty(shape) for x in tensors)
    sizes_out, sizes_in = [0] * ranks.size, [0] * ranks.size
    for rank in others:
        sizes_out[rank] = len(tensors) * sent(tensors[0], rank).numel()
        sizes_in[rank] = len(tensors) * got(out[0], rank).numel()
    sending, coming = (tensors[0].new_empty(sum(sizes)) for sizes in (sizes_out, sizes_in))
    for rank, piece in zip(others, sending.split([sizes_out[rank] for rank in others])):
        for x, place in zip(tensors, piece.view(len(tensors), *sent(tensors[0], rank).shape)):
            place.copy_(sent(x, rank))
    travelling = dist.all_to_all_single(coming, sending, sizes_in, sizes_out, group=ranks.group, async_op=True)
    for x, made in zip(tensors, out):
        got(made, ranks.rank).copy_(sent(x, ranks.rank))
    assert travelling is not None
    travelling.wait()
    for rank, piece in zip(others, coming.split([sizes_in[rank] for rank in others])):
        for made, x in zip(out, piece.view(len(tensors), *got(out[0], rank).shape)):
            got(made, rank).copy_(x)
    return out


class _Shard(torch.autograd.Function):
    """This rank's tokens. Backward gives every rank the gradient of all tokens, for what is whole before the split."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: UlyssesShard) -> Tensor:
        ctx.shard = shard
        return x.narrow(_TOKENS, shard.start, shard.size).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather(grad, ctx.shard) / ctx.shard.ranks.size, None


class _AllGather(torch.autograd.Function):
    """The tokens of all ranks. Backward keeps this rank's, times the ranks over which gradients will be averaged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: UlyssesShard) -> Tensor:
        ctx.shard = shard
        return _gather(x, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        shard = ctx.shard
        return grad.narrow(_TOKENS, shard.start, shard.size) * shard.ranks.size, None


def _gather(x: Tensor, shard: UlyssesShard) -> Tensor:
    """The tokens of all ranks, from each rank's."""
    most = shard.sizes[0]
    padding = [0, 0] * (x.ndim - 1 - _TOKENS) + [0, most - shard.size]
    mine = F.pad(x, padding).contiguous()  # equally many from every rank: not every backend takes others
    parts = [torch.empty_like(mine) for _ in shard.sizes]
    dist.all_gather(parts, mine, group=shard.ranks.group)
    return torch.cat([part.narrow(_TOKENS, 0, size) for part, size in zip(parts, shard.sizes)], _TOKENS)
