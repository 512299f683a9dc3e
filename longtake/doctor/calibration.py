"""Constants from measurements: what `benchmarks/full_size.py` wrote on one GPU into its `results.json`.

Kernel rates are taken as they are. Whole updates, by kind and exit step, are compared with the model: `slowdown` makes
the sum of those right that call whole clips only, `slowdown_blocks` that of the roll-outs in the others. What is left
shows where the model is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.config import StageConfig
from longtake.doctor.layout import Layout
from longtake.doctor.memory import Networks
from longtake.doctor.rates import Rates
from longtake.doctor.speed import SpeedModel
from longtake.errors import ConfigError
from longtake.models.dit import DiTConfig
from longtake.models.folders import image_token_count
from longtake.rollout.work import CRITIC

SAME_CLIPS = "critic update on the same clips"


@dataclass(frozen=True)
class Compared:
    """Seconds of one kind of update at one exit step, without the optimizer, of one GPU; `clips` and `blocks` as
    predicted, in calls of whole clips and in calls of a block.
    """

    what: str
    clips: float
    blocks: float
    measured: float

    @property
    def predicted(self) -> float:
        return self.clips + self.blocks


def measured_rates(rates: Rates, file: Path) -> Rates:
    """`rates` with all that a `results.json` tells. Raises: ConfigError when the file is not there or is none."""
    results = read_results(file)
    rates = kernel_rates(rates, results)
    rows = compared(rates.replaced("assumed", slowdown=1.0, slowdown_blocks=1.0), results)
    if not rows:
        return rates
    alone = [row for row in rows if not row.blocks] or rows
    clips = sum(row.measured for row in alone) / sum(row.predicted for row in alone)
    both = [row for row in rows if row.blocks]
    left = sum(row.measured - clips * row.clips for row in both)
    blocks = left / sum(row.blocks for row in both) if left > 0 else clips
    return rates.replaced("measured", slowdown=clips, slowdown_blocks=blocks)


def read_results(file: Path) -> dict[str, Any]:
    """The parts of a `results.json`. Raises: ConfigError."""
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--measured {file} cannot be read ({error}); give the results.json of benchmarks/full_size.py"
        ) from None
    if not isinstance(results, dict) or not (results.get("rates") or list(_trainings(results))):
        raise ConfigError(f"--measured {file} has neither `rates` nor a training; run benchmarks/full_size.py for it")
    return results


def kernel_rates(rates: Rates, results: Mapping[str, Any]) -> Rates:
    """`rates` with those of the part `rates`."""
    values: dict[str, float] = {}
    for name, value in (results.get("rates") or {}).items():
        attention = re.fullmatch(r"attention, (\d+) frames to (\d+), TFLOP/s", name)
        if name.startswith("matmul"):
            values["products"] = value * 1e12
        elif attention is not None:
            queries, keys = map(int, attention.groups())
            values["attention_long" if queries == keys else "attention_block"] = value * 1e12
    return rates.replaced("measured", **values)


def compared(rates: Rates, results: Mapping[str, Any]) -> list[Compared]:
    """Each update that was timed beside its prediction."""
    rows = []
    for training in _trainings(results):
        config = StageConfig.from_tree(training["config"])
        size = DiTConfig(**training["network"])
        tokens = image_token_count(config.encoders_folder)
        model = SpeedModel(config, Networks(size, size, size), Layout(1), rates, tokens)
        for kind, cells in training["seconds by exit step"].items():
            for step, seconds in cells.items():
                rows.append(Compared(f"{kind}, exit step {step}", *_update_seconds(model, kind, float(step)), seconds))
    return rows


def _trainings(results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name, values in results.items():
        if name.startswith("train,") and "config" in values and values.get("seconds by exit step"):
            yield values


def _update_seconds(model: SpeedModel, kind: str, exit_step: float) -> tuple[float, float]:
    """Of calls of whole clips, and of a block."""
    clips = blocks = 0.0
    for each in model.passes(kind == "generator update", exit_step):
        of_critic = each.network == CRITIC and each.graded
        if of_critic if kind == "generator update" else kind == SAME_CLIPS and not of_critic:
            continue
        seconds = each.times * (model.forward_seconds(each) + (model.backward_seconds(each) if each.graded else 0.0))
        if each.phase == "rollout":
            blocks += seconds
        else:
            clips += seconds
    return clips, blocks
