"""Recomputation of a block in backward: what surrounds it, and what is kept from forward.

Must know no model and no memory; `Execution` chooses contexts, and `VideoDiT` enters them through
`torch.utils.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Contexts = tuple[AbstractContextManager, AbstractContextManager]


# What backward computes again of a block: all (True), nothing (False), or all but the results of what the name says.
Again = bool | str


@dataclass(eq=False)
class ByBlock:
    """What backward computes again, for each block. It may change between updates, and then for all that share it."""

    ways: Sequence[Again]

    def of(self, layer: int) -> Again:
        """Of one block."""
        return self.ways[layer]

    def follow(self, ways: Sequence[Again]) -> None:
        """From the next forward on."""
        self.ways = ways


class _All(AbstractContextManager):
    """Enters all of `parts`; unlike a generator's context, each time that it is entered."""

    def __init__(self, parts: Sequence[AbstractContextManager]) -> None:
        self.parts = parts
        self._stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        for part in self.parts:
            stack.enter_context(part)
        self._stacks.append(stack)

    def __exit__(self, *error: Any) -> bool | None:
        return self._stacks.pop().__exit__(*error)


def together(makers: Sequence[Callable[[], Contexts]]) -> Contexts:
    """One context around a forward and one around its recomputation, of all `makers`; called before the forward."""
    pairs = [make() for make in makers]
    return _All([forward for forward, _ in pairs]), _All([again for _, again in pairs])


def keep_attention() -> Contexts:
    """Contexts under which the results of attention are kept from forward, and all else is recomputed.

    An attention kernel costs the most to run again and its result, [B, L, N, K], little to keep. Its inputs are
    recomputed, so what a cache lent to the forward must stay there until backward. Source: torch.utils.checkpoint,
    `create_selective_checkpoint_contexts`.
    """
    return _keeping(_policy)


def keep_products() -> Contexts:
    """As `keep_attention`, with the results of matrix products too: what lies between them is recomputed."""
    return _keeping(_policy_of_products)


def _keeping(policy: Callable[..., CheckpointPolicy]) -> Contexts:
    forward, again = create_selective_checkpoint_contexts(policy)
    return _All([_NoCopies(), forward]), _All([_NoCopies(), again])


KEEPERS = {"selective": keep_attention, "products": keep_products}


class _NoCopies(AbstractContextManager):
    """Inside, autocast does not remember casts of weights: operators are counted, and must be the same both times."""

    def __init__(self) -> None:
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_cache_enabled(self._before.pop())


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    # Flash4's operator is there only where its package is; its name is there always.
    keeps = operator in _attention() or operator.name() == "longtake::flash4"
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def _policy_of_products(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    if operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        return CheckpointPolicy.MUST_SAVE
    return _policy(context, operator, *args, **options)


def _attention() -> tuple[Any, ...]:
    """The kernels behind `scaled_dot_product_attention`, and `flex_attention`."""
    aten = torch.ops.aten
    return (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    )
