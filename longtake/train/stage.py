"""Builds one stage from its configuration and trains it: weights, encoders, objective, data, validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtake.checkpoint.async_save import SaveSettings
from longtake.checkpoint.invariants import invariants, resume_invariants, rows_invariant
from longtake.checkpoint.save import refuse_other_invariants
from longtake.condition import VideoShape
from longtake.config.groups import EmaConfig, VideoConfig
from longtake.config.objective import NetworkConfig
from longtake.config.stage import StageConfig, dump
from longtake.data.encoded import EncodedRows
from longtake.data.samples import Dataset
from longtake.encoders.bundle import Encoders
from longtake.encoders.vae import VideoVAE
from longtake.encodings.encode import BatchEncoder, RowEncoder, StoredEncoder
from longtake.encodings.key import check_encoded
from longtake.errors import ConfigError
from longtake.inference.pipeline import load_encoders
from longtake.models.sequence_parallel import check_heads
from longtake.objectives.base import LossResult, Objective
from longtake.parallel.mesh import Mesh
from longtake.run_folder import checkpoints_folder
from longtake.train.adapters import facts_of
from longtake.train.ema import EMASettings
from longtake.train.lock import only_run
from longtake.train.loop import Hooks, LoopSettings, RunInfo, train
from longtake.train.metrics import PhaseTimer
from longtake.train.networks import Builder, weights_folder
from longtake.train.optim import OptimizerSettings
from longtake.train.stage_data import find_buckets, make_batches, open_data, sizes_of
from longtake.train.state import TrainState
from longtake.train.throughput import Trace, stage_throughput
from longtake.train.validation import Validation, can_validate
from longtake.train.watchdog import WatchdogSettings
from longtake.train.window_codec import EncoderCodec
from longtake.weights.load import open_dit
from longtake.weights.locate import image_token_count
from longtake.weights.lora import Adapter
from longtake.weights.presets import model_config

logger = logging.getLogger(__name__)

PREFILL_BYTES = 2 << 30


class InPrecision(Objective):
    """An objective whose losses run under autocast; weights, optimizer and losses stay float32.

    Where networks are sharded, autocast must not keep its copies of weights from one forward to the next: the gradient
    of all forwards would come through one copy, after FSDP2 has reduced the block's gradients, and be lost in part.
    """

    def __init__(self, objective: Objective, mesh: Mesh, *, bf16: bool) -> None:
        self.objective, self.device, self.bf16 = objective, mesh.device, bf16
        self.keep_copies = mesh.fsdp_mesh is None
        self.networks = objective.networks

    def turns(self, step: int) -> list[str]:
        """As the objective's."""
        return self.objective.turns(step)

    def loss(self, turn: str, batch: Any, step: int) -> LossResult:
        """As the objective's, with matrix products in bfloat16 where asked for."""
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, cache_enabled=self.keep_copies) if self.bf16 else nullcontext():
            return self.objective.loss(turn, batch, step)

    def discard(self) -> None:
        """As the objective's."""
        self.objective.discard()


def run_stage(config: StageConfig, mesh: Mesh) -> None:
    """Trains one stage to its last step, going on from its newest checkpoint if there is one."""
    accumulation = config.accumulation(mesh.world_size)
    mesh = mesh.arranged(config.parallel)
    if config.wandb.enabled and find_spec("wandb") is None:  # on every rank, before any of them waits for another
        raise ConfigError(
            "wandb.enabled=true needs the package wandb; install it (pip install wandb) or set it to false"
        )
    _check_heads(config.networks, config.source, config.logdir, config.model.preset, config.parallel.sequence)
    dataset = open_data(config.data, config.video, config.clip_shape)
    validates = can_validate(config.validation, config.validate_every, config.model, config.video)
    if isinstance(dataset, EncodedRows) and validates:
        raise ConfigError(
            f"validate_every={config.validate_every} needs the encoders, and none is loaded for the encoded set "
            f"{config.data.path}; set validate_every=0"
        )
    with only_run(config.folder, mesh, "set another name or logdir"):
        _Run(config, mesh, dataset, accumulation, validates=validates).train()


class _Run:
    """One process's part of the training of a stage: everything that it needs, built in order."""

    def __init__(
        self, config: StageConfig, mesh: Mesh, dataset: Dataset, accumulation: int, *, validates: bool
    ) -> None:
        self.config, self.mesh, self.dataset, self.accumulation = config, mesh, dataset, accumulation
        must_stay = invariants(config) | resume_invariants(config, mesh.on_main(lambda: rows_invariant(dataset)))
        refuse_other_invariants(checkpoints_folder(config.folder), must_stay, mesh)
        builder = Builder(config, mesh)
        self.networks = builder.build()
        self.must_stay = must_stay | facts_of(self.networks.adapters)
        self.with_tokens = self.networks.trained["generator"].config.image_dim is not None
        self.encoder = self._encoder()
        self.phases = PhaseTimer(mesh.device)
        codec = None
        if config.objective.decodes:
            codec = EncoderCodec.of_stage(
                self.encoders,
                config.encoders_folder,
                config.model,
                config.video.num_latent_frames,
                mesh.device,
                with_tokens=self.with_tokens,
            )
        self.objective = builder.objective(self.networks, codec, self.phases)
        self.state = make_state(
            config.networks, self.objective.networks, self.networks.adapters, config.ema, config.max_steps, config.seed
        )
        self.loaded = make_batches(
            config.data,
            dataset,
            self.encoder,
            mesh,
            find_buckets(config.data, sizes_of(config.data, config.video), dataset, mesh),
            seed=config.seed,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch(mesh.world_size),
        )
        self.validation: Validation | None = None
        if validates and self.encoders is not None:
            # The teacher makes clips of its own length only.
            as_long = config.validation.num_latent_frames in (None, config.video.num_latent_frames)
            reference = builder.reference(self.networks) if as_long else None
            self.validation = Validation(config, self.encoders, self.state, reference, mesh, config.folder)

    def _encoder(self) -> RowEncoder:
        """Where the encodings of rows come from; sets `encoders`, None for a set that is encoded already."""
        config, device = self.config, self.mesh.device
        parts = {
            "with_image": config.model.image_condition == "i2v",
            "with_y": config.model.with_y,
            "with_latents": config.objective.learns_from_videos,
            "with_later": config.objective.second_prompts,
        }
        self.encoders: Encoders | None = None
        if isinstance(self.dataset, EncodedRows):
            check_encoded(config, self.dataset, self.mesh, with_tokens=self.with_tokens)
            return StoredEncoder(self.dataset, config.clip_shape, with_tokens=self.with_tokens, device=device, **parts)
        folder = config.encoders_folder
        self.encoders = load_encoders(folder, config.model, device, with_image=self.with_tokens)
        check_strides(self.encoders.vae, config.video, folder)
        empty = config.objective.empty_prompt
        return BatchEncoder(self.encoders, config.clip_shape, device=device, empty_prompt=empty, **parts)

    def train(self) -> None:
        """To the last step."""
        config, validation = self.config, self.validation
        settings = LoopSettings(
            max_steps=config.max_steps,
            accumulation=self.accumulation,
            save_every=config.save_every,
            save=SaveSettings(config.checkpoint.mode, config.keep_checkpoints, export=config.checkpoint.export),
            log_every=config.log_every,
            validate_every=config.validate_every,
            sample_every=config.validate_every,
            on_nonfinite=config.on_nonfinite,
            max_skipped=config.max_skipped,
            watchdog=WatchdogSettings(config.watchdog.seconds, config.watchdog.slow_seconds),
        )
        wandb = {"project": config.wandb.project} if config.wandb.enabled else None
        sizes = {name: net.config for name, net in (self.networks.trained | self.networks.frozen).items()}
        throughput = stage_throughput(
            self.objective,
            sizes,
            {name: wanted.lora for name, wanted in config.networks.items()},
            config.video.shape,
            config.batch_size,
            self.mesh,
            precision=config.precision,
            image_tokens=image_token_count(config.encoders_folder),
        )
        train(
            self.state,
            InPrecision(self.objective, self.mesh, bf16=config.precision == "bf16"),
            self.objective.batches(self.loaded, config.batch_size, self.accumulation),
            settings,
            folder=config.folder,
            mesh=self.mesh,
            info=RunInfo(config.model_dump(), self.must_stay, wandb),
            hooks=Hooks(validation.evaluate, validation.sample, self._start)
            if validation
            else Hooks(start=self._start),
            phases=self.phases,
            throughput=throughput,
            trace=Trace(config.profile, config.folder, self.mesh),
        )

    def _start(self) -> None:
        """Writes the configuration, and encodes all rows where they are small enough to travel and to be remembered
        whole, and every row is needed at least twice; then nobody may need the encoders any more.
        """
        config, loaded = self.config, self.loaded
        self.mesh.on_main(lambda: _write_config(config.folder, dump(config)))
        if not isinstance(self.encoder, BatchEncoder):
            return
        rows = loaded.num_rows
        if rows * _row_bytes(config.clip_shape) > PREFILL_BYTES or 2 * rows > config.max_steps * config.batch_size:
            return
        with self.phases("encode"):
            loaded.prefill(self.mesh)
        if self.validation is None and not config.objective.decodes and loaded.is_complete:
            self.encoder.release()
            self.encoders = None


def _check_heads(
    networks: Mapping[str, NetworkConfig],
    source_of: Callable[[str], Path],
    logdir: str,
    preset: str,
    together: int,
) -> None:
    """Raises ConfigError when the ranks of a sequence group cannot share the heads of each network; from the heads of
    files, before any network is read.
    """
    if together == 1:
        return
    for source in {network.source for network in networks.values()}:
        if source is None:
            check_heads(model_config(preset).num_heads, together)
        else:
            check_heads(open_dit(weights_folder(source_of(source), logdir))[1].config.num_heads, together)


def _row_bytes(shape: VideoShape) -> int:
    """About the size of one row's encodings: latents, and y about three times as long, of 16 to 20 channels."""
    return 4 * 80 * shape.num_latent_frames * shape.latent_height * shape.latent_width


def make_state(
    wanted: Mapping[str, NetworkConfig],
    networks: dict[str, nn.Module],
    adapters: dict[str, Adapter],
    ema: EmaConfig,
    max_steps: int,
    seed: int,
) -> TrainState:
    """The state of a stage before its first iteration, of networks that are already sharded."""
    optimizers = {}
    for name in networks:
        group = wanted[name].optim
        assert group is not None
        optimizers[name] = OptimizerSettings(
            lr=group.lr,
            betas=(group.beta1, group.beta2),
            eps=group.eps,
            weight_decay=group.weight_decay,
            warmup_steps=group.warmup_steps,
            decay_steps=group.decay_steps,
            total_steps=max_steps,
            max_grad_norm=group.max_grad_norm,
        )
    averaged = {"generator": EMASettings(ema.decay, ema.start_step)} if ema.enabled else {}
    return TrainState.build(networks, optimizers, averaged, seed=seed, adapters=adapters)


def check_strides(vae: VideoVAE, video: VideoConfig, folder: Path) -> None:
    """Raises ConfigError when the VAE in `folder` has other strides than the configuration says."""
    for name in ("temporal_stride", "spatial_stride"):
        if getattr(vae, name) != getattr(video, name):
            raise ConfigError(
                f"video.{name}={getattr(video, name)} is not that of the VAE in {folder}, {getattr(vae, name)}; set it "
                f"to {getattr(vae, name)}"
            )


def _write_config(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text)
