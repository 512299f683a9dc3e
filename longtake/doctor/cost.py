"""What a stage will take, from seconds that `longtake bench` measured: hours and their price, with the formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longtake.errors import ConfigError
from longtake.json_text import parse_json


@dataclass(frozen=True)
class Cost:
    """Of one stage; `seconds` of an iteration on a `device`, `price` of an hour of one of the `ranks` GPUs."""

    seconds: float
    device: str
    iterations: int
    ranks: int
    validation_share: float
    price: float | None

    @property
    def hours(self) -> float:
        """Of the whole stage, without validations."""
        return self.seconds * self.iterations / 3600

    def line(self) -> str:
        """The formula and what comes of it."""
        text = f"{self.seconds:.3g} s ({self.device}) x {self.iterations} iterations / 3600 = {self.hours:.1f} hours"
        if self.validation_share:
            text += f", and at most {self.validation_share:.0%} more for validations"
        if self.price is not None:
            text += f"; x {self.ranks} GPU(s) x {self.price:g} an hour = {self.hours * self.ranks * self.price:.2f}"
        return text


def measured_seconds(file: Path, ranks: int, stages: Sequence[str], command: str) -> tuple[str, float, str]:
    """The stage, seconds of an iteration and the device that a JSON of `longtake bench CONFIG --json` tells.

    A cycle is the iterations to one update of the generator, over which exit steps were averaged.
    Args: `stages` that there are, by name; `command`, which writes such a file.
    Raises: ConfigError for files of something else, and of other numbers of `ranks` than are planned.
    """
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--seconds-from {file} cannot be read ({error}); write it by {command}") from None
    if not isinstance(found, dict) or "stage" not in found:
        what = "a stream" if isinstance(found, dict) and "plan" in found else "something else"
        raise ConfigError(
            f"--seconds-from {file} is of {what}, and hours are those of a training: measure its stage by {command}"
        )
    measured, iterations, seconds = (found.get(key) for key in ("ranks", "cycle_iterations", "cycle_s"))
    if measured != ranks:
        raise ConfigError(f"--seconds-from {file} was measured on {measured} rank(s), and {ranks} are planned")
    numbers = [value for value in (seconds, iterations) if isinstance(value, int | float) and 0 < value < math.inf]
    if len(numbers) < 2:
        raise ConfigError(
            f"--seconds-from {file} tells no seconds of a whole cycle (cycle_s {seconds}, cycle_iterations "
            f"{iterations}): the bench was ended, or its iterations were too few; write it by {command} with --steps"
        )
    if (name := str(found["stage"])) not in stages:
        there = f"CONFIG has {', '.join(stages)}" if stages else "CONFIG is missing"
        raise ConfigError(f"--seconds-from {file} is of stage {name}, and {there}; write it by {command}")
    return name, numbers[0] / numbers[1], str(found.get("device"))
