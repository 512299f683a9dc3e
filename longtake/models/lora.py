"""Low-rank updates while they are trained: PEFT's layers inside the blocks of a transformer, all else frozen.

W stays as it is and the layer computes W x + (alpha / rank) B A x (Hu et al. 2021, arXiv 2106.09685, eq. 3), with B = 0
at the start; without gradient as one product (`low_rank.py`). Source of the layers: huggingface/peft 0.21
`inject_adapter_in_model` (its guides "Adapter injection" and, of layers beside PEFT's own, "Custom models") and
`tuners/lora/layer.py`; of the choice of layers: specification H.7. Must know no file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longtake.errors import ConfigError
from longtake.models.dit import VideoDiT
from longtake.models.low_rank import low_rank_linear
from longtake.rng import KeyedRNG

DEFAULT = "default"  # PEFT's name of the only updates of a network; published files leave it out
WRITER = "writer"  # of those that write the context of a network, beside its own


def targets_of(model: VideoDiT, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The linear layers of a block that `wanted` names, in the model's order; all (10, or 12 with an image branch) for
    None. Raises: ConfigError.
    """
    linear = (name for name, module in model.blocks[0].named_modules() if isinstance(module, nn.Linear))
    # Where a layer has updates already, its own weight is one level deeper.
    known = tuple(name.removesuffix(".base_layer") for name in linear if ".lora_" not in name)
    if unknown := sorted(set(wanted or ()) - set(known)):
        names, layers = ", ".join(unknown), ", ".join(known)
        raise ConfigError(f"lora.targets names {names}; the linear layers of a block are {layers}")
    return tuple(name for name in known if wanted is None or name in wanted)


def inject_lora(model: VideoDiT, pattern: str, rank: int, alpha: float, name: str = DEFAULT) -> VideoDiT:
    """`model` with updates called `name` on the layers whose whole name matches `pattern`, of no value yet.

    Call it before sharding, and fill in `first_factors` after it. A model may get several, each under its own name; the
    last one is on. The factors are float32 on the device of the weights, whatever the type of these, and are trained.
    """
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=pattern)  # type: ignore[arg-type]
    settings._register_custom_module({nn.Linear: low_rank_linear()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several on purpose
        inject_adapter_in_model(settings, model, name, low_cpu_mem_usage=True)
    for _, layer in _updated_layers(model, name):
        weight: Tensor = layer.base_layer.weight
        outputs, inputs = weight.shape
        for linear, shape in ((layer.lora_A[name], (rank, inputs)), (layer.lora_B[name], (outputs, rank))):
            linear.weight = nn.Parameter(torch.empty(shape, device=weight.device))
        if len(layer.lora_A) == 1:
            layer.register_forward_pre_hook(_cast_outside_autocast)
    for parameter_name, parameter in model.named_parameters():
        if is_factor(parameter_name):
            parameter.requires_grad_(True)  # PEFT lets only the newest ones be trained
    return model


def first_factors(model: VideoDiT, draws: KeyedRNG, purpose: str, name: str = DEFAULT) -> Iterator[tuple[str, Tensor]]:
    """Yields (parameter name, first value) of all factors called `name`, float32 on the CPU.

    A is uniform in +-1 / sqrt(inputs) (PEFT's own start) and a function of the seed of `draws`, `purpose` and the
    layer's name alone, hence the same on every rank; B is 0, so that the model computes what it did.
    """
    for layer_name, layer in _updated_layers(model, name):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        bound = 1 / math.sqrt(a.shape[1])
        generator = draws.generator(0, f"{purpose} {layer_name}", 0)
        start = torch.empty(a.shape, device="cpu").uniform_(-bound, bound, generator=generator)
        yield f"{layer_name}.lora_A.{name}.weight", start
        yield f"{layer_name}.lora_B.{name}.weight", torch.zeros(b.shape, device="cpu")


def is_factor(name: str) -> bool:
    """True for the name of a factor A or B."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The name that a frozen weight has without updates; other names stay."""
    return name.replace(".base_layer.", ".")


def factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only the factors A and B among the named tensors of a network."""
    return {name: tensor for name, tensor in tensors.items() if is_factor(name)}


def _updated_layers(model: VideoDiT, update: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and update in module.lora_A:
            yield name, module


def _cast_outside_autocast(layer: Any, arguments: tuple[Tensor, ...]) -> None:
    """Lets PEFT cast the input of bfloat16 layers to the float32 of the factors where autocast does not see to types.

    Under autocast that cast would be undone at once, and each layer would keep a copy of the input for backward.
    """
    layer.cast_input_dtype_enabled = not torch.is_autocast_enabled(arguments[0].device.type)
