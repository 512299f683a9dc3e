"""Text-to-video weights made into image-to-video weights of the same function: new parts start without effect.

The channels of y get zero weights in the patch embedding. The image branch gets zero values (`v_img`), so that what
cross-attention adds is exactly 0; its keys and the embedding of CLIP tokens start as Wan's do (specification A.5), so
that gradients reach `v_img` at once and the rest after its first step. Must know no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from longtake.config.groups import ModelConfig
from longtake.errors import ConfigError
from longtake.models.dit import VideoDiT
from longtake.models.sizes import DiTConfig
from longtake.weights.load import Opened
from longtake.weights.presets import model_config

# What may differ between the weights and the sizes they are widened to
_ADDED = {"model_type", "in_channels", "image_dim", "image_positions"}


def widen(opened: Opened, config: DiTConfig, seed: int) -> Opened:
    """Weights of sizes `config` that compute what those of a text-to-video model do, for any y and CLIP tokens.

    Args: `seed` of the new keys and embeddings of the image branch.
    Raises: ConfigError when the model already has condition channels, or when `config` differs in more than those
    and the image branch.
    """
    wide = _wider(opened.model, config)

    def read(names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = set(wide.state_dict() if names is None else names)
        old = opened.read([name for name in opened.model.state_dict() if name in wanted])
        for name, tensor in _widened(old, wide, torch.Generator().manual_seed(seed)):
            if name in wanted:
                yield name, tensor

    return Opened(wide, read, opened.place, opened.source)


def _wider(model: VideoDiT, config: DiTConfig) -> VideoDiT:
    """A model of the new sizes on the meta device. Raises: ConfigError."""
    old = model.config
    changed = [name for name, value in config.to_dict().items() if value != getattr(old, name)]
    if other := sorted(set(changed) - _ADDED):
        listed = ", ".join(f"{name}={getattr(old, name)} (not {getattr(config, name)})" for name in other)
        raise ConfigError(f"the weights cannot be widened: they have {listed}; name a preset of that size")
    if old.condition_channels or old.image_dim is not None:
        raise ConfigError(f"the weights have in_channels={old.in_channels} already; only text-to-video weights widen")
    with torch.device("meta"):
        return type(model)(config)


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


def opened_as_asked(opened: Opened, settings: ModelConfig, seed: int) -> Opened:
    """`opened`, widened to the sizes of `settings.preset` where `settings.widen` asks and it is text-to-video."""
    asked = settings.widen and not opened.model.config.condition_channels
    return widen(opened, model_config(settings.preset), seed) if asked else opened


def check_condition(sizes: DiTConfig, settings: ModelConfig, source: Path) -> None:
    """Raises ConfigError when the weights of `source` take y and `settings` say that they do not, or the reverse."""
    if (sizes.condition_channels > 0) != settings.with_y:
        key, fix = _misfit(settings)
        raise ConfigError(
            f"model.{key}={getattr(settings, key)} does not fit the weights at {source}, which have "
            f"in_channels={sizes.in_channels}; set it to {fix}"
        )


def _misfit(settings: ModelConfig) -> tuple[str, str]:
    """The value that contradicts the weights, where these take y and it says no or the reverse, and the way out."""
    if settings.with_y:
        return "image_condition", (
            "t2v, or model.first_frame_sigma=zero if they know the picture as a clean frame 0 (TI2V), or "
            "model.widen=true and model.preset to the sizes wanted"
        )
    return ("image_condition", "i2v") if settings.image_condition == "t2v" else ("first_frame_sigma", "clip")
