"""Where the numbers of a run go: JSON lines, TensorBoard, a progress bar, wandb if asked for; and phase timers.

Only rank 0 writes; on the other ranks every call does nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from longtake.config.groups import WandbConfig
from longtake.errors import CheckpointError, ConfigError
from longtake.json_text import parse_json

logger = logging.getLogger(__name__)

_MOST_MARKS = 4096  # kept before they are read, which on a GPU waits for the last one


class PhaseTimer:
    """Seconds spent in each named phase since they were last taken: `with phases("rollout"): ...`.

    Phases do not overlap: one inside another pauses it. What is in none is `other`, so that all of them add up to the
    time that went by. On a CPU this is the clock of the process. With a CUDA `device` the ends of phases are marked by
    events on its current stream and read when they are taken: kernels count where they run, not where they were
    queued, and nothing waits before `take`. PhaseTimer are also ranges of a profiler's trace.

    `current` is the innermost phase that this process is in now, `last` the one that it completed last; both by the
    clock of the process, None before the first. `observer` is told the name at the begin (True) and the end (False) of
    each phase.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._clock: _Clock = _EventClock() if device is not None and device.type == "cuda" else _WallClock()
        self._stack: list[str] = []
        self._pieces: list[tuple[str, Any, Any]] = []
        self._wholes: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = {}
        self._since = self._clock.mark()
        self.last: str | None = None
        self.observer: Callable[[str, bool], None] | None = None

    @property
    def current(self) -> str | None:
        return self._stack[-1] if self._stack else None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._cut()
        self._stack.append(name)
        if self.observer is not None:
            self.observer(name, True)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._cut()
            self._stack.pop()
            self.last = name
            if self.observer is not None:
                self.observer(name, False)

    @contextmanager
    def whole(self, name: str) -> Iterator[None]:
        """Times everything inside, whatever its phases: for `take_wholes`."""
        start = self._clock.mark()
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._wholes.append((name, start, self._clock.mark()))

    def take(self) -> dict[str, float]:
        """Seconds by phase, `other` included, and sets all back to zero."""
        self._cut()
        self._read()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def take_wholes(self) -> dict[str, float]:
        """Seconds by the names of `whole`, and sets all back to zero."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, start, end in self._wholes:
            seconds[name] += self._clock.seconds(start, end)
        self._wholes.clear()
        return dict(seconds)

    def _cut(self) -> None:
        now = self._clock.mark()
        self._pieces.append((self.current or "other", self._since, now))
        self._since = now
        if len(self._pieces) >= _MOST_MARKS:
            self._read()

    def _read(self) -> None:
        for name, start, end in self._pieces:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock.seconds(start, end)
        self._pieces.clear()


class _Clock(Protocol):
    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class _WallClock:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _EventClock:
    """Events on the current stream: asking for seconds waits until the later one has happened."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


class MetricsLog:
    """The log of one stage folder.

    `metrics.jsonl` holds one object a line, each with its `step`: an iteration's row carries the index of the
    iteration (0 is the first), a validation's row the number of completed iterations. What an interrupted run wrote
    from `first_step` on is cut off, so that a resumed run leaves each row once.

    Args: `enabled` on rank 0 only.
    Raises: ConfigError when wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        max_steps: int,
        wandb: WandbConfig,
        enabled: bool,
    ) -> None:
        self._file, self._board, self._bar, self._wandb = None, None, None, None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        cut_from(path, first_step)
        self._file = path.open("a", buffering=1)
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self._board = SummaryWriter(str(folder), purge_step=first_step)
        self._bar = tqdm(total=max_steps, initial=first_step, desc=folder.name, unit="it", dynamic_ncols=True)
        if wandb.enabled:
            self._wandb = _start_wandb(folder, wandb)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row. A value that is not finite becomes null, since JSON has no NaN."""
        if self._file is None:
            return
        row = {key: _jsonable(value) for key, value in values.items()}
        self._file.write(json.dumps({"step": step} | row) + "\n")
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Shows uint8 `[h, w, 3]` images in TensorBoard (and wandb)."""
        if self._board is not None:
            for name, image in images.items():
                self._board.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image) for name, image in images.items()}, step=step)

    def iteration(self, step: int, row: Mapping[str, float]) -> None:
        """Writes the row of an iteration, if it has one, and moves the bar, beside which its losses stand."""
        if row:
            self.scalars(step, row)
        if self._bar is not None:
            if row:
                losses = {key: f"{value:.4g}" for key, value in row.items() if key.endswith("_loss")}
                self._bar.set_postfix(losses, refresh=False)
            self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            self._file.close()
            self._file = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a killed run left unfinished is dropped.

    Raises: CheckpointError when another line is no JSON object with a step.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    try:
        rows = [parse_json(line) for line in lines[:-1] if line]
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); move it away, then the run goes on without it") from error
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise CheckpointError(f"{path} holds rows without a step; move it away, then the run goes on without it")
    return rows


def cut_from(path: Path, first_step: int) -> None:
    """Removes the rows of `path` whose step is `first_step` or later, in one replace."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] < first_step]
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(temporary, path)


def _jsonable(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # NumPy and torch scalars
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _start_wandb(folder: Path, config: WandbConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "wandb is switched on and not installed; `pip install wandb`, or leave it off: TensorBoard and "
            "metrics.jsonl hold the same numbers"
        ) from error
    return wandb.init(dir=str(folder), project=config.project)
