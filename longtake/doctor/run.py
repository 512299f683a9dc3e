"""`longtake doctor`: what is missing, whether a configuration fits, and what this machine has."""

from __future__ import annotations

import logging
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longtake.config.generation import changes_of, generation_settings, read_rules
from longtake.config.job import JobConfig, load_config
from longtake.config.stage import TOY, StageConfig
from longtake.devices import DEVICES, find_device
from longtake.doctor.cost import Cost, measured_seconds
from longtake.doctor.estimate import stage_need
from longtake.doctor.files import look_at
from longtake.doctor.machine import Machine, fits, in_words, look
from longtake.doctor.streaming import StreamReport, stream_choices
from longtake.errors import ConfigError
from longtake.outputs import free_disk
from longtake.weights.hub import fetch_small, order_weights
from longtake.weights.load import has_writer
from longtake.weights.locate import is_hub_name
from longtake.weights.presets import PRESETS, model_config
from longtake.weights.students import find_student

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageReport:
    """One stage: bytes that each rank needs at the worst `moment` by what for, what is free there and `where`, its
    problems in words, the commands that download what is missing, and what it costs where seconds were measured.
    """

    name: str
    objective: str
    ranks: int
    need_bytes: dict[str, int]
    moment: str
    free_bytes: int
    where: str
    disk_need_bytes: int
    disk_free_bytes: int
    missing: list[str]
    notes: list[str]
    problems: list[str]
    downloads: list[str]
    cost: Cost | None

    def lines(self) -> list[str]:
        """The report as text."""
        total, each = in_words(sum(self.need_bytes.values())), f"each of {self.ranks} rank(s)"
        free, disk, room = map(in_words, (self.free_bytes, self.disk_need_bytes, self.disk_free_bytes))
        return [
            f"stage {self.name} ({self.objective}), {each}: needs {total}, free {free} ({self.where})",
            *(f"  {name:<16} {in_words(size):>12}" for name, size in self.need_bytes.items() if size),
            f"  most at once     in {self.moment}",
            f"  checkpoints      {disk:>12}   (on disk; free {room})",
            *([] if self.cost is None else [f"  time             {self.cost.line()}"]),
            *(f"  note: {note}" for note in self.notes),
        ]


@dataclass(frozen=True)
class Report:
    """The whole answer; prints as text, `tree()` is for JSON. `ok` when nothing is missing and everything fits."""

    machine: Machine
    stages: list[StageReport]
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems and not any(stage.problems for stage in self.stages)

    def tree(self) -> dict[str, Any]:
        """Everything as plain values; sizes in bytes."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        of: dict[str, list[str]] = defaultdict(list)  # stages by what is wrong with them
        for stage in self.stages:
            for what in stage.problems:
                of[what].append(stage.name)
        problems = [f"PROBLEM: {what}" for what in self.problems]
        problems += [f"PROBLEM: stage {', '.join(names)}: {what}" for what, names in of.items()]
        downloads = [f"  {command}" for command in dict.fromkeys(c for stage in self.stages for c in stage.downloads)]
        blocks = [problems or ["all is well"], ["to download:", *downloads] if downloads else []]
        blocks += [*(stage.lines() for stage in self.stages), self.machine.lines()]
        return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def diagnose(
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    gpus: int | None = None,
    device: str | None = None,
    seconds_from: Path | None = None,
    price: float | None = None,
) -> Report:
    """Looks at the machine, and at a stage or job when `config` names one.

    Args: `gpus`, ranks to plan for (default: the GPUs of this machine, at least 1); `device`, to plan for GPUs of that
    name, or of so much memory (`24GB`), on other machines; `seconds_from`, the JSON of a `longtake bench` of the stage
    (of one of the job's), whose hours are told, and with the `price` of an hour of a GPU what they cost.
    Raises: ConfigError for a wrong configuration, and for numbers that do not divide each other.
    """
    loaded = None if config is None else load_config(config, overrides)
    machine = look()
    problems = [f"package {name} is not installed" for name in machine.missing_packages]
    ranks = gpus or max(1, len(machine.gpus))
    if device is None and 0 < len(machine.gpus) < ranks:
        problems.append(f"{ranks} ranks are planned and this machine has {len(machine.gpus)} GPU(s); name --device")
    room = _room(device, machine) or (machine.ram_free_bytes // ranks, "memory without a GPU, shared by the ranks")
    job = loaded if isinstance(loaded, JobConfig) else None
    stages = [loaded] if isinstance(loaded, StageConfig) else list(job.stages.values()) if job else []
    if device is None and not machine.gpus:
        stages = [stage.without_a_gpu() for stage in stages]
    costs: dict[str, Cost] = {}
    if seconds_from is not None:
        of = [str(config), *overrides] if isinstance(loaded, StageConfig) else ["FILE_OF_THE_STAGE"]
        command = shlex.join(["longtake", "bench", *of, "--json", "bench.json"])
        known = {stage.name: stage for stage in stages}
        name, seconds, gpu = measured_seconds(seconds_from, ranks, list(known), f"`{command}`")
        stage = known[name]
        share = stage.validation.max_share if stage.validates and stage.validation.num_rows else 0.0
        costs[name] = Cost(seconds, gpu, stage.max_steps, ranks, share, price)
    elif price is not None:
        raise ConfigError("--price needs --seconds-from, the JSON of a `longtake bench` of the stage")
    reports = [_stage(s, costs.get(s.name), job, ranks, *room, elsewhere=device is not None) for s in stages]
    return Report(machine, reports, problems)


def diagnose_stream(model: str, overrides: Sequence[str] = (), *, device: str | None = None) -> StreamReport:
    """Whether a stream fits: of a preset, of the sizes in the `config.json` of a folder or of a repository on the hub
    by the rules beside it, or of a published student.

    Args: `device` as that of `diagnose`; by default the fullest GPU here. Raises: ConfigError.
    """
    if model == TOY:
        raise ConfigError("toy has small encoders of its own and streams on any machine; name a model of Wan's sizes")
    student, changes = find_student(model), {"precision": "bf16", **changes_of(*overrides)}
    if student is None and model not in PRESETS and not Path(model).exists() and is_hub_name(model):
        model = str(fetch_small(order_weights(model)))
    sizes = model_config(model if student is None else student.preset)
    rules = student.rules if student is not None else read_rules(Path(model)) if Path(model).is_dir() else None
    if (room := _room(device, look())) is None:
        raise ConfigError("this machine has no GPU; name the one to plan for, such as --device 24GB")
    apart = Path(model).is_dir() and has_writer(Path(model)) if student is None else student.student.writes_apart
    settings = generation_settings(None, changes, rules)
    asked, *others = stream_choices(sizes, settings, networks=2 if apart else 1)
    return StreamReport(*room, asked, others)


def _room(device: str | None, machine: Machine) -> tuple[int, str] | None:
    """Bytes of a GPU, and whose they are; None where there is none. Raises: ConfigError."""
    if device is None:
        return min(((gpu.free_bytes, "on the fullest GPU") for gpu in machine.gpus), default=None)
    if (known := find_device(device)) is not None:
        return known.memory_bytes, f"--device {device}"
    if (plain := re.fullmatch(r"([1-9]\d*) ?GB", device, re.IGNORECASE)) is None:
        raise ConfigError(
            f"--device {device} is not known; give {', '.join(d.name for d in DEVICES)}, or memory such as 24GB"
        )
    return int(plain[1]) * 10**9, f"--device {device}"


def _stage(
    config: StageConfig, cost: Cost | None, job: JobConfig | None, ranks: int, free: int, where: str, *, elsewhere: bool
) -> StageReport:
    found = look_at(config, job)
    about: dict[str, Any] = {"image_tokens": found.image_tokens, "vae": found.vae}
    logger.info("%s: an iteration is traced without data, which can take minutes", config.name)
    need = stage_need(config, found.sizes, ranks, **about)
    parts = {**need.at_rest, "encoders": found.encoder_bytes}
    parts["working memory"] = need.peak - sum(need.at_rest.values())
    problems = []
    if not fits(total := sum(parts.values()), free):
        remedy = "use more GPUs, a smaller micro_batch_size, or smaller videos"
        if config.activation_checkpointing in (False, "selective"):
            recomputing = config.model_copy(update={"activation_checkpointing": True})
            less = stage_need(recomputing, found.sizes, ranks, **about).peak + found.encoder_bytes
            enough = f"which needs {in_words(less)}" if fits(less, free) else f"and {remedy}"
            remedy = f"set activation_checkpointing=full, {enough}"
        problems.append(
            f"{in_words(total)} and a tenth for what is not counted do not fit into {in_words(free)}: {remedy}"
        )
    problems += [f"missing {what}" for what in found.missing]
    disk = need.checkpoint * (config.keep_checkpoints + 1 if config.save_every else 0)
    room = free_disk(config.logdir)
    if disk > room and not elsewhere:
        problems.append(
            f"{config.keep_checkpoints} checkpoints and one being written need {in_words(disk)} of disk; lower "
            "keep_checkpoints or move logdir"
        )
    names, texts = (config.name, config.objective.kind, ranks), (found.missing, found.notes, problems)
    return StageReport(*names, parts, need.moment, free, where, disk, room, *texts, found.downloads, cost)
