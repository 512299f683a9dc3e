"""The networks of a stage: opened, made fit, sharded, and only then filled; separate ones, or roles of a shared base.

No rank holds a network whole (`parallel/materialize.py`); random first weights are the exception.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.checkpoint.invariants import invariants
from longtake.config.groups import LoraConfig, ModelConfig
from longtake.config.stage import StageConfig
from longtake.errors import CheckpointError, ConfigError
from longtake.models.dit import VideoDiT
from longtake.models.shared_base import AdapterSwitch, AdapterView, SharedBase
from longtake.parallel.fsdp import gathered, parallelize
from longtake.parallel.materialize import materialize
from longtake.parallel.mesh import Mesh
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.run_folder import read_manifest
from longtake.train.adapters import adapt, earlier_values, first_values
from longtake.weights.fingerprint import weights_identity
from longtake.weights.load import Opened, open_weights
from longtake.weights.locate import find_weights
from longtake.weights.lora import Adapter, is_adapter, read_base
from longtake.weights.presets import model_config
from longtake.weights.tensor_files import not_finite
from longtake.weights.widen import opened_as_asked

logger = logging.getLogger(__name__)


class Networks(NamedTuple):
    """The trained networks by name, the frozen real score, the low-rank updates of those that train nothing else, and
    the generator as it streams.
    """

    trained: dict[str, VideoDiT]
    real: VideoDiT | None
    adapters: dict[str, Adapter]
    student: Denoiser


def build_networks(config: StageConfig, mesh: Mesh) -> Networks:
    """The networks of a stage.

    Raises: CheckpointError, ConfigError when weights are missing, or fit neither each other nor the stage.
    """
    builder = Builder(config, mesh)
    if config.init_from is not None:
        builder.open(builder.weights("generator"))  # heads of files only
        _check_same_rules(config.source(config.init_from), config)
    return builder.build()


def weights_folder(source: Path, config: StageConfig) -> Path:
    """What `load_dit` reads for a source: published weights themselves, or the newest checkpoint of a stage."""
    try:
        return find_weights(source, config.logdir).path
    except CheckpointError as error:
        raise CheckpointError(f"no weights at {source}: {error}") from error


def load_weights(source: Path, config: StageConfig, mesh: Mesh) -> VideoDiT:
    """A whole model in float32 from a source, checked against the stage's condition. Raises: as `build_networks`."""
    opened = _open(source, config)
    _fill(opened, mesh.device, opened.read(None), mesh)
    return opened.model


def _fill(opened: Opened, device: torch.device | str, values: Iterator[tuple[str, Tensor]], mesh: Mesh) -> None:
    """Puts the weights in place; all ranks call it. Raises: CheckpointError on every rank when one reads nan or inf."""
    found = materialize(opened.model, device, values)
    if wrong := sorted({name for names in mesh.every(lambda: found) for name in names}):
        raise not_finite(opened.place(wrong[0]))


class Builder:
    """Builds the networks of one stage one after the other, and remembers their updates."""

    def __init__(self, config: StageConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.adapters: dict[str, Adapter] = {}

    def build(self) -> Networks:
        """All networks of the stage."""
        real = None
        if self.config.roles == "shared":
            networks, real = self.shared()
        else:
            networks = {"generator": self.trained("generator")}
            if self.config.distils:
                real = self.frozen()
                networks["critic"] = self.trained("critic")
        return Networks(networks, real, self.adapters, self.student(networks["generator"]))

    def trained(self, name: str) -> VideoDiT:
        """A network of its own: trained whole, or its updates alone."""
        config, lora = self.config, self._lora(name)
        if name == "generator" and config.init_from is None:
            return self._random()
        weights = self.weights(name)
        opened = self.open(weights)
        if lora is None:
            return self._filled(opened)
        if config.precision == "bf16":
            opened.model.cast(torch.bfloat16)
        identity = self.mesh.on_main(lambda: self.identity(weights))
        self.adapters[name] = adapt(opened, name, lora, weights, config, self.mesh, identity=identity)
        return self._filled(opened, first_values(opened.model, name, config))

    def frozen(self) -> VideoDiT:
        """The teacher alone."""
        opened = self.open(self.weights("teacher"))
        self._freeze(opened.model)
        return self._filled(opened, recompute=False)

    def shared(self) -> tuple[dict[str, VideoDiT], VideoDiT]:
        """Teacher and the networks with updates as roles of one base; those without are trained whole beside it."""
        config, mesh = self.config, self.mesh
        base = self.weights("teacher")
        identity = mesh.on_main(lambda: self.identity(base))
        opened = self.open(base)
        self._freeze(opened.model)
        updates: list[Iterator[tuple[str, Tensor]]] = []
        names = [name for name in ("generator", "critic") if self._lora(name) is not None]
        for name in names:
            lora = self._lora(name)
            assert lora is not None
            own = self.weights(name)
            self._check_base(name, own, base, identity)
            found = self.adapters[name] = adapt(
                opened, name, lora, base, config, mesh, adapter_name=name, identity=identity
            )
            if own != base and is_adapter(own):
                updates.append(earlier_values(opened.model, own, found, f"{_key(name)}={own}", adapter_name=name))
            else:
                updates.append(first_values(opened.model, name, config, adapter_name=name))
        switch = AdapterSwitch()
        opened = replace(opened, model=opened.model.executed(replace(opened.model.execution, around=switch.contexts)))
        shared = SharedBase(self._filled(opened, *updates), switch)
        networks: dict[str, VideoDiT] = {}
        for name in ("generator", "critic"):
            networks[name] = AdapterView(shared, name) if name in names else self.trained(name)
        if mesh.is_main:
            logger.info("one frozen network is shared by the teacher and %s", " and ".join(names))
        return networks, AdapterView(shared, None)

    def student(self, generator: VideoDiT) -> Denoiser:
        """The generator as it streams."""
        config, mesh = self.config, self.mesh
        sharded = generator.base.model if isinstance(generator, AdapterView) else generator
        once = mesh.fsdp_mesh is not None and config.gathers_once
        sequence = 1 if mesh.sequence is None else mesh.sequence.size
        return Denoiser(
            generator,
            graphs=CUDAGraphRunner() if self._captures else None,
            batched_exit_backward=config.batches_exit_backward(whole=mesh.fsdp_mesh is None, sequence=sequence),
            gathering=partial(gathered, sharded) if once else nullcontext,
        )

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _check_base(self, name: str, own: Path, base: Path, identity: str) -> None:
        """Raises ConfigError unless `own` are the weights of the base, or low-rank updates of them."""
        if own == base:
            return
        updates = is_adapter(own)
        found = self.mesh.on_main(lambda: read_base(own).identity if updates else weights_identity(own))
        if found != identity:
            what = "updates of other weights" if updates else "other weights"
            raise ConfigError(
                f"roles=shared holds one base for all, and {_key(name)}={own} (SHA-256 {found[:16]}) are {what} "
                f"than teacher={base} ({identity[:16]}); name the same weights or updates of them, train the {name} "
                "whole (without lora), or set roles=separate"
            )

    def _lora(self, name: str) -> LoraConfig | None:
        if name == "generator":
            return self.config.lora
        assert self.config.critic is not None
        return self.config.critic.lora

    def weights(self, name: str) -> Path:
        """What the network `name` is read from. Raises: CheckpointError."""
        config = self.config
        source = config.teacher if name == "teacher" else config.init_from
        if name == "critic":
            assert config.critic is not None
            source = config.critic.init_from or config.teacher
        assert source is not None
        return weights_folder(config.source(source), config)

    def open(self, source: Path) -> Opened:
        """Weights before they are read. Raises: CheckpointError, ConfigError."""
        return _open(source, self.config)

    def identity(self, source: Path) -> str:
        """What tells these weights from all others."""
        return weights_identity(source)

    def _freeze(self, model: VideoDiT) -> None:
        if self.config.precision == "bf16":  # autocast rounds the same weights the same way
            model.cast(torch.bfloat16)
        model.requires_grad_(False)

    @property
    def _captures(self) -> bool:
        """Whether the student's passes are captured: where its weights never move, and Python makes the calls."""
        config, mesh = self.config, self.mesh
        whole = mesh.fsdp_mesh is None and not config.parallel.compile and config.lora is None
        return config.parallel.graphs and whole and mesh.device.type == "cuda" and config.stage != "teacher"

    def _random(self) -> VideoDiT:
        # The same random weights on every rank: sharding takes a slice of each.
        torch.manual_seed(self.config.seed)
        network = VideoDiT(model_config(self.config.model.preset)).to(self.mesh.device)
        return self._parallelized(network, recompute=True)

    def _filled(self, opened: Opened, *updates: Iterator[tuple[str, Tensor]], recompute: bool = True) -> VideoDiT:
        """Sharded while it is empty, then filled: a rank reads the slices that it keeps."""
        opened = replace(opened, model=self._parallelized(opened.model, recompute=recompute))
        _fill(opened, self.mesh.device, chain(opened.read(None), *updates), self.mesh)
        return opened.model

    def _parallelized(self, model: VideoDiT, *, recompute: bool) -> VideoDiT:
        config = self.config
        return parallelize(
            model,
            self.mesh,
            recompute=config.activation_checkpointing if recompute else None,
            param_dtype=torch.bfloat16 if config.precision == "bf16" else None,
            compiled=config.parallel.compile,
        )


def _key(name: str) -> str:
    """The key of the configuration that names the first weights of a trained network."""
    return "init_from" if name == "generator" else "critic.init_from"


def _open(source: Path, config: StageConfig) -> Opened:
    """Weights of a stage before they are read, checked against its condition. Raises: CheckpointError, ConfigError."""
    opened = opened_as_asked(open_weights(weights_folder(source, config)), config.model, config.seed)
    sizes = opened.model.config
    if (sizes.condition_channels > 0) != config.model.with_y:
        key, fix = _misfit(config.model)
        raise ConfigError(
            f"model.{key}={getattr(config.model, key)} does not fit the weights at {source}, which have "
            f"in_channels={sizes.in_channels}; set it to {fix}"
        )
    return opened


def _misfit(settings: ModelConfig) -> tuple[str, str]:
    """The value that contradicts the weights, where these take y and it says no or the reverse, and the way out."""
    if settings.with_y:
        return "image_condition", (
            "t2v, or model.first_frame_sigma=zero if they know the picture as a clean frame 0 (TI2V), or "
            "model.widen=true and model.preset to the sizes wanted"
        )
    return ("image_condition", "i2v") if settings.image_condition == "t2v" else ("first_frame_sigma", "clip")


def _check_same_rules(source: Path, config: StageConfig) -> None:
    """Raises ConfigError when a causal predecessor unrolled by other rules than this stage will."""
    checkpoint = find_weights(source, config.logdir).checkpoint
    if config.stage == "teacher" or checkpoint is None:
        return
    manifest = read_manifest(checkpoint)
    if manifest["config"].get("stage") == "teacher":
        return
    for key, value in invariants(config).items():
        if (before := manifest.get(key)) != json.loads(json.dumps(value)):
            raise ConfigError(
                f"{key}={value!r} is not that of init_from={config.init_from}, {before!r}; set it to that"
            )
