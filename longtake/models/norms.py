"""What a block does between its products: norms with what is added before and multiplied after.

Each is one function of `layers.py`, which says what it is. On a GPU a kernel stands in for it, whose rows are read once
(`normed_triton.py`): without gradient where it is right; with one, and another kernel for the gradients, where an
execution goes by rows; elsewhere it is as the execution fuses it. It must know no attention and no block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from longtake.models import layers, trial
from longtake.models.attention import MARGIN, ONE_THREAD, has_triton, milliseconds
from longtake.models.execution import Execution
from longtake.models.fp8 import FP8, Rows, has_kernel
from longtake.models.recompute import made_again

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
        return at_once(execution, layers.gated_then_normed)(x, made, gate, weight, bias, eps, dtype)
    return _Normed.apply(x, made, gate, weight, bias, eps, dtype)


def added_then_modulated(
    x: Tensor, made: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, execution: Execution
) -> tuple[Tensor, Tensor | Rows]:
    """`layers.added_then_modulated`."""
    if not _by_rows(x, dtype, execution):
        return at_once(execution, layers.added_then_modulated)(x, made, shift, scale, eps, dtype)
    return _Normed.apply(x, made, None, scale, shift, eps, dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, execution: Execution) -> Tensor:
    """`layers.rms_norm`."""
    if not _by_rows(x, x.dtype, execution):
        return execution.fused(layers.rms_norm)(x, weight, eps)
    return _Normed.apply(x, None, None, weight, None, eps, x.dtype)[1]


def _by_rows(x: Tensor, dtype: torch.dtype, execution: Execution) -> bool:
    return execution.by_rows and torch.is_grad_enabled() and x.is_cuda and dtype != FP8


# Of tokens, what is added to them, and at the end the type of weights: their sum, and its norm as it enters these
Normed = Callable[..., tuple[Tensor, Tensor | Rows]]


def at_once(execution: Execution, function: Normed) -> Normed:
    """`function`, one of `layers.py` with a kernel of its name: that without gradient on a GPU where it is right, else
    as the execution fuses it.
    """

    def run(x: Tensor, *given: Any) -> tuple[Tensor, Tensor | Rows]:
        quick = execution.fuses and x.is_cuda and not torch.is_grad_enabled() and has_triton()
        quick = quick and (given[-1] != FP8 or has_kernel(x.device))  # which then has instructions for the rounding
        kernel = in_one_pass(function, x.device, given[-1]) if quick else None
        return (kernel or execution.fused(function))(x, *given)

    return run


@cache
def in_one_pass(function: Normed, device: torch.device, dtype: torch.dtype) -> Normed | None:
    """The kernel of `normed_triton.py` for `function`; None, which is said once, where it is not right."""
    from longtake.models import normed_triton

    kernel: Normed = getattr(normed_triton, function.__name__)

    def off() -> list[float]:
        generator = torch.Generator(device).manual_seed(0)
        x, made, modulation = (torch.randn(2, 3, n, 48, device=device, generator=generator) for n in (5, 5, 3))
        gate, *rest = modulation.unsqueeze(3).unbind(2)
        if function is layers.gated_then_normed:
            rest = [rest[0][0, 0, 0], rest[1][0, 0, 0]]
        given = [made.bfloat16(), *([] if function is layers.added_then_modulated else [gate]), *rest, 1e-6, dtype]
        found = []
        for run in (kernel, function):
            total, normed = run(x, *given)
            normed = normed.values.float() * normed.scale if isinstance(normed, Rows) else normed.float()
            found.append(torch.cat([total.flatten(), normed.flatten()]))
        return [trial.beside(*found)]

    return kernel if trial.is_right(f"the kernel of {function.__name__}", device, off) else None


class _Normed(torch.autograd.Function):
    """`normed_triton.normed` in a type that has gradients: of x [..., L, D] the sum, and its norm."""

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
        from longtake.models.normed_triton import normed

        total, out = normed(x.contiguous(), None if made is None else made.contiguous(), gate, scale, shift, eps, dtype)
        assert isinstance(out, Tensor)
        total = x if made is None else total  # itself: its gradient comes with that of the norm
        ctx.save_for_backward(total, None if gate is None else made, gate, scale)
        ctx.eps, ctx.mean = eps, shift is not None
        ctx.added = None if made is None else made.dtype
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(ctx: Any, of_total: Tensor | None, of_out: Tensor | None) -> tuple[Any, ...]:
        from longtake.models.normed_triton import gradients

        def given(grad: Tensor | None) -> Tensor:
            return torch.zeros_like(total) if grad is None else grad.contiguous()

        total, made, gate, scale = ctx.saved_tensors
        of_x, of_made, of_gate, *of_both = gradients(
            total.contiguous(),
            None if made is None else made.contiguous(),
            gate,
            scale,
            given(of_out),
            given(of_total) if ctx.mean else None,
            ctx.added,
            ctx.eps,
        )
        if scale.ndim == 1:  # one weight for all frames
            of_both = [None if one is None else one.flatten(0, -2).sum(0).to(scale.dtype) for one in of_both]
        return of_x, of_made, of_gate, *of_both, None, None


@cache
def are_faster(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels do on a GPU what the functions do, gradients included, and faster than what torch's compiler
    makes of these, for rows of that width beside products in `dtype`; by one measurement.
    """
    if device.type != "cuda" or not has_triton() or width > _WIDEST:
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
    return own * MARGIN < compiled


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
    """Of results and gradients, also of those that backward makes again, each beside its own size."""
    found, truth = ([t.detach().to(t if same else torch.float32).requires_grad_() for t in given] for same in (1, 0))
    made, again, wanted = kernel(*found), made_again(kernel)(*found), function(*truth)
    gradients = [
        torch.autograd.grad(results, leaves, [w.detach().to(r.dtype) for w, r in zip(wanted, results, strict=True)])
        for results, leaves in ((made, found), (again, found), (wanted, truth))
    ]
    pairs = zip([*made, *gradients[0], *gradients[1]], [*wanted, *gradients[2], *gradients[2]], strict=True)
    return [trial.beside(one, truth) for one, truth in pairs]
