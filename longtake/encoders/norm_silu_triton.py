"""The triton kernel of `norm_silu.py`. Import it only where triton is."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements of a program


@triton.jit
def _sum_norm_silu(
    value,
    bias,
    skip,
    gamma,
    out,
    num_rows,  # pixels
    value_step,  # elements from a pixel to the next
    skip_step,
    rows_of_item,  # pixels of an item of the batch, over all its frames
    gap,  # pixels between the items of `out`
    scale,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    KEEP: tl.constexpr,
    WRITE: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
):
    # 64 bits: sixteen frames of 720x1280 with 256 channels are more elements than 32 bits can count.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    real = columns < C
    mask = (rows < num_rows)[:, None] & real[None, :]
    here = value + rows[:, None] * value_step + columns[None, :]
    x = tl.load(here, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    if SKIP:
        other = skip + rows[:, None] * skip_step + columns[None, :]
        x += tl.load(other, mask=mask, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(here, x.to(value.dtype.element_ty), mask=mask)
    if WRITE:
        if NORM:
            square = tl.sum(x * x, axis=1)
            x = x * (scale / tl.sqrt(tl.maximum(square, 1e-24)))[:, None]
            x *= tl.load(gamma + columns, mask=real, other=0.0).to(tl.float32)[None, :]
            if SILU:
                x = x / (1.0 + tl.exp(-x))
        rows += (rows // rows_of_item) * gap
        tl.store(out + rows[:, None] * C + columns[None, :], x.to(out.dtype.element_ty), mask=mask)


def launch(
    value: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    out: Tensor | None,
    gamma: Tensor | None,
    *,
    silu: bool,
    keep: bool,
) -> Tensor:
    """Adds up, into `value` where `keep`; with `out`, writes the sum there, normalised where `gamma` is given."""
    batch, channels = value.shape[0], value.shape[-1]
    pixels = value.view(-1, channels)  # raises where they do not lie one behind the other
    others = pixels if skip is None else skip.view(-1, channels)
    rows_of_item, gap = len(pixels) // batch, 0
    if out is not None:
        assert out.shape == value.shape and out[0].is_contiguous()
        gap = out.stride(0) // channels - rows_of_item if batch > 1 else 0
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE // block)

    def given(tensor: Tensor | None) -> Any:
        return value if tensor is None else tensor  # any pointer will do: it is not read

    with torch.cuda.device(value.device):
        _sum_norm_silu[(triton.cdiv(len(pixels), rows),)](
            value,
            given(bias),
            others,
            given(gamma),
            given(out),
            len(pixels),
            pixels.stride(0),
            others.stride(0),
            rows_of_item,
            gap,
            channels**0.5,
            C=channels,
            BLOCK=block,
            ROWS=rows,
            BIAS=bias is not None,
            SKIP=skip is not None,
            KEEP=keep and (bias is not None or skip is not None),
            WRITE=out is not None,
            NORM=gamma is not None,
            SILU=silu,
        )
    return value
