"""Where the weights of a generator come from, and the rules they stream by: a training run, or files of any origin.

Reads no weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.config.generation import GenerationConfig, generation_settings, read_rules
from longtake.config.stage import TOY, TOY_ASSETS, StageConfig
from longtake.errors import CheckpointError, ConfigError
from longtake.plan import StreamPlan
from longtake.run_folder import exported_weights, find_checkpoint, trained_config
from longtake.weights.load import Opened, open_weights
from longtake.weights.locate import find_encoders, find_weights
from longtake.weights.students import FoundStudent, find_student

TOY_STUDENT = TOY_ASSETS / "student"

# Rules whose change is not what a student was trained for
_TRAINED = ("plan", "rope", "steps", "later_steps", "shift", "warp_steps", "clock")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a generator comes from, and its rules: `weights` a folder or file, `encoders` a folder, both also names on
    the hub; `config` is that of the stage that trained it, None for weights of other origin; `student`, a published one
    that is known by name. Making one reads no weights.
    """

    weights: Path
    encoders: Path
    settings: GenerationConfig
    config: StageConfig | None = None
    student: FoundStudent | None = None

    @classmethod
    def of_run(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Source:
        """The student of a log folder (its last stage), of a stage folder or of a checkpoint.

        Args: `changes` win over the values that it was trained with; other rules than those are named in the log.
        Raises: CheckpointError when the folder holds no complete checkpoint of a causal student.
        """
        checkpoint = find_checkpoint(Path(path))
        config = trained_config(checkpoint)
        if not config.objective.causal:
            raise CheckpointError(
                f"{path} holds a bidirectional teacher, which cannot stream; give the run of a student"
            )
        source = cls.of_checkpoint(checkpoint, config, changes)
        _say_differences(source.settings, generation_settings(config))
        return source

    @classmethod
    def of_checkpoint(cls, path: Path, config: StageConfig, changes: Mapping[str, Any] | None = None) -> Source:
        """The weights that a stage left in a checkpoint, also those of a teacher."""
        return cls(exported_weights(path), config.encoders_folder, generation_settings(config, changes), config)

    def open(self) -> Opened:
        """The weights, before they are in a model. Raises: CheckpointError."""
        return open_weights(self.weights, check=True) if self.student is None else self.student.open()

    @property
    def plan(self) -> StreamPlan | None:
        """How it streams; None for a bidirectional teacher, which samples whole clips."""
        is_teacher = self.config is not None and not self.config.objective.causal
        return None if is_teacher else self.settings.stream_plan

    @classmethod
    def of_model(
        cls,
        path: str | Path,
        encoders: str | Path | None = None,
        stage: StageConfig | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Source:
        """Weights of any origin, as `weights/locate.py` finds them.

        Args: `path`, also `toy` for the student that ships with the package, and a published student
        (`weights/students.py`), of which all is known; `encoders`, their folder (default: in the model's folder, in its
        `encoders/`, or beside it); `stage`, a configuration whose rules are taken (default: those of `generation.yaml`
        beside the weights, else of the published student, else of `GenerationConfig`); `changes` win over all.
        Raises: CheckpointError when weights or encoders are not found, ConfigError for wrong values and for a
        checkpoint of a training run without `stage`, since its own rules would be lost.
        """
        path = TOY_STUDENT if path == TOY else path
        if (student := find_student(path)) is not None:
            published = student.student.settings
            settings = generation_settings(stage, changes, published)
            _say_differences(settings, published)
            folder = Path(encoders) if encoders is not None else student.encoders()
            return cls(student.weights, folder, settings, student=student)
        found = find_weights(path)
        if stage is None and found.checkpoint is not None:
            raise ConfigError(
                f"{path} is a checkpoint of a training run and has rules of its own; give it with --run, or name other "
                "rules with --config"
            )
        settings = generation_settings(stage, changes, read_rules(found.path))
        folder = Path(encoders) if encoders is not None else find_encoders(path)
        return cls(found.path, folder, settings)


def _say_differences(settings: GenerationConfig, trained: GenerationConfig) -> None:
    for name in _TRAINED:
        if (now := getattr(settings, name)) != (before := getattr(trained, name)):
            logger.warning("%s is %s and was %s in training: expect drift or flicker", name, now, before)
