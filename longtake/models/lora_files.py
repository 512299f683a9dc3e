"""Low-rank updates on disk: read from PEFT's names, checked against the base, merged tensor by tensor, written.

A folder of updates holds `adapter_model.safetensors` and `adapter_config.json` as PEFT writes and reads them, and
`base.json`: which weights they belong to. Source of the names: PEFT `get_peft_model_state_dict`, which LongLive calls
(NVlabs/LongLive utils/lora_utils.py); specification H.7, K.2; of the folder: PEFT `utils/constants.py` and
`tuners/lora/config.py`. Must know no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake.config import TOY, resolve_source
from longtake.errors import CheckpointError
from longtake.models.folders import PICKLED
from longtake.models.model_json import read_json
from longtake.models.names import clean_key
from longtake.models.published import pick, read_pickled
from longtake.models.tensor_files import save_tensors

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_NETWORKS = ("generator_lora",)
# Fields of adapter_config.json that change what an update is; W + scale B A is all there is here
_OTHER_KINDS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")


@dataclass(frozen=True)
class LowRank:
    """Updates of linear weights: name of the weight -> (A [rank, in], B [out, rank]); W becomes W + scale B A."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scale: float

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """`weight` with its update, float32; a tensor without an update comes back as it is."""
        if name not in self.factors:
            return weight
        a, b = self.factors[name]
        return weight.float() + self.scale * (b.float() @ a.float())


@dataclass(frozen=True)
class Base:
    """The weights that updates belong to.

    Fields: `source`, where they were: `toy`, OWNER/NAME on the hub, an absolute path, or one that begins with `..` and
    is relative to the folder of the updates, so that a log folder can be moved; `identity`, as `weights_identity`.
    """

    source: str
    identity: str

    def path(self, folder: Path) -> Path:
        """Where the base of the updates in `folder` should be. Raises: CheckpointError when it is a path to nothing."""
        if self.source.startswith(".."):
            path = (folder.absolute() / self.source).resolve()
        else:
            path = resolve_source(TOY, folder) if self.source == TOY else Path(self.source)
        if (self.source.startswith("..") or path.is_absolute()) and not path.exists():
            raise CheckpointError(
                f"the updates in {folder} belong to the weights at {path}, which are not there; put them back, or "
                f"merge by hand: longtake convert BASE TARGET --to longtake --lora {folder}"
            )
        return path


@dataclass(frozen=True)
class Adapter:
    """The updates that are trained on one network; `targets` are names of linear layers inside a block."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: Base

    @property
    def pattern(self) -> str:
        """The regular expression that PEFT compares with whole names of layers."""
        return rf"blocks\.\d+\.({'|'.join(map(re.escape, self.targets))})"

    def facts(self) -> dict[str, Any]:
        """What must not change when training goes on, beside the base."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}


def is_adapter(path: Path) -> bool:
    """True for a folder of updates that names its base."""
    return (path / BASE).is_file() and (path / WEIGHTS).is_file()


def write_adapter(folder: Path, factors: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Writes a folder of updates.

    Args: `factors`, name of the module's parameter (`blocks.0.self_attn.q.lora_A.default.weight`) -> CPU tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    published = {PREFIX + name.replace(".default.", "."): tensor.contiguous() for name, tensor in factors.items()}
    save_tensors(published, folder / WEIGHTS, {"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": adapter.pattern,
        "base_model_name_or_path": adapter.base.source,
        "inference_mode": True,
    }
    for name, data in ((CONFIG, fields), (BASE, asdict(adapter.base))):
        (folder / name).write_text(json.dumps(data, indent=2) + "\n")


def read_base(folder: Path) -> Base:
    """The base of a folder of updates. Raises: CheckpointError when `base.json` is not what `write_adapter` wrote."""
    data = read_json(folder / BASE)
    if not isinstance(data, dict) or set(data) != {"source", "identity"}:
        raise CheckpointError(f"{folder / BASE} must hold source and identity of the base; use another checkpoint")
    return Base(**data)


def read_lora(path: str | Path, shapes: Mapping[str, Tensor], *, scale: float | None = None) -> LowRank:
    """The updates in a folder, or in a `.pt`, `.pth` or `.safetensors` file (of the student where it holds several).

    Args: `shapes`, the tensors that they are for, under original Wan names (any device). `scale` = alpha / rank;
    default: that of the `adapter_config.json` in the folder or beside the file, else 1, which is LongLive's.
    Raises: CheckpointError that lists what is no factor, has no partner, no weight, or another shape.
    """
    path = Path(path).expanduser()
    file = path / WEIGHTS if path.is_dir() else path
    state = _read(file)
    halves: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in state.items():
        if match := _FACTOR.fullmatch(key):
            module = clean_key(re.sub(r"^(.*\.)?base_model\.model\.", "", match[1]))
            halves.setdefault(f"{module}.weight", {})[match[2]] = tensor
        else:
            problems.append(f"{key} is no lora_A or lora_B weight")
    for name, pair in halves.items():
        problems += _misfit(name, pair, shapes)
    if problems or not halves:
        listed = "; ".join(problems[:12]) or "it holds none"
        raise CheckpointError(
            f"the low-rank updates in {path} do not fit the base ({len(problems)} problems): {listed}"
        )
    factors = {name: (pair["A"], pair["B"]) for name, pair in halves.items()}
    return LowRank(factors, read_scale(file.parent) if scale is None else scale)


def read_scale(folder: Path) -> float:
    """alpha / rank of the `adapter_config.json` in a folder, 1 without one.

    Raises: CheckpointError for kinds of updates that are more than W + scale B A.
    """
    file = folder / CONFIG
    if not file.is_file():
        return 1.0
    fields = read_json(file)
    if not isinstance(fields, dict) or not {"r", "lora_alpha"} <= set(fields):
        raise CheckpointError(f"{file} must hold r and lora_alpha; give the scale (alpha / rank) yourself")
    if other := [name for name in _OTHER_KINDS if fields.get(name)]:
        raise CheckpointError(f"{file} sets {', '.join(other)}; only plain updates W + alpha / r B A are read")
    return fields["lora_alpha"] / fields["r"]


def _read(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give the file of the low-rank updates")
    if path.suffix in PICKLED:
        return pick(read_pickled(path), path, _NETWORKS, None)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def _misfit(name: str, pair: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> list[str]:
    if set(pair) != {"A", "B"}:
        return [f"{name} has lora_{min(pair)} only"]
    if name not in shapes:
        return [f"the base has no {name}"]
    a, b, weight = tuple(pair["A"].shape), tuple(pair["B"].shape), tuple(shapes[name].shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != weight:
        return [f"{name} is {weight} and its factors are {b} and {a}"]
    return []
