"""The values of a run, whatever it trains: how long, what is saved, measured and logged when, and what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from longtake.config.alarms import AlarmsConfig, Score
from longtake.config.base import PathText, Settings
from longtake.config.groups import ProfileConfig, WandbConfig


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


class RunConfig(Settings):
    """What the training loop reads of a stage: where it writes, how long it trains, and what happens every how many
    iterations (and after the last).
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="folder of the stage inside the log folder")
    logdir: PathText = Field(min_length=1, description="log folder, shared by all stages of a run")
    seed: int = Field(default=0, ge=0, description="seed of everything random; the same seed gives the same run")
    max_steps: int = Field(gt=0, description="iterations; of dmd and long_tuning, one update of the critic each")
    save_every: int = Field(
        default=100,
        ge=0,
        description="iterations between checkpoints; the last step is saved too. 0 = nothing is saved (measurements)",
    )
    keep_checkpoints: int = Field(default=2, gt=0, description="checkpoints kept, the newest")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description=CheckpointConfig.__doc__)
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop", description="what a loss or gradient that is not finite does: stop the run, or skip the update"
    )
    max_skipped: int = Field(default=10, gt=0, description="updates of a run that on_nonfinite=skip may skip")
    watchdog: WatchdogConfig = Field(default=WatchdogConfig(), description=WatchdogConfig.__doc__)
    validate_every: int = Field(default=100, ge=0, description="iterations between validations; 0 = never")
    alarms: AlarmsConfig = Field(default=AlarmsConfig(), description=AlarmsConfig.__doc__)
    keep_best: Score | None = Field(
        default=None,
        description="number of the validations by which the networks of the best checkpoint are kept in the stage's "
        "folder `best`; null = none are",
    )
    log_every: int = Field(default=1, gt=0, description="iterations between lines of metrics.jsonl")
    wandb: WandbConfig = Field(default=WandbConfig(), description=WandbConfig.__doc__)
    profile: ProfileConfig = Field(default=ProfileConfig(), description=ProfileConfig.__doc__)

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        if self.keep_best is not None and self.save_every == 0:
            raise ValueError(
                f"keep_best={self.keep_best} needs checkpoints, and save_every=0 saves none; set it higher"
            )
        return self

    @property
    def folder(self) -> Path:
        """The stage's own folder: checkpoints, metrics and samples."""
        return Path(self.logdir) / self.name
