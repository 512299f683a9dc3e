"""FlashAttention-4, forward and backward, as operators of torch. Import it only where the package is.

The package's own autograd function is not seen by what watches operators: selective recomputation, which keeps the
results of attention, and traces without data. Source: Dao-AILab/flash-attention, flash_attn/cute/interface.py
(`FlashAttnFunc`).
"""

# No `from __future__ import annotations`: torch reads the types of an operator from its signature.
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_KEYS = 128  # for which a core finds the gradient, going through all queries
_LEAST = 1024  # queries of a piece


def pieces(queries: int, blocks: int, cores: int) -> int:
    """Into how many equal pieces queries are cut for a backward of so many `blocks` of keys (and heads), which leaves
    most cores idle where keys are few.
    """
    if blocks >= 4 * cores:
        return 1
    most = min(-(-8 * cores // blocks), queries // _LEAST)
    return max((count for count in range(2, most + 1) if queries % count == 0), default=1)


def cores(device: torch.device) -> int:
    """Those that a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, scale 1/sqrt(K): q [B, L, N, K], k and v [B, S, N, K] -> [B, L, N, K]; with gradient."""
    return _forward(q, k, v)[0]


@torch.library.custom_op("longtake::flash4", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each row's sum [B, N, L], which backward reads."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, log_sum, *_ = _called(_flash_attn_fwd, q.detach(), k.detach(), v.detach(), return_lse=True)
    return out, log_sum


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.custom_op("longtake::flash4_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    count = pieces(queries, batch * heads * -(-keys // _KEYS), cores(q.device))
    if count > 1:  # as so many videos, which all have these keys and values
        q, out, grad = (t.unflatten(1, (count, -1)).flatten(0, 1) for t in (q, out, grad))
        log_sum = log_sum.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1).contiguous()
        k, v = (t.repeat_interleave(count, 0) for t in (k, v))
    of_q, of_k, of_v, *_ = _called(_flash_attn_bwd, q, k, v, out, grad, log_sum)
    if count > 1:
        of_q = of_q.unflatten(0, (batch, count)).flatten(1, 2)
        of_k, of_v = (t.unflatten(0, (batch, count)).sum(1) for t in (of_k, of_v))
    return of_q, of_k, of_v


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_keep)


def flash4_joined(
    q: Tensor, k: Tensor, v: Tensor, query_ends: Tensor, key_ends: Tensor, most_queries: int, most_keys: int
) -> Tensor:
    """`flash4` of parts of each video by themselves, all by one kernel: q [B, L, N, K], k and v [B, S, N, K].

    Args: int32 [P + 1], where queries and keys of each part end, from 0 on; the most that a part has of them.
    """
    batch = q.shape[0]
    ends = [
        torch.cat([ends[:1], *(ends[1:] + video * length for video in range(batch))]) if batch > 1 else ends
        for ends, length in ((query_ends, q.shape[1]), (key_ends, k.shape[1]))
    ]
    packed = (t.flatten(0, 1) for t in (q, k, v))
    return _joined_forward(*packed, *ends, most_queries, most_keys)[0].unflatten(0, (batch, -1))


@torch.library.custom_op("longtake::flash4_joined", mutates_args=())
def _joined_forward(
    q: Tensor, k: Tensor, v: Tensor, query_ends: Tensor, key_ends: Tensor, most_queries: int, most_keys: int
) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm of each row's sum [N, B * L]."""
    from flash_attn.cute.interface import _flash_attn_fwd

    given = {**_lengths(query_ends, key_ends, most_queries, most_keys), "return_lse": True}
    out, log_sum, *_ = _called(_flash_attn_fwd, q.detach(), k.detach(), v.detach(), **given)
    return out, log_sum


@_joined_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, query_ends: Tensor, key_ends: Tensor, most_queries: int, most_keys: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("longtake::flash4_joined_backward", mutates_args=())
def _joined_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_queries: int,
    most_keys: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    given = _lengths(query_ends, key_ends, most_queries, most_keys)
    found = _called(_flash_attn_bwd, q, k, v, out, grad, log_sum, **given)
    return found[0], found[1], found[2]


@_joined_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_joined(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.most_queries, ctx.most_keys = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients_joined(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, query_ends, key_ends, out, log_sum = ctx.saved_tensors
    lengths = query_ends, key_ends, ctx.most_queries, ctx.most_keys
    return *_joined_backward(grad, q, k, v, out, log_sum, *lengths), None, None, None, None


_joined_forward.register_autograd(_gradients_joined, setup_context=_keep_joined)


def _lengths(query_ends: Tensor, key_ends: Tensor, most_queries: int, most_keys: int) -> dict[str, Any]:
    return {
        "cu_seqlens_q": query_ends,
        "cu_seqlens_k": key_ends,
        "max_seqlen_q": most_queries,
        "max_seqlen_k": most_keys,
    }


def _called(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Raises: RuntimeError for whatever the package or its compiler raises."""
    try:
        return function(*args, **options)
    except RuntimeError:
        raise
    except Exception as error:  # its compiler has a tree of exceptions of its own
        raise RuntimeError(f"FlashAttention-4 failed: {type(error).__name__}: {error}") from error
