"""A linear layer, GELU (tanh) and another linear layer as one operator of torch, whose backward makes GELU again.

What is kept is the first layer's result; selective recomputation keeps it with the last one and runs nothing of the MLP
again, or, inside `FirstLayerAgain`, that product alone: its result is several times as wide as all others. Backward
reads and writes the wide tensors once, where torch's own operations take three passes and a sum over all rows for the
first bias. It must know no transformer.
"""

# No `from __future__ import annotations`: torch reads the types of an operator from its signature.
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.models import trial
from longtake.models.attention import has_triton

_first_layer_again = ContextVar("_first_layer_again", default=False)


class FirstLayerAgain(AbstractContextManager):
    """Inside, backward makes the first layer's result again, from its input. It may be entered more than once."""

    def __init__(self) -> None:
        self._before: list[Token[bool]] = []

    def __enter__(self) -> None:
        self._before.append(_first_layer_again.set(True))

    def __exit__(self, *_: object) -> None:
        _first_layer_again.reset(self._before.pop())


def mlp_with_gradient(x: Tensor, first: Tensor, first_bias: Tensor, last: Tensor, last_bias: Tensor) -> Tensor:
    """x [L, D] -> [L, D]. Args: weights and biases of both layers, of the type of `x`."""
    return _mlp(x, first, first_bias, last, last_bias, _first_layer_again.get())[0]


@torch.library.custom_op("longtake::mlp", mutates_args=())
def _mlp(
    x: Tensor, first: Tensor, first_bias: Tensor, last: Tensor, last_bias: Tensor, again: bool
) -> tuple[Tensor, Tensor]:
    """The result, and that of the first layer; without rows, where backward makes it again."""
    if again and x.is_cuda:  # nobody asks for the first layer's result: cuBLAS has GELU (tanh) behind its product
        made = torch._addmm_activation(first_bias, x, first.t(), use_gelu=True)
        return torch.addmm(last_bias, made, last.t()), x.new_empty(0, first.shape[0])
    hidden = torch.addmm(first_bias, x, first.t())
    made = torch.addmm(last_bias, _gelu(hidden), last.t())
    return made, x.new_empty(0, first.shape[0]) if again else hidden


@_mlp.register_fake
def _(
    x: Tensor, first: Tensor, first_bias: Tensor, last: Tensor, last_bias: Tensor, again: bool
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    return x.new_empty(rows, last.shape[0]), x.new_empty(0 if again else rows, first.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, first, first_bias, last, _, ctx.again = inputs
    ctx.save_for_backward(x, first, first_bias if ctx.again else None, last, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the first layer's result, zeros as wide as it


def _gradients(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, first, first_bias, last, hidden = ctx.saved_tensors
    of_x, of_first, of_first_bias, of_last, of_last_bias = ctx.needs_input_grad[:5]
    if ctx.again:
        hidden = torch.addmm(first_bias, x, first.t())
    made, change, total = gelu_backward(hidden, grad @ last)
    del hidden
    found_last = grad.t() @ made if of_last else None
    del made
    return (
        change @ first if of_x else None,
        change.t() @ x if of_first else None,
        total.to(change.dtype) if of_first_bias else None,
        found_last,
        grad.sum(0) if of_last_bias else None,
        None,
    )


_mlp.register_autograd(_gradients, setup_context=_keep)


def _gelu(x: Tensor) -> Tensor:
    if x.is_cuda and is_right(x.device):
        from longtake.models.gelu_triton import gelu

        return gelu(x)
    return F.gelu(x, approximate="tanh")


def gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU of `x` [L, W]; the gradient of `x`, in the place of `grad`, which is that of the former; and its sum over
    all rows, float32.
    """
    if x.is_cuda and is_right(x.device):
        from longtake.models.gelu_triton import gelu_backward as kernel

        return kernel(x.contiguous(), grad.contiguous())
    torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)
    return F.gelu(x, approximate="tanh"), grad, grad.sum(0, dtype=torch.float32)


@cache
def is_right(device: torch.device) -> bool:
    """Whether the kernels for GELU do on a GPU what torch's operations do."""
    if device.type != "cuda" or not has_triton():
        return False
    return trial.is_right("the kernel for GELU", device, lambda: _off(device))


def _off(device: torch.device) -> list[float]:
    from longtake.models.gelu_triton import gelu, gelu_backward

    generator = torch.Generator(device).manual_seed(0)
    x, grad = (3 * torch.randn(70, 300, device=device, generator=generator).bfloat16() for _ in range(2))
    exact = x.double()
    made, change = (
        F.gelu(exact, approximate="tanh"),
        torch.ops.aten.gelu_backward(grad.double(), exact, approximate="tanh"),
    )
    found = [gelu(x), *gelu_backward(x, grad.clone())]
    return [trial.beside(one, truth) for one, truth in zip(found, [made, made, change, change.sum(0)], strict=True)]
