"""Published streaming students by name: where their files are, what is in them, and the rules they stream by.

The table is `assets/students.yaml`; nothing here knows a student. One that streams by a law that this version cannot
play is refused by name: played by another law it would look worse, and nobody would know why.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from longtake.config.base import read_yaml
from longtake.config.generation import RULES_FILE, GenerationConfig, read_rules
from longtake.config.stage import TOY
from longtake.errors import CheckpointError, ConfigError, nearest
from longtake.models.dit import VideoDiT
from longtake.run_folder import holds_student
from longtake.weights.config_json import FILE
from longtake.weights.hub import TABLE, Order, fetch, look_up
from longtake.weights.load import Opened, open_dit, open_weights
from longtake.weights.locate import SAFETENSORS, files_in, find_encoders, find_weights, is_hub_name, locate
from longtake.weights.read import CheckpointReader
from longtake.weights.two_networks import Part, are_two, reader_of, writer_of

_PATCH = "patch_embedding.weight"


@dataclass(frozen=True)
class Student:
    """A row of the table; its fields are explained there. `settings`, its rules."""

    name: str
    repository: str
    file: str
    settings: GenerationConfig
    base: str
    network: str | None
    licence: str
    source: str
    lora: str | None = None
    skipped: str | None = None
    linear_patch: bool = False
    writes_apart: bool = False
    ours: str | None = None

    @property
    def model(self) -> str:
        """What `--model` calls it."""
        return f"{self.repository}/{self.file}"

    @property
    def files(self) -> tuple[str, ...]:
        """The file that tells it from others."""
        return (self.file,)

    @property
    def in_words(self) -> str:
        """Blocks, window, noise levels and how a picture enters, in one line."""
        return f"{in_words(self.settings)}; zero-shot picture: {self.settings.picture}"

    def mended(self, published: CheckpointReader) -> CheckpointReader:
        """Its tensors under the names and shapes of a transformer: without what is no parameter, patches as a kernel.

        A kernel is [D, C, 1, 2, 2], and as a linear layer [D, C * 1 * 2 * 2] in this order.
        """
        tensors = {
            name: stored
            for name, stored in published.tensors.items()
            if self.skipped is None or not stored.key.startswith(self.skipped)
        }
        patch = tensors.get(_PATCH)
        if not self.linear_patch or patch is None or len(patch.shape) != 2 or patch.shape[1] % 4:
            return replace(published, tensors=tensors)
        shape = (patch.shape[0], patch.shape[1] // 4, 1, 2, 2)

        def as_kernel(name: str, tensor: Tensor) -> Tensor:
            return tensor.reshape(shape) if name == _PATCH else tensor

        tensors[_PATCH] = replace(patch, shape=shape)
        return replace(published, tensors=tensors, updates=(*published.updates, as_kernel))


def in_words(settings: GenerationConfig) -> str:
    """Blocks, window and noise levels, in one line."""
    plan = settings.stream_plan
    lists = [plan.sigmas] if plan.later_sigmas is None else [plan.sigmas, plan.later_sigmas]
    levels = ", then ".join(" ".join(f"{sigma:.4g}" for sigma in sigmas) for sigmas in lists)
    blocks = f"blocks of {plan.block_frames}, window {plan.window_frames}, sink {plan.sink_frames}"
    context = "" if plan.context == "pass" else ", context by the last step"
    clock = "" if plan.clock == "exact" else f", clock in {plan.clock}" + " numbers" * (plan.clock == "whole")
    return f"{blocks}, {plan.rope} positions; noise levels {levels}{clock}{context}"


@dataclass(frozen=True)
class RefusedStudent:
    """A row of the table that cannot be played: the `law` that it streams by, and what would be `needed`."""

    name: str
    repository: str
    files: tuple[str, ...]
    law: str
    needed: str
    licence: str
    source: str


_Row = Student | RefusedStudent


@dataclass(frozen=True)
class FoundStudent:
    """A student and its files, local paths or names on the hub; `root`, the local folder that it lies in, or None."""

    student: Student
    weights: Path
    lora: Path | None
    root: Path | None

    @property
    def preset(self) -> str:
        """The name of its sizes, those of its base."""
        return self.student.base.rpartition("/")[2].lower()

    @property
    def rules(self) -> GenerationConfig:
        """By which it streams: those of a `generation.yaml` beside it, else of the table. Raises: ConfigError."""
        own = None if self.root is None else read_rules(self.weights) or read_rules(self.root)
        return own or self.student.settings

    def read(self, *, writer: bool = False) -> tuple[CheckpointReader, VideoDiT]:
        """Its tensors, strictly: every one of the sizes and no other, low-rank updates merged; and the model of them.

        Args: `writer`, those of the network that makes the context, where that is another.
        Raises: CheckpointError that names the student.
        """
        student, order = self.student, self.order()
        here = self if order is None else self.fetched(fetch([order])[0])
        try:
            part = writer_of if writer else reader_of
            return open_dit(here.weights, student.network, here.lora, mend=lambda found: student.mended(part(found)))
        except CheckpointError as error:
            raise CheckpointError(f"{student.name}, published as {student.model}: {error}") from error

    def open(self, *, writer: bool = False) -> Opened:
        """Its weights before they are in a model. Args, raises: as `read`."""
        published, model = self.read(writer=writer)
        held = published.tensors
        return Opened(model, published.read, lambda name: str(held.get(name, name)), str(self.weights))

    def check_is_one(self) -> None:
        """Raises ConfigError where two networks are played together, and one alone would be another student."""
        if self.student.writes_apart:
            raise are_two(self.student.name)

    def order(self) -> Order | None:
        """What is to be fetched of it from the hub, None for a local one. Raises: CheckpointError for missing files."""
        if self.root is not None:
            return None
        repository, wanted = look_up(self.student.repository), {"transformer": self.student.file}
        if self.student.lora is not None:
            wanted["low-rank updates"] = self.student.lora
        if absent := [file for file in wanted.values() if file not in repository.sizes]:
            raise CheckpointError(
                f"{self.student.name} was {' and '.join(absent)} of {repository.name}, which is no longer there; give "
                f"its new place as --model {repository.name}/FILE and its rules (docs/students.md) by options"
            )
        files = {what: [file] for what, file in wanted.items()}
        sizes = repository.present([str(PurePosixPath(self.student.file).with_name(FILE))])
        return Order(repository, files | ({"sizes": sizes} if sizes else {}), self.student.file)

    def fetched(self, root: Path) -> FoundStudent:
        """Itself, with its files below a local copy of its repository."""
        lora = None if self.student.lora is None else root / self.student.lora
        return replace(self, weights=root / self.student.file, lora=lora, root=root)

    def encoders(self) -> Path:
        """The folder of its encoders: in its own, beside it, or else that of its base on the hub.

        Raises: CheckpointError when it is a local student without them.
        """
        base = self.student.base
        if self.root is None:
            return Path(base)
        beside = self.root.parent / base.rpartition("/")[2]
        return beside if beside.is_dir() else find_encoders(self.root)


@cache
def read_table(file: Path = TABLE) -> tuple[list[Student], list[RefusedStudent]]:
    """The students that can be played, and those that are refused."""
    table = read_yaml(file)
    common: dict[str, Any] = table["common"]
    students = []
    for row in table["students"]:
        settings = GenerationConfig.from_tree(_merged(common["rules"], row.get("rules", {})))
        values = {**common, **row}
        del values["rules"]
        students.append(Student(**values, settings=settings))
    return students, [RefusedStudent(**{**row, "files": tuple(row["files"])}) for row in table["refused"]]


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {**common, **own, "plan": {**common["plan"], **own.get("plan", {})}}


def find_student(source: str | Path) -> FoundStudent | None:
    """The published student that a source means: its name, as `longtake students` lists it; OWNER/NAME on the hub, with
    its file where there are several; a local folder of such files; or one of them. None for other weights.

    Raises: ConfigError for a student that cannot be played, where several are meant, and for a name that is nearly one.
    """
    path = Path(source).expanduser()
    found: Sequence[tuple[_Row, Path, Path | None]] = ()
    if path.exists():
        found = () if _is_our_layout(path) else _local(path)
    elif is_hub_name(source):
        found = _on_the_hub(source)
    else:
        found = _named(os.fspath(source))
        if not found and source != TOY and (near := nearest(os.fspath(source), _names())):
            raise ConfigError(f"{source} is neither a path nor a student's name{near} `longtake students` lists them")
    if not found:
        return None
    if len(found) > 1:
        names = "; ".join(f"--model {os.fspath(weights)} ({row.name})" for row, weights, _ in found)
        raise ConfigError(f"{source} holds several students; give one of them: {names}")
    row, weights, root = found[0]
    if isinstance(row, RefusedStudent):
        raise ConfigError(
            f"{row.name} ({row.repository}) cannot be played: {row.law}. It would need {row.needed}; `longtake "
            "students` lists those that can be played"
        )
    lora = None
    if row.lora is not None:
        lora = weights.with_name(PurePosixPath(row.lora).name) if root is not None else Path(row.repository, row.lora)
        if root is not None and not lora.is_file():
            raise CheckpointError(f"{row.name} is a base and updates, and {lora} is not there; download it, too")
    return FoundStudent(row, weights, lora, root)


def _is_our_layout(path: Path) -> bool:
    """Whether a folder holds weights with rules beside them, as `longtake export` writes them."""
    return path.is_dir() and (path / RULES_FILE).is_file() and bool(files_in(locate(path), SAFETENSORS))


def _named(name: str) -> list[tuple[_Row, Path, None]]:
    """Rows of that name, or of a family of it: "Self-Forcing" means all of "Self-Forcing (DMD)" and so on."""
    wanted = name.lower()
    exact = [row for row in _rows() if row.name.lower() == wanted]
    found = exact or [row for row in _rows() if isinstance(row, Student) and row.name.lower().startswith(f"{wanted} (")]
    return [(row, Path(row.repository, *row.files[:1]), None) for row in found]


def open_source(source: str | Path, *, check: bool = False, part: Part = "alone") -> Opened:
    """Weights that are read later: a published student by its rules of reading, others as `open_weights`.

    Raises: CheckpointError; ConfigError as `find_student`.
    """
    if (student := find_student(source)) is None:
        return open_weights(source, check=check, part=part)
    student.check_is_one()
    return student.open()


def is_causal(source: str | Path, logdir: str | Path) -> bool | None:
    """Whether weights say of themselves that they are causal: by the run that trained them, by the `generation.yaml`
    beside them, as a published student. None: they say nothing, as files of tensors do, whose names and shapes are the
    same either way.
    """
    if find_student(source) is not None:
        return True
    found = find_weights(source, logdir)
    if found.checkpoint is not None:
        return holds_student(found.checkpoint)
    rules = read_rules(found.path) if found.path.exists() else None
    return None if rules is None else rules.sampler == "stream"


def _names() -> list[str]:
    """All names that may be meant, those of families too."""
    return [TOY, *dict.fromkeys(name for row in _rows() for name in (row.name.partition(" (")[0], row.name))]


def _rows() -> list[_Row]:
    students, refused = read_table()
    return [*students, *refused]


def _local(path: Path) -> list[tuple[_Row, Path, Path]]:
    """Rows with their file and folder. A file may lie as in the repository, or in one folder if its name tells it."""
    names = Counter(PurePosixPath(file).name for row in _rows() for file in row.files)
    found: list[tuple[_Row, Path, Path]] = []
    for row in _rows():
        for file in map(PurePosixPath, row.files):
            short = [PurePosixPath(file.name)] if names[file.name] == 1 and file.stem != "model" else []
            for place in dict.fromkeys([file, *short]):
                if path.is_dir() and (path / place).is_file():
                    found.append((row, path / place, path))
                elif path.is_file() and path.parts[-len(place.parts) :] == place.parts:
                    found.append((row, path, path.parents[len(place.parts) - 1]))
    return list({weights: (row, weights, root) for row, weights, root in reversed(found)}.values())[::-1]


def _on_the_hub(source: str | Path) -> list[tuple[_Row, Path, None]]:
    owner, name, *rest = PurePosixPath(source).parts
    rows = [row for row in _rows() if row.repository.lower() == f"{owner}/{name}".lower()]
    if rest and not all(isinstance(row, RefusedStudent) for row in rows):
        rows = [row for row in rows if "/".join(rest) in row.files]
    elif not all(isinstance(row, RefusedStudent) for row in rows):
        rows = [row for row in rows if isinstance(row, Student)]
    return [(row, Path(row.repository, *row.files[:1]), None) for row in rows]


def weights_folder(source: Path, logdir: str | Path) -> Path:
    """What is read for a source: published weights themselves, or the newest checkpoint of a stage."""
    if (student := find_student(source)) is not None:
        return student.weights
    try:
        return find_weights(source, logdir).path
    except CheckpointError as error:
        raise CheckpointError(f"no weights at {source}: {error}") from error
