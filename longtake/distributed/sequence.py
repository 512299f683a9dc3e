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

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from longtake.errors import ShapeError

_TOKENS = 2  # the axis of [B, E, L, ...]


class SequenceParallel:
    """The `size` ranks of a one-dimensional mesh, of which this is number `rank`."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()
        self._shares: dict[int, TokenShare] = {}

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for the group."""
        return self.rank == 0

    @property
    def group(self) -> ProcessGroup:
        """The process group of these ranks."""
        return self._mesh.get_group()

    def share(self, tokens: int) -> TokenShare:
        """This rank's part of calls with `tokens` tokens a frame. Raises: ShapeError when they are too few."""
        if tokens not in self._shares:
            self._shares[tokens] = TokenShare(self, tokens)
        return self._shares[tokens]


class TokenShare:
    """This rank's part of calls with `tokens` tokens a frame; the first ranks have one more where it is uneven."""

    def __init__(self, ranks: SequenceParallel, tokens: int) -> None:
        if tokens < ranks.size:
            raise ShapeError(
                f"{tokens} tokens a frame cannot be split over {ranks.size} ranks; lower parallel.sequence to {tokens} "
                "or less"
            )
        least, more = divmod(tokens, ranks.size)
        self.ranks = ranks
        self.sizes = [least + (rank < more) for rank in range(ranks.size)]
        self.start, self.size = sum(self.sizes[: ranks.rank]), self.sizes[ranks.rank]

    @property
    def _even(self) -> bool:
        """Whether all ranks have equally many tokens."""
        return self.sizes[0] == self.sizes[-1]

    def take(self, x: Tensor) -> Tensor:
        """[B, E, L, ...] -> [B, E, l, ...]."""
        return _Take.apply(x, self)

    def whole(self, x: Tensor) -> Tensor:
        """[B, E, l, ...] -> [B, E, L, ...] on every rank."""
        return _Whole.apply(x, self)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three of [B, E, l, N, K] -> three of [B, E, L, n, K], in one exchange."""
        # [P, 3, B, E, l, n, K]: what goes to one rank lies together
        parts = torch.stack([t.unflatten(3, (self.ranks.size, -1)).movedim(3, 0) for t in (q, k, v)], 1)
        shape = parts.shape[1:]
        a_token = parts[0].numel() // self.size
        got = _Exchange.apply(parts.flatten(), [parts[0].numel()] * len(parts), self._times(a_token), self.ranks)
        if self._even:  # one copy, not one a piece
            q, k, v = got.view(self.ranks.size, *shape).movedim(0, 3).flatten(3, 4).unbind(0)
            return q, k, v
        pieces = [
            piece.view(*shape[:3], size, *shape[4:]) for piece, size in zip(got.split(self._times(a_token)), self.sizes)
        ]
        q, k, v = torch.cat(pieces, 3).unbind(0)
        return q, k, v

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, E, L, n, K] -> [B, E, l, N, K]."""
        pieces = x.split(self.sizes, _TOKENS)
        mine = pieces[self.ranks.rank]
        send = self._times(mine.numel() // self.size)
        if self._even:
            flat = x.unflatten(_TOKENS, (self.ranks.size, -1)).movedim(_TOKENS, 0).flatten()
        else:
            flat = torch.cat([piece.flatten() for piece in pieces])
        got = _Exchange.apply(flat, send, [mine.numel()] * self.ranks.size, self.ranks)
        return got.view(self.ranks.size, *mine.shape).movedim(0, 3).flatten(3, 4)

    def _times(self, a_token: int) -> list[int]:
        """Elements of each rank's share, from those of one token."""
        return [size * a_token for size in self.sizes]


class _Exchange(torch.autograd.Function):
    """`send[r]` elements of a flat tensor go to rank r, `receive[r]` come from it; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], ranks: SequenceParallel) -> Tensor:
        ctx.send, ctx.receive, ctx.ranks = send, receive, ranks
        return _all_to_all(x, send, receive, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _all_to_all(grad, ctx.receive, ctx.send, ctx.ranks), None, None, None


class _Take(torch.autograd.Function):
    """This rank's tokens. Backward gives every rank the gradient of all tokens, for what is whole before the split."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: TokenShare) -> Tensor:
        ctx.share = share
        return x.narrow(_TOKENS, share.start, share.size).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather(grad, ctx.share) / ctx.share.ranks.size, None


class _Whole(torch.autograd.Function):
    """The tokens of all ranks. Backward keeps this rank's, times the ranks over which gradients will be averaged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: TokenShare) -> Tensor:
        ctx.share = share
        return _gather(x, share)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        share = ctx.share
        return grad.narrow(_TOKENS, share.start, share.size) * share.ranks.size, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], ranks: SequenceParallel) -> Tensor:
    out = x.new_empty(sum(receive))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=ranks.group)
    return out


def _gather(x: Tensor, share: TokenShare) -> Tensor:
    """The tokens of all ranks, from each rank's."""
    most = share.sizes[0]
    padding = [0, 0] * (x.ndim - 1 - _TOKENS) + [0, most - share.size]
    mine = F.pad(x, padding).contiguous()  # equally many from every rank: not every backend takes others
    parts = [torch.empty_like(mine) for _ in share.sizes]
    dist.all_gather(parts, mine, group=share.ranks.group)
    return torch.cat([part.narrow(_TOKENS, 0, size) for part, size in zip(parts, share.sizes)], _TOKENS)
