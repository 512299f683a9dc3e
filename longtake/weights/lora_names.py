"""Names of low-rank updates as they are published, and which weight each belongs to.

Sources: PEFT `get_peft_model_state_dict`; diffusers `loaders/lora_conversion_utils.py` (its Wan converters: ComfyUI's
prefix, musubi-tuner's flat names, LightX2V's `diff` and `diff_b`); kijai/ComfyUI-WanVideoWrapper#807 (`diff_m`, of the
modulation); LyCORIS (names of the kinds that are refused). Must know no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longtake.errors import CheckpointError
from longtake.weights.families import describe, is_wan
from longtake.weights.lora_scale import ABSENT
from longtake.weights.names import clean_key, original_names, shown_key
from longtake.weights.read import check_type
from longtake.weights.tensor_files import check_finite

_FACTOR = re.compile(
    r"(?P<module>.+?)[._]lora(_linear_layer)?[._](?P<part>A|B|down|up)(\.(?!weight$|bias$)\w+)?(\.(?P<leaf>weight|bias))?"
)
_OTHER = re.compile(r"(?P<module>.+?)(\.lora)?\.(?P<part>alpha|diff|diff_b|diff_m)")
_REFUSED = {
    "DoRA": r"dora_scale|(lora_)?magnitude(_vector)?\b",
    "LoHa": r"hada_",
    "LoKr": r"lokr_",
    "OFT": r"b?oft_",
    "LoCon with a middle factor": r"lora_mid",
}
_PARTS = {"A": "a", "down": "a", "B": "b", "up": "b", "alpha": "alpha"}
_LEAVES = {"diff_b": "bias", "diff_m": "modulation"}
_FLAT = re.compile(r"(lora_unet|lora_transformer|lora_wan|lycoris)_+")


@dataclass
class Update:
    """What one parameter gets: `module`, the layer's name in the file; factors, their `alpha`, a `difference`, which
    counts with the scale of its layer's factors where it is `scaled` (PEFT's lora_bias).
    """

    module: str
    a: Tensor | None = None
    b: Tensor | None = None
    alpha: Any = ABSENT
    difference: Tensor | None = None
    scaled: bool = False


def assign(state: Mapping[str, Any], shapes: Mapping[str, Tensor], file: object) -> tuple[dict[str, Update], list[str]]:
    """The updates by the original Wan name of their parameter, and keys that are none, in words.

    Raises: CheckpointError for kinds of updates that are not read, for whole weights, and for values that are not
    finite or not of a type that weights have.
    """
    places, problems = _places(state, file)
    if not places:
        held = "whole weights of Wan" if is_wan(map(clean_key, state)) else describe(map(clean_key, state))
        what = held or "; ".join(problems[:3]) or "nothing"
        raise CheckpointError(
            f"{file} holds no low-rank updates under a name of PEFT, diffusers, ComfyUI, musubi-tuner or LightX2V, but "
            f"{what}; give another file"
        )
    names = _original([module for module, _, _ in places.values()], shapes)
    updates: dict[str, Update] = {}
    used: dict[tuple[str, str], str] = {}
    for key, (module, part, leaf) in places.items():
        name, value = f"{names[module]}.{leaf}", state[key]
        slot = _PARTS.get(part, "difference") if leaf == "weight" else "difference"
        if (first := used.setdefault((name, slot), key)) != key:
            raise CheckpointError(f"{file} holds {name} twice, as {first} and as {key}; keep one of them")
        update = updates.setdefault(name, Update(module))
        if slot == "alpha":
            update.alpha = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key} of {file} is {value!r} and no tensor; use another file")
        check_type(value.dtype, f"{key} of {file}")
        check_finite(value, f"{key} of {file}")
        setattr(update, slot, value.detach())
        update.scaled = slot == "difference" and part in _PARTS
    return updates, problems


def _places(state: Mapping[str, Any], file: object) -> tuple[dict[str, tuple[str, str, str]], list[str]]:
    """Module, part and leaf of each key that is part of an update; the others, in words."""
    places: dict[str, tuple[str, str, str]] = {}
    problems = []
    for key in state:
        for kind, pattern in _REFUSED.items():
            if re.search(rf"\.({pattern})", key):
                raise CheckpointError(
                    f"{file} holds updates of the kind {kind} ({key}); only W + scale B A is read: merge them where "
                    "they were made and give the whole weights"
                )
        match = _FACTOR.fullmatch(key) or _OTHER.fullmatch(key)
        leaf = match and (match.groupdict().get("leaf") or _LEAVES.get(match["part"], "weight"))
        if match is None or (leaf == "bias" and match["part"] in ("A", "down")):
            problems.append(f"{key} is no lora_A or lora_B weight")
        elif key.startswith(("lora_te", "text_encoder")):
            problems.append(f"{key} is of a text encoder, whose updates are not read")
        else:
            places[key] = (match["module"], match["part"], str(leaf))
    return places, problems


def _original(modules: Iterable[str], shapes: Mapping[str, Tensor]) -> dict[str, str]:
    """Original Wan names of the file's modules; one that is none keeps its own."""
    found: dict[str, str] = {}
    dotted: dict[str, str] = {}
    flat: dict[str, str] = {}
    for name in shapes:
        layer = name.rpartition(".")[0]
        flat |= {form.replace(".", "_"): layer for form in (layer, shown_key(name).rpartition(".")[0])}
    for module in dict.fromkeys(modules):
        if match := _FLAT.match(module):
            found[module] = flat.get(module[match.end() :], module)
        else:
            own = re.sub(r"^(.*\.)?base_model\.model\.", "", module).replace(".processor.", ".")
            dotted[module] = f"{clean_key(own)}.weight"
    names = original_names(dotted.values())
    return found | {module: names[name].removesuffix(".weight") for module, name in dotted.items()}
