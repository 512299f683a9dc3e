"""What a video says about itself, in its own metadata and beside it: enough to make it again.

Beside `a.mp4` lies `a.json`, beside a video of any other kind its kind is in the name, too: `a.gif.json`, and
`a.png.json` beside a folder `a` of pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from longtake.config.base import Settings
from longtake.config.generation import GenerationConfig
from longtake.errors import ConfigError, DataError
from longtake.inference.containers import SUFFIXES, Target, read_metadata
from longtake.inference.pipeline import Pipeline
from longtake.inference.session_file import made_with
from longtake.inference.source import Source
from longtake.json_text import parse_json
from longtake.outputs import check_output_file, check_space, write_whole
from longtake.weights.locate import is_hub_name
from longtake.weights.students import find_student

if TYPE_CHECKING:
    from longtake.inference.pipeline import Picture

FROM_MEMORY = "a picture that was no file"
# Of pictures with grain at the default quality, twice where packets are written again at the end
_BYTES_A_PIXEL = {"mp4": 0.15, "webm": 0.15, "gif": 0.8, "webp": 0.3, "png": 2.0}
_KEY = "record"  # in the file beside a video, which may say more


class Change(Settings):
    """A change of a video in the making; it takes effect with the first block that begins at this frame or later."""

    frame: int = Field(gt=0, description="pixel frames that had been made")
    prompt: str | None = Field(default=None, description="what happens from then on")
    image: str | None = Field(default=None, description="a cut: picture of a new scene")
    alone: bool = Field(default=False, description="a cut to a scene without a picture")
    target: str | None = Field(default=None, description="a picture to move towards")


class VideoRecord(Settings):
    """How a video was made."""

    longtake: str = Field(description="version of Longtake")
    torch: str = Field(description="version of torch")
    device: str = Field(description="what computed it")
    command: str | None = Field(default=None, description="the command line, None from Python")
    weights: str = Field(description="path, or name on the hub")
    encoders: str = Field(description="path, or name on the hub")
    student: str | None = Field(default=None, description="name of a published student")
    digests: dict[str, str] = Field(description="a key of each network's weights")
    settings: GenerationConfig = Field(description="the rules")
    image: str | None = Field(default=None, description="the first frame")
    prompt: str = Field(description="what happens")
    seed: int = Field(ge=0, lt=2**63, description="seed of the noise")
    negative: str | None = Field(default=None, description="what should not happen")
    num_frames: int = Field(gt=0, description="length in pixel frames")
    changes: list[Change] = Field(default=[], description="changes on the way")
    files: dict[str, str] = Field(default={}, description="SHA-256 of each picture")
    crf: int = Field(ge=0, le=51, description="as given to the encoder")
    scale: float = Field(gt=0, description="by which pictures were enlarged")

    def source(self) -> Source:
        """Where its weights were, and its rules. Raises: ConfigError when they are not there any more."""
        for path in (self.weights, self.encoders):
            if not is_hub_name(path) and not os.path.exists(path):
                raise ConfigError(f"{path}, of which the video was made, is not there; say with --model where it is")
        student = None if self.student is None else find_student(self.weights)
        return Source(Path(self.weights), Path(self.encoders), self.settings, student=student)

    def check_weights(self, pipeline: Pipeline, name: str) -> None:
        """Raises ConfigError when the networks of `pipeline` are others than those that made the video `name`."""
        here = made_with(pipeline)["weights"]
        if others := sorted(k for k in here.keys() | self.digests.keys() if here.get(k) != self.digests.get(k)):
            raise ConfigError(
                f"{name} was made with other weights of: {', '.join(others)} (they were at {self.weights}, encoders at "
                f"{self.encoders}); say with --model and --encoders where those are"
            )


@dataclass
class Asked:
    """What a video was asked to show, by names of files; `changes` may grow while it is made. `beside`: what the file
    beside it says, too.
    """

    prompt: str
    seed: int = 0
    image: Picture | None = None
    negative: str | None = None
    changes: list[Change] = field(default_factory=list)
    beside: Mapping[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.image = None if self.image is None else self.picture(self.image)
        self.changes = [self._named(change) for change in self.changes]

    def picture(self, path: Picture) -> str:
        """The name of a picture in the record, which notes what it is now. Raises: DataError."""
        if not isinstance(path, str | Path):
            self.files[FROM_MEMORY] = ""
            return FROM_MEMORY
        name = os.path.abspath(path)
        self.files[name] = _sha256(Path(name))
        return name

    def change(self, frame: int, **what: Any) -> None:
        """Notes what was told after `frame` frames; of several at one frame the later ones win, and a cut forgets a
        target.
        """
        before = self.changes.pop() if self.changes and self.changes[-1].frame == frame else Change(frame=frame)
        kept = before.model_dump()
        if "image" in what or "alone" in what:
            kept |= {"image": None, "alone": False, "target": None}
        self.changes.append(self._named(Change(**{**kept, **what})))

    def _named(self, change: Change) -> Change:
        named = {"image": change.image, "target": change.target}
        return change.model_copy(update={key: self.picture(name) for key, name in named.items() if name is not None})


@dataclass(frozen=True)
class Writing:
    """How a video is written (`VideoWriter`), and the `command` that its record names."""

    crf: int = 15
    scale: float = 1.0
    command: str | None = None


PLAIN = Writing()


def device_name(pipeline: Pipeline) -> str:
    """What computes a pipeline's calls."""
    device = pipeline.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe(pipeline: Pipeline, asked: Asked, num_frames: int, how: Writing) -> VideoRecord | None:
    """The record of a video of so many frames that `pipeline` made; None when nobody knows where its weights are."""
    import longtake

    source = pipeline.source
    if source is None:
        return None
    return VideoRecord(
        longtake=longtake.__version__,
        torch=torch.__version__,
        device=device_name(pipeline),
        command=how.command,
        weights=_lasting(source.weights),
        encoders=_lasting(source.encoders),
        student=None if source.student is None else source.student.student.name,
        digests=made_with(pipeline)["weights"],
        settings=pipeline.settings,
        image=None if asked.image is None else str(asked.image),
        prompt=asked.prompt,
        seed=asked.seed,
        negative=asked.negative,
        num_frames=num_frames,
        changes=asked.changes,
        files=asked.files,
        crf=how.crf,
        scale=how.scale,
    )


def sidecar(video: str | Path) -> Path:
    """The file beside a video that says how it was made."""
    target = Target.of(video)
    return target.path.with_suffix(".json" if target.kind == "mp4" else f".{target.kind}.json")


def check_output(video: str | Path, *, inputs: Sequence[str | Path | None] = (), overwrite: bool = False) -> None:
    """Raises ConfigError or OutputError when a video, or the file beside it, cannot be written or would replace what
    nobody asked to replace: a record of an earlier video of the name is replaced with it, another file never.
    """
    Target.of(video).check(inputs=inputs, overwrite=overwrite)
    file = sidecar(video)
    if file.exists() and _beside(file) is None:
        raise ConfigError(f"{file}, where the record of {video} goes, is another file; move it, or name the video else")
    check_output_file(file, inputs=inputs, overwrite=True)


def write_record(video: str | Path, record: VideoRecord | None, beside: Mapping[str, Any] | None = None) -> None:
    """Writes the file beside a video, with what else it says; without a record that of an earlier video goes.

    Raises: OutputError.
    """
    file = sidecar(video)
    if record is not None:
        write_whole(file, json.dumps({**(beside or {}), _KEY: record.model_dump(mode="json")}, indent=2) + "\n")
    elif _beside(file) is not None:
        file.unlink()


def check_space_for(video: str | Path, settings: GenerationConfig, num_frames: int | None, how: Writing) -> None:
    """Raises OutputError when a disk has no room for a video, and for what it is made from: a cautious guess. None: of
    the length of a training clip.
    """
    frames = settings.num_latent_frames * 4 if num_frames is None else num_frames  # no VAE has a longer stride
    pixels = frames * settings.height * settings.width * how.scale**2
    check_space(Target.of(video).path, pixels * _BYTES_A_PIXEL[Target.of(video).kind])


def read_record(video: str | Path) -> VideoRecord:
    """The record of a video, from itself or from the file beside it. Raises: DataError when there is none."""
    try:
        path = Target.of(video).path
    except ConfigError as error:  # it speaks of names to be given
        raise DataError(f"{video} is no video: {', '.join(SUFFIXES)}, or a folder of PNG files") from error
    if not path.exists():
        raise DataError(f"{path} does not exist")
    try:
        text = read_metadata(Target.of(video))
        found = None if text is None else parse_json(text)
    except ValueError:
        found = None  # another program's comment
    tree = found if isinstance(found, dict) and "digests" in found else _beside(sidecar(video))
    if tree is None and not path.with_suffix(".mp4").exists():  # whose it would be
        tree = _beside(path.with_suffix(".json"))  # where earlier versions put those of all kinds
    if tree is None:
        raise DataError(
            f"{path} carries no record, and {sidecar(video)} holds none: it was made by something else, or a program "
            "took it out; give the options of the video yourself"
        )
    try:
        return VideoRecord.from_tree(tree)
    except ConfigError as error:
        raise DataError(f"the record of {path} cannot be read by this version of Longtake: {error}") from error


def _beside(file: Path) -> dict[str, Any] | None:
    try:
        tree = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    found = tree.get(_KEY) if isinstance(tree, dict) else None
    return found if isinstance(found, dict) else None


def _lasting(path: Path) -> str:
    return str(path) if is_hub_name(path) else os.path.abspath(path)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"picture {path} cannot be read ({error.strerror})") from error
