"""Weights, encoders and rules, loaded and checked together: what streams, sessions and whole clips are made with."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from longtake.condition import Condition, pixel_frames
from longtake.config.generation import GenerationConfig
from longtake.config.groups import ModelConfig
from longtake.config.stage import StageConfig
from longtake.devices import memory_bytes, usable_device
from longtake.encoders.bundle import Encoders, vae_calls
from longtake.encoders.condition import ConditionFrames, begin_condition, encode_condition, prepare_image
from longtake.encoders.decoders import load_decoder
from longtake.encoders.sessions import Decoder, DecoderSession
from longtake.encoders.vae import VideoVAE
from longtake.errors import ConfigError
from longtake.inference.beginning import Beginning
from longtake.inference.cache_pool import CachePool
from longtake.inference.host_copies import HostCopies
from longtake.inference.source import Source
from longtake.models.cache import KVCache
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.models.sequence_parallel import SequenceParallel, check_heads
from longtake.plan import StreamPlan
from longtake.progress import as_size
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.weights.hub import local_encoders
from longtake.weights.load import Opened, load_frozen
from longtake.weights.locate import encoder_paths, encoder_sizes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    Picture = str | Path | Image.Image | NDArray[np.uint8]


logger = logging.getLogger(__name__)


def load_encoders(
    folder: Path,
    rules: ModelConfig | GenerationConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    *,
    with_image: bool,
    low_memory: bool = False,
) -> Encoders:
    """The encoders in a folder, in training, inference and evaluation alike. Raises: CheckpointError.

    Args: `rules` say how CLIP sees a picture and if the text encoder is bfloat16 where `dtype`, that of text and image
    encoder, is not; `low_memory` as that of `Encoders.load`.
    """
    text_dtype = torch.bfloat16 if rules.text_precision == "bf16" else dtype
    place = local_encoders(folder, with_image=with_image)
    sizes = encoder_sizes(place, with_image=with_image).items()
    parts = ", ".join(f"{name} {as_size(size)}" for name, size in sizes)
    logger.info("loading the encoders (%s) from %s to %s", parts, place, device)
    return Encoders.load(
        place,
        device,
        dtype,
        with_image=with_image,
        clip_preprocess=rules.clip_preprocess,
        text_dtype=text_dtype,
        vae_dtype=vae_dtype,
        low_memory=low_memory,
    )


def picture_condition(
    encoders: Encoders, pictures: Tensor, prompts: list[str], *, with_y: bool
) -> tuple[Condition, Tensor]:
    """The condition of pictures [B, 3, h, w] and prompts, and the pictures' latents [B, 1, C, H, W].

    Without `with_y` a picture enters as clean frame 0 alone.
    """
    if not with_y:
        return Condition(encoders.text.encode(prompts)), encoders.vae.encode(pictures[:, None])
    condition = encode_condition(encoders, pictures, prompts)
    assert condition.frames is not None
    return condition, condition.frames[:, :1, -encoders.vae.latent_channels :]


@dataclass
class Pipeline:
    """Weights, encoders and the rules to stream by. Make it with `build`.

    `decoder` makes pixels where the VAE of the encoders does not; `copies`, where sessions keep their past; `source`,
    where all of it came from.
    """

    denoiser: Denoiser
    encoders: Encoders
    settings: GenerationConfig
    device: torch.device
    config: StageConfig | None = None
    decoder: Decoder | None = None
    caches: CachePool = field(default_factory=CachePool)
    copies: HostCopies = field(default_factory=HostCopies)
    source: Source | None = None

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
        begins: Iterable[bool] = (),
    ) -> Self:
        """Loads weights and encoders: the one place that makes one.

        Args: `split`, the processes that compute each call of the transformer together (`Mesh.sequence`); all of them
        then make the same calls of it and get the same frames. `decode_device` has the decoder (of the VAE a second
        copy) there, so that another GPU can do it beside the transformer. `graphs` has passes fused, recorded and
        replayed on a GPU (`rollout/cuda_graphs.py`), with the same frames to rounding. `begins`, whether videos to be
        made begin with a picture: what the weights cannot do is refused before they are read.
        With `precision` bf16 the matrix weights, the cache, the text and the image encoder are bfloat16, and the VAE
        where `vae_precision` says nothing else; what Wan computes in float32 stays float32. With fp8 the large weights
        of blocks are 8-bit floats besides (`VideoDiT.quantise`).
        Raises: CheckpointError, ConfigError when weights, encoders and picture size do not fit each other, or there is
        no such device.
        """
        decoding, device = decoding_place(decode_device, split), usable_device(device)
        named, source, settings = source, source.fetched(), source.settings
        dtype = torch.bfloat16 if settings.is_half else torch.float32
        encoder_paths(source.encoders, with_image=source.needs_image)
        opened, apart = source.open(), source.open_writer()
        sizes = opened.model.config  # from the heads of the files: before they are read
        settings.shape(4, sizes.vae_stride)
        beginning = Beginning.of(sizes, settings)
        for given in begins:
            beginning.check(given=given)
        with_image = sizes.image_dim is not None
        encoder_paths(source.encoders, with_image=with_image)
        if split is not None:
            check_heads(sizes.num_heads, split.size)
        started = perf_counter()
        model = streaming_model(opened, device, settings, split)
        writer = None if apart is None else streaming_model(apart, device, settings, split)
        runner = CUDAGraphRunner() if graphs and device.type == "cuda" else None
        denoiser = Denoiser(model, graphs=runner, writer=writer)
        vae_dtype = torch.bfloat16 if settings.has_half_vae else torch.float32
        folder, low, types = source.encoders, settings.low_memory, (dtype, vae_dtype)
        encoders = load_encoders(folder, settings, device, *types, with_image=with_image, low_memory=low)
        _check_fit(model, encoders, source)
        decoder = _decoder_beside(encoders.vae, settings, folder, device, decoding, vae_dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # from here on streams of other threads may read it
        logger.info("loaded in %.1f s", perf_counter() - started)
        return cls(denoiser, encoders, settings, device, source.config, decoder, source=named)

    def new_decoder(self) -> DecoderSession:
        """A decoder at the beginning of a video, where decoding is done."""
        return (self.decoder or self.encoders.vae).decoder_session()

    @property
    def decoding_device(self) -> torch.device:
        """Where decoding is done."""
        return (self.decoder or self.encoders.vae).device

    @property
    def is_ahead(self) -> bool:
        """Whether a video that is written to a file is made a block ahead of its frames, which only a GPU can do."""
        return self.device.type == "cuda"

    @property
    def fps(self) -> int:
        """Frames a second of the videos it was trained on."""
        return self.settings.fps

    @cached_property
    def beginning(self) -> Beginning:
        """What a scene can begin with."""
        return Beginning.of(self.model.config, self.settings)

    @property
    def plan(self) -> StreamPlan:
        """Blocks, noise levels, window and positions of a scene that begins with a picture if it must, else without."""
        return self.beginning.plan

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        stride = self.encoders.vae.spatial_stride
        return self.settings.height // stride, self.settings.width // stride

    def new_caches(
        self, owner: object, history_blocks: int, max_latent_frames: int | None, guidance: float
    ) -> list[KVCache]:
        """Empty caches for a session of these values, `owner`'s until it is gone: one, and one more with guidance."""
        plan, split, graphs = self.plan, self.model.execution.split, self.denoiser.graphs
        most = max_latent_frames if plan.window_frames is None else None
        sizes, count = (plan, 1, self.latent_size, most), 1 if guidance == 1 else 2

        def new() -> list[KVCache]:
            return [self.model.new_cache(*sizes) for _ in range(count)]

        # States of a history hold caches of their own, each as long as it lives. Processes that share passes must
        # record them at the same time, and each may find another time for a session to be gone.
        if graphs is None or history_blocks or split is not None:
            return new()
        return self.caches.borrow(owner, (*sizes, count), new, graphs)

    def prepare(self, image: Picture) -> Tensor:
        """A picture as the model sees it, [1, 3, h, w] in [-1, 1]. Raises: DataError."""
        return prepare_image(image, self.settings.height, self.settings.width)[None].to(self.device)

    def first_pixels(self, *, given: bool) -> int:
        """Pixel frames of the first block of a scene, which begins with a picture (`given`) or without."""
        return pixel_frames(self.beginning.plan_of(given=given).first_frames, self.encoders.vae.temporal_stride)

    @torch.no_grad()
    def condition(self, picture: Tensor | None, prompt: str) -> tuple[Condition, Tensor | None]:
        """The condition of a picture [1, 3, h, w], or None, and a prompt; and the latents of the picture
        [1, f, C, H, W], the first block.
        """
        if picture is None:
            return Condition(self.encoders.text.encode([prompt])), None
        if self.model.config.condition_channels > 0:
            return picture_condition(self.encoders, picture, [prompt], with_y=True)
        video = picture[:, None].expand(-1, self.first_pixels(given=True), -1, -1, -1)
        return Condition(self.encoders.text.encode([prompt])), self.encoders.vae.encode(video)

    @torch.no_grad()
    def begin_condition(
        self, picture: Tensor | None, prompt: str
    ) -> tuple[Condition, Tensor | None, ConditionFrames | None]:
        """As `condition`; of its `frames` those alone that the third result has reached (None: it has no frames): the
        picture's own, and on a GPU, which works on them beside the text, those of the first block.
        """
        if picture is None or self.model.config.condition_channels == 0:
            return *self.condition(picture, prompt), None
        plan = self.beginning.plan_of(given=True)
        near = plan.block_of(plan.first_frames)[1] if self.device.type == "cuda" else 1
        condition, y = begin_condition(self.encoders, picture, [prompt], near)
        return condition, y.frames[:, :1, -self.encoders.vae.latent_channels :], y

    def check_memory(self, frames: int, layers: int, at_once: int, guidance: float) -> None:
        """Raises ConfigError when keys and values of `frames` latent frames in so many layers, twice with
        `guidance`, and the pixels of `at_once` latent frames that are decoded together, exceed the device's memory.
        """
        settings, vae, device = self.settings, self.encoders.vae, next(self.model.parameters()).device
        height, width = settings.height, settings.width
        tokens = frames * self.model.tokens_per_frame(height // vae.spatial_stride, width // vae.spatial_stride)
        split = self.model.execution.split
        sides, ranks = 1 if guidance == 1 else 2, 1 if split is None else split.size
        each = 2 * sides * layers * self.model.config.dim * (2 if settings.is_half else 4)
        pixels = at_once * vae.temporal_stride * height * width * 3 * 4  # as float32
        needed, there = tokens * each // ranks + pixels, memory_bytes(device)
        if needed > there:
            raise ConfigError(
                f"{frames} latent frames of {height}x{width} pixels need {needed / 1e9:.0f} GB for keys, values and "
                f"pixels, and {device} has {there / 1e9:.0f} GB; lower the size, the window or the length"
            )


def decoding_place(decode_device: str | torch.device | None, split: SequenceParallel | None) -> torch.device | None:
    """The device that decodes beside the transformer, as `Pipeline.build` is given it. Raises: ConfigError."""
    if decode_device is None:
        return None
    if split is not None:
        raise ConfigError(
            f"decode_device={decode_device} is for one process; processes that share the transformer's calls decode "
            "where they are: leave out one of both"
        )
    return usable_device(decode_device, "decode_device")


def streaming_model(
    opened: Opened, device: torch.device, settings: GenerationConfig, split: SequenceParallel | None
) -> VideoDiT:
    """A transformer with its weights, as precise as the rules say, for inference alone."""
    model = load_frozen(opened, device, torch.bfloat16 if settings.is_half else None)
    if settings.precision == "fp8":
        model.quantise()
    return model.executed(Execution(split))


def _decoder_beside(
    vae: VideoVAE,
    settings: GenerationConfig,
    folder: Path,
    device: torch.device,
    decoding: torch.device | None,
    dtype: torch.dtype,
) -> Decoder | None:
    """What decodes in the place of the VAE (which then only encodes), or of it on another device; None: itself."""
    if settings.decoder == "exact":
        return None if decoding is None else vae.copy_to(decoding)
    calls = vae_calls(low_memory=settings.low_memory)["latents_per_call"]
    named, place = (settings.decoder, settings.decoder_weights, folder), decoding or device
    decoder = load_decoder(*named, vae, place, dtype, latents_per_call=calls)
    vae.encodes_only()
    return decoder


def _check_fit(model: VideoDiT, encoders: Encoders, source: Source) -> None:
    """Raises ConfigError when weights, encoders and size of the picture do not fit each other."""
    vae, config, settings = encoders.vae, model.config, source.settings
    settings.shape(vae.temporal_stride, vae.spatial_stride)
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
    if encoders.text.width != config.text_dim:
        raise ConfigError(
            f"the weights at {source.weights} read text of width {config.text_dim} and the text encoder in "
            f"{source.encoders} writes {encoders.text.width}; take both from the same release"
        )


def check_prompt(text: str) -> str:
    """The prompt. Raises: ConfigError when it is empty or no text."""
    if not isinstance(text, str):
        raise ConfigError(f"the prompt is {text!r} and no text; say what should move and how")
    if not text.strip():
        raise ConfigError("the prompt is empty; say what should move and how")
    if not text.isascii() and (half := next((c for c in text if "\ud800" <= c <= "\udfff"), None)):
        raise ConfigError(f"the prompt holds {half!r}, half a character; give it as UTF-8")
    return text


def check_request(guidance: float, seed: int, negative: str | None) -> None:
    """Raises ConfigError for a seed that is none, and for a negative prompt that nothing would read."""
    if not (hasattr(seed, "__index__") and 0 <= seed < 2**63):
        raise ConfigError(f"seed={seed!r} must be a whole number, at least 0 and below 2^63")
    if negative is not None and guidance == 1:
        raise ConfigError(
            f"a negative prompt ({negative!r}) has no effect with guidance=1; set guidance above 1 (it doubles the "
            "work and the cache) or leave it out"
        )
