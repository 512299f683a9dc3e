"""Builds one stage from its configuration and trains it: weights, encoders, objective, data, validation."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from longtake.checkpoint.invariants import invariants, resume_invariants, rows_invariant
from longtake.checkpoint.save import RunInfo, refuse_other_invariants
from longtake.condition import VideoShape
from longtake.config.groups import VideoConfig
from longtake.config.stage import StageConfig, dump
from longtake.data.encoded import EncodedRows
from longtake.data.samples import Dataset
from longtake.encoders.vae import VideoVAE
from longtake.encodings.encode import BatchEncoder, StoredEncoder
from longtake.encodings.key import check_encoded, contents_of
from longtake.errors import ConfigError
from longtake.inference.pipeline import load_encoders
from longtake.objectives.base import LossResult, Objective
from longtake.parallel.mesh import Mesh
from longtake.run_folder import checkpoints_folder
from longtake.train.adapters import facts_of
from longtake.train.lock import only_run
from longtake.train.loop import Hooks, train
from longtake.train.metrics import PhaseTimer
from longtake.train.networks import Builder
from longtake.train.stage_data import make_batches, open_data
from longtake.train.throughput import stage_throughput
from longtake.train.validation import Validation, can_validate
from longtake.train.window_codec import EncoderCodec
from longtake.weights.locate import image_token_count

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
    config.accumulation(mesh.world_size)  # refused here rather than when the first batch is made
    mesh = mesh.arranged(config.parallel)
    if config.wandb.enabled and find_spec("wandb") is None:  # on every rank, before any of them waits for another
        raise ConfigError(
            "wandb.enabled=true needs the package wandb; install it (pip install wandb) or set it to false"
        )
    Builder(config, mesh).check_heads()
    dataset = open_data(config.data, config.video, config.clip_shape)
    if isinstance(dataset, EncodedRows) and can_validate(config):
        raise ConfigError(
            f"validate_every={config.validate_every} needs the encoders, and none is loaded for the encoded set "
            f"{config.data.path}; set validate_every=0"
        )
    with only_run(config.folder, mesh, "set another name or logdir"):
        _train(config, mesh, dataset)


def _train(config: StageConfig, mesh: Mesh, dataset: Dataset) -> None:
    must_stay = invariants(config) | resume_invariants(config, mesh.on_main(lambda: rows_invariant(dataset)))
    refuse_other_invariants(checkpoints_folder(config.folder), must_stay, mesh)
    builder = Builder(config, mesh)
    networks = builder.build()
    sizes = {name: network.config for name, network in (networks.trained | networks.frozen).items()}
    encoder = _encoder(config, dataset, mesh, with_tokens=sizes["generator"].image_dim is not None)
    phases, codec, validation = PhaseTimer(mesh.device), None, None
    if config.objective.decodes:
        frames, with_tokens = config.video.num_latent_frames, sizes["generator"].image_dim is not None
        codec = EncoderCodec.of_stage(
            encoder.encoders, config.encoders_folder, config.model, frames, mesh.device, with_tokens=with_tokens
        )
    objective = builder.objective(networks, codec, phases)
    loaded = make_batches(config, dataset, encoder, mesh)
    state = builder.state(objective)
    if encoder.encoders is not None and can_validate(config):
        validation = Validation(config, encoder.encoders, state, builder.reference(networks), mesh)

    def start() -> None:
        mesh.on_main(lambda: _write_config(config.folder, dump(config)))
        wanted = config.max_steps * config.batch_size
        if isinstance(encoder, BatchEncoder) and _travels(config.clip_shape, loaded.num_rows, wanted):
            with phases("encode"):
                loaded.prefill(mesh)
            if validation is None and not config.objective.decodes and loaded.is_complete:
                encoder.release()  # nobody needs them any more

    train(
        state,
        InPrecision(objective, mesh, bf16=config.precision == "bf16"),
        objective.batches(loaded, config.batch_size),
        config,
        mesh=mesh,
        info=RunInfo(config.model_dump(), must_stay | facts_of(networks.adapters)),
        hooks=Hooks(validation.evaluate, validation.sample, start) if validation else Hooks(start=start),
        phases=phases,
        throughput=stage_throughput(config, sizes, objective, mesh, image_token_count(config.encoders_folder)),
    )


def _encoder(config: StageConfig, dataset: Dataset, mesh: Mesh, *, with_tokens: bool) -> BatchEncoder | StoredEncoder:
    """Where the encodings of rows come from. Raises: CheckpointError, ConfigError, DataError."""
    objective = config.objective
    contents = contents_of(config.model, with_tokens=with_tokens, with_latents=objective.learns_from_videos)
    contents += ["text_1"] * objective.second_prompts
    if isinstance(dataset, EncodedRows):
        check_encoded(config, dataset, mesh, with_tokens=with_tokens)
        return StoredEncoder(dataset, config.clip_shape, contents, device=mesh.device)
    encoders = load_encoders(config.encoders_folder, config.model, mesh.device, with_image=with_tokens)
    check_strides(encoders.vae, config.video, config.encoders_folder)
    empty_prompt = objective.empty_prompt
    return BatchEncoder(encoders, config.clip_shape, contents, device=mesh.device, empty_prompt=empty_prompt)


def _travels(shape: VideoShape, num_rows: int, num_samples: int) -> bool:
    """Whether rows are encoded ahead: where all are small enough to travel and to be remembered, and each is needed at
    least twice. A row takes its latents, and y about three times as long, of 16 to 20 channels.
    """
    size = 4 * 80 * shape.num_latent_frames * shape.latent_height * shape.latent_width
    return num_rows * size <= PREFILL_BYTES and 2 * num_rows <= num_samples


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
