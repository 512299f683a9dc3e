"""Alarms: a training that goes wrong says so loudly, in a file, and may stop.

What raises one is a pure function of the rows of `metrics.jsonl`, which every rank has: all agree without asking, and a
resumed run, which reads the rows before it, raises what an uninterrupted one does.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from longtake.config.alarms import AlarmsConfig
from longtake.parallel.mesh import Mesh
from longtake.train.metrics import cut_from, read_rows

logger = logging.getLogger(__name__)

FILE = "alarms.jsonl"
_PREFIX = "validation/"
_WATCHED = ("_loss", "_grad_norm")  # ends of the names whose history is kept
_WINDOW, _ENOUGH = 200, 50  # rows of a history, and from how many on it says what is usual
_LEAST_SPREAD = 0.05  # of logarithms: what hardly ever changes may change by that much
_SIGMA = 1.4826  # of a normal distribution, in median distances from the median
_MEANINGS = {
    "motion": "videos move too little beside the teacher's: the student freezes",
    "saturation": "colours at the end of the videos are not those of the teacher, or of shorter videos",
    "seam": "the picture jumps where blocks meet",
    "uniform": "frames without a picture",
    "history": "outside of what it was before",
}


class Raised(NamedTuple):
    """An alarm: what is wrong, the number that says so with its value, and the limit that it passed."""

    alarm: str
    number: str
    value: float
    limit: float


class Watch:
    """What the rows so far say; `validation` and `iteration` take the next one and give the alarms that it raises."""

    def __init__(self, config: AlarmsConfig) -> None:
        self.config = config
        self._before: set[tuple[str, str]] = set()  # (alarm, number) past their limits in the validation before
        self._histories: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._outside: set[str] = set()

    def validation(self, step: int, numbers: Mapping[str, float | None]) -> list[Raised]:
        """The alarms of a validation; one that failed, or was made before the first iteration, says nothing."""
        known = {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
        if step == 0 or not known.keys() - {f"{_PREFIX}errors", f"{_PREFIX}seconds"}:
            return []
        passed = list(self._passed(known))
        before, self._before = self._before, {(one.alarm, one.number) for one in passed}
        return [one for one in passed if one.alarm == "uniform" or (one.alarm, one.number) in before]

    def iteration(self, numbers: Mapping[str, float | None]) -> list[Raised]:
        """The alarms of a row of iterations: raised when a number leaves its history, not while it stays outside."""
        found = []
        for name, value in numbers.items():
            if not name.endswith(_WATCHED) or value is None or not math.isfinite(value) or value <= 0:
                continue
            history, level = self._histories[name], math.log(value)
            limit = self._unusual(history, level)
            if limit is not None and name not in self._outside:
                found.append(Raised("history", name, value, math.exp(limit)))
            self._outside = self._outside - {name} if limit is None else self._outside | {name}
            history.append(level)
        return found

    def _unusual(self, history: deque[float], level: float) -> float | None:
        """The limit that `level` is past, None where it is as usual."""
        if self.config.history is None or len(history) < _ENOUGH:
            return None
        middle = median(history)
        spread = _SIGMA * median(abs(one - middle) for one in history)
        room = self.config.history * max(_LEAST_SPREAD, spread)
        return None if abs(level - middle) <= room else middle + math.copysign(room, level - middle)

    def _passed(self, known: Mapping[str, float]) -> Iterator[Raised]:
        config = self.config
        # Longer videos beside the clips: they may end otherwise than the teacher's clip does, and be sound.
        clip, long = f"{_PREFIX}saturation_vs_teacher", f"{_PREFIX}long_saturation_vs_teacher"
        for name, usual, most in ((clip, 1.0, config.saturation), (long, known.get(clip), config.drift)):
            if usual and most is not None and abs(known.get(name, usual) / usual - 1) > most:
                yield Raised("saturation", name, known[name], usual * (1 + math.copysign(most, known[name] - usual)))
        for start in ("", "long_"):
            if config.motion is not None and (moved := _motion(known, start)) is not None and moved[1] < config.motion:
                yield Raised("motion", *moved, config.motion)
            for alarm, end, most in (
                ("seam", "seam_score", config.seam),
                ("uniform", "defect_uniform", config.uniform),
            ):
                name = f"{_PREFIX}{start}{end}"
                if most is not None and known.get(name, 0.0) > most:
                    yield Raised(alarm, name, known[name], most)


def _motion(known: Mapping[str, float], start: str) -> tuple[str, float] | None:
    """How much videos move beside the teacher's: by the optical flow, in toy worlds by the truth."""
    name, exact, teacher = (
        f"{_PREFIX}{end}" for end in (f"{start}motion_vs_teacher", "motion_ratio", "teacher_motion_ratio")
    )
    if name in known:
        return name, known[name]
    if start or exact not in known:
        return None
    return exact, known[exact] / max(known.get(teacher, 1.0), 1e-6)


class Alarms:
    """The alarms of a stage: watches its rows, says and writes what is raised; every rank calls it alike.

    `stopping` says why the run must stop, None while it may go on.
    """

    def __init__(self, config: AlarmsConfig, folder: Path, mesh: Mesh, *, first_step: int) -> None:
        self.config, self._file, self._mesh = config, folder / FILE, mesh
        self._watch = Watch(config)
        self.stopping: str | None = None
        for row in mesh.on_main(lambda: self._resumed(folder, first_step)):
            self._take(row["step"], row)

    def validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes the numbers of a validation."""
        self._raise(step, self._watch.validation(step, numbers))

    def iteration(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes a row of iterations."""
        self._raise(step, self._watch.iteration(numbers))

    def _take(self, step: int, row: Mapping[str, Any]) -> None:
        if any(name.startswith(_PREFIX) for name in row):
            self._watch.validation(step, {k: v for k, v in row.items() if k.startswith(_PREFIX)})
        else:
            self._watch.iteration({k: v for k, v in row.items() if k != "step"})

    def _resumed(self, folder: Path, first_step: int) -> list[dict[str, Any]]:
        """The rows that say what was usual before; what an interrupted run raised later is cut off."""
        cut_from(self._file, first_step)
        rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] < first_step]
        keep = {id(row) for row in rows[-4 * _WINDOW :]}
        return [row for row in rows if id(row) in keep or any(name.startswith(_PREFIX) for name in row)]

    def _raise(self, step: int, raised: list[Raised]) -> None:
        for one in raised:
            action = "stop" if one.alarm in self.config.stop else "warn"
            text = f"{one.number} is {one.value:.4g}, the limit {one.limit:.4g}: {_MEANINGS[one.alarm]}"
            if action == "stop" and self.stopping is None:
                self.stopping = f"alarm {one.alarm}: {text}"
            if not self._mesh.is_main:
                continue
            logger.warning("ALARM %s after %d iterations: %s (%s)", one.alarm, step, text, action)
            row = {"step": step, "alarm": one.alarm, "value": one.value, "limit": one.limit, "action": action}
            with self._file.open("a") as file:
                file.write(json.dumps(row | {"number": one.number}) + "\n")
