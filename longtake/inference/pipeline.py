"""Weights, encoders and rules, loaded and checked together: what streams, sessions and whole clips are made with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from longtake.condition import Condition
from longtake.config.generation import GenerationConfig
from longtake.config.stage import StageConfig
from longtake.devices import usable_device
from longtake.encoders.bundle import Encoders
from longtake.encoders.condition import encode_condition, prepare_image
from longtake.encoders.vae import DecoderSession, VideoVAE
from longtake.errors import ConfigError
from longtake.inference.fit import check_fit
from longtake.inference.source import Source
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.models.sequence_parallel import SequenceParallel, check_heads
from longtake.plan import StreamPlan
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.weights.load import load_dit, open_dit

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


def load_encoders(config: StageConfig, device: torch.device, *, with_image: bool) -> Encoders:
    """The encoders of a stage, in training, inference and evaluation alike. Raises: CheckpointError."""
    return Encoders.load(
        config.encoders_folder,
        device,
        with_image=with_image,
        clip_preprocess=config.model.clip_preprocess,
        text_dtype=torch.bfloat16 if config.model.text_precision == "bf16" else torch.float32,
    )


@dataclass
class Pipeline:
    """Weights, encoders and the rules to stream by. Make it with `build`."""

    denoiser: Denoiser
    encoders: Encoders
    settings: GenerationConfig
    device: torch.device
    config: StageConfig | None = None
    decoding_vae: VideoVAE | None = None

    @property
    def model(self) -> VideoDiT:
        """The transformer."""
        return self.denoiser.model

    @classmethod
    def build(
        cls,
        source: Source,
        device: str | torch.device | None = None,
        *,
        split: SequenceParallel | None = None,
        decode_device: str | torch.device | None = None,
        graphs: bool = True,
    ) -> Self:
        """Loads weights and encoders: the one place that makes one.

        Args: `split`, the processes that compute each call of the transformer together (`Mesh.sequence`); all of them
        then make the same calls of it and get the same frames. `decode_device` has a second copy of the VAE
        that decodes there, so that another GPU can do it beside the transformer (default: no second copy). `graphs`
        has passes recorded on a GPU and replayed (`rollout/cuda_graphs.py`), with the same frames.
        With `precision` bf16 the matrix weights, the cache, the text and the image encoder are bfloat16, and the VAE
        where `vae_precision` says nothing else; what Wan computes in float32 stays float32.
        Raises: CheckpointError, ConfigError when weights, encoders and picture size do not fit each other, or there is
        no such device.
        """
        decoding = None if decode_device is None else _second_device(decode_device, split)
        device = usable_device(device)
        settings = source.settings
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        cast = dtype if dtype != torch.float32 else None
        if split is not None:  # from the heads of the files: before they are read
            check_heads(open_dit(source.weights)[1].config.num_heads, split.size)
        model = load_dit(source.weights, device, cast).eval().requires_grad_(False).executed(Execution(split))
        denoiser = Denoiser(model, graphs=CUDAGraphRunner() if graphs and device.type == "cuda" else None)
        encoders = Encoders.load(
            source.encoders,
            device,
            dtype,
            with_image=model.config.image_dim is not None,
            clip_preprocess=settings.clip_preprocess,
            text_dtype=torch.bfloat16 if settings.text_precision == "bf16" else dtype,
            vae_dtype=torch.bfloat16 if (settings.vae_precision or settings.precision) == "bf16" else torch.float32,
        )
        check_fit(model, encoders, source)
        vae = None if decoding is None else encoders.vae.copy_to(decoding)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # from here on streams of other threads may read it
        return cls(denoiser, encoders, settings, device, source.config, vae)

    def new_decoder(self) -> DecoderSession:
        """A decoder at the beginning of a video, where decoding is done."""
        return (self.decoding_vae or self.encoders.vae).decoder_session()

    @property
    def is_ahead(self) -> bool:
        """Whether a video that is written to a file is made a block ahead of its frames, which only a GPU can do."""
        return self.device.type == "cuda"

    @property
    def fps(self) -> int:
        """Frames a second of the videos it was trained on."""
        return self.settings.fps

    @property
    def plan(self) -> StreamPlan:
        """Blocks, noise levels, window and positions."""
        return self.settings.stream_plan

    def prepare(self, image: str | Path | Image.Image | NDArray[np.uint8]) -> Tensor:
        """A picture as the model sees it, [1, 3, h, w] in [-1, 1]. Raises: DataError."""
        return prepare_image(image, self.settings.height, self.settings.width)[None].to(self.device)

    @torch.no_grad()
    def condition(self, picture: Tensor, prompt: str) -> tuple[Condition, Tensor]:
        """The condition of a picture [1, 3, h, w] and a prompt, and the latent of the picture [1, 1, C, H, W]."""
        if self.model.config.condition_channels == 0:  # the picture enters as clean frame 0 alone
            return Condition(self.encoders.text.encode([prompt])), self.encoders.vae.encode(picture[:, None])
        condition = encode_condition(self.encoders, picture, [prompt])
        assert condition.frames is not None
        return condition, condition.frames[:, :1, -self.encoders.vae.latent_channels :]


def _second_device(name: str | torch.device, split: SequenceParallel | None) -> torch.device:
    """The device that decodes. Raises: ConfigError when there is none such, or several processes share the calls."""
    if split is not None:
        raise ConfigError(
            f"decode_device={name} is for one process; processes that share the transformer's calls decode where they "
            "are: leave out one of both"
        )
    return usable_device(name, "decode_device")


def check_prompt(text: str) -> str:
    """The prompt. Raises: ConfigError when it is empty or no text."""
    if not text.strip():
        raise ConfigError("the prompt is empty; say what should move and how")
    if not text.isascii() and (half := next((c for c in text if "\ud800" <= c <= "\udfff"), None)):
        raise ConfigError(f"the prompt holds {half!r}, half a character; give it as UTF-8")
    return text


def check_seed(seed: int) -> int:
    """The seed. Raises: ConfigError when it is negative or needs more than 63 bits."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed} must be at least 0 and below 2^63")
    return seed


def check_negative(negative: str | None, settings: GenerationConfig) -> None:
    """Raises ConfigError for a negative prompt that nothing would read."""
    if negative is not None and settings.guidance == 1:
        raise ConfigError(
            f"a negative prompt ({negative!r}) has no effect with guidance=1; set guidance above 1 (it doubles the "
            "work and the cache) or leave it out"
        )
