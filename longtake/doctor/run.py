"""`longtake doctor`: what is missing, whether a configuration fits, and what this machine has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longtake.config.generation import changes_of, generation_settings, read_rules
from longtake.config.job import JobConfig, load_config
from longtake.config.stage import StageConfig
from longtake.devices import DEVICES, find_device
from longtake.doctor.estimate import stage_need
from longtake.doctor.files import look_at
from longtake.doctor.machine import Machine, free_disk, look
from longtake.doctor.streaming import StreamReport, stream_report
from longtake.errors import ConfigError
from longtake.weights.presets import model_config
from longtake.weights.students import find_student

# What is not counted: the CUDA context, workspaces of kernels, fragments of the allocator, remembered encodings.
HEADROOM = 1.1


@dataclass(frozen=True)
class StageReport:
    """One stage: bytes that each rank needs at the worst `moment` by what for, what is free there and `where`, and its
    problems in words.
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

    def lines(self) -> list[str]:
        """The report as text."""
        total, ranks = _size(sum(self.need_bytes.values())), f"each of {self.ranks} rank(s)"
        return [
            f"stage {self.name} ({self.objective}), {ranks}: needs {total}, "
            f"free {_size(self.free_bytes)} ({self.where})",
            *(f"  {name:<16} {_size(size):>12}" for name, size in self.need_bytes.items() if size),
            f"  most at once     in {self.moment}",
            f"  checkpoints      {_size(self.disk_need_bytes):>12}   (on disk; free {_size(self.disk_free_bytes)})",
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
        problems = [f"PROBLEM: {problem}" for problem in self.problems]
        problems += [f"PROBLEM: stage {stage.name}: {what}" for stage in self.stages for what in stage.problems]
        verdict = "all is well" if self.ok else "something is missing or does not fit"
        blocks = [[*problems, verdict], *(stage.lines() for stage in self.stages), _machine_lines(self.machine)]
        return "\n\n".join("\n".join(lines) for lines in blocks)


def diagnose(
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    gpus: int | None = None,
    device: str | None = None,
) -> Report:
    """Looks at the machine, and at a stage or job when `config` names one.

    Args: `gpus`, ranks to plan for (default: the GPUs of this machine, at least 1); `device`, to plan for GPUs of that
    name, or of so much memory (`24GB`), on other machines.
    Raises: ConfigError for a wrong configuration, and for numbers that do not divide each other.
    """
    loaded = None if config is None else load_config(config, overrides)
    machine = look()
    problems = [f"package {name} is not installed" for name in machine.missing_packages]
    ranks = gpus or max(1, len(machine.gpus))
    if device is not None:
        room = _memory(device), f"--device {device}"
    elif machine.gpus:
        room = min(gpu.free_bytes for gpu in machine.gpus), "on the fullest GPU"
        if ranks > len(machine.gpus):
            problems.append(f"{ranks} ranks are planned and this machine has {len(machine.gpus)} GPU(s); name --device")
    else:
        room = machine.ram_free_bytes // ranks, "memory without a GPU, shared by the ranks"
    job = loaded if isinstance(loaded, JobConfig) else None
    stages = [loaded] if isinstance(loaded, StageConfig) else job.stages.values() if job else []
    return Report(machine, [_stage(stage, job, ranks, *room) for stage in stages], problems)


def diagnose_stream(model: str, overrides: Sequence[str] = (), *, device: str | None = None) -> StreamReport:
    """Whether a stream fits: of a preset, of the sizes in a folder's `config.json` by the rules beside it, or of a
    published student.

    Args: `device` as that of `diagnose`; by default the first GPU here. Raises: ConfigError.
    """
    student, changes = find_student(model), {"precision": "bf16", **changes_of(*overrides)}
    sizes = model_config(model if student is None else student.preset)
    rules = student.rules if student is not None else read_rules(Path(model)) if Path(model).is_dir() else None
    if device is not None:
        return stream_report(sizes, generation_settings(None, changes, rules), _memory(device), f"--device {device}")
    machine = look()
    if not machine.gpus:
        raise ConfigError("this machine has no GPU; name the one to plan for, such as --device 24GB")
    return stream_report(sizes, generation_settings(None, changes, rules), machine.gpus[0].free_bytes, "GPU 0")


def _memory(device: str) -> int:
    """Bytes of a GPU. Raises: ConfigError."""
    if (known := find_device(device)) is not None:
        return known.memory_bytes
    if (plain := re.fullmatch(r"(\d+) ?GB", device, re.IGNORECASE)) is None:
        raise ConfigError(
            f"--device {device} is not known; give {', '.join(d.name for d in DEVICES)}, or memory such as 24GB"
        )
    return int(plain[1]) * 10**9


def _stage(config: StageConfig, job: JobConfig | None, ranks: int, free: int, where: str) -> StageReport:
    found = look_at(config, job)
    about: dict[str, Any] = {"image_tokens": found.image_tokens, "vae": found.vae}
    need = stage_need(config, found.sizes, ranks, **about)
    parts = {**need.at_rest, "encoders": found.encoder_bytes}
    parts["working memory"] = need.peak - sum(need.at_rest.values())
    total = sum(parts.values())
    problems = [f"missing {what}" for what in found.missing]
    if total * HEADROOM > free:
        less = None
        if not config.activation_checkpointing:
            recomputing = config.model_copy(update={"activation_checkpointing": True})
            less = stage_need(recomputing, found.sizes, ranks, **about).peak + found.encoder_bytes
        problems.append(
            f"{_size(total)} and a tenth for what is not counted do not fit into {_size(free)}: " + _remedy(less, free)
        )
    disk = need.checkpoint * (config.keep_checkpoints + 1 if config.save_every else 0)
    if disk > (room := free_disk(config.logdir)):
        problems.append(
            f"{config.keep_checkpoints} checkpoints and one being written need {_size(disk)} of disk; lower "
            "keep_checkpoints or move logdir"
        )
    names, texts = (config.name, config.objective.kind, ranks), (found.missing, found.notes, problems)
    return StageReport(*names, parts, need.moment, free, where, disk, room, *texts)


def _remedy(recomputed: int | None, free: int) -> str:
    """What to do. Args: `recomputed`, the bytes with activation checkpointing, None where it is on."""
    if recomputed is not None and recomputed * HEADROOM <= free:
        return f"set activation_checkpointing=true, which needs {_size(recomputed)}"
    return "use more GPUs, activation_checkpointing=true, a smaller micro_batch_size, or smaller videos"


def _machine_lines(machine: Machine) -> list[str]:
    ram = f"memory {_size(machine.ram_bytes)}, available {_size(machine.ram_free_bytes)}"
    lines = [f"{machine.system}, {machine.cores} cores, {ram}"]
    for number, gpu in enumerate(machine.gpus):
        sizes = f"{_size(gpu.total_bytes)}, free {_size(gpu.free_bytes)}"
        lines.append(f"GPU {number}: {gpu.name}, capability {gpu.capability}, {sizes}")
        lines += [f"  attention in {dtype}: {', '.join(names)}" for dtype, names in gpu.kernels.items()]
    versions = ", ".join(f"{name} {found or 'not installed'}" for name, found in machine.packages.items())
    return [*lines, *([] if machine.gpus else ["no GPU that torch can use"]), versions]


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
