"""Builds one stage from its configuration and trains it: weights, encoders, objective, data, validation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from longtake.checkpoint.invariants import invariants, resume_invariants, rows_invariant
from longtake.checkpoint.save import RunInfo, refuse_other_invariants
from longtake.condition import VideoShape
from longtake.config.stage import StageConfig, dump
from longtake.data.encoded import EncodedRows
from longtake.data.samples import Dataset
from longtake.encodings.encode import BatchEncoder, RowEncoder
from longtake.errors import ConfigError
from longtake.objectives.base import LossResult, Objective
from longtake.parallel.mesh import Mesh
from longtake.rollout.denoise import Denoiser
from longtake.run_folder import checkpoints_folder
from longtake.train.adapters import facts_of
from longtake.train.keeping import Keeper
from longtake.train.lock import only_run
from longtake.train.loop import Hooks, train
from longtake.train.metrics import PhaseTimer
from longtake.train.networks import Builder, Networks
from longtake.train.row_validation import RowValidation
from longtake.train.stage_data import DataBuilder, learnt_rows, open_data
from longtake.train.state import TrainState
from longtake.train.throughput import clip_call, operations_of, stage_throughput
from longtake.train.validation import Validation, can_measure
from longtake.train.window_codec import EncoderCodec
from longtake.weights.locate import image_token_count

logger = logging.getLogger(__name__)

PREFILL_BYTES = 2 << 30


class InPrecision(Objective):
    """An objective whose losses run under autocast; weights, optimizer and losses stay float32.

    Where networks are sharded, autocast must not keep its copies of weights from one forward to the next: the gradient
    of all forwards would come through one copy, after FSDP2 has reduced the block's gradients, and be lost in part. On
    a GPU (`on_a_gpu`, by default where the mesh is) it keeps none either: functions are compiled for each state of
    autocast, recorded passes keep none, and a forward needs each copy once.
    """

    def __init__(self, objective: Objective, mesh: Mesh, *, bf16: bool, on_a_gpu: bool | None = None) -> None:
        self.objective, self.device, self.bf16 = objective, mesh.device, bf16
        on_a_gpu = mesh.device.type == "cuda" if on_a_gpu is None else on_a_gpu
        self.keep_copies = mesh.fsdp_mesh is None and not on_a_gpu
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


def run_stage(config: StageConfig, mesh: Mesh, *, passed: Callable[[int], None] | None = None) -> None:
    """Trains one stage to its last step, going on from its newest checkpoint if there is one. `passed`: see `Hooks`."""
    config.accumulation(mesh.world_size)  # refused here rather than when the first batch is made
    mesh = mesh.arranged(config.parallel)
    if config.wandb.enabled and find_spec("wandb") is None:  # on every rank, before any of them waits for another
        raise ConfigError(
            "wandb.enabled=true needs the package wandb; install it (pip install wandb) or set it to false"
        )
    builder = Builder(config, mesh)
    builder.check_heads()
    dataset = open_data(config.data, config.clip_shape)
    rows = config.validates and config.validation.num_rows > 0
    if rows and config.validation.data is None and learnt_rows(dataset, config.validation) is dataset:
        rows = False
        if mesh.is_main:
            logger.warning("NO VALIDATION: %s has a single row; name rows for it in validation.data", config.data.path)
    worlds = config.validates and not rows and can_measure(config.model, config.video)
    if isinstance(dataset, EncodedRows) and worlds:
        raise ConfigError(
            f"validate_every={config.validate_every} needs the encoders, and none is loaded for the encoded set "
            f"{config.data.path}; set validate_every=0, or validation.num_rows above 0 to validate rows of the set"
        )
    with only_run(config.folder, mesh, "set another name or logdir"):
        _train(config, mesh, dataset, builder, worlds=worlds, rows=rows, passed=passed)


def _train(
    config: StageConfig,
    mesh: Mesh,
    dataset: Dataset,
    builder: Builder,
    *,
    worlds: bool,
    rows: bool,
    passed: Callable[[int], None] | None,
) -> None:
    learnt = learnt_rows(dataset, config.validation)
    must_stay = invariants(config) | resume_invariants(config, mesh.on_main(lambda: rows_invariant(learnt)))
    refuse_other_invariants(checkpoints_folder(config.folder), must_stay, mesh)
    networks = builder.build()
    sizes = {name: network.config for name, network in (networks.trained | networks.frozen).items()}
    data = DataBuilder(config, mesh, dataset, with_tokens=sizes["generator"].image_dim is not None)
    encoder = data.encoder()
    phases = PhaseTimer(mesh.device)
    codec = data.codec(encoder.encoders) if config.objective.decodes else None
    objective = builder.objective(networks, codec, phases)
    loaded = data.batches(encoder)
    state = builder.state(objective)
    validation: Validation | RowValidation | None = None
    if encoder.encoders is not None and worlds:
        validation = Validation(config, encoder.encoders, state, builder.reference(networks), mesh)
    elif rows:
        validation = row_validation(builder, networks, state, data, encoder, codec)

    def start() -> None:
        mesh.on_main(lambda: _write_config(config.folder, dump(config)))
        if isinstance(validation, RowValidation):
            validation.prepare()
        wanted = config.max_steps * config.batch_size
        if isinstance(encoder, BatchEncoder) and _travels(config.clip_shape, loaded.num_rows, wanted):
            with phases("encode"):
                loaded.prefill(mesh)
            if not isinstance(validation, Validation) and not config.objective.decodes and loaded.is_complete:
                encoder.release()  # nobody needs them any more

    image_tokens, shape = image_token_count(config.encoders_folder), config.video
    clips = {name: clip_call(shape, size, config.batch_size, image_tokens) for name, size in sizes.items()}
    loras = {name: wanted.lora for name, wanted in config.networks.items()}
    operations = operations_of(objective, sizes, loras, clips, mesh.world_size)
    hooks = Hooks(start=start, passed=_both(builder.keeper(objective), passed))
    if validation is not None:
        hooks = replace(hooks, evaluate=validation.evaluate, sample=validation.sample)
    train(
        state,
        InPrecision(objective, mesh, bf16=config.precision == "bf16"),
        objective.batches(loaded, config.batch_size),
        config,
        mesh=mesh,
        info=RunInfo(config.model_dump(), must_stay | facts_of(networks.adapters)),
        hooks=hooks,
        phases=phases,
        throughput=stage_throughput(config.precision, operations, mesh),
    )


def _both(keeper: Keeper, passed: Callable[[int], None] | None) -> Callable[[int], None]:
    """What is told how many iterations are complete: what decides how much is kept, and who asked for it."""

    def complete(number: int) -> None:
        keeper.passed(number - 1)
        if passed is not None:
            passed(number)

    return complete


def row_validation(
    builder: Builder,
    networks: Networks,
    state: TrainState,
    data: DataBuilder,
    encoder: RowEncoder,
    codec: EncoderCodec | None,
) -> RowValidation:
    """What validates the rows of a stage."""
    return RowValidation(
        config=builder.config,
        mesh=builder.mesh,
        # Without recorded passes, whose memory training needs.
        student=Denoiser(networks.student.model, gathering=networks.student.gathered),
        average=state.ema.get("generator"),
        teacher=builder.teacher(networks),
        read=lambda: data.validated(encoder),
        decoder=lambda: data.decoder(encoder, codec),
    )


def _travels(shape: VideoShape, num_rows: int, num_samples: int) -> bool:
    """Whether rows are encoded ahead: where all are small enough to travel and to be remembered, and each is needed at
    least twice. A row takes its latents, and y about three times as long, of 16 to 20 channels.
    """
    size = 4 * 80 * shape.num_latent_frames * shape.latent_height * shape.latent_width
    return num_rows * size <= PREFILL_BYTES and 2 * num_rows <= num_samples


def _write_config(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text)
