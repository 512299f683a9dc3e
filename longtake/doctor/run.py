"""`longtake doctor`: what this machine has, what a configuration needs of it, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longtake.config import JobConfig, StageConfig, load_config
from longtake.doctor.files import Findings, look_at
from longtake.doctor.machine import Machine, free_disk, look
from longtake.doctor.memory import Need, parameter_count, stage_need
from longtake.errors import ConfigError

# What the model does not count: the CUDA context, fragments of the allocator, remembered encodings.
HEADROOM = 1.1


@dataclass(frozen=True)
class StageReport:
    """One stage: its `need` on each rank, what is `free` there and where, and its problems in words."""

    name: str
    stage: str
    ranks: int
    need: Need
    free_bytes: int
    where: str
    findings: Findings
    disk_need_bytes: int
    disk_free_bytes: int
    problems: list[str]
    checkpointing: bool

    def lines(self) -> list[str]:
        """The report as text."""
        networks = self.findings.networks
        sizes = [("generator", networks.generator), ("critic", networks.critic), ("teacher", networks.teacher)]
        shown = ", ".join(f"{name} {parameter_count(c) / 1e6:,.1f} M" for name, c in sizes if c is not None)
        parts = [f"  {name:<16} {_size(size):>12}" for name, size in self.need.parts.items() if size]
        if self.findings.encoder_bytes is None:
            parts.append("  encoders         not known: their files are missing")
        switch = "without" if self.checkpointing else "with"
        return [
            f"stage {self.name} ({self.stage}), each of {self.ranks} rank(s); parameters: {shown}",
            *parts,
            f"  {'sum':<16} {_size(self.need.total):>12}   ({switch} activation checkpointing "
            f"{_size(self.need.alternative)})",
            f"  {'while loading':<16} {_size(self.need.loading):>12}   (one network whole, those before it sharded)",
            f"  {'free':<16} {_size(self.free_bytes):>12}   ({self.where})",
            f"  {'checkpoints':<16} {_size(self.disk_need_bytes):>12}   (on disk; free {_size(self.disk_free_bytes)})",
            *(f"  note: {note}" for note in self.findings.notes),
            *(f"  PROBLEM: {problem}" for problem in self.problems),
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
        stages = [
            {
                "name": stage.name,
                "stage": stage.stage,
                "ranks": stage.ranks,
                "need_bytes": {**stage.need.parts, "sum": stage.need.total},
                "switched_checkpointing_bytes": stage.need.alternative,
                "loading_bytes": stage.need.loading,
                "encoders_known": stage.findings.encoder_bytes is not None,
                "free_bytes": stage.free_bytes,
                "where": stage.where,
                "disk_need_bytes": stage.disk_need_bytes,
                "disk_free_bytes": stage.disk_free_bytes,
                "missing": stage.findings.missing,
                "notes": stage.findings.notes,
                "problems": stage.problems,
            }
            for stage in self.stages
        ]
        return {"ok": self.ok, "problems": self.problems, "machine": asdict(self.machine), "stages": stages}

    def __str__(self) -> str:
        blocks = [_machine_lines(self.machine), *(stage.lines() for stage in self.stages)]
        text = "\n\n".join("\n".join(lines) for lines in blocks)
        problems = "".join(f"\nPROBLEM: {problem}" for problem in self.problems)
        return f"{text}{problems}\n\n{'all is well' if self.ok else 'something is missing or does not fit'}"


def diagnose(config: str | Path | None = None, overrides: Sequence[str] = (), *, gpus: int | None = None) -> Report:
    """Looks at the machine, and at a stage or job when `config` names one.

    Args: `gpus`, ranks to plan for (default: the GPUs of this machine, at least 1).
    Raises: ConfigError for a wrong configuration.
    """
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus {gpus} must be at least 1")
    loaded = None if config is None else load_config(config, overrides)
    machine = look()
    problems = [f"package {name} is not installed" for name in machine.missing_packages]
    ranks = gpus or max(1, len(machine.gpus))
    if machine.gpus and ranks > len(machine.gpus):
        problems.append(f"{ranks} ranks are planned and this machine has {len(machine.gpus)} GPU(s)")
    job = loaded if isinstance(loaded, JobConfig) else None
    stages = list(job.stages.values()) if job is not None else [loaded] if isinstance(loaded, StageConfig) else []
    return Report(machine, [_stage(stage, job, machine, ranks) for stage in stages], problems)


def _stage(config: StageConfig, job: JobConfig | None, machine: Machine, ranks: int) -> StageReport:
    found = look_at(config, job)
    need = stage_need(
        config, found.networks, ranks, encoder_bytes=found.encoder_bytes or 0, image_tokens=found.image_tokens
    )
    if machine.gpus:
        free, where = min(gpu.free_bytes for gpu in machine.gpus), "on the fullest GPU"
    else:
        free, where = machine.ram_free_bytes // ranks, "memory without a GPU, shared by the ranks"
    problems = [f"missing {what}" for what in found.missing]
    if need.total * HEADROOM > free:
        problems.append(
            f"{_size(need.total)} and a tenth for what is not counted do not fit into {_size(free)}: "
            + _remedy(config, need, free)
        )
    elif need.loading * HEADROOM > free:
        problems.append(f"the networks do not fit while they are loaded: {_size(need.loading)}")
    kept = config.keep_checkpoints + 1 if config.save_every else 0
    disk_need, disk_free = need.checkpoint * kept, free_disk(config.logdir)
    if disk_need > disk_free:
        problems.append(
            f"{config.keep_checkpoints} checkpoints and one being written need {_size(disk_need)} of disk; lower "
            "keep_checkpoints or move logdir"
        )
    return StageReport(
        config.name,
        config.stage,
        ranks,
        need,
        free,
        where,
        found,
        disk_need,
        disk_free,
        problems,
        bool(config.activation_checkpointing),
    )


def _remedy(config: StageConfig, need: Need, free: int) -> str:
    if not config.activation_checkpointing and need.alternative * HEADROOM <= free:
        return "set activation_checkpointing=true"
    return "use more GPUs, activation_checkpointing=true, a smaller micro_batch_size, or smaller videos"


def _machine_lines(machine: Machine) -> list[str]:
    lines = [
        f"{machine.system}, {machine.processor}, {machine.cores} cores, memory {_size(machine.ram_bytes)}, "
        f"available {_size(machine.ram_free_bytes)}"
    ]
    for number, gpu in enumerate(machine.gpus):
        lines.append(
            f"GPU {number}: {gpu.name}, capability {gpu.capability}, {_size(gpu.total_bytes)}, "
            f"free {_size(gpu.free_bytes)}"
        )
        lines += [f"  attention in {dtype}: {', '.join(names)}" for dtype, names in gpu.kernels.items()]
    if not machine.gpus:
        lines.append("no GPU that torch can use")
    lines += [f"{kind} attention: {what}" for kind, what in machine.attention.items()]
    lines.append(", ".join(f"{name} {found or 'not installed'}" for name, found in machine.packages.items()))
    return lines


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
