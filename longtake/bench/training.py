"""`longtake bench CONFIG`: seconds of a stage's iterations, by what they update and where their roll-outs stop.

The networks, objective, optimizers and iterations are those of `longtake train`. Encodings are made in memory: reading
and encoding are not measured. Weights that are not there are random, of the sizes that the configuration names. Nothing
is saved, and nothing is written into the run's folder.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch

from longtake.bench.kernels import Attention, Operation, backward_rate, rates
from longtake.bench.kernels import pass_operations as operations_of_call
from longtake.bench.random_models import RandomBuilder
from longtake.bench.report import machine
from longtake.config.stage import JobConfig, StageConfig
from longtake.devices import find_device
from longtake.doctor.files import Findings, look_at
from longtake.encoders.vae import VideoVAE
from longtake.errors import ConfigError
from longtake.models.flops import Call, Work
from longtake.objectives.base import Objective
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.rng import KeyedRNG
from longtake.rollout.work import clip_call, loras, model_work, passes
from longtake.train.loop import LoopSettings, MetricWindow, iteration
from longtake.train.made_batches import MadeBatches
from longtake.train.metrics import PhaseTimer
from longtake.train.networks import build_networks
from longtake.train.stage import InPrecision, for_long_videos, make_objective, make_state
from longtake.train.window_codec import EncoderCodec

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
    """One iteration: seconds in all, and of each network's update."""

    kind: Kind
    seconds: float
    of: Mapping[str, float]


class Bench:
    """A stage that is set up as for a training, whose iterations are run in any order."""

    def __init__(self, config: StageConfig, found: Findings, mesh: Mesh) -> None:
        self.config, self.mesh, self.found = config, mesh, found
        random = any(text.startswith(("weights", "sizes")) for text in (*found.missing, *found.notes))
        build = RandomBuilder(config, mesh, found.sizes).build if random else lambda: build_networks(config, mesh)
        self.weights = "random" if random else "those of the configuration"
        networks, real, adapters, student = build()
        self.phases = PhaseTimer(mesh.device)
        self.inner: Any = make_objective(config, student, networks, real, KeyedRNG(config.seed), self.phases)
        self.batches: Any = made_batches(config, found, mesh)
        accumulation = config.accumulation(mesh.world_size)
        if config.stage == "long":
            codec = _codec(found, config, mesh.device)
            self.inner, self.batches = for_long_videos(config, self.inner, codec, self.batches, accumulation)
        self.objective: Objective = InPrecision(self.inner, mesh, bf16=config.precision == "bf16")
        self.state = make_state(config, self.objective.networks, adapters)
        # Random weights may lead astray; an update that is skipped for it is counted and told.
        self.settings = LoopSettings(config.max_steps, accumulation, on_nonfinite="skip", max_skipped=10**9)

    def kind(self, step: int) -> Kind:
        """Of an iteration."""
        turns = self.inner.turns(step)
        return Kind("generator" in turns, self.inner.exit_step(step) if self.config.distils else None)

    def steps(self, count: int) -> list[int]:
        """The numbers of `count` iterations, one of each kind as far as that goes, after those of the warm-up.

        Chunks of long videos go on from each other, so that their iterations come in order.
        """
        if self.config.stage == "long":
            return list(range(WARM_UP + count))
        first: dict[Kind, int] = {}
        for step in range(_LOOK_AHEAD):
            first.setdefault(self.kind(step), step)
        order = sorted(first, key=lambda kind: (kind.exit_step or 0, kind.generator), reverse=True)
        warm_up = [first[order[index % len(order)]] for index in range(min(2, len(order)))] * WARM_UP
        return [*warm_up[:WARM_UP], *(first[order[index % len(order)]] for index in range(count))]

    def lap(self, step: int, *, warm_up: bool = False) -> Lap:
        """Runs an iteration and says what it took."""
        self.state.step = step
        begun = time.perf_counter()
        iteration(self.state, self.objective, self.batches, self.settings, self.mesh, self.phases, MetricWindow())
        of = self.phases.take_wholes()  # waits for the device
        lap = Lap(self.kind(step), time.perf_counter() - begun, of)
        updates = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in of.items())
        logger.info("%s exit step %s: %s", "warm-up," if warm_up else "counted,", lap.kind.exit_step, updates)
        return lap


def bench_training(
    config: StageConfig | JobConfig, device: str | None = None, *, steps: int = STEPS
) -> Iterator[dict[str, Any]]:
    """The numbers of a stage, of which `steps` iterations count after the warm-up, in parts as they are known.

    Raises: LongtakeError.
    """
    if isinstance(config, JobConfig):
        raise ConfigError("a job has several stages; give the file of one of them")
    found = look_at(config)
    with init_mesh(device) as mesh:
        mesh = mesh.arranged(config.parallel)
        bench = Bench(config, found, mesh)
        made = {"weights": bench.weights, "data": "encodings made in memory"}
        yield machine(mesh.device) | {"stage": config.name, **made}
        numbers = bench.steps(steps)
        warm_up = [bench.lap(step, warm_up=True) for step in numbers[:WARM_UP]]
        if mesh.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(mesh.device)
        bench.phases.take()
        laps = [bench.lap(step) for step in numbers[WARM_UP:]]
        phases = {name: seconds / len(laps) for name, seconds in sorted(bench.phases.take().items())}
        peak = mesh.peak_memory_bytes()
        yield {
            **summary(laps, _per_cycle(config)),
            "phases": phases,
            "peak_gib": None if peak is None else peak / GIB,
            "iterations": len(laps),
            "skipped_updates": bench.state.skipped,
            "warm_up_s": sum(lap.seconds for lap in warm_up),
        }
        yield _bounds(bench, laps)


def _per_cycle(config: StageConfig) -> int:
    """Iterations to one update of the generator."""
    return 1 if config.critic is None else config.critic.updates_per_generator


def summary(laps: list[Lap], per_cycle: int) -> dict[str, Any]:
    """Seconds by network and exit step, and of a cycle: `per_cycle` iterations of which one updates the generator.

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
        cycle = generator + (shared or 0.0) + (per_cycle - 1) * critic
    return {
        "cycle_s": cycle,
        "critic_s": seconds_of["critic"],
        "critic_given_s": shared,
        "generator_s": seconds_of["generator"],
        "iteration_s": mean(lap.seconds for lap in laps),
    }


# ---- what the kernels allow ------------------------------------------------------------------------------------------
def _bounds(bench: Bench, laps: list[Lap]) -> dict[str, Any]:
    """Rates of the kernels, the least seconds of a cycle at these, and the share of the device's peak that is used."""
    config, device = bench.config, bench.mesh.device
    networks, dtype = bench.found.sizes, torch.bfloat16 if config.precision == "bf16" else torch.float32
    clip = clip_call(config, networks["generator"], config.micro_batch(bench.mesh.world_size), bench.found.image_tokens)
    one = Call.bidirectional(1, clip.entries, clip.tokens, clip.text_tokens, clip.image_tokens)
    found = operations_of_call(networks["generator"], one)
    heaviest = max((op for op in found if isinstance(op, Attention)), key=lambda op: op.operations)
    products: Counter[Operation] = Counter({op: n for op, n in found.items() if not isinstance(op, Attention)})
    rate = rates(products, device, dtype, most=3)
    attention = rates({heaviest: 1}, device, dtype)[heaviest.name]
    backward = backward_rate(heaviest, device, dtype) / 1e12
    work = {lap.kind: _work(bench, lap.kind) for lap in laps}
    slowest = min(rate.values())

    def least(total: Work) -> float:
        return (total.products / slowest + total.attention / attention + total.attention_backward / backward) / 1e12

    floors = {kind: least(total) for kind, total in work.items()}
    floor = _cycle(floors, _per_cycle(config))
    peak = _peak(config, device)
    done = sum(work[lap.kind].total for lap in laps)
    return {
        "mfu": None if peak is None else done / sum(lap.seconds for lap in laps) / peak,
        "model_tflops": done / sum(lap.seconds for lap in laps) / 1e12,
        "floor_s": floor,
        "rates_tflops": {**rate, heaviest.name: attention, f"{heaviest.name}, backward": backward},
    }


def _cycle(seconds: Mapping[Kind, float], per_cycle: int) -> float | None:
    """Of a cycle, from those of iterations by kind."""
    with_generator = [value for kind, value in seconds.items() if kind.generator]
    without = [value for kind, value in seconds.items() if not kind.generator]
    if not with_generator or (per_cycle > 1 and not without):
        return None
    return mean(with_generator) + (per_cycle - 1) * (mean(without) if without else 0.0)


def _work(bench: Bench, kind: Kind) -> Work:
    """Model operations of an iteration of this kind, of one rank."""
    config, sizes = bench.config, bench.found.sizes
    options: dict[str, Any] = {}
    if config.distils:
        options = {"update_generator": kind.generator, "exit_step": kind.exit_step or 0}
        options["together"] = bench.inner.generator.batched_exit_backward
        options["chunk"] = 1 if config.stage == "long" else 0  # most chunks go on after another
    found = passes(config, sizes, config.batch_size, bench.found.image_tokens, **options)
    total = sum(model_work(found, sizes, loras(config)).values(), Work())
    return total * (1 / bench.mesh.world_size)


def _peak(config: StageConfig, device: torch.device) -> float | None:
    known = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if known is None else known.peak(config.precision)


# ---- what stands in for files ----------------------------------------------------------------------------------------
def made_batches(config: StageConfig, found: Findings, mesh: Mesh) -> MadeBatches:
    """Random encodings on the device."""

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=mesh.device)

    rows = config.micro_batch(mesh.world_size)
    return MadeBatches(config, found.sizes["generator"], rows, found.image_tokens, new)


def _codec(found: Findings, config: StageConfig, device: torch.device) -> EncoderCodec:
    """A VAE with random weights, of the sizes that files tell, else of Wan2.1; and CLIP tokens of the right shape."""
    from diffusers import AutoencoderKLWan

    width, count = found.sizes["generator"].image_dim, found.image_tokens

    def encode(images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), count, width or 0, device=device)

    tokens: Any = SimpleNamespace(encode=encode) if width else None
    with device:
        vae = VideoVAE(AutoencoderKLWan(**found.vae))
    options: dict[str, Any] = {"with_y": config.model.with_y, "num_latent_frames": config.video.num_latent_frames}
    return EncoderCodec(vae, tokens, **options)
