"""A video made again from its own record: the same frames, bit for bit, on the machine that made it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import longtake
from longtake.errors import ConfigError
from longtake.inference.cues import Cue
from longtake.inference.generator import GenerationReport, Generator, write_chunks
from longtake.inference.record import (
    FROM_MEMORY,
    Asked,
    VideoRecord,
    Writing,
    check_output,
    check_space_for,
    device_name,
    read_record,
    sidecar,
)
from longtake.inference.script import Story, pixels_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from longtake.inference.source import Source

logger = logging.getLogger(__name__)


def generate_like(
    like: str | Path,
    output: str | Path,
    *,
    source: Source | None = None,
    image: str | Path | None = None,
    overwrite: bool = False,
    look: Mapping[str, Any] | None = None,
    command: str | None = None,
    **build: Any,
) -> GenerationReport:
    """Makes the video `like` again, from the record that it carries.

    Args: `source`, where its weights are now, and `image`, where its first frame is (default: where they were);
    `look`, another `crf` or `scale` than before; `command`, for the record. `build` as those of `generate_file`.
    Raises: DataError when there is no record; ConfigError when a picture or weights are others, or gone.
    """
    record = read_record(like)
    check_output(output, inputs=[like, sidecar(like), image, *record.files], overwrite=overwrite)
    record = _with_pictures(record, image)
    source = replace(record.source() if source is None else source, settings=record.settings)
    begins = [record.image is not None, *(True for change in record.changes if change.image)]
    writing = Writing(**{"crf": record.crf, "scale": record.scale, **(look or {})}, command=command)
    check_space_for(output, source.settings, record.num_frames, writing)
    generator = Generator.build(source, begins=begins, **build)
    record.check_weights(generator, str(like))
    _say_differences(record, generator)
    asked = Asked(record.prompt, record.seed, record.image, record.negative, list(record.changes))
    if record.changes:
        story = _story(record)
        chunks = story.play(story.open(generator, history_blocks=0), ahead=generator.is_ahead)
    else:
        values: dict[str, Any] = {"num_frames": record.num_frames, "seed": record.seed, "negative": record.negative}
        chunks = generator.stream(record.image, record.prompt, **values, ahead=generator.is_ahead)
    how: dict[str, Any] = {"asked": asked, "writing": writing, "num_frames": record.num_frames}
    return write_chunks(generator, chunks, output, given=record.image is not None, **how)


def _with_pictures(record: VideoRecord, image: str | Path | None) -> VideoRecord:
    """The record with its first frame at `image`. Raises: ConfigError when a picture is another one, or gone."""
    places = {name: name for name in record.files}
    if image is not None:
        if record.image is None:
            raise ConfigError(f"the video began without a picture; leave out --image {image}")
        places[record.image] = os.path.abspath(image)
    for name, place in places.items():
        if not os.path.isfile(place):
            if name == FROM_MEMORY:
                what = "the video began with a picture in memory, not a file"
                raise ConfigError(f"{what}; save it as PNG and give that with --image")
            fix = " (say with --image where it is)" if name == record.image else "; put it back"
            raise ConfigError(f"{place}, a picture of the video, is not there{fix}")
    now = Asked(record.prompt)
    files = {place: now.files[now.picture(place)] for place in places.values()}
    others = [place for name, place in places.items() if record.files[name] not in ("", files[place])]
    if others:
        raise ConfigError(f"{', '.join(others)} is not the picture that the video was made from; put the former back")
    if FROM_MEMORY in places:
        logger.warning("%s stands for %s: nobody knows if it is the same one", places[FROM_MEMORY], FROM_MEMORY)
    first = None if record.image is None else places[record.image]
    return record.model_copy(update={"image": first, "files": files})


def _story(record: VideoRecord) -> Story:
    def pixels(name: str | None) -> NDArray[np.uint8] | None:
        return None if name is None else pixels_of(name, record.settings)

    cues = tuple(Cue(c.frame, c.prompt, pixels(c.image), pixels(c.target), c.alone) for c in record.changes)
    return Story(pixels(record.image), record.prompt, record.num_frames, record.seed, record.negative, cues)


def _say_differences(record: VideoRecord, generator: Generator) -> None:
    """Warns of what may give other bits."""
    for name, before, now in (
        ("Longtake", record.longtake, longtake.__version__),
        ("torch", record.torch, torch.__version__),
        ("the device", record.device, device_name(generator)),
    ):
        if before != now:
            logger.warning("%s was %s and is %s here: frames may differ in their last bits", name, before, now)
