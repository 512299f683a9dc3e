"""The one entry to attention: picks a verified kernel and applies a mask when there is one.

Everything that attends calls `attend`. Sequence parallelism
exchanges tokens for heads around it (`token_split.py`), before keys enter a cache. This file knows shapes and kernels;
it must not know the model, the cache or block boundaries.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longtake.errors import ConfigError

logger = logging.getLogger(__name__)

# Which kernels `scaled_dot_product_attention` may choose is a setting of the process, not of the thread. Who sets it
# (`sdpa_kernel`), or runs a network that follows it, holds this meanwhile; so does what else is for one thread at a
# time: recording a pass, a tokenizer.
ONE_THREAD = threading.RLock()

# Shapes of masked attention that one process compiles, and variants of a compiled block, for each of its layers: with
# and without cache, mask, gradient, commit, updates, first block.
SHAPES = VARIANTS = 64


class Attention(Protocol):
    """Signature of the replaceable entry."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: FrameMask | None = None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class FrameMask:
    """A mask at the granularity of frames, in the form that the chosen kernel reads.

    `allowed` [E, S] boolean, `tokens` per frame, `flex` the block mask of `flex_attention` or None. Without it
    there are `parts`: runs of entries that see the same slots, each attended by itself: (first entry, end, slots).
    """

    allowed: Tensor
    tokens: int
    flex: Any = None
    parts: tuple[tuple[int, int, tuple[int, ...]], ...] = ()


def make_mask(allowed: Tensor, tokens: int, device: torch.device, *, flex: bool | None = None) -> FrameMask:
    """The mask for `attend`: `flex_attention`'s on CUDA with triton, else one part after the other.

    Args: `allowed` [E, S] boolean; `tokens` per frame; `flex` forces (True) or forbids (False) flex attention.
    """
    allowed = allowed.to(device)
    if flex is None:
        flex = device.type == "cuda" and _has_triton()
    if not flex:
        return FrameMask(allowed, tokens, parts=_parts(allowed))
    from torch.nn.attention.flex_attention import create_block_mask

    def allow(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return allowed[query // tokens, key // tokens]

    entries, slots = allowed.shape
    block = create_block_mask(allow, None, None, entries * tokens, slots * tokens, device=str(device))
    return FrameMask(allowed, tokens, flex=block)


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: FrameMask | None = None) -> Tensor:
    """Softmax attention, scale 1/sqrt(K): q [B, L, N, K], k and v [B, S, N, K] -> [B, L, N, K]."""
    if mask is not None and mask.flex is None:
        return in_parts(q, k, v, mask, attend)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        out = _flex(q.is_cuda)(q, k, v, block_mask=mask.flex)
    elif q.is_cuda:
        alone = nullcontext() if torch.compiler.is_compiling() else ONE_THREAD  # compiled code has its kernel chosen
        with alone, sdpa_kernel(list(backends(q.device.index or 0, q.dtype, q.shape[-1])), set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def in_parts(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask, plain: Attention) -> Tensor:
    """`attend` with the `parts` of a mask: `plain` attention of each run of entries to the slots that it sees.

    Only permitted pairs are computed, which a dense mask does not spare. Where the runs see one slot after
    the other, and each slot once, nothing is copied.
    """
    queries = q.split([(end - start) * mask.tokens for start, end, _ in mask.parts], 1)
    keys, values = (_seen(t, [slots for _, _, slots in mask.parts], mask.tokens) for t in (k, v))
    return torch.cat([plain(*part) for part in zip(queries, keys, values, strict=True)], 1)


def _seen(x: Tensor, parts: Sequence[tuple[int, ...]], tokens: int) -> Sequence[Tensor]:
    """The slots of each part, of keys or values [B, S * tokens, N, K]."""
    if [slot for slots in parts for slot in slots] == list(range(x.shape[1] // tokens)):
        return x.split([len(slots) * tokens for slots in parts], 1)
    frames = x.unflatten(1, (-1, tokens)).unbind(1)
    return [torch.cat([frames[slot] for slot in slots], 1) for slots in parts]


def block_mask(blocks: Sequence[tuple[int, int]], tokens: int) -> FrameMask | None:
    """Of blocks that each see their own slots alone, [past, own] frames of each, one after the other; None for one."""
    if len(blocks) == 1:
        return None
    rows = [torch.ones(own, past + own, dtype=torch.bool) for past, own in blocks]
    return make_mask(torch.block_diag(*rows).bool(), tokens, torch.device("cpu"), flex=False)


def _parts(allowed: Tensor) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Runs of rows [E, S] that are alike."""
    rows = [tuple(row.nonzero().flatten().tolist()) for row in allowed.cpu()]
    starts = [row for row in range(len(rows)) if row == 0 or rows[row] != rows[row - 1]]
    return tuple((start, end, rows[start]) for start, end in zip(starts, [*starts[1:], len(rows)]))


@cache
def backends(device_index: int, dtype: torch.dtype, head_width: int) -> tuple[SDPBackend, ...]:
    """CUDA kernels of `scaled_dot_product_attention` that give the right answer here, fastest first.

    cuDNN's is 1.6x the flash kernel on Hopper. Each candidate is run once on a small random problem and compared with
    the mathematical definition in float64; one that fails or raises is left out and named once in the log.
    """
    device = torch.device("cuda", device_index)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(1, 2, 192, head_width, device=device, generator=generator).to(dtype) for _ in range(3))
    truth = torch.softmax(q.double() @ k.double().mT / head_width**0.5, -1) @ v.double()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    order.insert(0 if hopper else 1, SDPBackend.CUDNN_ATTENTION)
    good = []
    for backend in order:
        try:
            # Why a kernel is none for this problem is said below, in one line.
            with sdpa_kernel(backend), warnings.catch_warnings(action="ignore", category=UserWarning):
                out = F.scaled_dot_product_attention(q, k, v).double()
        except RuntimeError as error:  # the kernel does not support this type or device
            logger.debug("attention kernel %s is not available: %s", backend.name, error)
            continue
        if float((out - truth).norm() / truth.norm()) <= tolerance:
            good.append(backend)
        else:
            logger.warning("attention kernel %s gave a wrong result on %s and is not used", backend.name, device)
    logger.info("attention on %s in %s: %s", device, dtype, ", ".join(b.name for b in good))
    return tuple(good)


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled flex attention materialises the scores: only for tests on a CPU.
    return (
        limited(torch.compile(flex_attention, dynamic=False), SHAPES, "masked attentions")
        if compiled
        else flex_attention
    )


def limited(compiled: Callable[..., Any], variants: int, name: str) -> Callable[..., Any]:
    """A compiled function of which `variants` are compiled, and one more is an error.

    Beyond its limit (8) torch runs them uncompiled instead, for masked attention with all scores in memory.
    Raises: ConfigError.
    """
    import torch._dynamo

    # The second limit counts variants of one code, for all objects that it belongs to.
    limits = {"recompile_limit": variants, "accumulated_recompile_limit": variants, "fail_on_recompile_limit_hit": True}

    def call(*args: Any, **given: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled(*args, **given)
        try:
            with torch._dynamo.config.patch(limits):
                return compiled(*args, **given)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            raise ConfigError(
                f"{name} of {variants} different kinds and sizes are compiled in this process, and one more would run "
                "uncompiled, which takes far more memory: use fewer sizes of video in one run"
            ) from None

    return call


@cache
def _has_triton() -> bool:
    from importlib.util import find_spec

    if find_spec("triton") is not None:
        return True
    logger.warning("triton is not installed: masked attention is computed block by block (slower)")
    return False
