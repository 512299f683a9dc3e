"""A trained student ready to stream: a prompt and mostly a picture in, uint8 frames out, block by block."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longtake.condition import latent_frames, pixel_frames
from longtake.config.generation import frames_of
from longtake.config.stage import StageConfig
from longtake.encoders.condition import prepare_image
from longtake.errors import ConfigError
from longtake.inference.cues import play
from longtake.inference.frames import to_frames
from longtake.inference.pipeline import Pipeline, check_prompt, check_request
from longtake.inference.record import (
    PLAIN,
    Asked,
    Writing,
    check_output,
    check_space_for,
    describe,
    device_name,
    write_record,
)
from longtake.inference.sampling import teacher_latents
from longtake.inference.session import Session
from longtake.inference.session_file import damage, read_session
from longtake.inference.session_restored import restored
from longtake.inference.session_state import SessionInputs
from longtake.inference.source import Source
from longtake.inference.video import Video
from longtake.inference.video_io import VideoWriter
from longtake.models.execution import compilations
from longtake.progress import Progress

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from longtake.inference.pipeline import Picture


class Generator(Pipeline):
    """A pipeline that makes videos. Make it with `from_run`, `from_model` or `build`."""

    def __repr__(self) -> str:
        sizes, rules = self.model.config, self.settings
        return (
            f"Generator({sizes.num_layers} layers of width {sizes.dim}, {rules.height}x{rules.width} at {rules.fps} "
            f"frames/s, {rules.precision} on {self.device})"
        )

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

    def video(
        self,
        image: Picture | None = None,
        prompt: str = "",
        *,
        seconds: float | None = None,
        num_frames: int | None = None,
        output: str | Path | None = None,
        seed: int = 0,
        negative: str | None = None,
        overwrite: bool = False,
    ) -> Video:
        """A whole video, which a notebook shows; its frames are in this process's memory.

        Args: as those of `stream`; `seconds` or `num_frames`, neither = the length of the training clips; `output`, a
        file that is written meanwhile, in the place of another one with `overwrite`.
        Raises: as `stream`, ConfigError and OutputError for `output`; all before any work.
        """
        length = self.length(num_frames, seconds)
        if output is not None:
            check_output(output, inputs=[image] if isinstance(image, str | Path) else [], overwrite=overwrite)
        chunks = self.stream(image, prompt, num_frames=length, seed=seed, negative=negative, ahead=self.is_ahead)
        kept: list[NDArray[np.uint8]] = []
        asked = Asked(prompt, seed, image, negative)

        def keeping() -> Iterator[NDArray[np.uint8]]:
            for chunk in chunks:
                kept.append(chunk)
                yield chunk

        if output is not None:
            write_chunks(self, keeping(), output, given=image is not None, asked=asked, num_frames=length)
        else:
            kept.extend(chunks)
        record = partial(describe, self, asked, length, PLAIN)
        return Video(np.concatenate(kept), self.fps, None if output is None else Path(output), record)

    def stream(
        self,
        image: Picture | None = None,
        prompt: str = "",
        *,
        num_frames: int | None = None,
        seed: int = 0,
        negative: str | None = None,
        ahead: bool = False,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yields uint8 [T, h, w, 3], a block at a time; the first is the given picture as the model sees it (1 frame).

        Memory does not grow with the length: nothing but the window, the decoder's features and one block is kept.

        Args: `image` of any size, cropped to the model's aspect and resized; None: the first block is generated, which
        image-to-video weights refuse (what others do with one, the rule `picture` says). `num_frames` pixel frames in
        all, None = for ever. Whole blocks are generated and the last one is cut. `negative` is the text of the
        unconditional side of guidance (default: none). `ahead` begins a block before the one before it is fetched, so
        that on a GPU fetching and what the caller does overlap with the next block; frames come a block later, but
        those of the first block, and after a change, as soon as they are decoded, in two pieces. The same arguments
        give the same frames.
        Raises: DataError for an unreadable picture, ConfigError for one that is missing or that the weights cannot
        take, a bad number of frames, an empty prompt or a negative prompt without guidance; all before any work.
        """
        frames_of(num_frames, None, self.fps)
        if self.settings.sampler == "whole":
            return self._whole(image, prompt, num_frames, seed, negative)
        if num_frames is None and self.plan.window_frames is None:
            raise ConfigError("plan.window_frames=null keeps every frame; such a student needs num_frames")
        session = self.open(image, prompt, seed=seed, negative=negative, history_blocks=0, max_frames=num_frames)
        return play(session, num_frames, ahead=ahead)

    def open(
        self,
        image: Picture | None = None,
        prompt: str = "",
        *,
        seed: int = 0,
        negative: str | None = None,
        guidance: float | None = None,
        history_blocks: int | None = None,
        ready_blocks: int = 0,
        history_caches: int | None = None,
        max_frames: int | None = None,
    ) -> Session:
        """A video whose prompt and picture can change while it is made; no work is done before its first frame.

        Args: as those of `stream`; `guidance`, and `history_blocks` by which it can be rewound (default: those of the
        settings); of these `ready_blocks` are taken back at once: the decoder's features of each are kept, which are
        else made anew; `history_caches`, how many caches the history may hold beside the one in use: each change leaves
        one behind, and with the oldest of too many go its blocks (default: all stay); `max_frames` pixel frames of a
        scene, which a student that keeps every frame must know.
        Raises: as `stream`, and ConfigError for a missing `max_frames`.
        """
        if self.settings.sampler == "whole":
            raise ConfigError(
                "sampler=whole makes all frames at once, and a session block by block; use sampler=stream"
            )
        strength = self.settings.guidance if guidance is None else guidance
        check_request(strength, seed, negative)
        self.beginning.check(given=image is not None)
        plan = self.beginning.plan_of(given=image is not None)
        if max_frames is None and self.plan.window_frames is None:
            raise ConfigError("plan.window_frames=null keeps every frame; such a student needs max_frames")
        most = None
        if max_frames is not None:
            latent = latent_frames(max_frames, self.encoders.vae.temporal_stride)
            most = plan.block_of(latent - 1)[1]
        kept, layers = self.plan.window_frames or most or 0, self.model.config.num_layers
        self.check_memory(kept, layers, max(plan.first_frames, plan.block_frames), strength)
        return Session(
            self,
            SessionInputs(check_prompt(prompt), None if image is None else self.prepare(image)),
            seed=seed,
            guidance=strength,
            negative=negative or "",
            history_blocks=self.settings.history_blocks if history_blocks is None else history_blocks,
            ready_blocks=ready_blocks,
            history_caches=history_caches,
            max_latent_frames=most,
        )

    def resume(
        self,
        path: str | Path,
        *,
        history_blocks: int | None = None,
        ready_blocks: int = 0,
        history_caches: int | None = None,
    ) -> Session:
        """The session in a file of `Session.save`, going on with the same frames (bit for bit on the same machine).

        Args: as those of `open`.

        Raises: CheckpointError when the file is none, or when weights, rules or sizes are others than they were;
        ConfigError when several processes compute the calls of this generator together.
        """
        if self.model.execution.split is not None:
            raise ConfigError("a session file holds the cache of one process; resume it without sequence parallelism")
        kept = self.settings.history_blocks if history_blocks is None else history_blocks
        values, tensors = read_session(Path(path), self)
        with damage(Path(path)):
            past = {"history_blocks": kept, "ready_blocks": ready_blocks, "history_caches": history_caches}
            return restored(self, values, tensors, **past)

    def guided(self, guidance: float) -> Generator:
        """Itself with another classifier-free guidance; weights, encoders and caches are the same ones."""
        if guidance == self.settings.guidance:
            return self
        return replace(self, settings=self.settings.model_copy(update={"guidance": guidance}))

    def warm_up(self) -> int:
        """Makes what a video needs and does not depend on its picture: kernels are chosen, compiled and recorded for
        every pass until the window is full and one more. The next video that no other runs beside finds it all.

        Returns: how many blocks it made for that.
        """
        if self.settings.sampler == "whole":
            return 0
        started, before = perf_counter(), compilations()
        plan, picture = self.plan, None
        if self.beginning.needed:
            picture = np.zeros((self.settings.height, self.settings.width, 3), np.uint8)
        # The past grows by a block until the window is full, and the block after that commits one with a full past.
        past = max(0, (plan.window_frames or 0) - plan.block_frames - plan.first_frames)
        full = 2 + -(-past // plan.block_frames)
        # The pass that brings the condition is captured in the second video: only then its keys have a place.
        videos = [full] if self.denoiser.graphs is None else [full, 1]
        for blocks in videos:
            length = pixel_frames(plan.first_frames + blocks * plan.block_frames, self.encoders.vae.temporal_stride)
            with self.caches.captured_at_once():
                for _ in self.stream(picture, "a", num_frames=length):
                    pass
        logger.info("warm after %.1f s; %s", perf_counter() - started, compilations().since(before))
        return sum(videos)

    def length(self, num_frames: int | None, seconds: float | None) -> int:
        """The length in pixel frames that was asked for; by default that of the training clips. Raises: ConfigError."""
        given = frames_of(num_frames, seconds, self.fps)
        return (
            pixel_frames(self.settings.num_latent_frames, self.encoders.vae.temporal_stride) if given is None else given
        )

    def _whole(
        self, image: Picture | None, prompt: str, num_frames: int | None, seed: int, negative: str | None
    ) -> Iterator[NDArray[np.uint8]]:
        """The frames of a whole clip at once, from bidirectional weights: checked now, made when they are asked for."""
        if num_frames is None:
            raise ConfigError("sampler=whole makes all frames at once; it needs num_frames")
        check_request(self.settings.guidance, seed, negative)
        check_prompt(prompt)
        self.beginning.check(given=image is not None)
        if image is not None and self.beginning.picture == "still":
            raise ConfigError("sampler=whole has no blocks for a picture to stand still in; set picture=frame")
        count = latent_frames(num_frames, self.encoders.vae.temporal_stride)
        self.check_memory(count, 1, count, self.settings.guidance)
        picture, settings = None if image is None else self.prepare(image), self.settings

        @torch.no_grad()
        def clip() -> Iterator[NDArray[np.uint8]]:
            condition, first_latent = self.condition(picture, prompt)
            latents = teacher_latents(
                self.model,
                condition,
                self.encoders.text.encode([negative or ""]) if settings.guidance != 1 else condition.text,
                count,
                self.latent_size,
                seed=seed,
                videos=[0],
                num_steps=len(settings.steps),
                shift=settings.shift,
                guidance=settings.guidance,
                first_latent=None if self.model.config.condition_channels else first_latent,
            )
            yield to_frames(self.new_decoder().decode(latents)[0])[:num_frames]

        return clip()


@dataclass(frozen=True)
class GenerationReport:
    """What a generation took, and `note`, what is to be said of it; prints as one line."""

    output: Path
    num_frames: int
    seconds: float
    first_frame_seconds: float
    note: str | None = None

    @property
    def frames_per_second(self) -> float:
        """Generated frames a second, decoding and writing counted."""
        return self.num_frames / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.num_frames} frames in {self.seconds:.1f} s, {self.frames_per_second:.1f} frames/s, "
            f"first generated frame after {self.first_frame_seconds:.2f} s"
        ) + ("" if self.note is None else f"; {self.note}")


def generate_file(
    run: str | Path | Source,
    image: str | Path | None,
    prompt: str,
    output: str | Path,
    *,
    num_frames: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    negative: str | None = None,
    overwrite: bool = False,
    writing: Writing = PLAIN,
    **build: Any,
) -> GenerationReport:
    """Writes a video while it is generated, with the student in `run` or of a source.

    Args: `image` as in `Generator.stream`; `num_frames` pixel frames or `seconds`; neither = the length of the training
    clips. `overwrite` lets `output` replace another file; `writing`, how it is written. `build`: `device`, `split`
    and `decode_device` as in `Generator.build`.
    Raises: LongtakeError before any work for a bad run, picture, length or output.
    """
    check_output(output, inputs=[image], overwrite=overwrite)
    source = run if isinstance(run, Source) else Source.of_run(run)
    check_request(source.settings.guidance, seed, negative)
    check_prompt(prompt)
    check_space_for(output, source.settings, frames_of(num_frames, seconds, source.settings.fps), writing)
    if image is not None:
        prepare_image(image, source.settings.height, source.settings.width)
    asked = Asked(prompt, seed, image, negative)
    generator = Generator.build(source, begins=[image is not None], **build)
    length = generator.length(num_frames, seconds)
    chunks = generator.stream(image, prompt, num_frames=length, seed=seed, negative=negative, ahead=generator.is_ahead)
    how: dict[str, Any] = {"given": image is not None, "asked": asked, "writing": writing, "num_frames": length}
    return write_chunks(generator, chunks, output, **how)


def _told(
    generator: Generator, chunks: Iterable[NDArray[np.uint8]], output: str | Path, num_frames: int, asked: Asked | None
) -> Iterator[NDArray[np.uint8]]:
    """The same chunks; says what is made and how far it is."""
    settings = generator.settings
    seed = "" if asked is None else f", seed {asked.seed}"
    size, length = f"{settings.height}x{settings.width}", num_frames / settings.fps
    logger.info("%s: %d frames of %s, %.1f s%s, on %s", output, num_frames, size, length, seed, device_name(generator))
    progress = Progress(Path(output).name, num_frames, "frames")
    try:
        for chunk in chunks:
            progress.update(progress.done + len(chunk))
            yield chunk
    finally:
        progress.finish()


def write_chunks(
    generator: Generator,
    chunks: Iterable[NDArray[np.uint8]],
    output: str | Path,
    *,
    given: bool = True,
    keep: bool = True,
    finish: bool = False,
    asked: Asked | None = None,
    writing: Writing = PLAIN,
    num_frames: int | None = None,
) -> GenerationReport:
    """Writes frames that arrive in pieces as one video, which appears when it is complete. Raises: LongtakeError.

    `given`: they begin with a picture; `keep` as in `VideoWriter`; with `finish` it is also completed when making it
    fails; `asked`, what its record says was asked for (None: it has no record); `num_frames` that will come: given, it
    is said how far they are. Of the processes that compute a generator's calls together, one writes.
    """
    settings, split = generator.settings, generator.model.execution.split
    started = perf_counter()
    first, made, failure = 0.0, 0, None
    leads = split is None or split.leads
    size = settings.height, settings.width
    if leads and num_frames is not None:
        chunks = _told(generator, chunks, output, num_frames, asked)
    how: dict[str, Any] = {"crf": writing.crf, "scale": writing.scale, "keep": keep}
    record = None
    with VideoWriter(output, settings.fps, *size, **how) if leads else nullcontext() as writer:
        try:
            for index, chunk in enumerate(chunks):
                if writer is not None:
                    writer.write(chunk)
                made += len(chunk)
                if index <= given:  # the given picture is there at once; the first generated chunk is the second
                    first = perf_counter() - started
        except BaseException as error:
            if not finish or made == 0:
                raise
            failure = error  # raised when the file is complete: an hour of it may be there already
        if writer is not None and asked is not None and made:
            record = describe(generator, asked, made, writing)
            writer.record = None if record is None else record.model_dump(mode="json")
    if record is not None and asked is not None:
        write_record(output, record, asked.beside)
    if failure is not None:
        raise failure
    note = generator.beginning.zero_shot(given=given)
    return GenerationReport(Path(output), made, perf_counter() - started, first, note)
