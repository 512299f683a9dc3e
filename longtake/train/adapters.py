"""Low-rank updates of a stage: what they are added to, how that is named, and what must not change on resuming."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake.config.groups import LoraConfig
from longtake.config.stage import TOY, resolve_source
from longtake.errors import ConfigError
from longtake.models.dit import VideoDiT
from longtake.models.lora import DEFAULT, base_name, first_factors, inject_lora, is_factor, targets_of
from longtake.rng import KeyedRNG
from longtake.run_folder import LORA, checkpoint_name, checkpoints_folder
from longtake.weights.load import Opened
from longtake.weights.locate import is_hub_name
from longtake.weights.lora import Adapter, Base, read_lora


def adapt(opened: Opened, settings: LoraConfig, base: Base, weights: Path, *, adapter_name: str = DEFAULT) -> Adapter:
    """Adds low-rank updates to a network whose weights are still to be read; all ranks call it, before sharding.

    Args: `weights`, those of the base; `adapter_name`, the name of the updates in a network that gets several. Their
    first values are those of `first_values`.
    Raises: ConfigError when the weights need training that low-rank updates cannot give, or targets are not known.
    """
    network = opened.model
    _check_trained(opened, weights)
    targets = targets_of(network, settings.targets)
    alpha = float(settings.rank) if settings.alpha is None else settings.alpha
    adapter = Adapter(settings.rank, alpha, targets, base)
    if adapter_name == DEFAULT:
        network.requires_grad_(False)
    inject_lora(network, adapter.pattern, adapter.rank, alpha, adapter_name)
    return adapter


def first_values(network: VideoDiT, name: str, seed: int, adapter_name: str = DEFAULT) -> Iterator[tuple[str, Tensor]]:
    """First values of the updates of the network `name`, the same whether it is one of its own or on a shared base."""
    return first_factors(network, KeyedRNG(seed), f"{name} lora_A", adapter_name)


def earlier_values(
    network: VideoDiT, folder: Path, adapter: Adapter, source: str, adapter_name: str = DEFAULT
) -> Iterator[tuple[str, Tensor]]:
    """The updates in `folder` as first values of those called `adapter_name`; both are of the same base.

    Args: `source`, key and value of the configuration that names the folder.
    Raises: ConfigError, before anything is yielded, when they are of another rank or scale, or of other layers.
    """
    shapes = {base_name(name): parameter for name, parameter in network.named_parameters() if not is_factor(name)}
    stored = read_lora(folder, shapes)
    layers = [name.removesuffix(".weight") for name in shapes if re.fullmatch(rf"{adapter.pattern}\.weight", name)]
    have = sorted(name.removesuffix(".weight") for name in stored.factors)
    ranks = sorted({a.shape[0] for a, _ in stored.factors.values()})
    if (ranks, stored.scale) != ([adapter.rank], adapter.alpha / adapter.rank) or stored.differences:
        alpha = "of several" if stored.scale is None else f"{ranks[-1] * stored.scale:g}"
        raise ConfigError(
            f"{source} holds low-rank updates of rank {', '.join(map(str, ranks))} and alpha {alpha}, and this stage "
            f"asks for rank {adapter.rank} and alpha {adapter.alpha:g}; ask for the same, or set shared_base=false"
        )
    if have != sorted(layers):
        missing, surplus = sorted(set(layers) - set(have)), sorted(set(have) - set(layers))
        raise ConfigError(
            f"{source} holds low-rank updates of other layers: {len(missing)} of this stage's are missing "
            f"({', '.join(missing[:2])}) and {len(surplus)} are not this stage's ({', '.join(surplus[:2])}); set the "
            "same lora.targets, or shared_base=false"
        )
    return (
        (f"{name.removesuffix('.weight')}.lora_{part}.{adapter_name}.weight", factor.float())
        for name, pair in stored.factors.items()
        for part, factor in zip("AB", pair)
    )


def facts_of(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """What a resumed run must share: sizes of the updates (`lora`), and the identity of what they are added to."""
    return {
        "lora": {name: adapter.facts() for name, adapter in adapters.items()} or None,
        "base": {name: adapter.base.identity for name, adapter in adapters.items()} or None,
    }


def _check_trained(opened: Opened, weights: Path) -> None:
    sizes = opened.model.config
    ((_, patch),) = opened.read(["patch_embedding.weight"])
    if sizes.condition_channels and not patch[:, sizes.out_channels :].any():
        raise ConfigError(
            f"the weights at {weights} have never seen the condition y (its part of the patch embedding is 0, as "
            "model.widen leaves it), and low-rank updates do not train that layer; train a stage with lora=null first"
        )


def reference_of(weights: Path, logdir: str | Path, folder: Path) -> str:
    """How the exported updates of the stage in `folder` name their base: relative to themselves inside the log folder,
    which may move.
    """
    if weights == resolve_source(TOY, logdir):
        return TOY
    if is_hub_name(weights):
        return weights.as_posix()
    inside, path = Path(logdir).absolute(), weights.expanduser().absolute()
    if not path.is_relative_to(inside):
        return str(path)
    return os.path.relpath(path, checkpoints_folder(folder).absolute() / checkpoint_name(0) / f"generator{LORA}")
