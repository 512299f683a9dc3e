"""`longtake bench CONFIG`: seconds of a stage's iterations, by what they update and where their roll-outs stop.

The networks, objective, optimizers and iterations are those of `longtake train`. Encodings are made in memory: reading
and encoding are not measured. Weights that are not there are random, of the sizes that the configuration names. Nothing
is saved, and nothing is written into the run's folder.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from longtake.bench.clock import wholes
from longtake.bench.kernels import Attention, Operation, backward_rate, pass_operations, rates
from longtake.bench.random_models import RandomBuilder
from longtake.bench.report import machine
from longtake.bench.validating import ValidationBench
from longtake.config.job import JobConfig, load_config
from longtake.config.stage import StageConfig
from longtake.devices import find_device
from longtake.doctor.files import Findings, look_at
from longtake.errors import ConfigError
from longtake.models.execution import compilations
from longtake.models.flops import Work, backward, forward
from longtake.parallel.mesh import Mesh
from longtake.train.loop import MetricWindow, iteration
from longtake.train.made_batches import MadeBatches, made_codec
from longtake.train.metrics import PhaseTimer
from longtake.train.networks import Builder
from longtake.train.stage import InPrecision
from longtake.train.throughput import clip_call

logger = logging.getLogger(__name__)

GIB = 2**30
WARM_UP = 3  # iterations of each kind after which passes are recorded and everything is compiled
STEPS = 8  # that count, unless another number is asked for: one of each kind where roll-outs have four exits
_LOOK_AHEAD = 1000  # iterations among which one of each kind is looked for


@dataclass(frozen=True)
class Kind:
    """What tells iterations apart: whether the generator is updated, and the step at which roll-outs stop (None: there
    are none).
    """

    generator: bool
    exit_step: int | None


@dataclass(frozen=True)
class Lap:
    """One iteration by its number: seconds in all, of each network's update, and of each phase."""

    kind: Kind
    seconds: float
    of: Mapping[str, float]
    step: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)


class Bench:
    """A stage that is set up as for a training, whose iterations are run in any order."""

    def __init__(self, config: StageConfig, found: Findings, mesh: Mesh) -> None:
        self.mesh, self.found, self.in_order = mesh, found, config.objective.decodes
        # Random weights may lead astray; an update that is skipped for it is counted and told.
        self.config = config.model_copy(update={"on_nonfinite": "skip", "max_skipped": 10**9})
        random = any(text.startswith(("weights", "sizes")) for text in (*found.missing, *found.notes))
        self.weights = "random" if random else "those of the configuration"
        builder = RandomBuilder(config, mesh, sizes=found.sizes) if random else Builder(config, mesh)
        networks = self.networks = builder.build()
        codec = None
        if self.in_order:
            with mesh.device:
                codec = made_codec(
                    found.vae, found.sizes["generator"], found.image_tokens, config.video.num_latent_frames
                )
        self.phases = PhaseTimer(mesh.device)
        self.inner = builder.objective(networks, codec, self.phases)
        self.objective = InPrecision(self.inner, mesh, bf16=config.precision == "bf16")
        self.state = builder.state(self.inner)
        self.keeper = builder.keeper(self.inner)
        samples = torch.Generator(mesh.device).manual_seed(mesh.data_rank)  # of a sequence group the same ones
        self.made: Any = MadeBatches(
            config,
            found.sizes["generator"],
            found.image_tokens,
            config.accumulation(mesh.world_size),
            config.micro_batch(mesh.world_size),
            lambda *shape: torch.randn(shape, device=mesh.device, generator=samples),
        )
        self.batches = self.inner.batches(self.made, config.batch_size)

    def kind(self, step: int) -> Kind:
        """Of an iteration."""
        exit_step = getattr(self.inner, "exit_step", None)
        return Kind("generator" in self.inner.turns(step), None if exit_step is None else exit_step(step))

    def rolls_out(self, step: int) -> bool:
        """Whether an iteration makes the clips that it learns from."""
        made_at = getattr(self.inner, "rollout_step", None)
        return made_at is None or made_at(step) == step

    def cycle(self) -> tuple[int, int]:
        """Iterations to one update of the generator, and how many of them learn from a roll-out of another one."""
        steps = range(_LOOK_AHEAD, 2 * _LOOK_AHEAD)
        updates = max(1, sum("generator" in self.inner.turns(step) for step in steps))
        kept = sum(not self.rolls_out(step) for step in steps)
        return round(_LOOK_AHEAD / updates), round(kept / updates)

    def steps(self, count: int) -> list[int]:
        """The numbers of `count` iterations, one of each kind as far as that goes, after those of the warm-up.

        Roll-outs that stop last and first come first: a step more takes as long each time, so that the mean of these
        two is that of all. Chunks of long videos go on from each other, so that their iterations come in order. Those
        that learn from clips of another one are left out: beside the generator's update the critic does the same.
        """
        if self.in_order:
            begin = self._beginning()
            return list(range(begin, begin + WARM_UP + count))
        first: dict[Kind, int] = {}
        for step in range(_LOOK_AHEAD):
            if self.rolls_out(step):
                first.setdefault(self.kind(step), step)
        if len(first) == 1:  # all are alike: one after the other, as in a training, whose noise is made ahead
            return list(range(WARM_UP + count))
        exits = sorted({kind.exit_step or 0 for kind in first}, reverse=True)
        inwards = {step: min(2 * n, 2 * (len(exits) - n) - 1) for n, step in enumerate(exits)}
        order = sorted(first, key=lambda kind: (inwards[kind.exit_step or 0], not kind.generator))
        warm_up = [first[order[index % len(order)]] for index in range(min(2, len(order)))] * WARM_UP
        return [*warm_up[:WARM_UP], *(first[order[index % len(order)]] for index in range(count))]

    def _beginning(self) -> int:
        """The first iteration at which long videos begin and the generator is trained during the warm-up: before, the
        critic has its head start. 0 where there is none.
        """
        begins = (step for step in range(_LOOK_AHEAD) if self.inner.chunk(step) == 0)
        return next((b for b in begins if any(self.kind(step).generator for step in range(b, b + WARM_UP))), 0)

    def validation(self) -> ValidationBench:
        """A validation of the stage."""
        (rows, *_), networks, name = next(self.made), self.networks, self.config.objective.reference
        teacher = None if name is None else networks.frozen.get(name)
        average = self.state.ema.get("generator")
        student, row = networks.student, rows.first()
        return ValidationBench(self.config, self.mesh, student, average, teacher, row, self.found.vae)

    def lap(self, step: int, *, warm_up: bool = False, window: MetricWindow | None = None) -> Lap:
        """Runs an iteration and says what it took; `window` gets its losses."""
        self.state.step, window = step, window or MetricWindow()
        begun = time.perf_counter()
        iteration(self.state, self.objective, self.batches, self.config, self.mesh, self.phases, window)
        taken = self.phases.take()  # waits for the device
        self.keeper.passed(step)
        of = wholes(taken)
        lap = Lap(self.kind(step), time.perf_counter() - begun, of, step, taken)
        updates = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in of.items())
        logger.info("%s exit step %s: %s", "warm-up," if warm_up else "counted,", lap.kind.exit_step, updates)
        return lap

    def work(self, step: int) -> Work:
        """Model operations of an iteration, of one rank."""
        sizes, config = self.found.sizes, self.config
        clips = {
            name: clip_call(config.video, size, config.batch_size, self.found.image_tokens)
            for name, size in sizes.items()
        }
        total = Work()
        for one in self.inner.passes(step, clips):
            size, lora = sizes[one.network], config.networks[one.network].lora
            if one.ahead:  # without gradient updates are merged into their weights
                total += forward(size, one.call, lora if one.with_grad else None) * one.times
            if one.with_grad:
                total += backward(size, one.call, lora) * one.times
        return total * (1 / self.mesh.world_size)


def bench_training(
    path: Path, overrides: Sequence[str], mesh: Mesh, *, steps: int = STEPS, memory: float | None = None
) -> Iterator[dict[str, Any]]:
    """The numbers of a stage on the ranks of `mesh`, all of which call it; `steps` iterations count after the warm-up.

    They come in parts as they are known: what is measured, what came of it, what kernels allow, and a validation.
    Args: `memory` GiB of each GPU that may be taken, as if it had no more: what does not fit fails.
    Raises: LongtakeError; torch.OutOfMemoryError.
    """
    config = load_config(path, overrides)
    if isinstance(config, JobConfig):
        raise ConfigError("a job has several stages; give the file of one of them")
    begun, found = time.perf_counter(), look_at(config)
    config.accumulation(mesh.world_size)
    mesh = mesh.arranged(config.parallel)
    if memory is not None:
        _limit(memory, mesh.device)
    bench = Bench(config, found, mesh)
    made = {"weights": bench.weights, "data": "encodings made in memory"}
    yield machine(mesh.device) | {"stage": config.name, "ranks": mesh.world_size, "shared": _shared(bench), **made}
    numbers, losses = bench.steps(steps), MetricWindow()
    _forget_peak(mesh.device)
    warm_up = [bench.lap(numbers[0], warm_up=True, window=losses)]
    first, first_peaks = time.perf_counter() - begun, mesh.every(lambda: _peak_gib(mesh.device))
    warm_up += [bench.lap(step, warm_up=True) for step in numbers[1:WARM_UP]]
    compiled = compilations()  # in this process: the bench's
    _forget_peak(mesh.device)
    mine = [bench.lap(step) for step in numbers[WARM_UP:]]
    laps = [max(each, key=lambda lap: lap.seconds) for each in zip(*mesh.every(lambda: mine), strict=True)]
    names = sorted({name for lap in laps for name in lap.phases if name.startswith("seconds/")})
    phases = {name: sum(lap.phases.get(name, 0.0) for lap in laps) / len(laps) for name in names}
    peaks = mesh.every(lambda: _peak_gib(mesh.device))
    taken = summary(laps, *bench.cycle())
    yield {
        **taken,
        "samples_per_s": config.batch_size / _iteration_seconds(taken),
        "phases": phases,
        "peak_gib": _most(peaks, 0),
        "reserved_gib": _most(peaks, 1),
        "rank_peak_gib": [allocated for allocated, _ in peaks],
        "first_peak_gib": _most(first_peaks, 0),
        "limit_gib": memory,
        "iterations": len(laps),
        "skipped_updates": bench.state.skipped,
        "first": {name: value for name, value in losses.take(mesh).items() if name.endswith(("_loss", "_norm"))},
        "first_update_s": first,
        "warm_up_s": sum(lap.seconds for lap in warm_up),
        "compiled": asdict(compiled),
        "kept": bench.keeper.decided,
    }
    yield _bounds(bench, laps)
    if config.validates and config.validation.num_rows:
        yield {"validation": bench.validation().run()}


def _shared(bench: Bench) -> dict[str, Any]:
    """How the ranks divide samples and weights."""
    mesh, config = bench.mesh, bench.config
    together = 1 if mesh.sequence is None else mesh.sequence.size
    shards = mesh.world_size // (1 if mesh.fsdp_mesh is None else config.parallel.replicate)
    return {
        "samples_at_once": mesh.num_data_ranks * config.micro_batch(mesh.world_size),
        "ranks_a_sample": together,
        "weights": "whole on each rank" if mesh.fsdp_mesh is None else f"sharded over {shards} ranks",
    }


def _iteration_seconds(taken: Mapping[str, Any]) -> float:
    """The mean over exit steps, and over a cycle where there is one: what the recipe takes."""
    cycle = taken["cycle_s"]
    return taken["iteration_s"] if cycle is None else cycle / taken["cycle_iterations"]


def _limit(memory: float, device: torch.device) -> None:
    """Lets torch take so many GiB of a GPU. Raises: ConfigError where there is none, or it has less."""
    if device.type != "cuda":
        raise ConfigError(
            f"--memory {memory:g} limits what is taken of a GPU, and this runs on {device.type}; leave it out"
        )
    total = torch.cuda.get_device_properties(device).total_memory
    if memory * GIB > total:
        raise ConfigError(f"--memory {memory:g} is more than the {total / GIB:.1f} GiB of {device}; give less")
    torch.cuda.set_per_process_memory_fraction(memory * GIB / total, device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> tuple[float | None, float | None]:
    """The most that tensors took, and that was kept for them, since it was forgotten; None on a CPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB


def _most(peaks: Sequence[tuple[float | None, float | None]], which: int) -> float | None:
    """Of all ranks."""
    return max((value for peak in peaks if (value := peak[which]) is not None), default=None)


def summary(laps: list[Lap], per_cycle: int, kept: int = 0) -> dict[str, Any]:
    """Seconds by network and exit step, and of a cycle: `per_cycle` iterations of which one updates the generator and
    `kept` have the critic learn from clips that are there.

    Means over exit steps are of those that came; None where nothing of a kind did.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    given = []
    for lap in laps:
        step = "all" if lap.kind.exit_step is None else str(lap.kind.exit_step)
        for name, seconds in lap.of.items():
            if name == "critic" and lap.kind.generator:
                given.append(seconds)
            else:
                found[name][step].append(seconds)
    seconds_of = {
        name: {step: mean(values) for step, values in sorted(found[name].items())} for name in ("critic", "generator")
    }
    critic, generator = (mean(values.values()) if values else None for values in seconds_of.values())
    shared = mean(given) if given else None
    cycle = None
    if critic is None and generator is not None and per_cycle == 1:
        cycle = generator + (shared or 0.0)
    elif critic is not None and generator is not None:
        cycle = generator + (1 + kept) * (shared or 0.0) + (per_cycle - 1 - kept) * critic
    return {
        "cycle_s": cycle,
        "cycle_iterations": per_cycle,
        "cycle_roll_outs": per_cycle - kept,
        "critic_s": seconds_of["critic"],
        "critic_given_s": shared,
        "generator_s": seconds_of["generator"],
        "iteration_s": mean(lap.seconds for lap in laps),
    }


# ---- what the kernels allow ------------------------------------------------------------------------------------------
def _bounds(bench: Bench, laps: list[Lap]) -> dict[str, Any]:
    """Rates of the kernels, the least seconds of a cycle at these, and the share of the device's peak that is used."""
    config, device = bench.config, bench.mesh.device
    size, dtype = bench.found.sizes["generator"], torch.bfloat16 if config.precision == "bf16" else torch.float32
    found = pass_operations(size, clip_call(config.video, size, 1, bench.found.image_tokens))
    heaviest = max((op for op in found if isinstance(op, Attention)), key=lambda op: op.operations)
    products: Counter[Operation] = Counter({op: n for op, n in found.items() if not isinstance(op, Attention)})
    rate = rates(products, device, dtype, most=3)
    attention = rates({heaviest: 1}, device, dtype)[heaviest.name]
    rate_backward = backward_rate(heaviest, device, dtype) / 1e12
    slowest = min(rate.values())

    def least(total: Work) -> float:
        attended = total.attention / attention + total.attention_backward / rate_backward
        return (total.products / slowest + attended) / 1e12

    floors = {lap.kind: least(bench.work(lap.step)) for lap in laps}
    per_cycle, kept = bench.cycle()
    again = next((least(bench.work(step)) for step in range(_LOOK_AHEAD) if not bench.rolls_out(step)), 0.0)
    done, took = sum(bench.work(lap.step).total for lap in laps), sum(lap.seconds for lap in laps)
    peak = _peak(config.precision, device)
    return {
        "mfu": None if peak is None else done / took / peak,
        "model_tflops": done / took / 1e12,
        "floor_s": _cycle(floors, per_cycle, kept, again),
        "rates_tflops": {**rate, heaviest.name: attention, f"{heaviest.name}, backward": rate_backward},
    }


def _cycle(seconds: Mapping[Kind, float], per_cycle: int, kept: int, again: float) -> float | None:
    """Of a cycle, from those of iterations by kind, and of each that is `kept` (`again`)."""
    with_generator = [value for kind, value in seconds.items() if kind.generator]
    without = [value for kind, value in seconds.items() if not kind.generator]
    if not with_generator or (per_cycle > 1 and not without):
        return None
    return mean(with_generator) + (per_cycle - 1 - kept) * (mean(without) if without else 0.0) + kept * again


def _peak(precision: str, device: torch.device) -> float | None:
    known = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if known is None else known.peak(precision)
