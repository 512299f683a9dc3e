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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longtake.checkpoint.async_save import Saver
from longtake.checkpoint.best import Best
from longtake.checkpoint.save import RunInfo, resume
from longtake.config.run import RunConfig
from longtake.errors import TrainingError
from longtake.objectives.base import Objective
from longtake.parallel.fsdp import average_gradients
from longtake.parallel.mesh import Mesh
from longtake.run_folder import checkpoints_folder
from longtake.train.alarms import Alarms
from longtake.train.metrics import MetricsLog, PhaseTimer
from longtake.train.state import TrainState
from longtake.train.throughput import Throughput, recorded
from longtake.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """The micro-batches of one rank, for ever; `position` counts the samples that all ranks took together."""

    @property
    def position(self) -> int:
        """Samples that all ranks have taken so far."""
        ...

    def seek(self, position: int) -> None:
        """Makes the next update the one that follows the first `position` samples."""
        ...

    def __next__(self) -> Sequence[Any]:
        """The micro-batches that this rank accumulates for the next update."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What a stage adds to the loop; every rank calls them, the first two with the number of completed iterations.

    `evaluate` returns numbers to log, `sample` uint8 `[h, w, 3]` images; `start` runs once there is something to do,
    after a checkpoint that does not fit was refused; `passed` is told how many iterations are complete after each.
    """

    evaluate: Callable[[int], Mapping[str, float]] | None = None
    sample: Callable[[int], Mapping[str, np.ndarray]] | None = None
    start: Callable[[], None] | None = None
    passed: Callable[[int], None] | None = None


def train(
    state: TrainState,
    objective: Objective,
    batches: Batches,
    config: RunConfig,
    *,
    mesh: Mesh,
    info: RunInfo,
    hooks: Hooks | None = None,
    phases: PhaseTimer | None = None,
    throughput: Throughput | None = None,
) -> None:
    """Trains until `config.max_steps` iterations are complete (and saved), going on from the newest checkpoint.

    Args: `phases`, timers that the objective shares; `throughput`, rates for the rows.
    Raises: TrainingError on every rank, before the optimizer step, when a loss or a gradient is not finite (and may not
    be skipped), and once the state is saved after an alarm that stops; CheckpointError on every rank when a checkpoint
    cannot be written; SystemExit (128 + the signal) after SIGTERM or SIGINT, once the state is saved.
    """
    hooks, phases, throughput = hooks or Hooks(), phases or PhaseTimer(mesh.device), throughput or Throughput()
    with Watchdog(mesh, config.watchdog, phases, lambda: state.step):
        checkpoints, window = checkpoints_folder(config.folder), MetricWindow()
        with phases("resume"):
            resume(state, checkpoints, mesh=mesh, info=info)
        first, last = state.step, config.max_steps
        if first >= last:
            logger.info("%s: all %d iterations are done", config.folder, last)
            return
        saver = _saver(state, checkpoints, config, mesh, info)
        if hooks.start:
            hooks.start()
        batches.seek(state.data_position)
        alarms = Alarms(config.alarms, config.folder, mesh, first_step=first)
        best = Best(config.keep_best, config.folder, mesh)
        log = MetricsLog(config.folder, first_step=first, max_steps=last, wandb=config.wandb, enabled=mesh.is_main)
        trace = recorded(config.profile, config.folder, mesh, first)
        with closing(log), trace as recorder, _stop_on_signals() as asked, _complete_saves(saver, phases):
            for step in range(first, last + 1):
                numbers = _look(step, config, hooks, phases, log)
                alarms.validation(step, numbers)
                improved = best.improves(step, numbers)
                with phases("agree"):
                    stop = _agree(mesh, asked(), saver)
                ends = bool(stop) or alarms.stopping is not None
                if saver and step > first and (ends or improved or _due(step, config.save_every, last)):
                    with phases("checkpoint"):
                        saver.save(last=ends or step == last, then=best.keep if improved else None)
                if step == last and alarms.stopping is None:  # a job must not go on with a student that was stopped
                    break
                _stop_if_asked(stop, alarms.stopping, step, last, saved=saver is not None)
                before = state.data_position
                seconds = iteration(state, objective, batches, config, mesh, phases, window)
                throughput.add(step, seconds, state.data_position - before)
                if hooks.passed:  # before the row, with which the count of the most memory begins anew
                    hooks.passed(step + 1)
                recorder()
                row = _row(step, config, state, mesh, phases, window, throughput)
                log.iteration(step, row)
                alarms.iteration(step, row)


def _saver(state: TrainState, folder: Path, config: RunConfig, mesh: Mesh, info: RunInfo) -> Saver | None:
    if config.save_every == 0:
        return None
    return Saver(state, folder, config.checkpoint, keep=config.keep_checkpoints, mesh=mesh, info=info)


def _look(step: int, config: RunConfig, hooks: Hooks, phases: PhaseTimer, log: MetricsLog) -> Mapping[str, float]:
    """What is measured, and shown, after `step` iterations; nothing where nothing is."""
    numbers: Mapping[str, float] = {}
    if hooks.evaluate and _due(step, config.validate_every, config.max_steps):
        with phases("evaluate"):
            numbers = hooks.evaluate(step)
            if numbers:
                log.scalars(step, numbers)
    if hooks.sample and _due(step, config.validate_every, config.max_steps):
        with phases("sample"):
            log.images(step, hooks.sample(step))
    return numbers


def _row(
    step: int,
    config: RunConfig,
    state: TrainState,
    mesh: Mesh,
    phases: PhaseTimer,
    window: MetricWindow,
    throughput: Throughput,
) -> dict[str, float]:
    """The row that is due after iteration `step`, else nothing."""
    if not _due(step + 1, config.log_every, config.max_steps):
        return {}
    window.add(phases.take())  # summed over the row's iterations, evaluation and saving included
    with phases("agree"):
        row = window.take(mesh) | throughput.take(mesh)
    if config.on_nonfinite == "skip":
        row["skipped_updates"] = state.skipped
    return row


def _agree(mesh: Mesh, asked: int, saver: Saver | None) -> int:
    """The signal that some rank was sent, 0 for none. Raises: on every rank, the error of a save in the background.

    Asked in every iteration, on all ranks at once: a rank that stopped or failed alone would leave the others waiting
    in a collective for ever.
    """
    signals, failures = mesh.gather([asked, bool(saver and saver.failed)]).T.tolist()
    if saver is not None and any(failures):
        saver.wait()
    return int(max(signals))


def _stop_if_asked(number: int, alarm: str | None, step: int, last: int, *, saved: bool) -> None:
    """Ends the run after a signal, or an alarm that stops it. Raises: SystemExit, TrainingError."""
    if not number and alarm is None:
        return
    outcome = "the same command goes on" if saved else "nothing is saved (save_every=0)"
    if not number:
        raise TrainingError(
            f"stopped after {step} of {last} iterations by the {alarm}; {outcome} where it is in alarms.stop no more"
        )
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
    config: RunConfig,
    mesh: Mesh,
    phases: PhaseTimer,
    window: MetricWindow,
) -> float:
    """One iteration: each network of `turns` is updated once, all on the same micro-batches. Returns its seconds."""
    started, step = time.perf_counter(), state.step
    with phases("data"):
        micro_batches = next(batches)
    for turn in objective.turns(step):
        optimizer = state.optimizers[turn]
        metrics = []
        with phases.whole(turn):
            optimizer.zero_grad()
            losses: list[Tensor] = []
            for batch in micro_batches:
                with phases("forward"):  # what is in no other phase: the objective names roll-out and scores
                    result = objective.loss(turn, batch, step)
                with phases("backward"):
                    (result.loss / len(micro_batches)).backward()
                losses.append(result.loss.detach().double())
                metrics.append(result.metrics)
            with phases("backward"):
                average_gradients(state.networks[turn], mesh)
            with phases("optimizer"):  # where a GPU is waited for, once an update
                *each, norm = torch.stack([*losses, optimizer.gradient_norm().double()]).tolist()
                loss = sum(value / len(micro_batches) for value in each)
        with phases("agree"):  # before the step: one rank's NaN would be in all weights after it
            problem = nonfinite(mesh, step, turn, loss, norm)
        if problem is not None:
            optimizer.zero_grad()
            _skip_or_stop(state, problem, config, turn, mesh)
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
    seconds = time.perf_counter() - started
    window.add({"seconds": seconds})
    return seconds


def nonfinite(mesh: Mesh, step: int, turn: str, loss: float, gradient_norm: float) -> str | None:
    """What is wrong, the same text on every rank, unless loss and gradient norm are finite on all of them."""
    losses, norms = mesh.gather([loss, gradient_norm]).T.tolist()
    if all(math.isfinite(value) for value in losses + norms):
        return None
    return f"step {step}, {turn}: loss={losses} and gradient norm={norms} (one value a rank) must be finite"


def _skip_or_stop(state: TrainState, problem: str, config: RunConfig, turn: str, mesh: Mesh) -> None:
    """Counts a skipped update. Raises: TrainingError on every rank when it may not be skipped."""
    fix = f"Lower the learning rate or max_grad_norm of {turn}, or look at the samples of this step"
    if config.on_nonfinite == "stop":
        raise TrainingError(f"{problem}; no weight was changed in this update. {fix}, or set on_nonfinite=skip")
    if state.skipped >= config.max_skipped:
        raise TrainingError(
            f"{problem}; {state.skipped} updates of this run were skipped before, as many as max_skipped="
            f"{config.max_skipped} allows. {fix}"
        )
    state.skipped += 1
    if mesh.is_main:
        logger.warning("%s; the update is skipped (%d of %d)", problem, state.skipped, config.max_skipped)


class MetricWindow:
    """The metrics since the last row. Those of a GPU are read when they are taken, so that nothing waits for them."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[float | Tensor]] = defaultdict(list)

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            self._values[name].append(value.detach() if isinstance(value, Tensor) else value)

    def take(self, mesh: Mesh) -> dict[str, float]:
        """Mean of each metric over its micro-batches, iterations and all ranks; and starts anew."""
        mine = {name: (sum(map(float, values)), len(values)) for name, values in self._values.items()}
        self._values.clear()
        ranks = mesh.every(lambda: mine)
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
