"""What an evaluation measures: the trained stages of a run, or weights of any origin, and the teacher beside them.

Reads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from longtake.config.stage import TOY, TOY_ASSETS, StageConfig, resolve_source
from longtake.encoders.bundle import Encoders
from longtake.errors import CheckpointError, ConfigError
from longtake.inference.pipeline import load_encoders
from longtake.inference.source import Source
from longtake.models.dit import VideoDiT
from longtake.models.sizes import DiTConfig
from longtake.rollout.denoise import Denoiser
from longtake.run_folder import checkpoints_folder, find_checkpoint, student_stages, trained_config
from longtake.weights.load import load_frozen, open_weights
from longtake.weights.locate import find_weights
from longtake.weights.widen import opened_as_asked


@dataclass(frozen=True)
class EvalTarget:
    """What is measured.

    Fields: `students` by name, in the order of training, the last of which is the result; `teacher` loads the
    bidirectional weights (None: there are none).
    """

    students: dict[str, Source]
    teacher: Callable[[torch.device], VideoDiT] | None = None

    @property
    def name(self) -> str:
        """Of the result."""
        return list(self.students)[-1]

    @property
    def result(self) -> Source:
        return self.students[self.name]

    @cached_property
    def sizes(self) -> DiTConfig:
        """Of the result: pictures enter as `y` (`condition_channels`, else as a clean frame 0) and CLIP tokens."""
        return self.result.open().model.config

    @property
    def with_y(self) -> bool:
        return self.sizes.condition_channels > 0

    def check_worlds(self) -> None:
        """Raises ConfigError unless all students take pictures, in one way: worlds begin with one."""
        for name, source in self.students.items():
            if source.config is not None and source.config.model.image_condition != "i2v":
                raise ConfigError(
                    f"{name} is a text-to-video model, and worlds begin with a picture; give prompts with --data"
                )
        shapes = [source.open().model.config for source in self.students.values()]
        if len({(shape.condition_channels > 0, shape.image_dim is not None) for shape in shapes}) > 1:
            names = ", ".join(self.students)
            raise ConfigError(f"the models {names} take pictures in different ways; evaluate them one by one")

    def load_encoders(self, device: torch.device) -> Encoders:
        source = self.result
        return load_encoders(source.encoders, source.settings, device, with_image=self.sizes.image_dim is not None)


def load_denoiser(source: Source, device: torch.device, *, by_rules: bool = False) -> Denoiser:
    """A student for inference alone, with what writes its context where that is another network.

    Args: `by_rules`, whether it is as precise as its rules say, and not float32.
    """
    settings, apart = source.settings, source.open_writer()
    dtype = torch.bfloat16 if by_rules and settings.is_half else None
    writer = None if apart is None else load_frozen(apart, device, dtype)
    model = load_frozen(source.open(), device, dtype)
    for network in (model, writer) if by_rules and settings.precision == "fp8" else ():
        if network is not None:
            network.quantise()
    return Denoiser(model, writer=writer)


def of_run(run: Path, changes: Mapping[str, Any] | None = None) -> EvalTarget:
    """All stages of a log folder, or one stage folder, and the teacher that they started from.

    Args: `changes` win over the values that they were trained with.
    Raises: CheckpointError when nothing there was trained.
    """
    stages = trained_stages(run)
    checkpoint, last = stages[-1]
    source = last.reference

    def teacher(device: torch.device) -> VideoDiT:
        # By name within the log folder where it lies now: it may have been moved since.
        logdir = checkpoint.parents[2]
        weights = find_weights(resolve_source(source or "", logdir), logdir).path
        opened = opened_as_asked(open_weights(weights, check=True), last.model, last.seed)
        return load_frozen(opened, device)

    students = {config.name: Source.of_checkpoint(path, config, changes) for path, config in stages}
    return EvalTarget(students, None if source is None else teacher)


def of_models(
    models: Sequence[str | Path],
    teacher: str | Path | None = None,
    encoders: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> EvalTarget:
    """Folders of weights with their `generation.yaml`, as `longtake export` writes them; rows are named like them.

    Args: `models`, also `toy` for the student that ships with the package; the last one is the result; `teacher`, a
    folder of bidirectional weights, by default that of the package when `toy` is among the models; `encoders`, their
    folder, by default in or beside that of each model; `changes` win over the rules of all of them.
    Raises: CheckpointError, ConfigError as `Source.of_model`; ConfigError for two folders of one name.
    """
    sources = [Source.of_model(model, encoders, changes=changes) for model in models]
    names = [source.weights.name if source.weights.is_dir() else source.weights.stem for source in sources]
    if not sources or len(set(names)) < len(names):
        raise ConfigError(f"models named {', '.join(names) or 'none'} were given; give each a folder of another name")
    if teacher is None and TOY in [str(model) for model in models]:
        teacher = TOY
    weights = None if teacher is None else find_weights(TOY_ASSETS / "teacher" if str(teacher) == TOY else teacher).path
    return EvalTarget(
        dict(zip(names, sources, strict=True)),
        None if weights is None else lambda device: load_frozen(open_weights(weights, check=True), device),
    )


def trained_stages(run: Path) -> list[tuple[Path, StageConfig]]:
    """(checkpoint, configuration) of each student in a log folder, or of one stage folder, in training order."""
    if checkpoints_folder(run).is_dir() or (run / "manifest.json").is_file():
        folders = [run]
    else:
        folders = student_stages(run) if run.is_dir() else []
    if not folders:
        raise CheckpointError(f"{run} holds no trained stage; give a log folder or a stage folder of `longtake train`")
    found = [find_checkpoint(folder) for folder in folders]
    return [(path, trained_config(path)) for path in found]
