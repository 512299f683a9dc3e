"""A trained student ready to stream: one picture and a prompt in, uint8 frames out, block by block."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longtake.config import StageConfig
from longtake.config_generation import GenerationConfig, generation_settings
from longtake.config_groups import PlanConfig
from longtake.errors import CheckpointError, ConfigError
from longtake.flow.schedule import student_sigmas
from longtake.inference.sampling import stream_noise
from longtake.models.cache import KVCache
from longtake.models.conditioning import encode_condition, prepare_image
from longtake.models.dit import VideoDiT
from longtake.models.encoders import Encoders
from longtake.models.folders import find_encoders, find_weights
from longtake.models.weights import load_dit
from longtake.rollout.chunk import Guidance
from longtake.rollout.self_forcing import RollOutRules
from longtake.rollout.stream import stream_latents
from longtake.runs import exported_weights, find_checkpoint, read_manifest
from longtake.structs import Condition, VideoShape, latent_frames, pixel_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

logger = logging.getLogger(__name__)


def rules_of(config: StageConfig) -> RollOutRules:
    """How the student of a stage unrolls, in training and at inference alike."""
    return _rules(config.plan, config.flow.steps, config.flow.shift, config.rope)


def _rules(plan: PlanConfig, steps: Sequence[float], shift: float, rope: str) -> RollOutRules:
    return RollOutRules(
        plan=plan.blocks,
        sigmas=student_sigmas(steps, shift),
        window_frames=plan.window_frames,
        sink_frames=plan.sink_frames,
        rope=rope,
    )


def load_encoders(config: StageConfig, device: torch.device, *, with_image: bool) -> Encoders:
    """The encoders of a stage, in training, inference and evaluation alike. Raises: CheckpointError."""
    return Encoders.load(
        config.encoders_folder,
        device,
        with_image=with_image,
        clip_preprocess=config.model.clip_preprocess,
        text_dtype=torch.bfloat16 if config.model.text_precision == "bf16" else torch.float32,
    )


def to_frames(video: Tensor) -> NDArray[np.uint8]:
    """Decoder output [T, 3, h, w] in [-1, 1] as uint8 [T, h, w, 3]."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


@dataclass(frozen=True)
class Source:
    """Where a generator comes from, and its rules: `weights` a folder or file, `encoders` a folder; `config` is that
    of the stage that trained it, None for weights of other origin. Making one reads no weights.
    """

    weights: Path
    encoders: Path
    settings: GenerationConfig
    config: StageConfig | None = None

    @classmethod
    def of_run(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Source:
        """The student of a log folder (its last stage), of a stage folder or of a checkpoint.

        Args: `changes` win over the values that it was trained with; other rules than those are named in the log.
        Raises: CheckpointError when the folder holds no complete checkpoint of a causal student.
        """
        checkpoint = find_checkpoint(Path(path))
        config = StageConfig.from_tree(read_manifest(checkpoint)["config"])
        if config.stage == "teacher":
            raise CheckpointError(
                f"{path} holds a bidirectional teacher, which cannot stream; give a causal or distill run"
            )
        if config.model.image_condition != "i2v":
            raise CheckpointError(
                f"{path} holds a text-to-video student, and a Generator starts from a picture; give a run with "
                "model.image_condition=i2v"
            )
        settings, trained = generation_settings(config, changes), generation_settings(config)
        for name in ("plan", "rope", "steps", "shift"):
            if (now := getattr(settings, name)) != (before := getattr(trained, name)):
                logger.warning("%s is %s and was %s in training: expect drift or flicker", name, now, before)
        return cls(exported_weights(checkpoint), config.encoders_folder, settings, config)

    @classmethod
    def of_model(
        cls,
        path: str | Path,
        encoders: str | Path | None = None,
        stage: StageConfig | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Source:
        """Weights of any origin, as `models/folders.py` finds them.

        Args: `encoders`, their folder (default: in the model's folder, in its `encoders/`, or beside it); `stage`, a
        configuration whose rules are taken (default: those of `GenerationConfig`); `changes` win over both.
        Raises: CheckpointError when weights or encoders are not found, ConfigError for wrong values and for a
        checkpoint of a training run without `stage`, since its own rules would be lost.
        """
        found = find_weights(path)
        if stage is None and found.checkpoint is not None:
            raise ConfigError(
                f"{path} is a checkpoint of a training run and has rules of its own; give it with --run, or name other "
                "rules with --config"
            )
        settings = generation_settings(stage, changes)
        folder = Path(encoders) if encoders is not None else find_encoders(path)
        return cls(found.path, folder, settings)


@dataclass
class Generator:
    """Weights, encoders and the rules to stream by. Make it with `from_run`, `from_model` or `build`."""

    model: VideoDiT
    encoders: Encoders
    settings: GenerationConfig
    device: torch.device
    config: StageConfig | None = None

    @classmethod
    def from_run(cls, path: str | Path, device: str | torch.device | None = None) -> Generator:
        """The student of a log folder (its last stage) or of a stage folder; EMA weights where there are any.

        Raises: CheckpointError when the folder holds no complete checkpoint of a causal student.
        """
        return cls.build(Source.of_run(path), device)

    @classmethod
    def from_model(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        *,
        encoders: str | Path | None = None,
        stage: StageConfig | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Generator:
        """A student from weights of any origin; arguments and errors as those of `Source.of_model`."""
        return cls.build(Source.of_model(path, encoders, stage, changes), device)

    @classmethod
    def build(cls, source: Source, device: str | torch.device | None = None) -> Generator:
        """Loads weights and encoders: the one place that makes a generator.

        With `precision` bf16 the matrix weights, the cache, the text and the image encoder are bfloat16; the VAE and
        what Wan computes in float32 stay float32.
        Raises: CheckpointError, ConfigError when weights, encoders and picture size do not fit each other.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        settings = source.settings
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        cast = dtype if dtype != torch.float32 else None
        model = load_dit(source.weights, device, cast).eval().requires_grad_(False)
        encoders = Encoders.load(
            source.encoders,
            device,
            dtype,
            with_image=model.config.image_dim is not None,
            clip_preprocess=settings.clip_preprocess,
            text_dtype=torch.bfloat16 if settings.text_precision == "bf16" else dtype,
        )
        _check_fit(model, encoders, source)
        return cls(model, encoders, settings, device, source.config)

    @property
    def fps(self) -> int:
        """Frames a second of the videos it was trained on."""
        return self.settings.fps

    @property
    def rules(self) -> RollOutRules:
        """Block plan, noise levels, window and positions."""
        settings = self.settings
        return _rules(settings.plan, settings.steps, settings.shift, settings.rope)

    @torch.no_grad()
    def stream(
        self,
        image: str | Path | Image.Image | NDArray[np.uint8],
        prompt: str,
        *,
        num_frames: int | None = None,
        seed: int = 0,
        negative: str | None = None,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yields uint8 [T, h, w, 3]: first the given picture as the model sees it (1 frame), then a block at a time.

        Memory does not grow with the length: nothing but the window, the decoder's features and one block is kept.

        Args: `image` of any size, cropped to the model's aspect and resized; `num_frames` pixel frames in all, None =
        for ever. Whole blocks are generated and the last one is cut. `negative` is the text of the unconditional side
        of guidance (default: none). The same arguments give the same frames.
        Raises: DataError for an unreadable picture, ConfigError for a bad number of frames, an empty prompt or a
        negative prompt without guidance; all before any work.
        """
        if num_frames is not None and num_frames < 1:
            raise ConfigError(f"num_frames={num_frames} must be at least 1")
        if not prompt.strip():
            raise ConfigError("the prompt is empty; say what should move and how")
        if num_frames is None and self.rules.window_frames is None:
            raise ConfigError("plan.window_frames=null keeps every frame; such a student needs num_frames")
        check_negative(negative, self.settings)
        picture = prepare_image(image, self.settings.height, self.settings.width)[None].to(self.device)
        return self._frames(picture, prompt, negative or "", num_frames, seed)

    @torch.no_grad()
    def _frames(
        self, picture: Tensor, prompt: str, negative: str, num_frames: int | None, seed: int
    ) -> Iterator[NDArray[np.uint8]]:
        condition, first_latent = self._condition(picture, prompt)
        size = (first_latent.shape[3], first_latent.shape[4])
        rules, cache = self.rules, self._new_cache(size, num_frames)
        guidance = None
        if self.settings.guidance != 1:
            unconditional = condition.with_text(self.encoders.text.encode([negative]))
            guidance = Guidance(self.settings.guidance, unconditional, self._new_cache(size, num_frames))
        noise = stream_noise(seed, [0], self.model.config.out_channels, size, self.device)
        decoder = self.encoders.vae.decoder_session()
        made = 0
        for latents in stream_latents(self.model, cache, condition, first_latent, noise, rules, guidance=guidance):
            frames = to_frames(decoder.decode(latents)[0])
            if num_frames is not None:
                frames = frames[: num_frames - made]
            made += len(frames)
            yield frames
            if made == num_frames:
                return

    def _new_cache(self, size: tuple[int, int], num_frames: int | None) -> KVCache:
        rules = self.rules
        # Without a window nothing is evicted, and the cache must be as long as the video.
        max_frames = None
        if rules.window_frames is None:
            assert num_frames is not None
            latent = latent_frames(num_frames, self.encoders.vae.temporal_stride)
            max_frames = rules.plan.block_of(latent - 1)[1]
        return self.model.new_cache(1, *size, rules.window_frames, rules.sink_frames, rules.rope, max_frames=max_frames)

    def _condition(self, picture: Tensor, prompt: str) -> tuple[Condition, Tensor]:
        """The condition, and the latent of the picture [1, 1, C, H, W]."""
        if self.model.config.condition_channels == 0:  # the picture enters as clean frame 0 alone
            return Condition(self.encoders.text.encode([prompt])), self.encoders.vae.encode(picture[:, None])
        condition = encode_condition(self.encoders, picture, [prompt])
        assert condition.frames is not None
        return condition, condition.frames[:, :1, -self.encoders.vae.latent_channels :]


def check_negative(negative: str | None, settings: GenerationConfig) -> None:
    """Raises ConfigError for a negative prompt that nothing would read."""
    if negative is not None and settings.guidance == 1:
        raise ConfigError(
            f"a negative prompt ({negative!r}) has no effect with guidance=1; set guidance above 1 (it doubles the "
            "work and the cache) or leave it out"
        )


def _check_fit(model: VideoDiT, encoders: Encoders, source: Source) -> None:
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


@dataclass(frozen=True)
class GenerationReport:
    """What a generation took; prints as one line."""

    output: Path
    num_frames: int
    seconds: float
    first_frame_seconds: float

    @property
    def frames_per_second(self) -> float:
        """Generated frames a second, decoding and writing counted."""
        return self.num_frames / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.num_frames} frames in {self.seconds:.1f} s, {self.frames_per_second:.1f} frames/s, "
            f"first generated frame after {self.first_frame_seconds:.2f} s"
        )


def generate_file(
    run: str | Path | Source,
    image: str | Path,
    prompt: str,
    output: str | Path,
    *,
    num_frames: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    negative: str | None = None,
    device: str | None = None,
) -> GenerationReport:
    """Writes an mp4 while it is generated, with the student in `run` or of a source.

    Args: `num_frames` pixel frames or `seconds`; neither = the length of the training clips.
    Raises: LongtakeError before any work for a bad run, picture or length.
    """
    source = run if isinstance(run, Source) else Source.of_run(run)
    check_negative(negative, source.settings)
    generator = Generator.build(source, device)
    length = num_pixel_frames(generator, num_frames, seconds)
    return write_video(generator, image, prompt, output, num_frames=length, seed=seed, negative=negative)


def num_pixel_frames(generator: Generator, num_frames: int | None, seconds: float | None) -> int:
    """The length in pixel frames that was asked for; by default that of the training clips."""
    if num_frames is not None:
        return num_frames
    if seconds is not None:
        return max(1, round(seconds * generator.fps))
    return pixel_frames(generator.settings.num_latent_frames, generator.encoders.vae.temporal_stride)


def write_video(
    generator: Generator,
    image: str | Path,
    prompt: str,
    output: str | Path,
    *,
    num_frames: int,
    seed: int = 0,
    negative: str | None = None,
) -> GenerationReport:
    """Writes one mp4, a block at a time; the file appears when it is complete. Raises: LongtakeError."""
    from longtake.inference.video_io import VideoWriter

    settings = generator.settings
    started = perf_counter()
    first, made = 0.0, 0
    chunks = generator.stream(image, prompt, num_frames=num_frames, seed=seed, negative=negative)
    with VideoWriter(output, settings.fps, settings.height, settings.width) as writer:
        for index, chunk in enumerate(chunks):
            writer.write(chunk)
            made += len(chunk)
            if index <= 1:  # the given picture is there at once; the first generated chunk is the second
                first = perf_counter() - started
    return GenerationReport(Path(output), made, perf_counter() - started, first)
