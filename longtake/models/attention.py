"""The one entry to attention: picks a verified kernel and applies a mask when there is one.

Everything that attends calls `attend`, or where a pass comes again and again `attend_fastest`. Sequence parallelism
exchanges tokens for heads around it (`sequence_parallel.py`), before keys enter a cache. This file knows shapes and
kernels; it must not know the model, the cache or block boundaries.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
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


Run = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(Protocol):
    """Signature of the replaceable entry."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, mask: FrameMask | None = None) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class FrameMask:
    """A mask at the granularity of frames, in the form that the chosen kernel reads.

    `allowed` [E, S] boolean, `tokens` per frame, `flex` the block mask of `flex_attention` or None. Without it
    there are `parts`: runs of entries that see the same slots, each attended by itself: (first entry, end, slots).
    `together`, what attends in all parts by one call, where there is something (`apart.py`).
    """

    allowed: Tensor
    tokens: int
    flex: Any = None
    parts: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    together: Run | None = None


def make_mask(allowed: Tensor, tokens: int, device: torch.device, *, flex: bool | None = None) -> FrameMask:
    """The mask for `attend`: `flex_attention`'s on CUDA with triton, else one part after the other.

    Args: `allowed` [E, S] boolean; `tokens` per frame; `flex` forces (True) or forbids (False) flex attention.
    """
    allowed = allowed.to(device)
    if flex is None:
        flex = device.type == "cuda" and has_triton()
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
        with alone, sdpa_kernel(list(backends(q.device, q.dtype, q.shape[-1])), set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def attend_fastest(q: Tensor, k: Tensor, v: Tensor, *, mask: FrameMask | None = None) -> Tensor:
    """`attend` by the kernel that was found to be the fastest for calls of this kind: for calls that come again and
    again, since finding it takes seconds. Where there will be gradients, `choose_kernels` finds it beforehand.
    """
    if mask is not None and mask.flex is None:
        return in_parts(q, k, v, mask, attend_fastest) if mask.together is None else mask.together(q, k, v)
    if mask is not None or not q.is_cuda:
        return attend(q, k, v, mask=mask)
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    kernels = gradient_kernels if learns else forward_kernels
    return kernels(q.device, q.dtype, q.shape[-1], k.shape[1] >= MANY_KEYS)[0].run(q, k, v)


def choose_kernels(device: torch.device, dtype: torch.dtype, head_width: int) -> None:
    """Finds the fastest kernels forward and backward on a GPU, before any call with gradient: found in the middle of
    one, what it keeps of trials would be taken for its own by activation checkpointing.
    """
    for many_keys in (True, False):
        gradient_kernels(device, dtype, head_width, many_keys)


def in_parts(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask, plain: Run) -> Tensor:
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


MANY_KEYS = 1024  # from here on keys are many (frames), below few (text, image): the best kernels may differ
MARGIN = 1.05  # a kernel takes the place of one named before it when it is so much faster: the same one each time


@dataclass(frozen=True)
class Kernel:
    """A way to attend: `run(q, k, v)` on [B, L, N, K]; `ms`, what it took when it was chosen."""

    name: str
    run: Run
    ms: float | None = None


@cache
def forward_kernels(device: torch.device, dtype: torch.dtype, head_width: int, many_keys: bool) -> tuple[Kernel, ...]:
    """Kernels that give the right answer on a GPU, without gradient; the first is used, as measured once."""
    sdpa = backends(device, dtype, head_width)
    # Those after the first are for shapes that it does not take.
    kernels = [Kernel(b.name, partial(_sdpa, (b, *(o for o in sdpa if o != b)))) for b in sdpa]
    with ONE_THREAD, torch.no_grad():
        flash = _flash4_for(device, dtype, head_width)
        if flash is not None and _is_right(flash, device, dtype, head_width):
            kernels.insert(0, flash)
        if len(kernels) > 1:
            problem = random_problem(device, dtype, head_width, 6144, 16384 if many_keys else 512, heads=12)
            kernels = _by_time(kernels, problem)
    _tell("attention", kernels, device, dtype, many_keys=many_keys)
    return tuple(kernels)


@cache
def gradient_kernels(device: torch.device, dtype: torch.dtype, head_width: int, many_keys: bool) -> tuple[Kernel, ...]:
    """As `forward_kernels`, of those whose gradients are right too, by the time of forward and backward together."""
    kernels = [Kernel(backends(device, dtype, head_width)[0].name, attend)]
    with ONE_THREAD, torch.enable_grad():
        flash = None if _flash4_for(device, dtype, head_width) is None else _flash4_with_gradient()
        sizes = [(200, 321), *([] if many_keys else [(4096, 70)])]  # queries in pieces, too
        if flash is not None and all(
            _is_right(flash, device, dtype, head_width, *each, gradients=True) for each in sizes
        ):
            kernels.insert(0, flash)
        elif flash is not None:
            logger.warning("FlashAttention-4 is not used where there are gradients: its own are not right, or missing")
        if len(kernels) > 1:
            problem = random_problem(device, dtype, head_width, 6144, 16384 if many_keys else 512, heads=12)
            for tensor in problem:
                tensor.requires_grad_()
            kernels = _by_time(kernels, problem)
    _tell("attention, forward and backward,", kernels, device, dtype, many_keys=many_keys)
    return tuple(kernels)


@cache
def flex_is_faster(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether a GPU computes masks faster, forward and backward, by flex attention than one part after the other by
    the fastest kernel; by one measurement of blocks that see those before them. Asked before a call with gradient.
    """
    if not has_triton():
        return False
    allowed = torch.ones(3, 3, dtype=torch.bool).tril().repeat_interleave(4, 0).repeat_interleave(4, 1)
    choose_kernels(device, dtype, head_width)
    with ONE_THREAD, torch.enable_grad(), torch.autocast(device.type, enabled=False):
        problem = random_problem(device, dtype, head_width, 12 * 1024, 12 * 1024, heads=12)
        for tensor in problem:
            tensor.requires_grad_()
        by_flex, in_turn = (make_mask(allowed, 1024, device, flex=flex) for flex in (True, False))
        parts = milliseconds(partial(attend_fastest, mask=in_turn), problem)
        try:
            flex = milliseconds(partial(attend, mask=by_flex), problem)
        except RuntimeError as error:  # its compiler
            logger.warning("masked attention goes part by part, flex attention failed: %s", str(error).splitlines()[0])
            return False
    logger.info("masked attention, forward and backward: flex %.2f ms, part by part %.2f ms", flex, parts)
    return flex < parts


def _tell(what: str, kernels: Sequence[Kernel], device: torch.device, dtype: torch.dtype, *, many_keys: bool) -> None:
    told = ", ".join(k.name if k.ms is None else f"{k.name} {k.ms:.3f} ms" for k in kernels)
    logger.info("%s to %s keys on %s in %s: %s", what, "many" if many_keys else "few", device, dtype, told)


def _by_time(kernels: Sequence[Kernel], problem: tuple[Tensor, Tensor, Tensor]) -> list[Kernel]:
    """Kernels with their times, without the one that keeps all scores; those within `MARGIN` of the fastest first."""
    timed = [replace(k, ms=milliseconds(k.run, problem)) for k in kernels if k.name != SDPBackend.MATH.name]
    fastest = min(kernel.ms or 0.0 for kernel in timed)
    return sorted(timed, key=lambda kernel: (kernel.ms or 0.0) > MARGIN * fastest)


def _sdpa(order: Sequence[SDPBackend], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with ONE_THREAD, sdpa_kernel(list(order), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flash4_for(device: torch.device, dtype: torch.dtype, head_width: int) -> Kernel | None:
    """FlashAttention-4; not imported, which takes seconds, where it has no code for the problem."""
    takes = head_width in (64, 128) and dtype in (torch.bfloat16, torch.float16)
    return _flash4() if takes and torch.cuda.get_device_capability(device) >= (9, 0) else None


@cache
def _flash4_with_gradient() -> Kernel | None:
    """FlashAttention-4 as an operator of torch; says once why it is not one here."""
    try:
        from longtake.models.flash4 import flash4
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # the library of operators is another
        logger.warning("FlashAttention-4 is not used where there are gradients: %s", error)
        return None
    return Kernel("FLASH_ATTENTION_4", flash4)


@cache
def _flash4() -> Kernel | None:
    """FlashAttention-4, where it is installed; says once that it is not."""
    try:
        from flash_attn.cute import flash_attn_func
    except (ImportError, OSError) as error:
        logger.warning("FlashAttention-4 is not used, attention is slower (pip install 'longtake[fast]'): %s", error)
        return None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return Kernel("FLASH_ATTENTION_4", run)


def random_problem(
    device: torch.device, dtype: torch.dtype, head_width: int, queries: int, keys: int, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (queries, keys, keys)
    q, k, v = (torch.randn(1, n, heads, head_width, device=device, generator=generator).to(dtype) for n in sizes)
    return q, k, v


def _is_right(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    queries: int = 200,  # no multiples of a kernel's tile
    keys: int = 321,
    *,
    gradients: bool = False,
) -> bool:
    """Whether a kernel runs and agrees with the mathematical definition in float64, with its `gradients` too where
    asked for; says when its result is wrong.
    """
    q, k, v = random_problem(device, dtype, head_width, queries, keys, heads=2)  # a result's gradient goes along it
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # why it does not take this problem
            found = results_of(kernel.run, (q, k, v), gradients=gradients)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:  # it does not support this type or device
        logger.debug("attention kernel %s is not available: %s", kernel.name, error)
        return False
    truth = results_of(defined, (q.double(), k.double(), v.double()), gradients=gradients)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    if all(float((a.double() - b).norm() / b.norm()) <= tolerance for a, b in zip(found, truth, strict=True)):
        return True
    logger.warning("attention kernel %s gave a wrong result on %s and is not used", kernel.name, device)
    return False


def results_of(run: Run, problem: tuple[Tensor, Tensor, Tensor], *, gradients: bool) -> tuple[Tensor, ...]:
    """What a kernel makes of a problem, and where asked for the gradients of half the square of that."""
    if not gradients:
        return (run(*problem),)
    leaves = [tensor.detach().requires_grad_() for tensor in problem]
    out = run(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, out.detach())


def defined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, scale 1/sqrt(K), as it is defined."""
    scores = torch.einsum("blnk,bsnk->bnls", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnls,bsnk->blnk", scores.softmax(-1), v)


def milliseconds(run: Run, problem: tuple[Tensor, Tensor, Tensor]) -> float:
    """Of one call on a GPU, with its backward where the problem asks for gradients: the best of three rounds of ten."""
    learnt = [tensor for tensor in problem if tensor.requires_grad]

    def once() -> None:
        out = run(*problem)
        if learnt:
            torch.autograd.grad(out, learnt, out.detach())

    took = []
    for _ in range(3):
        once()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)  # some 10 ms, in which Python starts all ten: its own time would be measured too
        start.record()
        for _ in range(10):
            once()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 10)
    return min(took)


@cache
def backends(device: torch.device, dtype: torch.dtype, head_width: int) -> tuple[SDPBackend, ...]:
    """CUDA kernels of `scaled_dot_product_attention` that give the right answer here, by what is known the best first.

    cuDNN's is 1.6x the flash kernel on Hopper. Each candidate is run once on a small random problem and compared with
    the mathematical definition in float64; one that fails or raises is left out and named once in the log.
    """
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    order.insert(0 if torch.cuda.get_device_capability(device) >= (9, 0) else 1, SDPBackend.CUDNN_ATTENTION)
    good = [b for b in order if _is_right(Kernel(b.name, partial(_sdpa, (b,))), device, dtype, head_width)]
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
def has_triton() -> bool:
    """Whether kernels can be compiled; says once that they cannot."""
    from importlib.util import find_spec

    if find_spec("triton") is not None:
        return True
    logger.warning(
        "triton is not installed: masked attention is computed block by block, and nothing is fused (slower)"
    )
    return False
