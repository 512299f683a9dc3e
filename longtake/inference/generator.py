"""A trained student ready to stream: one picture and a prompt in, uint8 frames out, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longtake.config import StageConfig
from longtake.config_generation import GenerationConfig, frames_of
from longtake.devices import usable_device
from longtake.errors import ConfigError
from longtake.inference.fit import check_fit, check_memory
from longtake.inference.frames import Frames, fetched, to_frames
from longtake.inference.sampling import teacher_latents
from longtake.inference.source import Source
from longtake.inference.video_io import VIDEO_SUFFIXES, VideoWriter
from longtake.models.conditioning import encode_condition, prepare_image
from longtake.models.dit import VideoDiT
from longtake.models.encoders import Encoders
from longtake.models.execution import Execution
from longtake.models.token_split import TokenSplit, check_heads
from longtake.models.vae import DecoderSession, VideoVAE
from longtake.models.weights import load_dit, open_dit
from longtake.outputs import check_output_file
from longtake.plan import StreamPlan
from longtake.rollout.cuda_graphs import CUDAGraphRunner
from longtake.rollout.denoise import Denoiser
from longtake.structs import Condition, latent_frames, pixel_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from longtake.inference.session import Session


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
class Generator:
    """Weights, encoders and the rules to stream by. Make it with `from_run`, `from_model` or `build`."""

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
    def build(
        cls,
        source: Source,
        device: str | torch.device | None = None,
        *,
        split: TokenSplit | None = None,
        decode_device: str | torch.device | None = None,
        graphs: bool = True,
    ) -> Generator:
        """Loads weights and encoders: the one place that makes a generator.

        Args: `split`, the processes that compute each call of the transformer together (`Mesh.sequence`); all of them
        then make the same calls of this generator and get the same frames. `decode_device` has a second copy of the VAE
        that decodes there, so that another GPU can do it beside the transformer (default: no second copy). `graphs`
        has passes recorded on a GPU and replayed (`rollout/cuda_graphs.py`), with the same frames.
        With `precision` bf16 the matrix weights, the cache, the text and the image encoder are bfloat16; the VAE and
        what Wan computes in float32 stay float32.
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

    def stream(
        self,
        image: str | Path | Image.Image | NDArray[np.uint8],
        prompt: str,
        *,
        num_frames: int | None = None,
        seed: int = 0,
        negative: str | None = None,
        ahead: bool = False,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yields uint8 [T, h, w, 3]: first the given picture as the model sees it (1 frame), then a block at a time.

        Memory does not grow with the length: nothing but the window, the decoder's features and one block is kept.

        Args: `image` of any size, cropped to the model's aspect and resized; `num_frames` pixel frames in all, None =
        for ever. Whole blocks are generated and the last one is cut. `negative` is the text of the unconditional side
        of guidance (default: none). `ahead` begins a block before the one before it is fetched, so that on a GPU
        fetching and what the caller does overlap with the next block; frames come a block later. The same arguments
        give the same frames.
        Raises: DataError for an unreadable picture, ConfigError for a bad number of frames, an empty prompt or a
        negative prompt without guidance; all before any work.
        """
        frames_of(num_frames, None, self.fps)
        if num_frames is None and self.settings.sampler == "whole":
            raise ConfigError("sampler=whole makes all frames at once; it needs num_frames")
        if num_frames is None and self.plan.window_frames is None:
            raise ConfigError("plan.window_frames=null keeps every frame; such a student needs num_frames")
        if num_frames is not None and self.settings.sampler == "whole":
            check_negative(negative, self.settings)
            latent = latent_frames(num_frames, self.encoders.vae.temporal_stride)
            check_memory(self.model, self.encoders, self.settings, latent, 1, latent)
            return self._whole(self.prepare(image), check_prompt(prompt), negative or "", num_frames, check_seed(seed))
        session = self.open(image, prompt, seed=seed, negative=negative, history_blocks=0, max_frames=num_frames)
        return fetched(_Blocks(session, num_frames), ahead=ahead)

    def open(
        self,
        image: str | Path | Image.Image | NDArray[np.uint8],
        prompt: str,
        *,
        seed: int = 0,
        negative: str | None = None,
        history_blocks: int | None = None,
        max_frames: int | None = None,
    ) -> Session:
        """A video whose prompt and picture can change while it is made; no work is done before its first frame.

        Args: as those of `stream`; `history_blocks` by which it can be rewound (default: that of the settings);
        `max_frames` pixel frames of a scene, which a student that keeps every frame must know.
        Raises: DataError for an unreadable picture, ConfigError for an empty prompt, a negative prompt without guidance
        or a missing `max_frames`.
        """
        from longtake.inference.session import Look, Session

        if self.settings.sampler == "whole":
            raise ConfigError(
                "sampler=whole makes all frames at once, and a session block by block; use sampler=stream"
            )
        check_negative(negative, self.settings)
        if max_frames is None and self.plan.window_frames is None:
            raise ConfigError("plan.window_frames=null keeps every frame; such a student needs max_frames")
        most = None
        if max_frames is not None:
            latent = latent_frames(max_frames, self.encoders.vae.temporal_stride)
            most = self.plan.block_of(latent - 1)[1]
        kept, layers = self.plan.window_frames or most or 0, self.model.config.num_layers
        check_memory(self.model, self.encoders, self.settings, kept, layers, self.plan.block_frames)
        return Session(
            self,
            Look(check_prompt(prompt), self.prepare(image)),
            seed=check_seed(seed),
            negative=negative or "",
            history_blocks=self.settings.history_blocks if history_blocks is None else history_blocks,
            max_latent_frames=most,
        )

    def resume(self, path: str | Path, *, history_blocks: int | None = None) -> Session:
        """The session in a file of `Session.save`, going on with the same frames (bit for bit on the same machine).

        Raises: CheckpointError when the file is none, or when weights, rules or sizes are others than they were;
        ConfigError when several processes compute the calls of this generator together.
        """
        from longtake.inference.session_file import load_session

        if self.model.execution.split is not None:
            raise ConfigError("a session file holds the cache of one process; resume it without sequence parallelism")
        return load_session(
            self, Path(path), self.settings.history_blocks if history_blocks is None else history_blocks
        )

    @torch.no_grad()
    def _whole(
        self, picture: Tensor, prompt: str, negative: str, num_frames: int, seed: int
    ) -> Iterator[NDArray[np.uint8]]:
        """The frames of a whole clip at once, from bidirectional weights."""
        condition, first_latent = self.condition(picture, prompt)
        guided = self.settings.guidance != 1
        latents = teacher_latents(
            self.model,
            condition,
            self.encoders.text.encode([negative]) if guided else condition.text,
            latent_frames(num_frames, self.encoders.vae.temporal_stride),
            (first_latent.shape[3], first_latent.shape[4]),
            seed=seed,
            videos=[0],
            num_steps=len(self.settings.steps),
            shift=self.settings.shift,
            guidance=self.settings.guidance,
            first_latent=None if self.model.config.condition_channels else first_latent,
        )
        yield to_frames(self.encoders.vae.decode(latents)[0])[:num_frames]

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


class _Blocks(Iterator[Frames]):
    """The frames of a session, `num_frames` in all, as they are begun."""

    def __init__(self, session: Session, num_frames: int | None) -> None:
        self._session, self._num_frames = session, num_frames

    def __next__(self) -> Frames:
        before = self._session.num_frames
        if self._num_frames is None:
            return self._session.begin()
        if before >= self._num_frames:
            raise StopIteration
        return self._session.begin().cut(self._num_frames - before)


def _second_device(name: str | torch.device, split: TokenSplit | None) -> torch.device:
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
    split: TokenSplit | None = None,
    decode_device: str | None = None,
    overwrite: bool = False,
) -> GenerationReport:
    """Writes an mp4 while it is generated, with the student in `run` or of a source; `split` and `decode_device` as in
    `Generator.build`.

    Args: `num_frames` pixel frames or `seconds`; neither = the length of the training clips. `overwrite` lets `output`
    replace another file.
    Raises: LongtakeError before any work for a bad run, picture, length or output.
    """
    check_output_file(output, suffixes=VIDEO_SUFFIXES, inputs=[image], overwrite=overwrite)
    source = run if isinstance(run, Source) else Source.of_run(run)
    check_negative(negative, source.settings)
    check_prompt(prompt)
    check_seed(seed)
    frames_of(num_frames, seconds, source.settings.fps)
    prepare_image(image, source.settings.height, source.settings.width)
    generator = Generator.build(source, device, split=split, decode_device=decode_device)
    length = num_pixel_frames(generator, num_frames, seconds)
    return write_video(generator, image, prompt, output, num_frames=length, seed=seed, negative=negative)


def num_pixel_frames(generator: Generator, num_frames: int | None, seconds: float | None) -> int:
    """The length in pixel frames that was asked for; by default that of the training clips. Raises: ConfigError."""
    given = frames_of(num_frames, seconds, generator.fps)
    settings, stride = generator.settings, generator.encoders.vae.temporal_stride
    return pixel_frames(settings.num_latent_frames, stride) if given is None else given


def write_video(
    generator: Generator,
    image: str | Path,
    prompt: str,
    output: str | Path,
    *,
    num_frames: int,
    seed: int = 0,
    negative: str | None = None,
    keep: bool = True,
) -> GenerationReport:
    """Writes one mp4, a block at a time, as `write_chunks` does. Raises: LongtakeError."""
    chunks = generator.stream(
        image, prompt, num_frames=num_frames, seed=seed, negative=negative, ahead=generator.is_ahead
    )
    return write_chunks(generator, chunks, output, keep=keep)


def write_chunks(
    generator: Generator, chunks: Iterable[NDArray[np.uint8]], output: str | Path, *, keep: bool = True
) -> GenerationReport:
    """Writes frames that arrive in pieces as one mp4, which appears when it is complete. Raises: LongtakeError.

    `keep` as in `VideoWriter`. Of the processes that compute a generator's calls together, one writes.
    """
    settings, split = generator.settings, generator.model.execution.split
    started = perf_counter()
    first, made = 0.0, 0
    leads = split is None or split.leads
    size = settings.height, settings.width
    with VideoWriter(output, settings.fps, *size, keep=keep) if leads else nullcontext() as writer:
        for index, chunk in enumerate(chunks):
            if writer is not None:
                writer.write(chunk)
            made += len(chunk)
            if index <= 1:  # the given picture is there at once; the first generated chunk is the second
                first = perf_counter() - started
    return GenerationReport(Path(output), made, perf_counter() - started, first)
