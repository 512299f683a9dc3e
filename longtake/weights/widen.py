"""Text-to-video weights made into image-to-video weights of the same function: new parts start without effect.

The channels of y get zero weights in the patch embedding. The image branch gets zero values (`v_img`), so that what
cross-attention adds is exactly 0; its keys and the embedding of CLIP tokens start as Wan's do (specification A.5), so
that gradients reach `v_img` at once and the rest after its first step. Must know no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from longtake.config.groups import ModelConfig
from longtake.errors import ConfigError
from longtake.models.dit import VideoDiT, parameter_type
from longtake.models.sizes import DiTConfig
from longtake.weights.load import Opened
from longtake.weights.presets import model_config

# What may differ between the weights and the sizes they are widened to
_ADDED = {"model_type", "in_channels", "image_dim", "image_positions"}


@torch.no_grad()
def widen(model: VideoDiT, config: DiTConfig, generator: torch.Generator) -> VideoDiT:
    """A model of sizes `config` that computes what the text-to-video `model` does, for any y and CLIP tokens.

    The tensors of `model` are taken over, not copied.
    Args: `generator` (CPU) draws the new keys and embeddings of the image branch.
    Raises: ConfigError when the model already has condition channels, or when `config` differs in more than those
    and the image branch.
    """
    wide = _wider(model, config)
    matrix = model.state_dict()["blocks.0.cross_attn.k.weight"]
    state = {}
    for name, tensor in _widened(model.state_dict().items(), wide, generator):
        new = name not in model.state_dict()
        state[name] = tensor.to(matrix.device, parameter_type(name, matrix.dtype)) if new else tensor
    wide.load_state_dict(state, assign=True)
    return wide.requires_grad_(True)


def widen_opened(opened: Opened, config: DiTConfig, seed: int) -> Opened:
    """As `widen`, for weights that are still to be read; the same seed draws the same."""
    wide = _wider(opened.model, config)

    def read(names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = None if names is None else set(names)
        old = None if wanted is None else [name for name in opened.model.state_dict() if name in wanted]
        for name, tensor in _widened(opened.read(old), wide, torch.Generator().manual_seed(seed)):
            if wanted is None or name in wanted:
                yield name, tensor

    return Opened(wide, read, opened.place)


def _wider(model: VideoDiT, config: DiTConfig) -> VideoDiT:
    """A model of the new sizes on the meta device. Raises: ConfigError."""
    old = model.config
    other = sorted(
        name for name, value in config.to_dict().items() if name not in _ADDED and value != old.to_dict()[name]
    )
    if other:
        listed = ", ".join(f"{name}={getattr(old, name)} (not {getattr(config, name)})" for name in other)
        raise ConfigError(
            f"the weights cannot be widened to these sizes, they have {listed}; name a preset of that size"
        )
    if old.condition_channels or old.image_dim is not None:
        raise ConfigError(f"the weights have in_channels={old.in_channels} already; only text-to-video weights widen")
    with torch.device("meta"):
        return VideoDiT(config)


def _widened(
    old: Iterable[tuple[str, Tensor]], wide: VideoDiT, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a text-to-video model, the patch embedding with zeros for y, then those that are new."""
    known = {name for name, _ in wide.named_parameters() if not name.startswith("img_emb.") and "_img." not in name}
    for name, tensor in old:
        if name == "patch_embedding.weight":
            zeros = tensor.new_zeros(tensor.shape[0], wide.config.condition_channels, *tensor.shape[2:])
            tensor = torch.cat([tensor, zeros], 1)
        yield name, tensor
    for name, parameter in wide.named_parameters():
        if name not in known:
            yield name, _initial(name, parameter.shape, generator)


def _initial(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Start of a parameter of the image branch, float32 on the CPU."""
    if name.endswith(("bias", "emb_pos")) or ".v_img." in name:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return nn.init.xavier_uniform_(torch.empty(shape), generator=generator)


def widened_as_asked(model: VideoDiT, settings: ModelConfig, seed: int) -> VideoDiT:
    """`model`, widened to the sizes of `settings.preset` where `settings.widen` asks for it and it is text-to-video."""
    if not _asked(model, settings):
        return model
    return widen(model, model_config(settings.preset), torch.Generator().manual_seed(seed))


def opened_as_asked(opened: Opened, settings: ModelConfig, seed: int) -> Opened:
    """As `widened_as_asked`, for weights that are still to be read."""
    return widen_opened(opened, model_config(settings.preset), seed) if _asked(opened.model, settings) else opened


def _asked(model: VideoDiT, settings: ModelConfig) -> bool:
    return settings.widen and not model.config.condition_channels
