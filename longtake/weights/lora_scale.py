"""The scale of low-rank updates, alpha / rank, as an `adapter_config.json` or a file's metadata state it.

Sources: PEFT `tuners/lora/config.py` (fields), `tuners/lora/layer.py` (rsLoRA: alpha / sqrt(rank)), `utils/other.py`
(patterns); diffusers `loaders/lora_base.py` (`lora_adapter_metadata`); kohya-ss/sd-scripts and musubi-tuner
(`ss_network_dim`, `ss_network_alpha`). Must know no tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longtake.errors import CheckpointError
from longtake.json_text import parse_json

CONFIG = "adapter_config.json"
ONLY_PLAIN = "only plain updates W + scale B A are read: merge them where they were made and give the whole weights"
ABSENT = object()  # no alpha, which is another thing than an alpha of null
_BLOBS = ("lora_adapter_metadata", "adapter_config", "lora_config", "peft_config")
_RANKS = ("ss_network_dim", "network_dim", "lora_rank", "lora_dim", "rank", "r")
_ALPHAS = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")
_SCALES = ("lora_scale", "lora_scaling", "scaling", "scale")
_NONE = ("none", "null", "", "dynamic")  # kohya's words for values that each layer has itself


@dataclass(frozen=True)
class Settings:
    """What is stated of all layers (`rank`, `alpha` or the `fixed` scale) and of those whose name a pattern matches."""

    source: object = ""
    rank: int | None = None
    alpha: Any = ABSENT
    fixed: float = 1.0
    rslora: bool = False
    ranks: Mapping[str, Any] = field(default_factory=dict)
    alphas: Mapping[str, Any] = field(default_factory=dict)

    def scale(self, module: str, rank: int, alpha: Any = ABSENT) -> float:
        """The scale of a layer whose factors have `rank`; `alpha`, its own in the file.

        Raises: CheckpointError when another rank is stated, or alpha is no number above 0.
        """
        where = f"{module}.alpha"
        if alpha is ABSENT:
            stated, where = self._of(self.ranks, module, self.rank), f"{self.source}: alpha of {module}"
            if stated is not None and stated != rank:
                what = f"rank {stated}, and the factors of {module} have rank {rank}: they do not belong together"
                raise CheckpointError(f"{self.source} says {what}; give the right file, or the scale yourself")
            alpha = self._of(self.alphas, module, self.alpha)
        if alpha is ABSENT:
            return self.fixed
        return number(alpha, where) / (math.sqrt(rank) if self.rslora else rank)

    def _of(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        try:
            return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
        except re.error as error:
            raise CheckpointError(f"{self.source} holds a pattern that is no regular expression: {error}") from error


def number(value: Any, what: str) -> float:
    """`value` as a number above 0. Raises: CheckpointError."""
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and found > 0):
        shown = "null" if value is None else value
        rule = "the scale (alpha / rank) must be a finite number above 0; give it yourself: lora_scale"
        raise CheckpointError(f"{what} is {shown}, and {rule}")
    return found


def settings_from_json(fields: Any, source: object) -> Settings:
    """What PEFT's fields say. Raises: CheckpointError for kinds of updates that are more than W + scale B A."""
    if not isinstance(fields, dict) or not {"r", "lora_alpha"} <= fields.keys():
        known = isinstance(fields, dict) and "peft_type" in fields
        kind = f" (it is of the kind {fields['peft_type']})" if known else ""
        raise CheckpointError(f"{source} must hold r and lora_alpha{kind}; give the scale (alpha / rank) yourself")
    other = [name for name in ("use_dora", "fan_in_fan_out", "use_qalora") if fields.get(name)]
    if str(fields.get("peft_type") or "LORA").upper() != "LORA":
        other.append(f"peft_type={fields['peft_type']}")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        other.append(f"init_lora_weights={start}, which changes the base")
    if other:
        raise CheckpointError(f"{source} sets {', '.join(other)}; {ONLY_PLAIN}")
    ranks, alphas = (fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    if not (isinstance(ranks, dict) and isinstance(alphas, dict)):
        raise CheckpointError(f"{source}: rank_pattern and alpha_pattern must be objects; use another file")
    rank, alpha = (number(fields[name], f"{source}: {name}") for name in ("r", "lora_alpha"))
    return Settings(source, int(rank), alpha, 1.0, bool(fields.get("use_rslora")), ranks, alphas)


def settings_from_metadata(metadata: Mapping[str, str], file: Path) -> Settings:
    """What the metadata of a safetensors file say. Raises: CheckpointError as `settings_from_json`."""
    source = f"the metadata of {file}"
    if name := next((name for name in _BLOBS if name in metadata), None):
        try:
            fields = parse_json(metadata[name])
        except ValueError as error:
            raise CheckpointError(f"{source}: {name} is not valid JSON: {error}") from error
        if isinstance(fields, dict):
            fields = {key.removeprefix("transformer."): value for key, value in fields.items()}
        return settings_from_json(fields, source)

    def stated(names: tuple[str, ...], default: Any) -> Any:
        name = next((name for name in names if str(metadata.get(name, "")).lower() not in _NONE), None)
        return default if name is None else number(metadata[name], f"{source}: {name}")

    rank = stated(_RANKS, None)
    return Settings(source, rank and int(rank), stated(_ALPHAS, ABSENT), stated(_SCALES, 1.0))
