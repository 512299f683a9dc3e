"""The training loop of every stage.

It reads: resume -> for step: [evaluate?] [sample?] [save?] [stop?] -> data -> losses -> backward -> finite? -> clip,
step, EMA -> log. What comes before the step needs no special case for the last one. Nothing is caught here: an error
ends the process (once a save that had begun is complete), and torchrun ends the other ranks or starts all anew.
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
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from longtake.checkpoint.async_save import Saver, SaveSettings
from longtake.checkpoint.save import resume
from longtake.errors import ConfigError, TrainingError
from longtake.objectives.base import Objective
from longtake.parallel.fsdp import average_gradients
from longtake.parallel.mesh import Mesh
from longtake.run_folder import checkpoints_folder
from longtake.train.metrics import MetricsLog, PhaseTimer
from longtake.train.state import TrainState
from longtake.train.throughput import Throughput, Trace
from longtake.train.watchdog import Watchdog, WatchdogSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSettings:
    """How long, and what happens every how many iterations (0 = never).

    Fields: `accumulation`, micro-batches an update on each rank; `save`, how checkpoints are written (saving,
    evaluation and sampling also happen at `max_steps`); `on_nonfinite`, what a loss or gradient that is not finite
    does: `stop` the run, or `skip` the update, which may happen `max_skipped` times in a run; `watchdog`, when a run
    that hangs ends.
    """

    max_steps: int
    accumulation: int = 1
    save_every: int = 100
    save: SaveSettings = SaveSettings()
    log_every: int = 1
    validate_every: int = 0
    sample_every: int = 0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 0
    watchdog: WatchdogSettings = WatchdogSettings()

    def __post_init__(self) -> None:
        for name in ("accumulation", "log_every"):
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
    """What is written beside the weights: the resolved `config`; `invariants` that a resumed run must share (rope,
    block plan, fps); `wandb`, keyword arguments of `wandb.init` or None.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    invariants: Mapping[str, Any] = field(default_factory=dict)
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
    phases: PhaseTimer | None = None,
    throughput: Throughput | None = None,
    trace: Trace | None = None,
) -> None:
    """Trains until `settings.max_steps` iterations are complete (and saved), going on from the newest checkpoint.

    Args: `folder`, the stage's own; `phases`, timers that the objective shares; `throughput`, rates for the rows;
    `trace`, a profiler.
    Raises: TrainingError on every rank, before the optimizer step, when a loss or a gradient is not finite (and may not
    be skipped); CheckpointError on every rank when a checkpoint cannot be written; SystemExit (128 + the signal) after
    SIGTERM or SIGINT, once the state is saved.
    """
    info, hooks, phases = info or RunInfo(), hooks or Hooks(), phases or PhaseTimer(mesh.device)
    throughput = throughput or Throughput()
    with Watchdog(mesh, settings.watchdog, phases, lambda: state.step):
        checkpoints = checkpoints_folder(folder)
        invariants = {"config": info.config, "invariants": info.invariants}
        with phases("resume"):
            resumed = resume(state, checkpoints, mesh=mesh, **invariants)
        if resumed is not None and mesh.is_main:
            logger.info("Resuming %s", resumed)
        first, last = state.step, settings.max_steps
        if first >= last:
            logger.info("%s: all %d iterations are done", folder, last)
            return
        saver = Saver(state, checkpoints, settings.save, mesh=mesh, **invariants) if settings.save_every > 0 else None
        if hooks.start:
            hooks.start()
        batches.seek(state.data_position)
        log = MetricsLog(
            folder, enabled=mesh.is_main, first_step=first, max_steps=last, progress=info.progress, wandb=info.wandb
        )
        window = MetricWindow()
        with (
            closing(log),
            closing(trace) if trace else nullcontext(),
            _stop_on_signals() as asked,
            _complete_saves(saver, phases),
        ):
            for step in range(first, last + 1):
                _look(step, settings, hooks, phases, log)
                with phases("agree"):
                    stop = _agree(mesh, asked(), saver)
                if saver and step > first and (stop or _due(step, settings.save_every, last)):
                    with phases("checkpoint"):
                        saver.save(last=bool(stop) or step == last)
                if step == last:
                    break
                if stop:
                    _stop(stop, step, last, saved=saver is not None)
                if trace:
                    trace.at(step)
                started, before = time.perf_counter(), state.data_position
                iteration(state, objective, batches, settings, mesh, phases, window)
                seconds = time.perf_counter() - started
                window.add({"seconds": seconds})
                throughput.add(step, seconds, state.data_position - before)
                row = _row(step, settings, state, mesh, phases, window, throughput)
                if row:
                    log.scalars(step, row)
                log.advance({key: value for key, value in row.items() if key.endswith("_loss")})


def _look(step: int, settings: LoopSettings, hooks: Hooks, phases: PhaseTimer, log: MetricsLog) -> None:
    """What is measured and shown after `step` iterations."""
    if hooks.evaluate and _due(step, settings.validate_every, settings.max_steps):
        with phases("evaluate"):
            log.scalars(step, hooks.evaluate(step))
    if hooks.sample and _due(step, settings.sample_every, settings.max_steps):
        with phases("sample"):
            log.images(step, hooks.sample(step))


def _row(
    step: int,
    settings: LoopSettings,
    state: TrainState,
    mesh: Mesh,
    phases: PhaseTimer,
    window: MetricWindow,
    throughput: Throughput,
) -> dict[str, float]:
    """The row that is due after iteration `step`, else nothing."""
    if not _due(step + 1, settings.log_every, settings.max_steps):
        return {}
    # PhaseTimer are summed over the row's iterations, evaluation and saving included.
    window.add({f"seconds/{name}": seconds for name, seconds in phases.take().items()})
    window.add({f"seconds_of/{name}": seconds for name, seconds in phases.take_wholes().items()})
    with phases("agree"):
        row = window.take(mesh) | throughput.take(mesh)
    if settings.on_nonfinite == "skip":
        row["skipped_updates"] = state.skipped
    return row


def _agree(mesh: Mesh, asked: int, saver: Saver | None) -> int:
    """The signal that some rank was sent, 0 for none. Raises: on every rank, the error of a save in the background."""
    signals, failures = mesh.gather([asked, bool(saver and saver.failed)]).T.tolist()
    if saver is not None and any(failures):
        saver.wait()
    return int(max(signals))


def _stop(number: int, step: int, last: int, *, saved: bool) -> None:
    """Ends the run after a signal."""
    outcome = "the same command goes on" if saved else "nothing is saved (save_every=0)"
    name = signal.Signals(number).name
    logger.warning("Stopped by %s after %d of %d iterations; %s", name, step, last, outcome)
    raise SystemExit(128 + number)


@contextmanager
def _complete_saves(saver: Saver | None, phases: PhaseTimer) -> Iterator[None]:
    """However the inside ends, afterwards the save that had begun is complete."""
    failing = True
    try:
        yield
        failing = False
    except SystemExit:
        failing = False
        raise
    finally:
        if saver is not None:
            with phases("checkpoint"):
                saver.close(failing=failing)


def iteration(
    state: TrainState,
    objective: Objective,
    batches: Batches,
    settings: LoopSettings,
    mesh: Mesh,
    phases: PhaseTimer,
    window: MetricWindow,
) -> None:
    """One iteration: each network of `turns` is updated once, all on the same micro-batches."""
    step = state.step
    with phases("data"):
        micro_batches = [next(batches) for _ in range(settings.accumulation)]
    for turn in objective.turns(step):
        optimizer = state.optimizers[turn]
        metrics = []
        with phases.whole(turn):
            optimizer.zero_grad()
            loss = 0.0
            for batch in micro_batches:
                with phases("forward"):  # what is in no other phase: the objective names roll-out and scores
                    result = objective.loss(turn, batch, step)
                with phases("backward"):
                    (result.loss / settings.accumulation).backward()
                loss += result.loss.detach().item() / settings.accumulation
                metrics.append(result.metrics)
            with phases("backward"):
                average_gradients(state.networks[turn], mesh)
            with phases("optimizer"):
                norm = optimizer.gradient_norm()
        with phases("agree"):
            problem = nonfinite(mesh, step, turn, loss, norm)
        if problem is not None:
            optimizer.zero_grad()
            _skip_or_stop(state, problem, settings, turn, mesh)
            objective.discard()
            continue
        window.add({f"{turn}_learning_rate": optimizer.learning_rate(step)})
        with phases("optimizer"):
            optimizer.step(step, norm)
            if turn in state.ema:
                state.ema[turn].update(step)
            optimizer.zero_grad()  # now: the next turn's network finds their memory free
        for values in metrics:
            window.add(values)
        if all(f"{turn}_loss" not in values for values in metrics):  # else it is what the objective says it is
            window.add({f"{turn}_loss": loss})
        window.add({f"{turn}_grad_norm": norm})
    state.step, state.data_position = step + 1, batches.position


def nonfinite(mesh: Mesh, step: int, turn: str, loss: float, gradient_norm: float) -> str | None:
    """What is wrong, the same text on every rank, unless loss and gradient norm are finite on all of them."""
    losses, norms = mesh.gather([loss, gradient_norm]).T.tolist()
    if all(math.isfinite(value) for value in losses + norms):
        return None
    return f"step {step}, {turn}: loss={losses} and gradient norm={norms} (one value a rank) must be finite"


def _skip_or_stop(state: TrainState, problem: str, settings: LoopSettings, turn: str, mesh: Mesh) -> None:
    """Counts a skipped update. Raises: TrainingError on every rank when it may not be skipped."""
    fix = f"Lower the learning rate or max_grad_norm of {turn}, or look at the samples of this step"
    if settings.on_nonfinite == "stop":
        raise TrainingError(f"{problem}; no weight was changed in this update. {fix}, or set on_nonfinite=skip")
    if state.skipped >= settings.max_skipped:
        raise TrainingError(
            f"{problem}; {state.skipped} updates of this run were skipped before, as many as max_skipped="
            f"{settings.max_skipped} allows. {fix}"
        )
    state.skipped += 1
    if mesh.is_main:
        logger.warning("%s; the update is skipped (%d of %d)", problem, state.skipped, settings.max_skipped)


class MetricWindow:
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
def _stop_on_signals() -> Iterator[Callable[[], int]]:
    """A function that is the number of the first SIGTERM or SIGINT that came, or 0; a second signal ends at once.

    Schedulers and torchrun send SIGTERM before they kill, Ctrl-C is SIGINT.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # Python lets only the main thread handle signals
        return

    def remember(number: int, _: object) -> None:
        asked.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, remember)
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:  # it came after the last iteration: what would follow must not go on
        raise SystemExit(128 + asked[0])
