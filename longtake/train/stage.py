"""Builds one stage from its configuration and trains it: weights, encoders, objective, data, validation."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from longtake.checkpoint.async_save import SaveSettings
from longtake.checkpoint.invariants import invariants, resume_invariants, rows_invariant
from longtake.checkpoint.save import refuse_other_invariants
from longtake.config.groups import CriticConfig, OptimConfig
from longtake.config.stage import StageConfig, dump
from longtake.data.encoded import EncodedRows
from longtake.data.samples import Dataset
from longtake.encoders.bundle import Encoders
from longtake.encodings.encode import BatchEncoder, RowEncoder, StoredEncoder
from longtake.encodings.key import check_encoded
from longtake.errors import ConfigError
from longtake.inference.pipeline import load_encoders
from longtake.models.dit import VideoDiT
from longtake.models.sequence_parallel import check_heads
from longtake.objectives.base import LossResult, Objective
from longtake.objectives.dmd import DataLoss, Dmd, DmdSettings
from longtake.objectives.flow_matching import FlowMatching
from longtake.objectives.long_tuning import LongSchedule, LongTuning
from longtake.objectives.teacher_forcing import ErrorRecycling, TeacherForcing
from longtake.parallel.mesh import Mesh
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser
from longtake.rollout.long_video import PictureCodec
from longtake.run_folder import checkpoints_folder
from longtake.train.adapters import facts_of
from longtake.train.ema import EMASettings
from longtake.train.lock import only_run
from longtake.train.long_batches import LongBatches
from longtake.train.loop import Batches, Hooks, LoopSettings, RunInfo, train
from longtake.train.metrics import PhaseTimer
from longtake.train.networks import build_networks as _networks
from longtake.train.networks import load_weights, weights_folder
from longtake.train.optim import OptimizerSettings
from longtake.train.stage_data import make_batches, open_data
from longtake.train.state import TrainState
from longtake.train.throughput import Throughput, Trace, stage_throughput
from longtake.train.validation import Validation, can_validate
from longtake.train.watchdog import WatchdogSettings
from longtake.train.window_codec import EncoderCodec
from longtake.weights.load import open_dit
from longtake.weights.locate import image_token_count
from longtake.weights.lora import Adapter
from longtake.weights.presets import model_config

__all__ = ["InPrecision", "invariants", "for_long_videos", "load_weights", "run_stage", "weights_folder"]

logger = logging.getLogger(__name__)

PREFILL_BYTES = 2 << 30


class InPrecision:
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
    _check_parallel(config)
    dataset = open_data(config)
    if isinstance(dataset, EncodedRows) and can_validate(config):
        raise ConfigError(
            f"validate_every={config.validate_every} needs the encoders, and none is loaded for the encoded set "
            f"{config.data.path}; set validate_every=0"
        )
    with only_run(config.folder, mesh, "set another name or logdir"):
        _train(config, mesh, dataset, accumulation)


def _train(config: StageConfig, mesh: Mesh, dataset: Dataset, accumulation: int) -> None:
    must_stay = invariants(config) | resume_invariants(config, mesh.on_main(lambda: rows_invariant(dataset)))
    refuse_other_invariants(checkpoints_folder(config.folder), must_stay, mesh)
    networks, real, adapters, student = _networks(config, mesh)
    with_tokens = networks["generator"].config.image_dim is not None
    encoders: Encoders | None = None
    encoder: RowEncoder
    parts = {
        "with_image": config.model.image_condition == "i2v",
        "with_y": config.model.with_y,
        "with_latents": config.learns_from_videos,
        "with_later": config.long is not None and bool(config.long.switch_frames),
    }
    if isinstance(dataset, EncodedRows):
        check_encoded(config, dataset, mesh, with_tokens=with_tokens)
        encoder = StoredEncoder(dataset, config.clip_shape, with_tokens=with_tokens, device=mesh.device, **parts)
    else:
        encoders = load_encoders(config.encoders_folder, config.model, mesh.device, with_image=with_tokens)
        check_strides(config, encoders)
        encoder = BatchEncoder(
            encoders,
            config.clip_shape,
            device=mesh.device,
            empty_prompt=config.flow.negative_prompt,
            **parts,
        )
    phases = PhaseTimer(mesh.device)
    inner = make_objective(config, student, networks, real, KeyedRNG(config.seed), phases)
    loaded = make_batches(config, dataset, encoder, mesh)
    batches: Batches = loaded
    if config.stage == "long":
        codec = EncoderCodec.of_stage(config, encoders, mesh.device, with_tokens=with_tokens)
        inner, batches = for_long_videos(config, inner, codec, loaded, accumulation)
    objective = InPrecision(inner, mesh, bf16=config.precision == "bf16")
    state = make_state(config, objective.networks, adapters)
    settings = LoopSettings(
        max_steps=config.max_steps,
        accumulation=accumulation,
        save_every=config.save_every,
        save=SaveSettings(config.checkpoint.mode, config.keep_checkpoints, export=config.checkpoint.export),
        log_every=config.log_every,
        validate_every=config.validate_every,
        sample_every=config.validate_every,
        on_nonfinite=config.on_nonfinite,
        max_skipped=config.max_skipped,
        watchdog=WatchdogSettings(config.watchdog.seconds, config.watchdog.slow_seconds),
    )
    info = RunInfo(
        config.model_dump(),
        must_stay | facts_of(adapters),
        {"project": config.wandb.project} if config.wandb.enabled else None,
    )
    validation = None if encoders is None else _validation(config, encoders, state, real, mesh)

    def start() -> None:
        nonlocal encoders
        _write_config(config, mesh)
        # Small enough to travel and to be remembered whole, and every row is needed at least twice.
        rows = loaded.num_rows
        if encoders is None:
            return
        if rows * _row_bytes(config) <= PREFILL_BYTES and 2 * rows <= config.max_steps * config.batch_size:
            with phases("encode"):
                loaded.prefill(mesh)
            if validation is None and config.stage != "long" and loaded.is_complete:
                assert isinstance(encoder, BatchEncoder)
                encoder.release()  # nobody needs them any more
                encoders = None

    hooks = Hooks(validation.evaluate, validation.sample, start) if validation else Hooks(start=start)
    train(
        state,
        objective,
        batches,
        settings,
        folder=config.folder,
        mesh=mesh,
        info=info,
        hooks=hooks,
        phases=phases,
        throughput=_gauges(config, networks, real, inner, mesh),
        trace=Trace(config.profile, config.folder, mesh),
    )


def _gauges(
    config: StageConfig, networks: dict[str, VideoDiT], real: VideoDiT | None, objective: Objective, mesh: Mesh
) -> Throughput:
    sizes = {name: network.config for name, network in networks.items()}
    if real is not None:
        sizes["teacher"] = real.config
    return stage_throughput(config, sizes, objective, mesh, image_token_count(config.encoders_folder))


def _check_parallel(config: StageConfig) -> None:
    """Raises ConfigError when the ranks of a sequence group cannot share the heads of each network."""
    if (together := config.parallel.sequence) == 1:
        return
    critic = config.critic.init_from if config.critic is not None else None
    for source in (config.init_from, config.teacher, critic):
        if source is not None:  # from the heads of its files: before any network is read
            network = open_dit(weights_folder(config.source(source), config))[1]
            check_heads(network.config.num_heads, together)
    if config.init_from is None:
        check_heads(model_config(config.model.preset).num_heads, together)


def _row_bytes(config: StageConfig) -> int:
    """About the size of one row's encodings: latents, and y about three times as long, of 16 to 20 channels."""
    shape = config.clip_shape
    return 4 * 80 * shape.num_latent_frames * shape.latent_height * shape.latent_width


def _validation(
    config: StageConfig, encoders: Encoders, state: TrainState, real: VideoDiT | None, mesh: Mesh
) -> Validation | None:
    """Validation beside the teacher, where it is asked for and this stage can be measured."""
    if not can_validate(config):
        return None
    # The teacher makes clips of its own length only.
    as_long = config.validation.num_latent_frames in (None, config.video.num_latent_frames)
    teacher = real if as_long else None
    if config.stage == "causal" and as_long:
        teacher = load_weights(config.source(config.init_from or ""), config, mesh).requires_grad_(False)
    return Validation(config, encoders, state, teacher, mesh, config.folder)


def make_objective(
    config: StageConfig,
    student: Denoiser,
    networks: dict[str, VideoDiT],
    real: VideoDiT | None,
    draws: KeyedRNG,
    phases: PhaseTimer,
) -> Objective:
    """What the stage trains its networks by, but for long videos. Args: `real`, the frozen score."""
    clean = config.model.image_condition == "i2v" and config.model.first_frame_sigma == "zero"
    flow = config.flow
    if config.stage == "teacher":
        return FlowMatching(
            student.model,
            draws,
            shift=flow.shift,
            caption_dropout=config.caption_dropout,
            first_frame_clean=clean,
        )
    if config.stage == "causal":
        return TeacherForcing(
            student,
            draws,
            config.stream_plan,
            shift=flow.shift,
            caption_dropout=config.caption_dropout,
            error_recycling=ErrorRecycling(config.error_recycling.share, config.error_recycling.from_step),
            phase=phases,
        )
    assert real is not None and config.critic is not None
    settings = DmdSettings(
        shift=flow.shift,
        guidance=flow.guidance,
        sigma_min=flow.sigma_min,
        sigma_max=flow.sigma_max,
        updates_per_generator=config.critic.updates_per_generator,
        critic_warmup_steps=config.critic.critic_warmup_steps,
        first_frame_clean=clean,
    )
    plan, data_loss = config.stream_plan, None
    if weight := config.data_loss.weight:
        data_loss = DataLoss(TeacherForcing(student, draws, plan, shift=flow.shift), weight)
    return Dmd(
        student,
        networks["critic"],
        real,
        draws,
        plan,
        config.video.num_latent_frames,
        settings,
        data_loss=data_loss,
        phase=phases,
    )


def for_long_videos(
    config: StageConfig, dmd: Objective, codec: PictureCodec, batches: Batches, accumulation: int
) -> tuple[LongTuning, LongBatches]:
    """The objective and the batches of stage long, from those of distill."""
    assert isinstance(dmd, Dmd) and config.long is not None
    horizon, new = dmd.num_frames, config.new_frames
    lengths = [horizon + (chunks - 1) * new for chunks in config.long.num_chunks]
    schedule = LongSchedule(dmd.draws, horizon, new, lengths, config.long.switch_frames)
    tuning = LongTuning(
        dmd.generator,
        dmd.critic,
        dmd.real,
        dmd.draws,
        dmd.plan,
        dmd.settings,
        schedule,
        codec,
        data_loss=dmd.data_loss,
        phase=dmd.phase,
    )
    return tuning, LongBatches(
        batches,
        lambda step: schedule.at(step).sequence,
        batch_size=config.batch_size,
        accumulation=accumulation,
    )


def make_state(config: StageConfig, networks: dict[str, nn.Module], adapters: dict[str, Adapter]) -> TrainState:
    """The state of a stage before its first iteration, of networks that are already sharded."""
    groups: dict[str, OptimConfig | CriticConfig | None] = {"generator": config.optim, "critic": config.critic}
    optimizers = {}
    for name in networks:
        group = groups[name]
        assert group is not None
        optimizers[name] = OptimizerSettings(
            lr=group.lr,
            betas=(group.beta1, group.beta2),
            eps=group.eps,
            weight_decay=group.weight_decay,
            warmup_steps=group.warmup_steps,
            decay_steps=group.decay_steps,
            total_steps=config.max_steps,
            max_grad_norm=group.max_grad_norm,
        )
    ema = {"generator": EMASettings(config.ema.decay, config.ema.start_step)} if config.ema.enabled else {}
    return TrainState.build(networks, optimizers, ema, seed=config.seed, adapters=adapters)


def check_strides(config: StageConfig, encoders: Encoders) -> None:
    """Raises ConfigError when the VAE has other strides than the configuration says."""
    vae, video = encoders.vae, config.video
    for name in ("temporal_stride", "spatial_stride"):
        if getattr(vae, name) != getattr(video, name):
            raise ConfigError(
                f"video.{name}={getattr(video, name)} is not that of the VAE in {config.encoders_folder}, "
                f"{getattr(vae, name)}; set it to {getattr(vae, name)}"
            )


def _write_config(config: StageConfig, mesh: Mesh) -> None:
    def write() -> None:
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "config.yaml").write_text(dump(config))

    mesh.on_main(write)
