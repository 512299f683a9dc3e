"""What a stage will take, from seconds that `longtake bench` measured: hours and their price, with the formula."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def measured_seconds(file: Path, ranks: int) -> tuple[str, float, str]:
    """The stage, seconds of an iteration and the device that a JSON of `longtake bench CONFIG --json` tells.

    A cycle is the iterations to one update of the generator, over which exit steps were averaged.
    Raises: ConfigError, also where other numbers of `ranks` were measured than are planned.
    """
    try:
        found: dict[str, Any] = parse_json(file.read_bytes())
        stage, device, measured, iterations = (found[key] for key in ("stage", "device", "ranks", "cycle_iterations"))
        seconds = found["cycle_s"] / iterations
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"--seconds-from {file} tells no seconds of a stage ({type(error).__name__}: {error}); write it by "
            "`longtake bench CONFIG --json FILE`, with more --steps where cycle_s is null"
        ) from None
    if measured != ranks:
        raise ConfigError(f"--seconds-from {file} was measured on {measured} rank(s), and {ranks} are planned")
    return stage, seconds, device
