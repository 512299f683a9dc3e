"""Fills a model from the meta device with weights, each rank with its shards alone.

A tensor after the other is read and cut; no rank ever holds more of a network than its shards and one tensor. Must know
no file: values come as an iterator, of which views of a mapped file cost only what is copied out of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from longtake.models.lora import base_name
from longtake.weights.tensor_files import is_finite


def materialize(model: nn.Module, device: torch.device | str, values: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Puts `model`, sharded or not, on `device` with the given values, converted to the types of its parameters.

    Args: `values`, (name of the parameter, whole tensor), each parameter once, equal on every rank; weights that have
    low-rank updates go by their name without them.
    Returns: names of the parameters whose part here is not finite, which no other rank may know.
    """
    wrong = []
    model.to_empty(device=device)
    waiting = {base_name(name): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, value in values:
            target = waiting.pop(name)
            copy_part(target, value)
            if not is_finite(local(target)):
                wrong.append(name)
    assert not waiting, f"no values for {sorted(waiting)}"
    return wrong


def copy_part(target: Tensor, whole: Tensor) -> None:
    """Copies the part of `whole` that this rank holds of `target`."""
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    assert target.shape == whole.shape, f"{tuple(whole.shape)} is no value for {tuple(target.shape)}"
    target.to_local().copy_(whole[part_of(target)])


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; writing into it writes into the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: DTensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))
