"""What a stage asks for before it is built: model operations of an iteration, by which stages of a job compare.

No weights are read, only their heads, and those that an earlier stage has yet to make have the sizes of the preset.
"""

from __future__ import annotations

from typing import cast

from longtake.errors import CheckpointError
from longtake.models.sizes import DiTConfig
from longtake.rollout.denoise import Denoiser
from longtake.rollout.long_video import PictureCodec
from longtake.train.metrics import PhaseTimer
from longtake.train.networks import Builder, Networks, of_one_layer
from longtake.train.throughput import clip_call, operations_of
from longtake.weights.locate import image_token_count
from longtake.weights.presets import model_config

_MOST_ITERATIONS = 64  # over which is averaged: exit steps are drawn, and some update the critic alone


def planned_operations(builder: Builder) -> float | None:
    """Model operations of an iteration of all ranks together, the mean of the first ones, None where the objective does
    not say which calls it makes. Encoders, validations and rebuilt caches do not count.
    """
    config = builder.config
    sizes = {name: _sizes(builder, name) for name in config.networks}
    models = {name: of_one_layer(size) for name, size in sizes.items()}
    trained = {name: model for name, model in models.items() if config.networks[name].optim is not None}
    frozen = {name: model for name, model in models.items() if name not in trained}
    networks = Networks(trained, frozen, {}, Denoiser(models["generator"]))
    nothing = cast(PictureCodec, object())  # nothing is decoded
    objective = builder.objective(networks, nothing if config.objective.decodes else None, PhaseTimer())
    loras = {name: wanted.lora for name, wanted in config.networks.items()}
    tokens = image_token_count(config.encoders_folder)
    clips = {name: clip_call(config.video, size, config.batch_size, tokens) for name, size in sizes.items()}
    operations = operations_of(objective, sizes, loras, clips, world_size=1)
    if operations is None:
        return None
    steps = range(min(config.max_steps, _MOST_ITERATIONS))
    return sum(map(operations, steps)) / len(steps)


def _sizes(builder: Builder, name: str) -> DiTConfig:
    if builder.config.networks[name].source is not None:
        try:
            return builder.open(builder.weights(name), part="reader").model.config
        except CheckpointError:
            pass  # an earlier stage makes it
    return model_config(builder.config.model.preset)
