"""Low-rank updates while they are trained: PEFT's layers inside the blocks of a transformer, all else frozen.

W stays as it is and the layer computes W x + (alpha / rank) B A x (Hu et al. 2021, arXiv 2106.09685, eq. 3), with B = 0
at the start. Source of the layers: huggingface/peft 0.21 `inject_adapter_in_model` (its guide "Adapter injection") and
`tuners/lora/layer.py`; of the choice of layers: specification H.7. Must know no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import ConfigError
from longtake.models.dit import VideoDiT
from longtake.randomness import Draws

_NAME = "default"  # PEFT's name of the only set of updates; published files leave it out


def linear_layers(model: VideoDiT) -> tuple[str, ...]:
    """Names of all linear layers inside a block: 10, or 12 with an image branch."""
    return tuple(name for name, module in model.blocks[0].named_modules() if isinstance(module, nn.Linear))


def targets_of(model: VideoDiT, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The linear layers of a block that `wanted` names, in the model's order; all for None. Raises: ConfigError."""
    known = linear_layers(model)
    if unknown := sorted(set(wanted or ()) - set(known)):
        raise ConfigError(
            f"lora.targets names {', '.join(unknown)}; the linear layers of a block are {', '.join(known)}"
        )
    return tuple(name for name in known if wanted is None or name in wanted)


def add_lora(model: VideoDiT, pattern: str, rank: int, alpha: float, draws: Draws, purpose: str) -> VideoDiT:
    """`model` with updates on the layers whose whole name matches `pattern`; nothing else is trained any more.

    Call it after the weights were loaded and before sharding. The factors are float32, whatever the type of the
    weights. A is uniform in +-1 / sqrt(inputs) (PEFT's own start) and a function of the seed of `draws`, `purpose` and
    the layer's name alone, hence the same on every rank; B is 0, so that the model computes what it did.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=pattern)  # type: ignore[arg-type]
    inject_adapter_in_model(settings, model, _NAME, low_cpu_mem_usage=True)
    for name, layer in _updated_layers(model):
        weight: Tensor = layer.base_layer.weight
        bound = 1 / math.sqrt(weight.shape[1])
        generator = draws.generator(0, f"{purpose} {name}", 0)
        a, b = torch.empty(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
        if weight.device.type != "meta":
            a.uniform_(-bound, bound, generator=generator)
        for linear, value in ((layer.lora_A[_NAME], a), (layer.lora_B[_NAME], b)):
            linear.weight = nn.Parameter(value.to(weight.device))
        layer.register_forward_pre_hook(_cast_outside_autocast)
    return model


def factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the factors A and B among the named tensors of a network."""
    return {name: tensor for name, tensor in tensors.items() if ".lora_A." in name or ".lora_B." in name}


def _updated_layers(model: VideoDiT) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def _cast_outside_autocast(layer: Any, arguments: tuple[Tensor, ...]) -> None:
    """Lets PEFT cast the input of bfloat16 layers to the float32 of the factors where autocast does not see to types.

    Under autocast that cast would be undone at once, and each layer would keep a copy of the input for backward.
    """
    layer.cast_input_dtype_enabled = not torch.is_autocast_enabled(arguments[0].device.type)
