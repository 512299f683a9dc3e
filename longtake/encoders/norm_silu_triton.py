"""The triton kernel of `norm_silu.py`. Import it only where triton is."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements of a program


# Nothing is gained by code for one frame, or for numbers of frames that sixteen divides, and each takes half a second.
@triton.jit(do_not_specialize=["num_pixels", "num_frames"])
def _sum_norm_silu(
    value,
    bias,
    skip,
    gamma,
    out,
    num_pixels,
    num_frames,
    frame_pixels,
    item_step,  # elements of `out` from an item of the batch to the next
    frame_step,  # from a frame to the next
    scale,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    TAPS: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    KEEP: tl.constexpr,
    WRITE: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
):
    # 64 bits where elements are counted: sixteen frames of 720x1280 with 256 channels are more than 32 bits can count.
    # Pixels they can, and divisions of 64 bits would take registers, so that fewer programs run at a time.
    pixels = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    columns = tl.arange(0, BLOCK)
    real = columns < C
    mask = (pixels < num_pixels)[:, None] & real[None, :]
    places = pixels[:, None].to(tl.int64) * C + columns[None, :]
    x = tl.load(value + places, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    if SKIP:
        x += tl.load(skip + places, mask=mask, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(value + places, x.to(value.dtype.element_ty), mask=mask)
    if WRITE:
        if NORM:
            square = tl.sum(x * x, axis=1)
            x = x * (scale / tl.sqrt(tl.maximum(square, 1e-24)))[:, None]
            x *= tl.load(gamma + columns, mask=real, other=0.0).to(tl.float32)[None, :]
            if SILU:
                x = x / (1.0 + tl.exp2(x * -1.4426950408889634))  # exp(-x), by what GPUs have
        frames = pixels // frame_pixels
        item = frames // num_frames
        time = (frames - item * num_frames).to(tl.int64)
        base = item.to(tl.int64) * item_step + (pixels - frames * frame_pixels).to(tl.int64) * (TAPS * C)
        made = x.to(out.dtype.element_ty)
        for age in tl.static_range(TAPS):  # frame t is read by the outputs t, t + 1, ... as one of age 0, 1, ...
            rows = base + (time + age) * frame_step + (TAPS - 1 - age) * C
            there = mask & (time + age < num_frames)[:, None]
            tl.store(out + rows[:, None] + columns[None, :], made, mask=there)


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
    """Adds up, into `value` where `keep`; with `out`, writes the sum there, normalised where `gamma` is given.

    Args: `out` like `value`, or [B, T, H, W, taps, C] as in `norm_silu`.
    """
    assert value.is_contiguous() and (skip is None or skip.is_contiguous())
    _, frames, height, width, channels = value.shape
    place, taps = (value, 1) if out is None else (out, 1 if out.ndim == value.ndim else out.shape[4])
    assert place[0, 0].is_contiguous() and place.shape[:4] == value.shape[:4] and place.shape[-1] == channels
    num_pixels, block = value.numel() // channels, triton.next_power_of_2(channels)
    at_once = max(1, _TILE // block)

    def given(tensor: Tensor | None) -> Any:
        return value if tensor is None else tensor  # any pointer will do: it is not read

    with torch.cuda.device_of(value):
        _sum_norm_silu[(triton.cdiv(num_pixels, at_once),)](
            value,
            given(bias),
            given(skip),
            given(gamma),
            place,
            num_pixels,
            frames,
            height * width,
            place.stride(0),
            place.stride(1),
            channels**0.5,
            C=channels,
            BLOCK=block,
            PIXELS=at_once,
            TAPS=taps,
            BIAS=bias is not None,
            SKIP=skip is not None,
            KEEP=keep and (bias is not None or skip is not None),
            WRITE=out is not None,
            NORM=gamma is not None,
            SILU=silu,
        )
    return value
