"""Low-rank updates of a stage: what they are added to, how that is named, and what must not change on resuming."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longtake.config import TOY, StageConfig
from longtake.config_groups import LoraConfig
from longtake.distributed.mesh import Mesh
from longtake.errors import ConfigError
from longtake.models.dit import VideoDiT
from longtake.models.folders import is_hub_name
from longtake.models.lora import add_lora, targets_of
from longtake.models.lora_files import Adapter, Base
from longtake.models.weight_identity import weights_identity
from longtake.randomness import Draws
from longtake.runs import LORA, checkpoint_name, checkpoints_folder

logger = logging.getLogger(__name__)


def adapt(
    network: VideoDiT, name: str, settings: LoraConfig, weights: Path, config: StageConfig, mesh: Mesh
) -> Adapter:
    """Adds low-rank updates to a network that was loaded from `weights`; all ranks call it, before sharding.

    With `precision: bf16` the frozen weights are kept in the type in which they are multiplied; updates stay float32.
    Raises: ConfigError when the weights need training that low-rank updates cannot give, or targets are not known.
    """
    _check_trained(network, weights)
    targets = targets_of(network, settings.targets)
    alpha = float(settings.rank) if settings.alpha is None else settings.alpha
    base = Base(_reference(weights, config), mesh.on_main(lambda: weights_identity(weights)))
    adapter = Adapter(settings.rank, alpha, targets, base)
    if config.precision == "bf16":
        network.cast(torch.bfloat16)
    add_lora(network, adapter.pattern, adapter.rank, alpha, Draws(config.seed), f"{name} lora_A")
    if mesh.is_main:
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        logger.info("%s: low-rank updates of %s, %d parameters are trained", name, weights, trained)
    return adapter


def facts_of(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """What a resumed run must share: sizes of the updates (`lora`), and the identity of what they are added to."""
    return {
        "lora": {name: adapter.facts() for name, adapter in adapters.items()} or None,
        "base": {name: adapter.base.identity for name, adapter in adapters.items()} or None,
    }


def _check_trained(network: VideoDiT, weights: Path) -> None:
    patch, channels = network.patch_embedding.weight, network.config.out_channels
    if network.config.condition_channels and not patch[:, channels:].any():
        raise ConfigError(
            f"the weights at {weights} have never seen the condition y (its part of the patch embedding is 0, as "
            "model.widen leaves it), and low-rank updates do not train that layer; train a stage with lora=null first"
        )


def _reference(weights: Path, config: StageConfig) -> str:
    """How exported updates name their base: relative to themselves inside the log folder, which may move."""
    if weights == config.source(TOY):
        return TOY
    if is_hub_name(weights):
        return weights.as_posix()
    logdir, path = Path(config.logdir).absolute(), weights.expanduser().absolute()
    if not path.is_relative_to(logdir):
        return str(path)
    return os.path.relpath(path, checkpoints_folder(config.folder).absolute() / checkpoint_name(0) / f"generator{LORA}")
