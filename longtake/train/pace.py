"""Which stage of a job runs, what it validates, and about how long all of them will take. Must know no tensor."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from longtake.config.validation import ValidationConfig
from longtake.progress import duration

logger = logging.getLogger(__name__)


class JobPace:
    """Says what begins, and what is left at the pace of the stages that ended: others are slower or faster, which it
    says too.

    Args: `stages`, iterations and what is validated (`in_words`) by name, in the order in which they are trained.
    """

    def __init__(self, stages: Mapping[str, tuple[int, str]]) -> None:
        self._steps = {name: steps for name, (steps, _) in stages.items()}
        self._told = {name: f"{steps} iterations, validates {what}" for name, (steps, what) in stages.items()}
        self._began, self._seconds, self._trained = 0.0, 0.0, 0

    def begin(self, name: str) -> None:
        """The stage `name` is trained now."""
        number = 1 + list(self._steps).index(name)
        left = ""
        if self._trained:
            steps = sum(list(self._steps.values())[number - 1 :])
            seconds = duration(steps * self._seconds / self._trained)
            left = f"; about {seconds} left in all, at the pace of the stages before"
        logger.info("Stage %d of %d, %s: %s%s", number, len(self._steps), name, self._told[name], left)
        self._began = time.monotonic()

    def end(self, name: str, trained: int) -> None:
        """It ended, and made `trained` iterations of it in this run."""
        took = time.monotonic() - self._began
        self._seconds, self._trained = self._seconds + took, self._trained + trained
        logger.info("Stage %s took %s", name, duration(took))


def in_words(validation: ValidationConfig, every: int) -> str:
    """What a stage validates, `every` so many iterations."""
    rows, worlds = validation.num_rows, validation.num_worlds
    if every == 0 or not (rows or worlds):
        return "nothing"
    return f"{f'{rows} rows of data' if rows else f'{worlds} held-out worlds'} every {every}"
