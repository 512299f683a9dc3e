"""A video by script: a YAML file that says when prompt and picture change, checked as a whole before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from longtake.config.base import Settings, read_yaml
from longtake.config.generation import MAX_FRAMES, GenerationConfig, frames_of
from longtake.encoders.condition import prepare_image
from longtake.errors import ConfigError
from longtake.inference.cues import Cue, play
from longtake.inference.generator import GenerationReport, Generator, Source, write_chunks
from longtake.inference.pipeline import check_prompt, check_request
from longtake.inference.record import PLAIN, Asked, Writing, check_output, check_space_for

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from longtake.inference.session import Session
    from longtake.models.sequence_parallel import SequenceParallel


def _check_prompt(text: str) -> None:
    try:
        check_prompt(text)
    except ConfigError as error:
        raise ValueError(str(error)) from None


class Event(Settings):
    """A change at a time of the video. It takes effect with the first block that begins at this time or later."""

    seconds: float | None = Field(default=None, gt=0, le=MAX_FRAMES, description="time of the change, or")
    frame: int | None = Field(default=None, gt=0, description="pixel frame of the change")
    prompt: str | None = Field(default=None, description="what happens from then on")
    image: str | None = Field(default=None, description="a cut: picture of a new scene")
    alone: bool = Field(default=False, description="a cut to a scene of the prompt alone, without a picture")
    target: str | None = Field(
        default=None, description="a picture to move towards, without a cut unless image says so"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.seconds is None) == (self.frame is None):
            raise ValueError("an event needs its time: either seconds or frame")
        if self.prompt is None and self.image is None and self.target is None and not self.alone:
            raise ValueError(
                "an event without prompt, image or target changes nothing; give one of them or leave it out"
            )
        if self.image is not None and self.alone:
            raise ValueError("an event with image and alone cuts to a picture and to none; leave one of them out")
        if self.prompt is not None:
            _check_prompt(self.prompt)
        return self


class Script(Settings):
    """A video: how it begins, how long it is, what changes. Pictures are paths beside the script's file."""

    image: str | None = Field(default=None, description="the first frame; text-to-video weights have none")
    prompt: str = Field(description="what happens until an event says otherwise")
    seconds: float | None = Field(default=None, gt=0, description="length, or")
    frames: int | None = Field(default=None, gt=0, description="length in pixel frames")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the noise")
    guidance: float | None = Field(default=None, ge=0, description="classifier-free guidance; null = that of the rules")
    negative: str | None = Field(default=None, description="what should not happen; needs guidance")
    events: list[Event] = Field(default=[], description="changes, in the order of their times")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seconds is not None and self.frames is not None:
            raise ValueError("seconds and frames are both given; give one of them")
        _check_prompt(self.prompt)
        return self


@dataclass(frozen=True)
class Story:
    """A script that was checked and whose pictures, `files`, were read; `asked`, the same by names of files."""

    image: NDArray[np.uint8] | None
    prompt: str
    num_frames: int
    seed: int
    negative: str | None
    cues: tuple[Cue, ...]
    files: tuple[Path, ...] = ()
    asked: Asked | None = None
    guidance: float | None = None  # that of the rules

    def open(self, generator: Generator, *, history_blocks: int | None = None) -> Session:
        """A session at the beginning.

        Raises: ConfigError for a picture that is missing, or that the weights cannot take, or a target that they cannot
        be told of, and for an event that no block follows.
        """
        for given in self.begins:
            generator.beginning.check(given=given)
        self._check_cues(generator)
        session = generator.open(
            self.image,
            self.prompt,
            seed=self.seed,
            guidance=self.guidance,
            negative=self.negative,
            history_blocks=history_blocks,
            max_frames=None if generator.plan.window_frames is not None else self.num_frames,
        )
        if any(cue.target is not None for cue in self.cues):
            session.image_target = self.image  # refused where no target can be
            session.image_target = None
        return session

    def play(self, session: Session, *, ahead: bool = False) -> Iterator[NDArray[np.uint8]]:
        """Yields the frames from where `session` stands to the end of the story, as `cues.play` does."""
        return play(session, self.num_frames, self.cues, ahead=ahead)

    @property
    def begins(self) -> list[bool]:
        """Whether its scenes begin with a picture: the first one, and those that events cut to."""
        return [self.image is not None, *(cue.image is not None for cue in self.cues if cue.is_cut)]

    def _check_cues(self, generator: Generator) -> None:
        """Raises ConfigError for a cue after which no block begins, or whose change another one undoes before it."""
        block, fps = generator.plan.block_frames * generator.encoders.vae.temporal_stride, generator.fps

        def where(number: int) -> str:
            return f"event {number + 1} at frame {self.cues[number].frame} ({self.cues[number].frame / fps:g} s)"

        # The latest block, from which frame to which, and how long the next one is.
        begin, made, step = 0, 0, generator.first_pixels(given=self.image is not None)
        for number, cue in enumerate(self.cues):
            before = made
            while made < cue.frame:
                begin, made, step = made, made + step, block
            if made >= self.num_frames:
                raise ConfigError(
                    f"{where(number)} never shows: it takes effect where a block begins, and the last does at frame "
                    f"{begin} of {self.num_frames}; make the video longer, or the event earlier"
                )
            if number > 0 and made == before and cue.undoes(self.cues[number - 1]):
                raise ConfigError(
                    f"{where(number - 1)} never shows: no block begins between it and {where(number)}; make them "
                    f"{block} frames apart, or one event"
                )
            if cue.is_cut:
                step = generator.first_pixels(given=cue.image is not None)  # a cut begins with its picture


def read_story(
    path: str | Path,
    settings: GenerationConfig,
    *,
    num_frames: int | None = None,
    seconds: float | None = None,
    **given: Any,
) -> Story:
    """The story in a YAML file; what is given (a length, `seed`, `negative`) wins over the file.

    Raises: ConfigError for wrong keys, values and times, DataError for a picture that cannot be read.
    """
    path = Path(path)
    length = {"frames": num_frames, "seconds": seconds} if (num_frames, seconds) != (None, None) else {}
    script = Script.from_tree({**read_yaml(path), **length, **given})
    check_request(settings.guidance if script.guidance is None else script.guidance, script.seed, script.negative)
    frames = frames_of(script.frames, script.seconds, settings.fps)
    if frames is None:
        raise ConfigError(f"{path} does not say how long the video is; add seconds or frames")
    files, begin = [], None if script.image is None else path.parent / script.image
    asked = Asked(script.prompt, script.seed, begin, script.negative)

    def picture(name: str | None) -> NDArray[np.uint8] | None:
        if name is None:
            return None
        files.append(path.parent / name)
        return pixels_of(files[-1], settings)

    cues: list[Cue] = []
    for number, event in enumerate(script.events, 1):
        frame = event.frame or max(1, round((event.seconds or 0) * settings.fps))
        where = f"{path}: event {number} at frame {frame} ({frame / settings.fps:g} s)"
        if cues and frame <= cues[-1].frame:
            raise ConfigError(f"{where} is not after the one before it; order events by time, one for each")
        if frame >= frames:
            raise ConfigError(f"{where} is after the end, frame {frames}; make the video longer, or leave it out")
        cues.append(Cue(frame, event.prompt, picture(event.image), picture(event.target), event.alone))
        told = {key: value for key in ("prompt", "alone") if (value := getattr(event, key))}
        named = {key: str(path.parent / name) for key in ("image", "target") if (name := getattr(event, key))}
        asked.change(frame, **told, **named)
    values = script.prompt, frames, script.seed, script.negative
    return Story(picture(script.image), *values, tuple(cues), tuple(files), asked, script.guidance)


def pixels_of(picture: str | Path, settings: GenerationConfig) -> NDArray[np.uint8]:
    """A picture at the size of the video, uint8 [h, w, 3]. Raises: DataError."""
    pixels = prepare_image(picture, settings.height, settings.width)
    return pixels.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()


def generate_story(
    source: Source,
    script: str | Path,
    output: str | Path,
    *,
    device: str | torch.device | None = None,
    split: SequenceParallel | None = None,
    decode_device: str | None = None,
    overwrite: bool = False,
    writing: Writing = PLAIN,
    **given: Any,
) -> GenerationReport:
    """Writes the video of a script with the student of `source`; `split` and `decode_device` as in `Generator.build`,
    `overwrite` and `writing` as in `generate_file`, `given` as in `read_story`.

    Raises: LongtakeError before any frame for a bad script, picture, source or output.
    """
    story = read_story(script, source.settings, **given)
    check_output(output, inputs=[script, *story.files], overwrite=overwrite)
    check_space_for(output, source.settings, story.num_frames, writing)
    generator = Generator.build(source, device, split=split, decode_device=decode_device, begins=story.begins)
    if story.guidance is not None:
        generator = generator.guided(story.guidance)  # which its record then holds
    frames = story.play(story.open(generator, history_blocks=0), ahead=generator.is_ahead)
    how: dict[str, Any] = {"asked": story.asked, "writing": writing, "num_frames": story.num_frames}
    report = write_chunks(generator, frames, output, given=story.image is not None, **how)
    return replace(report, note=generator.beginning.zero_shot(given=any(story.begins)))
