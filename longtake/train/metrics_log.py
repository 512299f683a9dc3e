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
from typing import Any

import numpy as np

from longtake.errors import ConfigError

logger = logging.getLogger(__name__)


class Phases:
    """Seconds spent in each named phase since they were last taken: `with phases("rollout"): ...`.

    Wall-clock time of this process; on CUDA a phase ends when its kernels are queued, not when they are done.
    `observer` is told the name at the begin (True) and the end (False) of each phase.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.observer: Callable[[str, bool], None] | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.observer is not None:
            self.observer(name, True)
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start
            if self.observer is not None:
                self.observer(name, False)

    def take(self) -> dict[str, float]:
        """Seconds by phase, and sets all back to zero."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


class MetricsLog:
    """The log of one stage folder.

    `metrics.jsonl` holds one object a line, each with its `step`: an iteration's row carries the index of the
    iteration (0 is the first), a validation's row the number of completed iterations. What an interrupted run wrote
    from `first_step` on is cut off, so that a resumed run leaves each row once.

    Args: `enabled` on rank 0 only; `wandb`, keyword arguments of `wandb.init` or None.
    Raises: ConfigError when wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool = True,
        first_step: int = 0,
        max_steps: int = 0,
        tensorboard: bool = True,
        progress: bool = True,
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        self._file, self._board, self._bar, self._wandb = None, None, None, None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        cut_from(path, first_step)
        self._file = path.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=first_step)
        if progress:
            from tqdm import tqdm

            self._bar = tqdm(total=max_steps, initial=first_step, desc=folder.name, unit="it", dynamic_ncols=True)
        if wandb is not None:
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

    def advance(self, values: Mapping[str, float]) -> None:
        """Moves the bar by one iteration; `values` stand beside the remaining time."""
        if self._bar is not None:
            if values:
                self._bar.set_postfix({key: f"{value:.4g}" for key, value in values.items()}, refresh=False)
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
    """The rows of a `metrics.jsonl`; a last line that a killed run left unfinished is dropped."""
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


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


def _start_wandb(folder: Path, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "wandb is switched on and not installed; `pip install wandb`, or leave it off: TensorBoard and "
            "metrics.jsonl hold the same numbers"
        ) from error
    return wandb.init(dir=str(folder), **settings)
