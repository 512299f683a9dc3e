"""Low-rank updates as published: read from PEFT's names, checked against the base, merged tensor by tensor.

Source of the names: PEFT `get_peft_model_state_dict`, which LongLive calls (NVlabs/LongLive utils/lora_utils.py);
specification H.7, K.2. Must know no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from longtake.errors import CheckpointError
from longtake.models.folders import PICKLED
from longtake.models.names import clean_key
from longtake.models.published import pick, read_pickled

_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_NETWORKS = ("generator_lora",)


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


def read_lora(path: str | Path, shapes: Mapping[str, Tensor], *, scale: float = 1.0) -> LowRank:
    """The updates in a `.pt`, `.pth` or `.safetensors` file, of the student where it holds several networks.

    Args: `shapes`, the tensors that they are for, under original Wan names (any device). `scale` = alpha / rank, which
    the files do not hold; LongLive's is 1.
    Raises: CheckpointError that lists what is no factor, has no partner, no weight, or another shape.
    """
    path = Path(path).expanduser()
    state = _read(path)
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
    return LowRank({name: (pair["A"], pair["B"]) for name, pair in halves.items()}, scale)


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
