"""A trained student ready to stream: one picture and a prompt in, uint8 frames out, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longtake.config import StageConfig
from longtake.errors import CheckpointError, ConfigError
from longtake.flow.schedule import student_sigmas
from longtake.inference.sampling import stream_noise
from longtake.models.conditioning import encode_condition, prepare_image
from longtake.models.dit import VideoDiT
from longtake.models.encoders import Encoders
from longtake.models.weights import load_dit
from longtake.rollout.self_forcing import RollOutRules
from longtake.rollout.stream import stream_latents
from longtake.runs import (
    STUDENTS,
    checkpoints_folder,
    exported_weights,
    latest_checkpoint,
    read_manifest,
    student_stages,
)
from longtake.structs import latent_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image


def rules_of(config: StageConfig) -> RollOutRules:
    """How the student of a stage unrolls, in training and at inference alike."""
    return RollOutRules(
        plan=config.plan.blocks,
        sigmas=student_sigmas(config.flow.steps, config.flow.shift),
        window_frames=config.plan.window_frames,
        sink_frames=config.plan.sink_frames,
        rope=config.rope,
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


@dataclass
class Generator:
    """Weights, encoders and the rules they were trained with. Make it with `Generator.from_run`."""

    model: VideoDiT
    encoders: Encoders
    config: StageConfig
    device: torch.device

    @classmethod
    def from_run(cls, path: str | Path, device: str | torch.device | None = None) -> Generator:
        """The student of a log folder (its last stage) or of a stage folder; EMA weights where there are any.

        Raises: CheckpointError when the folder holds no complete checkpoint of a causal student.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
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
        model = load_dit(exported_weights(checkpoint), device).eval().requires_grad_(False)
        encoders = load_encoders(config, device, with_image=model.config.image_dim is not None)
        return cls(model, encoders, config, device)

    @property
    def fps(self) -> int:
        """Frames a second of the videos it was trained on."""
        return self.config.video.fps

    @property
    def rules(self) -> RollOutRules:
        """Block plan, noise levels, window and positions."""
        return rules_of(self.config)

    @torch.no_grad()
    def stream(
        self,
        image: str | Path | Image.Image | NDArray[np.uint8],
        prompt: str,
        *,
        num_frames: int | None = None,
        seed: int = 0,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yields uint8 [T, h, w, 3]: first the given picture as the model sees it (1 frame), then a block at a time.

        Args: `image` of any size, cropped to the model's aspect and resized; `num_frames` pixel frames in all, None =
        for ever. Whole blocks are generated and the last one is cut. The same arguments give the same frames.
        Raises: DataError for an unreadable picture, ConfigError for a bad number of frames; both before any work.
        """
        if num_frames is not None and num_frames < 1:
            raise ConfigError(f"num_frames={num_frames} must be at least 1")
        if not prompt.strip():
            raise ConfigError("the prompt is empty; say what should move and how")
        if num_frames is None and self.rules.window_frames is None:
            raise ConfigError("plan.window_frames=null keeps every frame; such a student needs num_frames")
        video = self.config.video
        picture = prepare_image(image, video.height, video.width)[None].to(self.device)
        return self._frames(picture, prompt, num_frames, seed)

    @torch.no_grad()
    def _frames(self, picture: Tensor, prompt: str, num_frames: int | None, seed: int) -> Iterator[NDArray[np.uint8]]:
        condition, first_latent = self._condition(picture, prompt)
        size = (
            picture.shape[2] // self.encoders.vae.spatial_stride,
            picture.shape[3] // self.encoders.vae.spatial_stride,
        )
        rules = self.rules
        # Without a window nothing is evicted, and the cache must be as long as the video.
        max_frames = None
        if rules.window_frames is None:
            assert num_frames is not None
            latent = latent_frames(num_frames, self.encoders.vae.temporal_stride)
            max_frames = rules.plan.block_of(latent - 1)[1]
        cache = self.model.new_cache(
            1, *size, rules.window_frames, rules.sink_frames, rules.rope, max_frames=max_frames
        )
        noise = stream_noise(seed, [0], self.model.config.out_channels, size, self.device)
        decoder = self.encoders.vae.decoder_session()
        made = 0
        for latents in stream_latents(self.model, cache, condition, first_latent, noise, rules):
            frames = to_frames(decoder.decode(latents)[0])
            if num_frames is not None:
                frames = frames[: num_frames - made]
            made += len(frames)
            yield frames
            if made == num_frames:
                return

    def _condition(self, picture: Tensor, prompt: str) -> tuple[Any, Tensor | None]:
        condition = encode_condition(self.encoders, picture, [prompt])
        assert condition.frames is not None
        return condition, condition.frames[:, :1, -self.encoders.vae.latent_channels :]


def find_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint of a stage folder, of the last trained stage of a log folder, or `path` itself.

    Raises: CheckpointError.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist; give a log folder (outputs/toy) or a stage folder (outputs/toy/distill)"
        )
    if (path / "manifest.json").is_file():
        return path
    stages = [path] if checkpoints_folder(path).is_dir() else reversed(student_stages(path))
    for stage in stages:
        if (found := latest_checkpoint(checkpoints_folder(stage))) is not None:
            return found
    raise CheckpointError(f"{path} holds no complete checkpoint of a student ({', '.join(STUDENTS)}); train one first")


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
    run: str | Path,
    image: str | Path,
    prompt: str,
    output: str | Path,
    *,
    num_frames: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    device: str | None = None,
) -> GenerationReport:
    """Writes an mp4 while it is generated, with the student in `run`.

    Args: `num_frames` pixel frames or `seconds`; neither = the length of the training clips.
    Raises: LongtakeError before any work for a bad run, picture or length.
    """
    from longtake.inference.video_io import VideoWriter

    generator = Generator.from_run(run, device)
    video = generator.config.video
    if num_frames is None:
        num_frames = video.shape.num_pixel_frames if seconds is None else max(1, round(seconds * video.fps))
    started = perf_counter()
    first, made = 0.0, 0
    chunks = generator.stream(image, prompt, num_frames=num_frames, seed=seed)
    with VideoWriter(output, video.fps, video.height, video.width) as writer:
        for index, chunk in enumerate(chunks):
            writer.write(chunk)
            made += len(chunk)
            if index <= 1:  # the given picture is there at once; the first generated chunk is the second
                first = perf_counter() - started
    return GenerationReport(Path(output), made, perf_counter() - started, first)
