"""What must not change between a run, its resumption and its use, and how that is compared.

Every other option may change where a run is resumed, and holds from there on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtake.config.stage import StageConfig
from longtake.data.encoded import EncodedRows
from longtake.data.samples import Dataset, FirstRows
from longtake.errors import CheckpointError
from longtake.plan import PlanConfig

# What to do about invariants that cannot simply be set back
_FIXES = {
    "base": "name the weights that it was trained on in init_from (and critic.init_from)",
    "lora": "set rank, alpha and targets back",
    "rows": "give data.path the rows that it had, in the same order, and validation.num_rows its value (0 in runs from "
    "before there was one)",
    "batch_size": "set it back (with data.buckets and in long_tuning it says which rows come next)",
}

# What runs of versions without these keys did
_BEFORE = {"later_steps": None, "warp_steps": True}


def invariants(config: StageConfig) -> dict[str, Any]:
    """What must not change between a run, its resumption and its use: stored in every manifest."""
    return {
        "rope": config.rope,
        "plan": config.plan.model_dump(),
        **config.flow.model_dump(),
        "fps": config.video.fps,
        "clip_preprocess": config.model.clip_preprocess,
    }


def resume_invariants(config: StageConfig, rows: str) -> dict[str, Any]:
    """What must not change beside `invariants` in a resumed run: values by dotted key, and the `rows` of the data."""
    keys = ["seed", "objective.kind", "model.image_condition", "model.first_frame_sigma", "data.buckets", "ema.enabled"]
    keys += ["model.preset"] * (config.init_from is None) + ["batch_size"] * (config.data.buckets is not None)
    keys += config.objective.resume_keys
    values = flat(config.model_dump())
    return {key: values[key] for key in keys} | {"rows": rows}


def rows_invariant(dataset: Dataset) -> str:
    """Number and identity of the rows of a data set, in their order; an encoded set without bad rows has those of the
    set that it was made from, and the first rows of a set have its own and their number.
    """
    if isinstance(dataset, FirstRows):
        return f"{rows_invariant(dataset.dataset)}, the first {len(dataset)}"
    if isinstance(dataset, EncodedRows) and dataset.made_from is not None:
        return dataset.made_from
    digest = hashlib.blake2b(digest_size=8)
    for row in dataset.identities():
        digest.update(row.encode("utf-8", "surrogatepass") + b"\n")
    return f"{len(dataset)} ({digest.hexdigest()})"


def compare_facts(manifest: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> list[str]:
    """Names of the invariants that a manifest of an earlier version does not hold.

    Raises: CheckpointError that names each fact which the run at `path` has otherwise.
    """
    config, unknown, wrong = flat(manifest.get("config", {})), [], []
    known = {**config, **completed(manifest)}
    for key, value in wanted.items():
        if key not in known:
            unknown.append(key)
        elif (saved := known[key]) != json.loads(json.dumps(value)):
            wrong.append(f"{key}={saved!r} and this run has {value!r}; {_FIXES.get(key, 'set it back')}")
    if wrong:
        raise CheckpointError(
            f"{path} was trained with {'; with '.join(wrong)}, or start in another log directory and initialise from "
            "the checkpoint"
        )
    return unknown


def completed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with what earlier versions, which had fewer rules, did by those that it does not name."""
    plan = {name: field.default for name, field in PlanConfig.model_fields.items()}
    return {**_BEFORE, **manifest, **({"plan": plan | manifest["plan"]} if "plan" in manifest else {})}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted key, in JSON's types."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.loads(json.dumps(value))
    return found
