"""Recomputation of a block in backward: what surrounds it, and what is kept from forward.

Must know no model and no memory; `Execution` chooses contexts, and `VideoDiT` enters them through
`torch.utils.checkpoint`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longtake.models.gelu import FirstLayerAgain

Contexts = tuple[AbstractContextManager, AbstractContextManager]


# What backward computes again of a block: all (True), nothing (False), or all but the results of what the name says.
Again = bool | str


@dataclass(eq=False)
class ByBlock:
    """What backward computes again, for each block. It may change between updates, and then for all that share it; not
    any more once it is `settled`.
    """

    ways: Sequence[Again]
    settled: bool = False

    def of(self, layer: int) -> Again:
        """Of one block."""
        return self.ways[layer]

    def follow(self, ways: Sequence[Again]) -> None:
        """From the next forward on, for good."""
        self.ways, self.settled = ways, True


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


def kept_as(dtype: torch.dtype, tokens: Tensor) -> AbstractContextManager:
    """Inside, `torch.utils.checkpoint` keeps `tokens` in `dtype` until backward, and computes again from what is left
    of them; other inputs as they are.
    """
    memory = tokens.untyped_storage()._cdata  # not the tensor itself: it would be kept, too

    def pack(x: Tensor) -> tuple[Tensor, torch.dtype]:
        return (x.to(dtype) if x.untyped_storage()._cdata == memory else x), x.dtype

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept[0].to(kept[1]))


def keep_attention(*, alone: bool = False) -> Contexts:
    """Contexts under which the results of self-attention are kept from forward, and all else is recomputed.

    An attention kernel costs the most to run again and its result, [B, L, N, K], little to keep. Its inputs are
    recomputed, so what a cache lent to the forward must stay there until backward.

    Args: `alone`, whether the account is of the kept operators alone (`_Account`); else it is torch's, of all
    (torch.utils.checkpoint, `create_selective_checkpoint_contexts`).
    """
    return _keeping(_policy, alone)


def keep_products(*, alone: bool = False) -> Contexts:
    """As `keep_attention`, with the results of matrix products too: what lies between them is recomputed."""
    return _keeping(_policy_of_products, alone)


def keep_narrow_products(*, alone: bool = False) -> Contexts:
    """As `keep_products`, but for results that are wider than what they were made of, which take the most to keep: the
    first product of an MLP is made again.
    """
    forward, again = _keeping(_policy_of_narrow_products, alone)
    return _All([FirstLayerAgain(), forward]), _All([FirstLayerAgain(), again])


def made_again(work: Callable[..., Any], way: str = "products", *, alone: bool = False) -> Callable[..., Any]:
    """`work` as part of a block that keeps what `way` says: for trials, since what is right once may not be when
    backward makes it again. Args: `alone`, as `keep_attention`.
    """
    keep = partial(KEEPERS[way], alone=alone)
    return partial(checkpoint, work, use_reentrant=False, context_fn=keep, preserve_rng_state=False)


def _keeping(policy: Callable[..., CheckpointPolicy], alone: bool) -> Contexts:
    forward, again = _accounts(policy) if alone else create_selective_checkpoint_contexts(policy)
    return _All([_NoCopies(), forward]), _All([_NoCopies(), again])


KEEPERS = {"selective": keep_attention, "narrow": keep_narrow_products, "products": keep_products}


def _accounts(policy: Callable[..., CheckpointPolicy]) -> Contexts:
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Account(policy, kept), _Account(policy, kept, again=True)


class _Account(TorchDispatchMode):
    """Keeps the results of some operators of a forward in `kept`, in their order, and gives them to its recomputation.

    torch's own counts all operators, and refuses those that the forward had not. Sharded weights may be gathered in one
    of both alone: a roll-out gathers them once for many forwards.
    """

    supports_higher_order_operators = True

    def __init__(
        self, policy: Callable[..., CheckpointPolicy], kept: dict[Any, deque[Any]], *, again: bool = False
    ) -> None:
        super().__init__()
        self.policy, self.kept, self.again = policy, kept, again

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Functions are compiled under it, as if it was not there."""
        return True

    def __torch_dispatch__(self, operator: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        options = options or {}
        if self.policy(None, operator, *inputs, **options) is not CheckpointPolicy.MUST_SAVE:
            return operator(*inputs, **options)
        if self.again:
            return self.kept[operator].popleft()
        made = operator(*inputs, **options)
        # Detached: the tensors themselves will know the graph, which holds this account.
        self.kept[operator].append(tree_map_only(Tensor, Tensor.detach, made))
        return made


class _NoCopies(AbstractContextManager):
    """Inside, autocast does not remember casts of weights: operators are counted, and must be the same both times."""

    def __init__(self) -> None:
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_cache_enabled(self._before.pop())


def _policy(_context: Any, operator: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
    # Flash4's operator is there only where its package is; its name is there always.
    if operator in _attention():
        queries, keys = (each.shape[-2] for each in inputs[:2])
    elif operator.name() in ("longtake::flash4", "longtake::flash4_joined"):
        queries, keys = (each.shape[-3] for each in inputs[:2])
    else:
        return CheckpointPolicy.PREFER_RECOMPUTE
    # Attention to text and picture has fewer keys than queries: it costs little to run again and as much to keep.
    return CheckpointPolicy.MUST_SAVE if keys >= queries else CheckpointPolicy.PREFER_RECOMPUTE


def _policy_of_products(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    products = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    if operator in products or operator.name() == "longtake::mlp":
        return CheckpointPolicy.MUST_SAVE
    return _policy(context, operator, *args, **options)


def _policy_of_narrow_products(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    aten = torch.ops.aten
    if operator in (aten.mm.default, aten.addmm.default):
        rows, columns = args[-2:]
        wide = columns.shape[1] > rows.shape[1]
        return CheckpointPolicy.PREFER_RECOMPUTE if wide else CheckpointPolicy.MUST_SAVE
    return _policy_of_products(context, operator, *args, **options)


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
