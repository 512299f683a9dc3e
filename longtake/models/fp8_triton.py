"""GELU and quantising of rows in one pass over memory, as a kernel for GPUs. Import it only where triton is.

A row stays in registers between its largest number and its rounding; torch's compiler reads so long a row twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gelu_quantised(
    value,
    out,
    scales,
    LEAST: tl.constexpr,
    LARGEST: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    real = columns < K
    x = tl.load(value + row * K + columns, mask=real, other=0.0).to(tl.float32)
    # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
    x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), LEAST) / LARGEST
    scale += tl.sum(x * 0.0, axis=0)  # the largest of what are numbers was found: what is not finite must show
    q = tl.clamp(x / scale, -LARGEST, LARGEST)
    tl.store(out + row * K + columns, q.to(out.dtype.element_ty), mask=real)
    tl.store(scales + row, scale)


def gelu_quantised(x: Tensor, least: float, largest: float) -> tuple[Tensor, Tensor]:
    """The values and scales of `fp8.gelu_quantised`, of a contiguous tensor on a GPU."""
    assert x.is_contiguous()
    width = x.shape[-1]
    out = torch.empty(x.shape, device=x.device, dtype=torch.float8_e4m3fn)
    scales = torch.empty(*x.shape[:-1], 1, device=x.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _gelu_quantised[(x.numel() // width,)](
            x, out, scales, LEAST=least, LARGEST=largest, K=width, BLOCK=block, num_warps=16 if block > 4096 else 4
        )
    return out, scales
