"""The groups of values about what keeps a run alive; `longtake/config/stage.py` puts them together with the others."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from longtake.config.base import Settings


class CheckpointConfig(Settings):
    """How checkpoints are written."""

    mode: Literal["async", "sync"] = Field(
        default="async",
        description="`async`: training waits only until the state is copied to host memory, which must have room for "
        "it, and goes on while the copy is written; `sync`: it waits until all is written",
    )
    export: Literal["every", "last"] = Field(
        default="every",
        description="checkpoints that also hold the generator's weights whole, for inference and the next stage: every "
        "one, or the last only (also that of a run stopped by a signal)",
    )


class WatchdogConfig(Settings):
    """What ends a run that hangs."""

    seconds: float = Field(
        default=900,
        ge=0,
        description="time without progress after which the run says what each rank was doing and ends; 0 = off",
    )
    slow_seconds: float = Field(
        default=7200,
        ge=0,
        description="the same for resuming, encoding, evaluation, samples and saving, and for the first time that a "
        "process does anything (compiling)",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.slow_seconds < self.seconds:
            raise ValueError(f"slow_seconds={self.slow_seconds:g} must be at least seconds={self.seconds:g}")
        return self
