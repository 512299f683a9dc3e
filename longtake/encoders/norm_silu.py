"""What stands between two convolutions of the Wan VAE, in one pass over memory: bias, residual, RMS norm, SiLU.

A convolution's result is read once, and what follows it goes where the next convolution reads: into a buffer whose
first frames are those of the call before. With triton it is one kernel (`norm_silu_triton.py`); without, torch's own
operations, which are also the reference. Must know no layer and no stream.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


class Term(NamedTuple):
    """A sum that waits for its reader: `value` + `bias` + `skip`.

    `value` [B, T, H, W, C], contiguous, belongs to the reader, who may overwrite it; `bias` [C]; `skip` like `value`.
    """

    value: Tensor
    bias: Tensor | None = None
    skip: Tensor | None = None


def norm_silu(x: Term, gamma: Tensor, out: Tensor, *, silu: bool = True, keep: bool = True) -> Tensor:
    """Writes SiLU(sum / RMS over channels * gamma) to `out`; the sum [B, T, H, W, C] where `keep`, else what was there.

    Args: `gamma` [C]; `out` [B, T, H, W, C], each item of the batch contiguous; `silu` False leaves the SiLU out.
    Source: diffusers `WanRMS_norm`: x / max(|x|, 1e-12) * sqrt(C) * gamma, in float32.
    """
    if (kernels := _kernels(x.value.device.type)) is not None:
        return kernels.launch(x, out, gamma, silu=silu, keep=keep)
    total = _total(x)
    scaled = F.normalize(total.float(), dim=-1) * (gamma.float() * total.shape[-1] ** 0.5)
    out.copy_(F.silu(scaled, inplace=True) if silu else scaled)
    return total


def settle(x: Term, out: Tensor | None = None) -> Tensor:
    """The sum [B, T, H, W, C], in `out` (as that of `norm_silu`) where it is given, else where `value` was."""
    if x.bias is None and x.skip is None:
        return x.value if out is None else out.copy_(x.value)
    if (kernels := _kernels(x.value.device.type)) is not None:
        total = kernels.launch(x, out, None, silu=False, keep=out is None)
        return total if out is None else out
    return _total(x) if out is None else out.copy_(_total(x))


def _total(x: Term) -> Tensor:
    total = x.value
    for part in (x.bias, x.skip):
        if part is not None:
            total.add_(part)
    return total


@cache
def _kernels(device_type: str) -> ModuleType | None:
    """The kernels for a type of device; None, said once, where there are none."""
    if device_type != "cuda":
        return None
    try:
        from longtake.encoders import norm_silu_triton
    except ImportError as error:
        logger.warning("triton is missing (%s): the VAE's norms run as torch's operations, which takes longer", error)
        return None
    return norm_silu_triton


def is_fused(device: torch.device) -> bool:
    """Whether norms on `device` are one kernel."""
    return _kernels(device.type) is not None
