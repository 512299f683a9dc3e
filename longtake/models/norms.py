"""What a block does between its products where gradients flow: norms with what is added before and multiplied after.

Each is one function of `layers.py`, which says what it is. Where an execution goes by rows it is a kernel of its own
forward and one backward, whose rows are read once (`norms_triton.py`); else, and where no gradient is wanted, the
function as the execution fuses it. It must know no attention and no block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from longtake.models import layers, trial
from longtake.models.attention import ONE_THREAD, milliseconds
from longtake.models.execution import Execution
from longtake.models.fp8 import FP8, Rows

logger = logging.getLogger(__name__)

_WIDEST = 8192  # row that stays in registers


def kept_and_modulated(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, execution: Execution
) -> tuple[Tensor, Tensor | Rows]:
    """`x` as it is, for what adds to it, and `layers.modulated`: backward adds up the gradients of both as it goes."""
    if not _by_rows(x, dtype, execution):
        return x, execution.fused(layers.modulated)(x, shift, scale, eps, dtype)
    return _Normed.apply(x, None, None, scale, shift, eps, dtype)


def gated_then_normed(
    x: Tensor,
    made: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    execution: Execution,
) -> tuple[Tensor, Tensor | Rows]:
    """`layers.gated_then_normed`."""
    if not _by_rows(x, dtype, execution):
        return layers.at_once(execution, layers.gated_then_normed)(x, made, gate, weight, bias, eps, dtype)
    return _Normed.apply(x, made, gate, weight, bias, eps, dtype)


def added_then_modulated(
    x: Tensor, made: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, execution: Execution
) -> tuple[Tensor, Tensor | Rows]:
    """`layers.added_then_modulated`."""
    if not _by_rows(x, dtype, execution):
        return layers.at_once(execution, layers.added_then_modulated)(x, made, shift, scale, eps, dtype)
    return _Normed.apply(x, made, None, scale, shift, eps, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, execution: Execution) -> Tensor:
    """`layers.rms_norm`."""
    if not _by_rows(x, x.dtype, execution):
        return execution.fused(layers.rms_norm)(x, weight, eps)
    return _Normed.apply(x, None, None, weight, None, eps, x.dtype)[1]


def _by_rows(x: Tensor, dtype: torch.dtype, execution: Execution) -> bool:
    return execution.by_rows and torch.is_grad_enabled() and x.is_cuda and dtype != FP8


class _Normed(torch.autograd.Function):
    """Of x [..., L, D]: (the sum, its norm); `scale` and `shift` [..., 1, D] are of modulation, [D] of a norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        made: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor | None,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from longtake.models.norms_triton import forward

        added = None if made is None else _rows(made)
        out, normed = forward(_rows(x), added, _by_entry(gate), _entries(scale), _by_entry(shift), eps, dtype)
        out = x if made is None else out.view(x.shape)
        ctx.save_for_backward(out, made if gate is not None else None, gate, scale)
        ctx.eps, ctx.mean, ctx.shared = eps, shift is not None, scale.ndim == 1
        ctx.added = None if made is None else made.dtype
        ctx.set_materialize_grads(False)
        return out, normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        from longtake.models.norms_triton import backward

        out, made, gate, scale = ctx.saved_tensors
        of_out, of_normed = (None if grad is None else _rows(grad) for grad in grads)
        value = _rows(out)
        if ctx.mean and of_out is None:
            of_out = torch.zeros_like(value)
        found, of_made, of_gate, *of_both = backward(
            value,
            None if made is None else _rows(made),
            _by_entry(gate),
            _entries(scale),
            torch.zeros_like(value) if of_normed is None else of_normed,
            of_out if ctx.mean else None,
            ctx.added,
            ctx.eps,
        )

        def of_entries(total: Tensor | None) -> Tensor | None:
            return None if total is None else total.view(*out.shape[:-2], 1, out.shape[-1])

        def of_all(total: Tensor | None) -> Tensor | None:
            return None if total is None else total.sum(0).to(scale.dtype)

        of_scale, of_shift = map(of_all if ctx.shared else of_entries, of_both)
        of_made = None if of_made is None else of_made.view(out.shape)
        return found.view(out.shape), of_made, of_entries(of_gate), of_scale, of_shift, None, None


def _rows(x: Tensor) -> Tensor:
    """[..., L, D] -> [E, L, D]."""
    return x.contiguous().flatten(0, -3)


def _entries(t: Tensor) -> Tensor:
    """[..., 1, D] -> [E, D], a view where it can be one; [D] as it is."""
    return t if t.ndim == 1 else t.squeeze(-2).flatten(0, -2)


def _by_entry(t: Tensor | None) -> Tensor | None:
    return None if t is None else _entries(t)


@cache
def are_faster(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels do on a GPU what the functions do, gradients included, and faster than what torch's compiler
    makes of these, for rows of that width beside products in `dtype`; by one measurement.
    """
    if width > _WIDEST:
        return False
    with ONE_THREAD, torch.enable_grad(), torch.autocast(device.type, enabled=False):
        if not trial.is_right("the kernel for norms", device, lambda: off(device, dtype, width)):
            return False
        x, made, more = (torch.randn(1, 16, n, width, device=device) for n in (1560, 1560, 2))
        problem = (x.requires_grad_(), made.to(dtype).requires_grad_(), more.requires_grad_())
        compiled, own = (
            milliseconds(partial(_added, execution=Execution(fuses=True, by_rows=by_rows)), problem)
            for by_rows in (False, True)
        )
    logger.info("a norm of rows of %d, forward and backward: compiled %.2f ms, by rows %.2f ms", width, compiled, own)
    return own < compiled


def _added(x: Tensor, made: Tensor, modulation: Tensor, *, execution: Execution) -> Tensor:
    """A sum and its norm, added up: a problem with gradients of both."""
    shift, scale = modulation.unsqueeze(3).unbind(2)
    out, normed = added_then_modulated(x, made, shift, scale, 1e-6, made.dtype, execution)
    assert isinstance(normed, Tensor)
    return out + normed


def off(device: torch.device, dtype: torch.dtype, width: int = 200) -> list[float]:
    """How far results and gradients of the kernels are from those of the functions, for rows of `width`, of products in
    `dtype`.
    """
    generator, eps, exact = torch.Generator(device).manual_seed(0), 1e-6, torch.float32

    def random(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(of)

    x, made, low = (random(2, 3, 45, width, of=of) for of in (torch.float32, dtype, dtype))
    shift, scale, gate, *_ = random(2, 3, 6, width).unsqueeze(3).unbind(2)
    weight, bias = random(width), random(width)
    cases: list[tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]] = [
        (
            lambda x, a, b: _Normed.apply(x, None, None, b, a, eps, dtype),
            lambda x, a, b: (1 * x, layers.modulated(x, a, b, eps, exact)),
            [x, shift, scale],
        ),
        (
            lambda x, m, g, w, b: _Normed.apply(x, m, g, w, b, eps, dtype),
            lambda x, m, g, w, b: layers.gated_then_normed(x, m, g, w, b, eps, exact),
            [x, made, gate, weight, bias],
        ),
        (
            lambda x, m, a, b: _Normed.apply(x, m, None, b, a, eps, dtype),
            lambda x, m, a, b: layers.added_then_modulated(x, m, a, b, eps, exact),
            [x, made, shift, scale],
        ),
        (
            lambda x, w: _Normed.apply(x, None, None, w, None, eps, dtype)[1:],
            lambda x, w: (layers.rms_norm(x, w, eps),),
            [low, weight],
        ),
    ]
    return [one for case in cases for one in _differences(*case)]


def _differences(kernel: Callable[..., Any], function: Callable[..., Any], given: list[Tensor]) -> list[float]:
    """Of results and gradients, each beside its own size."""
    found, truth = ([t.detach().to(t if same else torch.float32).requires_grad_() for t in given] for same in (1, 0))
    made, wanted = kernel(*found), function(*truth)
    gradients = [
        torch.autograd.grad(results, leaves, [w.detach().to(r.dtype) for w, r in zip(wanted, results, strict=True)])
        for results, leaves in ((made, found), (wanted, truth))
    ]
    pairs = zip([*made, *gradients[0]], [*wanted, *gradients[1]], strict=True)
    return [trial.beside(one, truth) for one, truth in pairs]
