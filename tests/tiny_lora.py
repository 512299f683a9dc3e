"""Low-rank updates on tiny models, for several test folders."""

from __future__ import annotations

import torch

from longtake.models.dit import VideoDiT
from longtake.models.lora import first_factors, inject_lora, targets_of
from longtake.rng import KeyedRNG
from longtake.weights.lora import Adapter, Base

RANK, ALPHA = 3, 6.0


def add_lora(model: VideoDiT, pattern: str, rank: int, alpha: float, draws: KeyedRNG, purpose: str) -> VideoDiT:
    """`model` with updates on the layers whose whole name matches `pattern`; nothing else is trained any more.

    Call it after the weights were loaded.
    """
    inject_lora(model.requires_grad_(False), pattern, rank, alpha)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in first_factors(model, draws, purpose):
            parameters[name].copy_(value)
    return model


def adapter_of(model: VideoDiT, targets: list[str] | None = None, base: Base | None = None) -> Adapter:
    """Of a model that has updates already, or of one that is about to get them."""
    there = tuple(name for name, module in model.blocks[0].named_modules() if hasattr(module, "lora_A"))
    return Adapter(RANK, ALPHA, there or targets_of(model, targets), base or Base("toy", "0"))


def adapted(model: VideoDiT, targets: list[str] | None = None, seed: int = 0) -> VideoDiT:
    """`model` itself, with fresh updates."""
    adapter = adapter_of(model, targets)
    return add_lora(model, adapter.pattern, adapter.rank, adapter.alpha, KeyedRNG(seed), "generator lora_A")


@torch.no_grad()
def stir(model: VideoDiT, seed: int = 7) -> VideoDiT:
    """Gives every B a value, so that the updates matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def own(model: VideoDiT) -> dict[str, torch.Tensor]:
    """The frozen weights under their own names, as copies."""
    state = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    return {name: value.clone() for name, value in state.items() if ".lora_" not in name}
