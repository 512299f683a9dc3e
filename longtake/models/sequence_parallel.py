"""Which tokens of each frame this process computes: all of them, or its share where a group of processes splits them.

The transformer asks a `TokenShard` at four places (`VideoDiT.forward`, `SelfAttention.forward`) and knows nothing else
of it; `parallel/ulysses.py` has the one that communicates. This file must know no process group.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from longtake.errors import ConfigError


class TokenShard(Protocol):
    """The part of this process in calls of one number of tokens a frame.

    `l` are its tokens of a frame and `n` its heads, of `L` and `N` in all. Processes of a group make the same calls in
    the same order, on equal inputs.
    """

    def shard(self, x: Tensor) -> Tensor:
        """Its tokens [B, E, l, ...] of [B, E, L, ...]."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """All tokens [B, E, L, ...], from the [B, E, l, ...] of each process."""
        ...

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Some heads of all tokens, [B, E, L, n, K], from all heads of some tokens, [B, E, l, N, K]."""
        ...

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back for the result of attention: [B, E, L, n, K] -> [B, E, l, N, K]."""
        ...


class SequenceParallel(Protocol):
    """A group of `size` processes that splits the tokens of each frame, and in attention the heads."""

    @property
    def size(self) -> int:
        """Processes of the group."""
        ...

    @property
    def leads(self) -> bool:
        """Whether this process speaks for its group, whose processes all have the same results."""
        ...

    def agree(self, fine: bool) -> bool:
        """Whether all processes of the group are `fine`; all of them call it."""
        ...

    def shard(self, tokens: int) -> TokenShard:
        """The part of this process in calls with `tokens` tokens a frame. Raises: ShapeError when they are too few."""
        ...


def check_heads(num_heads: int, processes: int) -> None:
    """Raises ConfigError unless the heads can be divided equally over the `processes` that share a call."""
    if num_heads % processes:
        fitting = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise ConfigError(
            f"{num_heads} heads cannot be divided over {processes} ranks of a sequence group; set parallel.sequence "
            f"(in generate --sequence-parallel) to one of {fitting}"
        )


class NoSplit:
    """The share of a process that computes everything: nothing happens."""

    def shard(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def to_tokens(self, x: Tensor) -> Tensor:
        return x


NO_SPLIT = NoSplit()
