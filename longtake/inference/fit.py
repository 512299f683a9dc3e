"""Whether weights, encoders, the size of the picture and the device fit each other: asked before any frame is made."""

from __future__ import annotations

import logging

from longtake.condition import VideoShape
from longtake.config.generation import GenerationConfig
from longtake.devices import memory_bytes
from longtake.encoders.bundle import Encoders
from longtake.errors import ConfigError
from longtake.inference.source import Source
from longtake.models.dit import VideoDiT

logger = logging.getLogger(__name__)


def check_fit(model: VideoDiT, encoders: Encoders, source: Source) -> None:
    """Raises ConfigError when weights, encoders and size of the picture do not fit each other."""
    vae, config, settings = encoders.vae, model.config, source.settings
    VideoShape(settings.height, settings.width, 1, vae.temporal_stride, vae.spatial_stride)
    if config.out_channels != vae.latent_channels:
        raise ConfigError(
            f"the weights at {source.weights} have {config.out_channels} latent channels and the VAE in "
            f"{source.encoders} {vae.latent_channels}; take both from the same release"
        )
    wanted = vae.temporal_stride + vae.latent_channels
    if config.condition_channels not in (0, wanted):
        raise ConfigError(
            f"the weights at {source.weights} have in_channels={config.in_channels}; with this VAE an image-to-video "
            f"model has {config.out_channels + wanted}, or {config.out_channels} where the picture is only frame 0"
        )
    if config.condition_channels == 0:
        logger.info("%s takes no y: the picture enters as the clean first frame alone", source.weights)
    if encoders.text.width != config.text_dim:
        raise ConfigError(
            f"the weights at {source.weights} read text of width {config.text_dim} and the text encoder in "
            f"{source.encoders} writes {encoders.text.width}; take both from the same release"
        )


def check_memory(
    model: VideoDiT, encoders: Encoders, settings: GenerationConfig, frames: int, layers: int, at_once: int
) -> None:
    """Raises ConfigError when keys and values of `frames` latent frames in so many layers, and the pixels of `at_once`
    latent frames that are decoded together, exceed the memory of the device.
    """
    vae, device = encoders.vae, next(model.parameters()).device
    tokens = frames * model.tokens_per_frame(
        *(side // vae.spatial_stride for side in (settings.height, settings.width))
    )
    sides, ranks = 1 if settings.guidance == 1 else 2, 1 if (split := model.execution.split) is None else split.size
    each = 2 * sides * layers * model.config.dim * (2 if settings.precision == "bf16" else 4)
    pixels = at_once * vae.temporal_stride * settings.height * settings.width * 3 * 4  # as float32
    needed, there = tokens * each // ranks + pixels, memory_bytes(device)
    if needed > there:
        raise ConfigError(
            f"{frames} latent frames of {settings.height}x{settings.width} pixels need {needed / 1e9:.0f} GB for keys, "
            f"values and pixels, and {device} has {there / 1e9:.0f} GB; lower the size, the window or the length"
        )
