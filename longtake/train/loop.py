"""The training loop of every stage.

It reads: resume -> for step: [evaluate?] [sample?] [save?] [stop?] -> fetch -> losses -> backward -> finite? -> clip,
step, EMA -> log. What comes before the step needs no special case for the last one. Nothing is caught here: an error
ends the process, and torchrun ends the other ranks.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from longtake.distributed.mesh import Mesh
from longtake.distributed.parallelize import sum_gradients
from longtake.errors import ConfigError, TrainingError
from longtake.objectives.base import Objective
from longtake.runs import checkpoints_folder
from longtake.train.checkpoint import resume, save_checkpoint
from longtake.train.gauges import Gauges, Trace
from longtake.train.metrics_log import MetricsLog, Phases
from longtake.train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSettings:
    """How long, and what happens every how many iterations (0 = never).

    Fields: `accumulation`, micro-batches an update on each rank; `reduce_once`, only the last of these sums gradients
    over the ranks; `export`, networks whose weights every checkpoint also holds whole, for inference and for the next
    stage. Saving, evaluation and sampling also happen at `max_steps`.
    """

    max_steps: int
    accumulation: int = 1
    save_every: int = 100
    keep_checkpoints: int = 3
    log_every: int = 1
    validate_every: int = 0
    sample_every: int = 0
    export: tuple[str, ...] = ("generator",)
    reduce_once: bool = False

    def __post_init__(self) -> None:
        for name in ("accumulation", "keep_checkpoints", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} must be at least 1; set it to 1 or more")


class Batches(Protocol):
    """Endless micro-batches of one rank; `position` counts the samples that all ranks took together."""

    @property
    def position(self) -> int:
        """Samples that all ranks have taken so far."""
        ...

    def seek(self, position: int) -> None:
        """Makes the next micro-batch the one that follows the first `position` samples."""
        ...

    def __next__(self) -> Any: ...


@dataclass(frozen=True)
class Hooks:
    """What a stage adds to the loop; every rank calls them, the first two with the number of completed iterations.

    `evaluate` returns numbers to log, `sample` uint8 `[h, w, 3]` images; `start` runs once there is something to do,
    after a checkpoint that does not fit was refused.
    """

    evaluate: Callable[[int], Mapping[str, float]] | None = None
    sample: Callable[[int], Mapping[str, np.ndarray]] | None = None
    start: Callable[[], None] | None = None


@dataclass(frozen=True)
class RunInfo:
    """What is written beside the weights: the resolved `config`; `facts` that a resumed run must share (rope, block
    plan, fps); `wandb`, keyword arguments of `wandb.init` or None.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    wandb: Mapping[str, Any] | None = None
    progress: bool = True


def train(
    state: TrainState,
    objective: Objective,
    batches: Batches,
    settings: LoopSettings,
    *,
    folder: Path,
    mesh: Mesh,
    info: RunInfo | None = None,
    hooks: Hooks | None = None,
    phases: Phases | None = None,
    gauges: Gauges | None = None,
    trace: Trace | None = None,
) -> None:
    """Trains until `settings.max_steps` iterations are complete (and saved), going on from the newest checkpoint.

    Args: `folder`, the stage's own; `phases`, timers that the objective shares; `gauges`, rates for the rows; `trace`,
    a profiler.
    Raises: TrainingError on every rank, before the optimizer step, when a loss or a gradient is not finite;
    SystemExit (143) after SIGTERM, once the state is saved.
    """
    info, hooks, phases = info or RunInfo(), hooks or Hooks(), phases or Phases(mesh.device)
    gauges = gauges or Gauges()
    checkpoints = checkpoints_folder(folder)
    facts = {"config": info.config, "facts": info.facts}
    resumed = resume(state, checkpoints, mesh=mesh, **facts)
    if resumed is not None and mesh.is_main:
        logger.info("Resuming %s", resumed)
    first, last = state.step, settings.max_steps
    if first >= last:
        logger.info("%s: all %d iterations are done", folder, last)
        return
    if hooks.start:
        hooks.start()
    batches.seek(state.data_position)
    log = MetricsLog(
        folder, enabled=mesh.is_main, first_step=first, max_steps=last, progress=info.progress, wandb=info.wandb
    )
    window = Window()
    with closing(log), closing(trace) if trace else nullcontext(), _stop_on_sigterm() as stop_asked:
        for step in range(first, last + 1):
            if hooks.evaluate and _due(step, settings.validate_every, last):
                with phases("evaluate"):
                    log.scalars(step, hooks.evaluate(step))
            if hooks.sample and _due(step, settings.sample_every, last):
                with phases("sample"):
                    log.images(step, hooks.sample(step))
            stop = mesh.any(stop_asked())
            save = settings.save_every > 0
            if save and step > first and (stop or _due(step, settings.save_every, last)):
                with phases("checkpoint"):
                    save_checkpoint(
                        state, checkpoints, mesh=mesh, keep=settings.keep_checkpoints, export=settings.export, **facts
                    )
            if step == last:
                break
            if stop:
                outcome = "the same command goes on" if save else "nothing is saved (save_every=0)"
                logger.warning("Stopped by SIGTERM after %d of %d iterations; %s", step, last, outcome)
                raise SystemExit(128 + signal.SIGTERM)
            if trace:
                trace.at(step)
            started, before = time.perf_counter(), state.data_position
            once = settings.reduce_once
            _iteration(state, objective, batches, settings.accumulation, mesh, phases, window, reduce_once=once)
            seconds = time.perf_counter() - started
            window.add({"seconds": seconds})
            gauges.add(step, seconds, state.data_position - before)
            row = {}
            if _due(step + 1, settings.log_every, last):
                # Phases are summed over the row's iterations, evaluation and saving included.
                window.add({f"seconds/{name}": value for name, value in phases.take().items()})
                window.add({f"seconds_of/{name}": value for name, value in phases.take_wholes().items()})
                row = window.take(mesh) | gauges.take(mesh)
                log.scalars(step, row)
            log.advance({key: value for key, value in row.items() if key.endswith("_loss")})


def _iteration(
    state: TrainState,
    objective: Objective,
    batches: Batches,
    accumulation: int,
    mesh: Mesh,
    phases: Phases,
    window: Window,
    *,
    reduce_once: bool = False,
) -> None:
    """One iteration: each network of `turns` is updated once, all on the same micro-batches."""
    step = state.step
    with phases("data"):
        micro_batches = [next(batches) for _ in range(accumulation)]
    for turn in objective.turns(step):
        optimizer = state.optimizers[turn]
        with phases.whole(turn):
            optimizer.zero_grad()
            loss = 0.0
            for number, batch in enumerate(micro_batches, 1):
                sum_gradients(state.networks[turn], not reduce_once or number == accumulation)
                with phases("forward"):  # what is in no other phase: the objective names roll-out and scores
                    result = objective.loss(turn, batch, step)
                with phases("backward"):
                    (result.loss / accumulation).backward()
                loss += result.loss.detach().item() / accumulation
                window.add(result.metrics)
            with phases("optimizer"):
                norm = optimizer.gradient_norm()
        check_finite(mesh, step, turn, loss, norm)
        with phases("optimizer"):
            optimizer.step(step, norm)
            if turn in state.ema:
                state.ema[turn].update(step)
            optimizer.zero_grad()  # now: the next turn's network finds their memory free
        window.add({f"{turn}_loss": loss, f"{turn}_grad_norm": norm})
        window.add({f"{turn}_learning_rate": optimizer.learning_rate(step)})
    state.step, state.data_position = step + 1, batches.position


def check_finite(mesh: Mesh, step: int, turn: str, loss: float, gradient_norm: float) -> None:
    """Raises TrainingError on every rank unless loss and gradient norm are finite on all of them."""
    losses, norms = mesh.gather([loss, gradient_norm]).T.tolist()
    if not all(math.isfinite(value) for value in losses + norms):
        raise TrainingError(
            f"step {step}, {turn}: loss={losses} and gradient norm={norms} (one value a rank) must be finite; no "
            f"weight was changed in this update. Lower the learning rate or max_grad_norm of {turn}, or look at the "
            "samples of this step"
        )


class Window:
    """The metrics since the last row."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            total, count = self._sums[name]
            self._sums[name] = (total + float(value), count + 1)

    def take(self, mesh: Mesh) -> dict[str, float]:
        """Mean of each metric over its micro-batches, iterations and all ranks; and starts anew."""
        ranks = mesh.every(lambda: dict(self._sums))
        self._sums.clear()
        names = sorted({name for sums in ranks for name in sums})
        parts = {name: [sums[name] for sums in ranks if name in sums] for name in names}
        return {name: sum(total for total, _ in p) / sum(count for _, count in p) for name, p in parts.items()}


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step % every == 0 or step == last)


@contextmanager
def _stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """A function that is true once SIGTERM came (schedulers send it before they kill); a second one ends at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python lets only the main thread handle signals
        return

    def remember(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGTERM, previous)

    previous = signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, previous)
