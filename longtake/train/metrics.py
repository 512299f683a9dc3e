"""Where the numbers of a run go: JSON lines, TensorBoard, a progress bar, wandb if asked for; and phase timers.

Only rank 0 writes; on the other ranks every call does nothing.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.config.groups import WandbConfig
from longtake.errors import CheckpointError
from longtake.json_text import parse_json
from longtake.outputs import write_whole

logger = logging.getLogger(__name__)

_MOST_MARKS = 4096  # kept before they are read, which on a GPU waits for the last one


class PhaseTimer:
    """Seconds spent in each named phase since they were last taken: `with phases("rollout"): ...`.

    Phases do not overlap: one inside another pauses it. What is in none is `other`, so that all of them add up to the
    time that went by. On a CPU this is the clock of the process. With a CUDA `device` the ends of phases are marked by
    events on its current stream there and read when they are taken: kernels count where they run, not where they were
    queued, and nothing waits before `take`. Phases are also ranges of a profiler's trace.

    The watchdog's thread reads the rest, by the clock of the process: `open`, the phases that it is in now, outermost
    first; `last`, the one that ended last, and `known`, all that ended; how many `changes` (begins and ends) there
    were, and when the last was (`changed`, of time.monotonic).
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._mark: Callable[[], Any] = _wall_clock
        self._between: Callable[[Any, Any], float] = _wall_seconds
        if device is not None and device.type == "cuda":
            self._mark, self._between = partial(_event, device), _event_seconds
        self._pieces: list[tuple[str, Any, Any]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._since = self._mark()
        self.open: tuple[str, ...] = ()
        self.last: str | None = None
        self.known: set[str] = set()
        self.changes, self.changed = 0, time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._change((*self.open, name))
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._change(self.open[:-1])
            self.known.add(name)
            self.last = name

    @contextmanager
    def whole(self, name: str) -> Iterator[None]:
        """Times everything inside, whatever its phases."""
        start = self._mark()
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._pieces.append((f"seconds_of/{name}", start, self._mark()))

    def take(self) -> dict[str, float]:
        """`seconds/...` of each phase, `other` included, and `seconds_of/...` of each whole; all start anew."""
        self._cut()
        self._read()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def _change(self, now_open: tuple[str, ...]) -> None:
        self._cut()  # before `open` changes: the time up to now belongs to the phase that was innermost
        self.open = now_open
        self.changes, self.changed = self.changes + 1, time.monotonic()

    def _cut(self) -> None:
        now, phase = self._mark(), self.open[-1] if self.open else "other"
        self._pieces.append((f"seconds/{phase}", self._since, now))
        self._since = now
        if len(self._pieces) >= _MOST_MARKS:
            self._read()

    def _read(self) -> None:
        for name, start, end in self._pieces:
            self._seconds[name] += self._between(start, end)
        self._pieces.clear()


_wall_clock = time.perf_counter


def _wall_seconds(start: float, end: float) -> float:
    return end - start


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _event_seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1000


class MetricsLog:
    """The log of one stage folder.

    `metrics.jsonl` holds one object a line, each with its `step`: an iteration's row carries the index of the
    iteration (0 is the first), a validation's row the number of completed iterations. What an interrupted run wrote
    from `first_step` on is cut off, so that a resumed run leaves each row once.

    Args: `enabled` on rank 0 only.
    """

    def __init__(self, folder: Path, *, first_step: int, max_steps: int, wandb: WandbConfig, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        cut_from(path, first_step)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder), purge_step=first_step)
        self._bar = tqdm(total=max_steps, initial=first_step, desc=folder.name, unit="it", dynamic_ncols=True)
        self._wandb: Any = None
        if wandb.enabled:
            self._wandb = import_module("wandb")
            self._wandb.init(dir=str(folder), project=wandb.project)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row. A value that is not finite becomes null, since JSON has no NaN."""
        if not self._enabled:
            return
        row = {key: _jsonable(value) for key, value in values.items()}
        self._file.write(json.dumps({"step": step} | row) + "\n")
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}
        for key, value in numbers.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Shows uint8 `[h, w, 3]` images in TensorBoard (and wandb)."""
        if not self._enabled:
            return
        for name, image in images.items():
            self._board.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({name: self._wandb.Image(image) for name, image in images.items()}, step=step)

    def iteration(self, step: int, row: Mapping[str, float]) -> None:
        """Writes the row of an iteration, if it has one, and moves the bar, beside which its losses stand."""
        if not self._enabled:
            return
        if row:
            self.scalars(step, row)
            losses = {key: f"{value:.4g}" for key, value in row.items() if key.endswith("_loss")}
            self._bar.set_postfix(losses, refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        if not self._enabled:
            return
        self._bar.close()
        self._board.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


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
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


def _jsonable(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # NumPy and torch scalars
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
