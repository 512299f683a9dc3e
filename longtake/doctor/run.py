"""`longtake doctor`: what this machine has, what a configuration needs of it, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longtake.config import JobConfig, StageConfig, load_config
from longtake.devices import find_device
from longtake.doctor.calibration import measured_rates
from longtake.doctor.files import Findings, look_at
from longtake.doctor.layout import Layout, layout_of, with_shared_base
from longtake.doctor.machine import Machine, free_disk, look
from longtake.doctor.memory import parameter_count
from longtake.doctor.need import HEADROOM, Need, stage_need
from longtake.doctor.rates import Rates, rates_of
from longtake.doctor.speed import Prediction, SpeedModel
from longtake.doctor.table import markdown
from longtake.errors import ConfigError


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
    layout: Layout
    prediction: Prediction
    rates: Rates

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
            f"  {'while loading':<16} {_size(self.need.loading):>12}   (each rank reads its shards)",
            f"  {'free':<16} {_size(self.free_bytes):>12}   ({self.where})",
            f"  {'checkpoints':<16} {_size(self.disk_need_bytes):>12}   (on disk; free {_size(self.disk_free_bytes)})",
            *self._prediction_lines(),
            *(f"  note: {note}" for note in self.findings.notes),
            *(f"  PROBLEM: {problem}" for problem in self.problems),
        ]

    def _prediction_lines(self) -> list[str]:
        guess, layout = self.prediction, self.layout
        known = self.rates.is_calibrated
        basis = "computing by measured steps of one GPU" if known else "no whole step was measured on one"
        phases = ", ".join(f"{name} {value:.2f}" for name, value in guess.seconds.items() if value >= 0.005)
        return [
            f"  predicted for {layout.gpus} x {self.rates.device.name} in nodes of {layout.gpus_per_node} ({basis}): "
            f"{layout.copies} replica(s) x {layout.shards} shard(s), sequence {layout.sequence}",
            f"  {'seconds a step':<16} {guess.total:>12.2f}   ({phases}; {guess.samples_per_second:.2f} samples/s, "
            f"{guess.utilisation:.0%} of the peak)",
            f"  {'network bytes':<16} {guess.node_bytes / 1e9:>9.1f} GB   (a step and GPU inside a node; "
            f"{guess.network_bytes / 1e9:.1f} GB between nodes)",
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
                "layout": asdict(stage.layout),
                "device": stage.rates.device.name,
                "calibrated": stage.rates.is_calibrated,
                "prediction": stage.prediction.tree(),
            }
            for stage in self.stages
        ]
        return {"ok": self.ok, "problems": self.problems, "machine": asdict(self.machine), "stages": stages}

    def __str__(self) -> str:
        blocks = [_machine_lines(self.machine), *(stage.lines() for stage in self.stages)]
        text = "\n\n".join("\n".join(lines) for lines in blocks)
        problems = "".join(f"\nPROBLEM: {problem}" for problem in self.problems)
        return f"{text}{problems}\n\n{'all is well' if self.ok else 'something is missing or does not fit'}"


def diagnose(
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    gpus: int | None = None,
    device: str | None = None,
    measured: str | Path | None = None,
    **layout: Any,
) -> Report:
    """Looks at the machine, and at a stage or job when `config` names one.

    Args: `gpus`, ranks to plan for (default: the GPUs of this machine, at least 1); `device`, to plan for other
    machines with such GPUs (default where there are more ranks than one node has: H200); `measured`, the
    `results.json` of `benchmarks/full_size.py`; `layout`, fields of `Layout` that win over the configuration's.
    Raises: ConfigError for a wrong configuration, and for numbers that do not divide each other.
    """
    if gpus is not None and gpus < 1:
        raise ConfigError(f"--gpus {gpus} must be at least 1")
    loaded = None if config is None else load_config(config, overrides)
    machine = look()
    problems = [f"package {name} is not installed" for name in machine.missing_packages]
    ranks = gpus or max(1, len(machine.gpus))
    if ranks > (layout.get("gpus_per_node") or Layout(1).gpus_per_node):
        device = device or _device_of(machine)
    if machine.gpus and ranks > len(machine.gpus) and device is None:
        problems.append(f"{ranks} ranks are planned and this machine has {len(machine.gpus)} GPU(s)")
    plan = Plan(ranks, device, _rates(device or _device_of(machine), measured), layout)
    reports = [_stage(stage, job, machine, plan) for stage, job in _stages(loaded)]
    return Report(machine, reports, problems)


@dataclass(frozen=True)
class Plan:
    """What is asked for: `ranks`, the `device` of other machines (None: this one), `rates`, options of the layout."""

    ranks: int
    device: str | None
    rates: Rates
    layout: dict[str, Any]

    def lay(self, config: StageConfig, found: Findings) -> tuple[StageConfig, Layout]:
        """The stage and its layout, checked. Raises: ConfigError."""
        layout = layout_of(config, self.ranks, **self.layout)
        if layout.shared_base and config.distils:
            config = with_shared_base(config)
        layout.check(config, found.networks)
        return config, layout


def scaling_table(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    measured: str | Path | None = None,
    **layout: Any,
) -> str:
    """Each stage of a recipe on 1 to 1024 GPUs, as Markdown; nothing of this machine enters. Raises: ConfigError."""
    rates, tables = _rates(device or "H200", measured), []
    for stage, job in _stages(load_config(config, overrides)):
        found = look_at(stage, job)
        like = layout_of(stage, 1, **{k: v for k, v in layout.items() if k not in ("sequence", "replicate")})
        if like.shared_base and stage.distils:
            stage = with_shared_base(stage)
        like.check(stage, found.networks)
        tables.append(markdown(stage, found.networks, rates, found.image_tokens, like=like))
    return "\n\n".join(tables)


def _stages(loaded: StageConfig | JobConfig | None) -> list[tuple[StageConfig, JobConfig | None]]:
    if isinstance(loaded, JobConfig):
        return [(stage, loaded) for stage in loaded.stages.values()]
    return [] if loaded is None else [(loaded, None)]


def _device_of(machine: Machine) -> str:
    """The GPU of this machine where its rates are known, else the one that the constants were measured on."""
    found = [find_device(gpu.name) for gpu in machine.gpus[:1]]
    return found[0].name if found and found[0] is not None else "H200"


def _rates(device: str, measured: str | Path | None) -> Rates:
    return rates_of(device) if measured is None else measured_rates(rates_of(device), Path(measured))


def _stage(config: StageConfig, job: JobConfig | None, machine: Machine, plan: Plan) -> StageReport:
    ranks = plan.ranks
    found = look_at(config, job)
    config, layout = plan.lay(config, found)
    need = stage_need(
        config,
        found.networks,
        ranks,
        encoder_bytes=found.encoder_bytes or 0,
        image_tokens=found.image_tokens,
        layout=layout,
        vae_width=found.vae_width,
    )
    prediction = SpeedModel(config, found.networks, layout, plan.rates, found.image_tokens).predict()
    if plan.device is not None:
        free, where = plan.rates.device.memory_bytes, f"an {plan.rates.device.name} by its data sheet"
    elif machine.gpus:
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
        layout,
        prediction,
        plan.rates,
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
