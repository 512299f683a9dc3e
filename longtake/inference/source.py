"""Where the weights of a generator come from, and the rules they stream by: a training run, or files of any origin.

Reads no weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longtake.config.generation import GenerationConfig, generation_settings, read_rules
from longtake.config.stage import TOY, TOY_ASSETS, StageConfig, encoders_at
from longtake.errors import CheckpointError, ConfigError
from longtake.plan import StreamPlan
from longtake.run_folder import exported_weights, find_checkpoint, trained_config
from longtake.weights.config_json import FILE, config_from_json, read_json
from longtake.weights.file_kind import is_pickled
from longtake.weights.hub import (
    Order,
    check_image_encoder,
    encoders_of,
    fetch,
    fetch_small,
    joined,
    lacks_encoders,
    needs_image,
    no_encoders,
    order_encoders,
    order_weights,
    surely_needs_image,
)
from longtake.weights.load import Opened, has_writer, open_weights
from longtake.weights.locate import file_beside, find_encoders, find_weights, is_hub_name, locate
from longtake.weights.students import FoundStudent, find_student

TOY_STUDENT = TOY_ASSETS / "student"

# Rules whose change is not what a student was trained for
_TRAINED = ("plan", "rope", "steps", "later_steps", "shift", "warp_steps", "clock", "sampler")
_SIZES = ("height", "width")

logger = logging.getLogger(__name__)


class NotAStudentError(ConfigError):
    """Weights that nothing says to be a streaming student; `options` of the command line sample them as a teacher."""

    def __init__(self, message: str, options: Mapping[str, Any]) -> None:
        given = " ".join(f"--{name} {value}" for name, value in options.items())
        super().__init__(f"{message} As a teacher, all frames at once, it is sampled with {given}")
        self.options = options


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
        Raises: CheckpointError when the folder holds no complete checkpoint; NotAStudentError for that of a teacher,
        unless `changes` name a sampler.
        """
        checkpoint = find_checkpoint(Path(path))
        config = trained_config(checkpoint)
        source = cls.of_checkpoint(checkpoint, config, changes)
        if config.objective.causal:
            _say_differences(source.settings, generation_settings(config))
        elif "sampler" not in (changes or {}):
            steps, guidance = (16, 1) if config.model.preset == TOY else (40, 5)
            raise NotAStudentError(
                f"{path} holds a bidirectional teacher, which cannot stream; give the run of a student.",
                {"sampler": "whole", "steps": steps, "guidance": guidance},
            )
        return source

    @classmethod
    def of_checkpoint(cls, path: Path, config: StageConfig, changes: Mapping[str, Any] | None = None) -> Source:
        """The weights that a stage left in a checkpoint, also those of a teacher."""
        settings = generation_settings(config, changes)
        folder = config.encoders_folder if settings.encoders is None else encoders_at(settings.encoders)
        return cls(exported_weights(path), folder, settings, config)

    def open(self) -> Opened:
        """The weights of what denoises, before they are in a model. Raises: CheckpointError."""
        return open_weights(self.weights, check=True, part="reader") if self.student is None else self.student.open()

    def open_writer(self) -> Opened | None:
        """Those of the network that makes the context, where that is another. Raises: CheckpointError."""
        if self.student is not None:
            return self.student.open(writer=True) if self.student.student.writes_apart else None
        return open_weights(self.weights, check=True, part="writer") if has_writer(self.weights) else None

    @property
    def name(self) -> str:
        """What people call it; says no folder of this machine."""
        if self.student is not None:
            return self.student.student.name
        if self.config is not None:
            return Path(self.config.logdir).name
        if is_hub_name(self.weights):
            return self.weights.as_posix()
        if self.weights == TOY_STUDENT:
            return TOY
        return self.weights.stem if self.weights.is_file() else self.weights.name

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
        *,
        must_stream: bool = True,
    ) -> Source:
        """Weights of any origin, as `weights/locate.py` finds them.

        Args: `path`, also `toy` for the student that ships with the package, and a published student
        (`weights/students.py`), of which all is known; `encoders`, their folder, OWNER/NAME on the hub or `toy`
        (default: where `generation.yaml` says, in the model's folder or repository, in its `encoders/`, or beside it);
        `stage`, a configuration whose rules are taken (default: those of `generation.yaml` beside the weights, else of
        the published student, else of `GenerationConfig`); `changes` win over all; `must_stream`: weights of which
        nothing says that they stream are refused, unless `changes` name a sampler.
        Raises: CheckpointError when weights or encoders are not found, ConfigError for wrong values and for a
        checkpoint of a training run without `stage`, since its own rules would be lost; NotAStudentError.
        """
        path, changes = TOY_STUDENT if str(path) == TOY else path, changes or {}
        asked = encoders if encoders is not None else changes.get("encoders")
        if (student := find_student(path)) is not None:
            settings = generation_settings(stage, changes, student.rules)
            _say_differences(settings, student.rules)
            folder = encoders_at(asked or student.rules.encoders or student.encoders())
            return cls(student.weights, _existing(folder), settings, student=student)
        found = find_weights(path)
        if stage is None and found.checkpoint is not None:
            raise ConfigError(
                f"{path} is a checkpoint of a training run and has rules of its own; give it with --run, or name other "
                "rules with --config"
            )
        order = None if found.path.exists() else order_weights(found.path)
        place = found.path if order is None else fetch_small(order)
        rules = read_rules(place)
        settings = generation_settings(stage, changes, rules)
        if rules is not None and stage is None:
            _say_differences(settings, rules)
        is_student = rules is not None if stage is None else stage.objective.causal
        if must_stream and not is_student and "sampler" not in changes:
            raise _not_a_student(path, place)
        if asked:
            return cls(found.path, _existing(encoders_at(asked)), settings)
        last = None if stage is None else stage.encoders_folder
        return cls(found.path, _own_encoders(path, place, order, rules, last), settings)

    @property
    def needs_image(self) -> bool:
        """Whether it surely needs an image encoder, known without reading the weights."""
        return self.student is None and surely_needs_image(self.weights)

    def fetched(self) -> Source:
        """Itself, with weights and encoders on this machine: those on the hub are fetched, once all are known to exist.

        Raises: CheckpointError.
        """
        order: Order | None = None
        place = self.weights
        if self.student is not None:
            order, with_image = self.student.order(), False
        else:
            if is_hub_name(self.weights):
                order = order_weights(self.weights)
                place = fetch_small(order)
            with_image = needs_image(place)
        beside = encoders_of(self.encoders, with_image=with_image) if _is_remote(self.encoders) else None
        if with_image and beside is not None and surely_needs_image(place, order):
            check_image_encoder(beside)
        if order is None and beside is None:
            return self
        roots = fetch(joined([one for one in (order, beside) if one is not None]))
        source = self if beside is None else replace(self, encoders=roots[-1])
        if order is None:
            return source
        if self.student is not None:
            return replace(source, student=(student := self.student.fetched(roots[0])), weights=student.weights)
        return replace(source, weights=roots[0] / order.part)


def _is_remote(folder: Path) -> bool:
    return not folder.exists() and is_hub_name(folder)


def _existing(folder: Path) -> Path:
    """The folder of encoders, which is there or a name on the hub. Raises: CheckpointError."""
    if not folder.is_dir() and not is_hub_name(folder):
        raise CheckpointError(
            f"the encoder folder {folder} does not exist; give the folder of a Wan model, OWNER/NAME of a repository "
            "on the Hugging Face hub that has them, or toy"
        )
    return folder


def _own_encoders(
    path: str | Path, place: Path, order: Order | None, rules: GenerationConfig | None, last: Path | None
) -> Path:
    """The encoders of weights where none are named: where their rules say, in or beside them, else the folder `last`.

    Args: `order`, that of weights on the hub; `place`, where their small files lie. Raises: CheckpointError.
    """
    named = None if rules is None or rules.encoders is None else encoders_at(rules.encoders)
    if named is not None and (named.is_dir() or is_hub_name(named)):
        return named
    if order is not None:
        with_image = needs_image(place)
        lacking = lacks_encoders(order_encoders(order.repository, with_image=with_image), with_image=with_image)
        if "VAE" in lacking or "text encoder" in lacking:
            raise no_encoders(order.repository.name, lacking)
        return Path(order.repository.name)
    try:
        return find_encoders(path)
    except CheckpointError as error:
        if last is not None:
            return _existing(last)
        if named is None:
            raise
        said = f"encoders={named}, as the generation.yaml of {path} says, do not exist here"
        raise CheckpointError(f"{said}, and {error}") from None


def _say_differences(settings: GenerationConfig, trained: GenerationConfig) -> None:
    """One warning about rules that weights were not trained with, one about sizes."""
    now, before = (_flat(rules) for rules in (settings, trained))
    rules = [f"{name} is {now[name]} and was {before[name]}" for name in now if now[name] != before[name]]
    if rules:
        logger.warning("Not as in training: %s; expect drift or flicker", ", ".join(rules))
    if any(getattr(settings, name) != getattr(trained, name) for name in _SIZES):
        sizes = (f"{one.height}x{one.width}" for one in (settings, trained))
        logger.warning("Pictures of %s from weights that were trained with %s: expect worse ones", *sizes)


def _flat(rules: GenerationConfig) -> dict[str, Any]:
    values = {name: getattr(rules, name) for name in _TRAINED if name != "plan"}
    return {f"plan.{name}": value for name, value in rules.plan.model_dump().items()} | values


def _not_a_student(path: str | Path, place: Path) -> NotAStudentError:
    """The error about weights without rules; `place`, where their `config.json` lies, if there is one.

    Raises: CheckpointError for a file that holds no weights.
    """
    folder = locate(place)
    if folder.is_file():
        is_pickled(folder)  # says what it is, unless it holds weights
    file = file_beside(folder, FILE)
    kind = config_from_json(read_json(file), file).model_type if file.is_file() else "i2v"
    # What Wan's own code samples them with. Source: Wan-Video/Wan2.1 and Wan2.2, generate.py, README.md
    options: dict[str, Any] = {"sampler": "whole", "steps": 40, "shift": 3, "guidance": 5, "frames": 81}
    if kind == "t2v":
        options |= {"steps": 50, "shift": 8, "guidance": 6}
    if kind == "ti2v":
        options |= {"steps": 50, "shift": 5, "frames": 121, "fps": 24, "height": 704, "width": 1280}
    elif "720p" in str(path).lower():
        options |= {"shift": 5, "height": 720, "width": 1280}
    return NotAStudentError(
        f"nothing says that {path} is a streaming student: no generation.yaml lies beside the weights, and they are no "
        "published student. Bidirectional weights, as Wan's own, stream to stripes. A student is given its rules by "
        "--config RECIPE, or by --sampler stream and what differs from the defaults.",
        options,
    )
