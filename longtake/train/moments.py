"""The moments of AdamW in storage: float32, or 8 bits and a scale for each 256 numbers.

The 8-bit format is that of torchao (`torchao.optim.subclass_8bit.OptimState8bit`, version 0.18; Dettmers et al. 2021,
arXiv 2110.02861). Codes and scales are plain tensors, sharded like the parameter, so that a checkpoint holds them and
another number of ranks can read it. Must know no network.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longtake.errors import ConfigError

BLOCK = 256  # numbers that share a scale
_SMALLEST = 4096  # tensors with fewer numbers stay in float32


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Float32Moment:
    """A moment as it is; `tensors` by the end of their name in a checkpoint."""

    def __init__(self, parameter: Tensor) -> None:
        self.value = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.preserve_format)
        self.tensors = {"": self.value}

    def load(self) -> Tensor:
        """This rank's part in float32; it may be changed in place before `store`."""
        return local(self.value)

    def store(self, value: Tensor) -> None:
        """Keeps what `load` gave, changed."""


class Int8Moment:
    """A moment as 8-bit codes [rows, ...] and scales [rows, numbers of a row / 256]."""

    def __init__(self, parameter: Tensor, *, signed: bool) -> None:
        rows = parameter.shape[0]
        blocks = parameter.numel() // rows // BLOCK
        mine = local(parameter)
        codes = torch.zeros(mine.shape, dtype=torch.uint8, device=mine.device)
        scale = torch.zeros((mine.shape[0], blocks), device=mine.device)
        self._kept = _quantised(codes, scale, signed) if codes.numel() else None
        self.tensors = {
            ".codes": _like(codes, parameter, tuple(parameter.shape)),
            ".scale": _like(scale, parameter, (rows, blocks)),
        }

    def load(self) -> Tensor:
        """This rank's part in float32."""
        return local(self.tensors[".scale"]).flatten() if self._kept is None else self._kept.dequantize()

    def store(self, value: Tensor) -> None:
        """Keeps what `load` gave, changed, to 8 bits."""
        if self._kept is not None:
            self._kept.copy_(value)


def suits_int8(parameter: Tensor) -> bool:
    """True where blocks of 256 lie within rows, so that they are the same on any number of ranks."""
    return parameter.numel() >= _SMALLEST and parameter[0].numel() % BLOCK == 0


def check_int8() -> None:
    """Raises ConfigError when the package for 8-bit moments is not there."""
    if find_spec("torchao") is None:
        raise ConfigError(
            "optim.moments=int8 needs the package torchao; install it (pip install torchao) or set moments=float32"
        )


def _quantised(codes: Tensor, scale: Tensor, signed: bool) -> Any:
    from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

    values = torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), device=codes.device)
    return OptimState8bit(codes, scale.view(-1), values, signed, dtype=torch.float32)


def _like(mine: Tensor, parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """This rank's rows as a tensor of `shape` that is sharded like the parameter."""
    if not isinstance(parameter, DTensor):
        return mine
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        mine, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
