"""Text-to-video weights made into image-to-video weights of the same function: new parts start without effect.

The channels of y get zero weights in the patch embedding. The image branch gets zero values (`v_img`), so that what
cross-attention adds is exactly 0; its keys and the embedding of CLIP tokens start as Wan's do (specification A.5), so
that gradients reach `v_img` at once and the rest after its first step. Must know no file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtake.config_groups import ModelConfig
from longtake.errors import ConfigError
from longtake.models.dit import DiTConfig, VideoDiT, parameter_type
from longtake.models.presets import model_config

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
        wide = VideoDiT(config)
    state = dict(model.state_dict())
    patch, matrix = state["patch_embedding.weight"], state["blocks.0.cross_attn.k.weight"]
    added = patch.new_zeros(patch.shape[0], config.condition_channels, *patch.shape[2:])
    state["patch_embedding.weight"] = torch.cat([patch, added], 1)
    for name, parameter in wide.named_parameters():
        if name not in state:
            state[name] = _initial(name, parameter.shape, generator).to(
                matrix.device, parameter_type(name, matrix.dtype)
            )
    wide.load_state_dict(state, assign=True)
    return wide.requires_grad_(True)


def _initial(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Start of a parameter of the image branch, float32 on the CPU."""
    if name.endswith(("bias", "emb_pos")) or ".v_img." in name:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return nn.init.xavier_uniform_(torch.empty(shape), generator=generator)


def widened_as_asked(model: VideoDiT, settings: ModelConfig, seed: int) -> VideoDiT:
    """`model`, widened to the sizes of `settings.preset` where `settings.widen` asks for it and it is text-to-video."""
    if not settings.widen or model.config.condition_channels:
        return model
    return widen(model, model_config(settings.preset), torch.Generator().manual_seed(seed))
