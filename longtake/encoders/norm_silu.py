"""What stands between two convolutions of the Wan VAE, in one pass over memory: bias, residual, RMS norm, SiLU.

A convolution's result is read once, and what follows it goes where the next convolution reads: into a buffer whose
first frames are those of the call before. With triton it is one kernel (`norm_silu_triton.py`); without, torch's own
operations, which are also the reference. Must know no layer and no stream.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

# Pixels of a frame up to which torch does it: the kernel is compiled, half a second for each kind of call, of which a
# network has twenty, and so small videos never get that back.
FEW_PIXELS = 1024


class Sum:
    """`value` + `bias` + `skip`, not added up yet. It is read once, by `norm_silu` or `settle`, and is empty then: what
    it held is free as soon as nobody needs it.

    `value` [B, T, H, W, C], contiguous, belongs to the reader, who may overwrite it; `bias` [C]; `skip` like `value`.
    """

    def __init__(self, value: Tensor, bias: Tensor | None = None, skip: Tensor | None = None) -> None:
        self._parts: tuple[Tensor, Tensor | None, Tensor | None] | None = (value, bias, skip)
        self.shape = value.shape
        self.device = value.device

    def taken(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The parts, from whom has none of them any more."""
        assert self._parts is not None, "a sum was read twice"
        parts, self._parts = self._parts, None
        return parts

    @classmethod
    def joined(cls, parts: Sequence[Sum]) -> Sum:
        """One sum of the frames of several, all made by the same layer."""
        if len(parts) == 1:
            return parts[0]
        values, biases, skips = zip(*(part.taken() for part in parts), strict=True)
        return cls(torch.cat(values, 1), biases[0], None if skips[0] is None else torch.cat(skips, 1))

    def split(self, frames: int) -> list[Sum]:
        """Sums of so many frames each."""
        value, bias, skip = self.taken()

        def pieces(tensor: Tensor) -> list[Tensor]:
            return [piece.contiguous() for piece in tensor.split(frames, dim=1)]

        values = pieces(value)
        skips = [None] * len(values) if skip is None else pieces(skip)
        return [Sum(piece, bias, other) for piece, other in zip(values, skips, strict=True)]


def norm_silu(x: Sum, gamma: Tensor, out: Tensor, *, silu: bool = True, keep: bool = True) -> Tensor | None:
    """Writes SiLU(sum / RMS over channels * gamma) to `out`; the sum [B, T, H, W, C] where `keep`, else None.

    Args: `gamma` [C]; `out` [B, T, H, W, C], each frame contiguous, or [B, T, H, W, taps, C], where each frame gets a
    place beside the taps - 1 frames after it: the last tap of frame t is frame t itself, the first one frame
    t - taps + 1, and what there is none for is left; `silu` False leaves the SiLU out.
    Source: diffusers `WanRMS_norm`: x / max(|x|, 1e-12) * sqrt(C) * gamma, in float32.
    """
    kernels, parts = _kernels(x), x.taken()
    if kernels is not None:
        total = kernels.launch(*parts, out, gamma, silu=silu, keep=keep)
    else:
        total = _total(*parts)
        scaled = F.normalize(total.float(), dim=-1) * (gamma.float() * total.shape[-1] ** 0.5)
        made, places = F.silu(scaled, inplace=True) if silu else scaled, out if out.ndim == 6 else out.unsqueeze(-2)
        for age, place in enumerate(reversed(places.unbind(-2))):
            place[:, age:].copy_(made[:, : made.shape[1] - age])
    return total if keep else None


def settle(x: Sum, out: Tensor | None = None) -> Tensor:
    """The sum [B, T, H, W, C], in `out` (as that of `norm_silu`) where it is given, else where `value` was."""
    kernels, (value, bias, skip) = _kernels(x), x.taken()
    if bias is None and skip is None:
        return value if out is None else out.copy_(value)
    if kernels is not None:
        total = kernels.launch(value, bias, skip, out, None, silu=False, keep=out is None)
    else:
        total = _total(value, bias, skip)
        if out is not None:
            out.copy_(total)
    return total if out is None else out


def _total(value: Tensor, bias: Tensor | None, skip: Tensor | None) -> Tensor:
    for part in (bias, skip):
        if part is not None:
            value.add_(part)
    return value


def _kernels(x: Sum) -> ModuleType | None:
    """The kernels for a sum, None where torch's operations do."""
    few = x.shape[2] * x.shape[3] <= FEW_PIXELS
    return None if few or x.device.type != "cuda" else _compiled()


@cache
def _compiled() -> ModuleType | None:
    """The kernels; None, said once, where there are none."""
    try:
        from longtake.encoders import norm_silu_triton
    except ImportError as error:
        logger.warning("triton is missing (%s): the VAE's norms run as torch's operations, which takes longer", error)
        return None
    return norm_silu_triton
