"""Matrix products of 8-bit floats: every row of the input and every row of the weight has a scale of its own.

A row x of float32 numbers is kept as q = x / s rounded to e4m3 (a sign, 4 bits of exponent, 3 of mantissa; 448 is the
largest), with s = max |x| / 448. A product is then sum_k q_x q_w, times s_x s_w, plus the bias. What a row gives
depends on that row alone, whatever else is in the call. Must know no transformer.
Source: the row-wise scaling of `torch._scaled_mm` (pytorch aten/src/ATen/native/cuda/ScaledBlas.cpp).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.models.trial import beside, is_right

logger = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST = 1e-12  # of a row's largest number: rows of zeros have a scale too


class Rows(NamedTuple):
    """Rows [..., K] of numbers in e4m3, and the scale of each [..., 1], float32."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def flatten(self, start: int, end: int) -> Rows:
        """As a tensor's, of axes before the last one."""
        return Rows(self.values.flatten(start, end), self.scale.flatten(start, end))


def quantised(x: Tensor) -> Rows:
    """The rows of `x` [..., K]. Each number is off by 1/16 of itself at the most, or by scale / 1024 where it is small;
    what is not finite leaves no finite number in its row.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) / LARGEST
    # The quotient can round to a little more than the largest number, which the cast would make NaN.
    return Rows((x / scale).clamp(-LARGEST, LARGEST).to(FP8), scale)


def gelu_quantised(x: Tensor) -> Rows:
    """The rows of GELU (tanh) of `x`."""
    return quantised(F.gelu(x.float(), approximate="tanh"))


@cache
def gelu_quantised_once(device: torch.device) -> Callable[[Tensor], Rows] | None:
    """`gelu_quantised` of contiguous tensors on a GPU in one pass over memory; None, which is said once, where that is
    not right.
    """
    from longtake.models.fp8_triton import gelu_quantised as kernel

    def run(x: Tensor) -> Rows:
        return Rows(*kernel(x, LEAST, LARGEST))

    def off() -> list[float]:
        x = torch.randn(64, 300, device=device, generator=torch.Generator(device).manual_seed(0)).mul_(3)
        made, truth = ((rows.values.float() * rows.scale) for rows in (run(x), gelu_quantised(x)))
        return [beside(made, truth)]

    return run if is_right("the kernel that quantises GELU", device, off) else None


def entering(x: Tensor, dtype: torch.dtype) -> Tensor | Rows:
    """`x` as it enters a product whose weights are of `dtype`."""
    return quantised(x) if dtype == FP8 else x.to(dtype)


class FP8Linear(nn.Module):
    """A linear layer whose weight is kept in e4m3, a scale an output; its result has the type of its bias."""

    def __init__(self, weight: Rows, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.values, requires_grad=False)
        self.scale = nn.Parameter(weight.scale.flatten(), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> FP8Linear:
        """The quantised layer of another one."""
        return cls(quantised(linear.weight.detach()), linear.bias.detach())

    def forward(self, x: Tensor | Rows) -> Tensor:
        """[..., K] -> [..., N]; a plain tensor is quantised first."""
        rows = x if isinstance(x, Rows) else quantised(x)
        multiply = _multiplied if has_kernel(self.weight.device) else plainly_multiplied
        made = multiply(rows.values.flatten(0, -2), rows.scale.view(-1, 1), self.weight, self.scale, self.bias)
        return made.unflatten(0, rows.shape[:-1])


def _multiplied(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """[L, K] and [N, K] -> [L, N] by the device's own product of 8-bit floats."""
    made = torch._scaled_mm(
        x, weight.t(), scale_a=scale, scale_b=weight_scale[None], bias=bias, out_dtype=bias.dtype, use_fast_accum=True
    )
    return made


def plainly_multiplied(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The same of the same quantised numbers, by a product that every device has."""
    wide = torch.bfloat16 if x.is_cuda else torch.float32  # both hold every number of e4m3 exactly
    made = F.linear(x.to(wide), weight.to(wide)).float() * scale * weight_scale
    return (made + bias.float()).to(bias.dtype)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether a device multiplies 8-bit floats itself, and rightly; says once that it does not."""
    if device.type != "cuda":
        reason: object = f"{device.type} has none"
    elif torch.cuda.get_device_capability(device) < (8, 9):
        reason = "a GPU has them from Ada and Hopper on (compute capability 8.9)"
    else:
        reason = _fault(device)
    if reason is None:
        return True
    logger.warning("precision fp8: products of 8-bit floats are computed in wider types, slower than bf16: %s", reason)
    return False


def _fault(device: torch.device) -> object:
    """What is wrong with the device's own product on a small problem; None where nothing is."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, 256, device=device, generator=generator) for n in (64, 128))
    bias = torch.randn(128, device=device, generator=generator).bfloat16()
    (x, scale), (weight, weight_scale) = quantised(x), quantised(weight)
    given = (x, scale, weight, weight_scale.flatten(), bias)
    try:
        made = _multiplied(*given).double()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    truth = plainly_multiplied(*(t.cpu() for t in given)).to(made)
    wrong = float((made - truth).norm() / truth.norm())
    return None if wrong <= 1e-2 else f"torch._scaled_mm is off by {wrong:.3f}"
