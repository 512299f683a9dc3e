"""What a stage will take, from seconds that `longtake bench` measured: hours and their price, with the formula."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longtake.config.stage import StageConfig
from longtake.errors import ConfigError
from longtake.json_text import parse_json

_KEYS = ("stage", "device", "ranks", "cycle_s", "cycle_iterations")


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


def measured_cost(file: Path, stage: StageConfig, ranks: int, price: float | None) -> Cost | None:
    """That of a stage, from the JSON of `longtake bench CONFIG --json`; None where that measured another stage.

    A cycle is the iterations to one update of the generator, the unit that exit steps were averaged over.
    Raises: ConfigError.
    """
    try:
        found = parse_json(file.read_bytes())
        name, device, measured, cycle, iterations = (found[key] for key in _KEYS)
        seconds = None if cycle is None else float(cycle) / int(iterations)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"--seconds-from {file} is no JSON of a stage by this version ({type(error).__name__}: {error}); write it "
            f"by `longtake bench CONFIG --json {file}`"
        ) from None
    if name != stage.name:
        return None
    if measured != ranks or seconds is None:
        what = f"{measured} rank(s), and {ranks} are planned" if seconds is not None else "too few iterations"
        fix = f"name --gpus {measured}, or measure again" if seconds is not None else "measure again with more"
        raise ConfigError(f"--seconds-from {file} was measured on {what}; {fix}")
    share = stage.validation.max_share if stage.validates and stage.validation.num_rows else 0.0
    return Cost(seconds, device, stage.max_steps, ranks, share, price)
