"""Which stage of a job runs, what it validates, and about how long all of them will take. Must know no tensor."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from longtake.config.validation import ValidationConfig
from longtake.progress import duration

logger = logging.getLogger(__name__)

_FIRST_SECONDS, _FACTOR, _LONGEST_SECONDS = 10.0, 3.0, 1800.0  # between what is told of a stage


@dataclass(frozen=True)
class StagePlan:
    """A stage of a job: its iterations, what it validates (`in_words`), and `work`, model operations of an iteration,
    None where nobody knows them.
    """

    steps: int
    validates: str
    work: float | None = None


class JobPace:
    """Says what begins, and about how long all that is left will take: iterations of other stages are as long as their
    model operations ask for beside those that were timed, or all as long where they are not known; it says which. What
    is measured when all are trained is not in it.

    Args: `stages` by name, in the order in which they are trained.
    """

    def __init__(self, stages: Mapping[str, StagePlan]) -> None:
        self._stages = stages
        self._knows_work = all(stage.work for stage in stages.values())
        self._name, self._began, self._seconds, self._worked = "", 0.0, 0.0, 0.0
        self._mark: tuple[float, int] | None = None
        self._wait = _FIRST_SECONDS

    def begin(self, name: str) -> None:
        """The stage `name` is trained now."""
        number, stage = 1 + list(self._stages).index(name), self._stages[name]
        left = ""
        if self._worked:
            seconds = self._seconds / self._worked * self._left(name, 0)
            left = f"; about {duration(seconds)} left in all, at the pace of the stages before{self._how(name)}"
        told = f"{stage.steps} iterations, validates {stage.validates}"
        logger.info("Stage %d of %d, %s: %s%s", number, len(self._stages), name, told, left)
        self._name, self._began, self._mark, self._wait = name, time.monotonic(), None, _FIRST_SECONDS

    def update(self, step: int) -> None:
        """So many iterations of it are complete. The first in this run is not timed: it compiles, and finds its memory.

        Says what is left now and then, first after ten seconds.
        """
        now, name = time.monotonic(), self._name
        if self._mark is None:
            self._mark = now, step
        since, first = self._mark
        if now - since < self._wait or step == first or step >= self._stages[name].steps:
            return
        self._wait = min(_FACTOR * self._wait, self._wait + _LONGEST_SECONDS)
        each = (now - since) / (step - first)
        seconds = each / self._work(name) * self._left(name, step)
        told = f"{step} of {self._stages[name].steps} iterations, {each:.2g} s each with all that stood between"
        left = f"about {duration(seconds)} left in all, at this pace{self._how(name)}"
        logger.info("%s: %s; %s", name, told, left)

    def end(self, name: str, trained: int) -> None:
        """It ended, and made `trained` iterations of it in this run."""
        took = time.monotonic() - self._began
        self._seconds, self._worked = self._seconds + took, self._worked + trained * self._work(name)
        logger.info("Stage %s took %s", name, duration(took))

    def _work(self, name: str) -> float:
        return self._stages[name].work or 1.0 if self._knows_work else 1.0

    def _later(self, name: str) -> list[str]:
        names = list(self._stages)
        return names[names.index(name) + 1 :]

    def _left(self, name: str, step: int) -> float:
        """What is to be done when `step` iterations of a stage are, in the unit of `_work`."""
        own = (self._stages[name].steps - step) * self._work(name)
        return own + sum(self._stages[other].steps * self._work(other) for other in self._later(name))

    def _how(self, name: str) -> str:
        """How iterations of the stages after this one were counted."""
        if not (later := self._later(name)):
            return ""
        if not self._knows_work:
            return ", as if iterations of all stages took as long"
        counted = (f"one of {other} as {self._work(other) / self._work(name):.2g}" for other in later)
        return f", counting an iteration of it as 1 and {', '.join(counted)}, as their model calls ask"


def in_words(validation: ValidationConfig, every: int) -> str:
    """What a stage validates, `every` so many iterations."""
    rows, worlds = validation.num_rows, validation.num_worlds
    if every == 0 or not (rows or worlds):
        return "nothing"
    return f"{f'{rows} rows of data' if rows else f'{worlds} held-out worlds'} every {every}"
