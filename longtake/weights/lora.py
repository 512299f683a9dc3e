"""Low-rank updates on disk: read under every published name, checked against the base, merged, written.

A folder of updates holds `adapter_model.safetensors` and `adapter_config.json` as PEFT writes and reads them, and
`base.json`: which weights they belong to. The scale of updates: `lora_scale`. Must know no model.

Sources of the names: PEFT `get_peft_model_state_dict`, which LongLive calls (NVlabs/LongLive utils/lora_utils.py);
specification H.7, K.2; diffusers `loaders/lora_conversion_utils.py` (its Wan converters: ComfyUI's prefix,
musubi-tuner's flat names, LightX2V's `diff` and `diff_b`); kijai/ComfyUI-WanVideoWrapper#807 (`diff_m`, of the
modulation); LyCORIS (names of the kinds that are refused); of the folder: PEFT `utils/constants.py` and
`tuners/lora/config.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from longtake.config.stage import TOY, resolve_source
from longtake.errors import CheckpointError, ConfigError
from longtake.weights.config_json import read_json
from longtake.weights.file_kind import describe, is_pickled, is_wan
from longtake.weights.locate import PICKLED, SAFETENSORS, files_in, is_hub_name
from longtake.weights.lora_scale import ABSENT, CONFIG, ONLY_PLAIN, Settings, settings_from_json, settings_from_metadata
from longtake.weights.names import clean_key, original_names, shown_key
from longtake.weights.read import check_type, open_safetensors, pick, read_pickled
from longtake.weights.tensor_files import check_finite, save_tensors

WEIGHTS, BASE = "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."
_FILES = (WEIGHTS, "adapter_model.bin", "pytorch_lora_weights.safetensors")  # PEFT now and once, diffusers
_NETWORKS = ("generator_lora",)
_FACTOR = re.compile(
    r"(?P<module>.+?)[._]lora(_linear_layer)?[._](?P<part>A|B|down|up)(\.(?!weight$|bias$)\w+)?(\.(?P<leaf>weight|bias))?"
)
_OTHER = re.compile(r"(?P<module>.+?)(\.lora)?\.(?P<part>alpha|diff|diff_b|diff_m)(?P<leaf>)")
_REFUSED = {
    "DoRA": r"dora_scale|(lora_)?magnitude(_vector)?\b",
    "LoHa": r"hada_",
    "LoKr": r"lokr_",
    "OFT": r"b?oft_",
    "LoCon with a middle factor": r"lora_mid",
}
_SLOTS = {"A": "a", "down": "a", "B": "b", "up": "b", "alpha": "alpha"}
_LEAVES = {"diff_b": "bias", "diff_m": "modulation"}
_PEFT = r"^(.*\.)?base_model\.model\."  # and whatever is around it
_FLAT = re.compile(r"(lora_unet|lora_transformer|lora_wan|lycoris)_+")


# ---- values ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LowRank:
    """Updates of weights: W becomes W + sign (scale B A + difference), for each name what there is of both.

    Fields: `factors`, name of the weight -> (A [rank, in], B [out, rank]) with its scale in `scales`; `differences`,
    name of a parameter -> a tensor of its shape; `source`, their file; `sign`, -1 to take them out again.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]
    differences: Mapping[str, Tensor]
    source: Path
    sign: int = 1

    @property
    def scale(self) -> float | None:
        """The scale of all factors; None where they have several."""
        return next(iter(self.scales.values())) if len(set(self.scales.values())) == 1 else None

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """`weight` with its update, float32; a tensor without an update comes back as it is.

        Raises: CheckpointError when the result is not finite.
        """
        if name not in self.factors and name not in self.differences:
            return weight
        merged = weight.float()
        if name in self.factors:
            a, b = self.factors[name]
            product = b.float().flatten(1) @ a.float().flatten(1)
            merged = merged + self.sign * self.scales[name] * product.view(weight.shape)
        if name in self.differences:
            merged = merged + self.sign * self.differences[name].view(weight.shape)
        check_finite(merged, f"{name} with the update of {self.source}")
        return merged


def check_scale(scale: float | None, lora: object) -> None:
    """Raises ConfigError unless a scale that is given is a finite number and belongs to updates that are given."""
    if scale is None:
        return
    if not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ConfigError(f"lora_scale={scale} is no finite number; give alpha / rank, or leave it out")
    if lora is None:
        raise ConfigError(f"lora_scale={scale:g} was given without updates; name their file (lora), or leave it out")


def read_lora(path: str | Path, shapes: Mapping[str, Tensor], *, scale: float | None = None) -> LowRank:
    """The updates in a folder or in a file of any suffix (of the student where it holds several).

    Names and scales are those of PEFT, diffusers, ComfyUI, musubi-tuner and LightX2V.
    Args: `shapes`, the tensors that they are for, under original Wan names (any device). `scale` = alpha / rank of all;
    default: the alpha of each layer in the file, else that of the `adapter_config.json` in the folder or beside the
    file, else that of the file's metadata, else alpha = rank, which is LongLive's.
    Raises: ConfigError for a scale that is not finite; CheckpointError that lists what is no update, has no partner, no
    weight, another shape or rank, is not finite, or is of another kind than W + scale B A.
    """
    check_scale(scale, path)
    file = updates_file(Path(path).expanduser())
    state, metadata = _read(file)
    updates, problems = _assigned(state, shapes, file)
    problems += [problem for name, update in updates.items() for problem in _misfit(name, update, shapes)]
    if problems:
        listed = "; ".join(problems[:12])
        raise CheckpointError(f"the updates in {path} do not fit the base ({len(problems)} problems): {listed}")
    pairs = {name: (u.a, u.b) for name, u in updates.items() if u.a is not None and u.b is not None}
    settings = _settings(file, metadata) if scale is None else Settings(fixed=float(scale))
    alphas = {name: u.alpha if scale is None else ABSENT for name, u in updates.items()}
    scales = {name: settings.scale(updates[name].module, len(a), alphas[name]) for name, (a, _) in pairs.items()}
    return LowRank(pairs, scales, _differences(updates, scales, scale, file), file)


def _differences(
    updates: Mapping[str, Update], scales: Mapping[str, float], scale: float | None, file: Path
) -> dict[str, Tensor]:
    """Differences times what counts for them: the scale that is given, or that of their layer for PEFT's biases."""
    plain = any(u.difference is not None and not u.scaled for u in updates.values())
    if scale is not None and plain and any(u.alpha is not ABSENT for u in updates.values()):
        why = f"{file} holds an alpha of its own and differences without one"
        raise ConfigError(f"lora_scale={scale:g} stands for alpha / rank, and {why}; leave lora_scale out")
    found = {}
    for name, update in updates.items():
        if update.difference is None:
            continue
        weight = f"{name.removesuffix('.bias')}.weight"
        if update.scaled and weight not in scales:
            raise CheckpointError(f"{file} holds lora_B of {name} and no factors of {weight}; use another file")
        factor = scales[weight] if update.scaled else 1.0 if scale is None else float(scale)
        found[name] = update.difference.float() * factor
    return found


def _misfit(name: str, update: Update, shapes: Mapping[str, Tensor]) -> list[str]:
    a, b, difference = update.a, update.b, update.difference
    problems = []
    if (a is None) != (b is None):
        problems.append(f"{name} has lora_{'A' if b is None else 'B'} only")
    if a is None and b is None and difference is None:
        problems.append(f"{name} has alpha only")
    if name not in shapes:
        return [*problems, f"the base has no {name}"]
    shape = tuple(shapes[name].shape)
    if a is not None and b is not None:
        ones = (1,) * (len(shape) - 2)
        wanted = ((len(a), *shape[1:]), (*shape[:1], len(a), *ones)) if a.ndim else None
        if len(shape) < 2 or not a.ndim or not len(a) or (tuple(a.shape), tuple(b.shape)) != wanted:
            problems.append(f"{name} is {shape} and its factors are {tuple(b.shape)} and {tuple(a.shape)}")
    if difference is not None and [n for n in difference.shape if n > 1] != [n for n in shape if n > 1]:
        problems.append(f"{name} is {shape} and its difference is {tuple(difference.shape)}")
    return problems


def updates_file(path: Path) -> Path:
    """The file of updates that a path means: itself, or the one in a folder. Raises: CheckpointError."""
    if path.is_file():
        return path
    if not path.is_dir():
        fix = "give the file of the low-rank updates"
        if is_hub_name(path):
            repository, file = "/".join(path.parts[:2]), "/".join(path.parts[2:])
            get = " ".join(filter(None, ["hf download", repository, file, "--local-dir updates"]))
            fix += f"; of the hub none are fetched, `{get}` does it"
        raise CheckpointError(f"{path} does not exist; {fix}")
    named = [path / name for name in _FILES if (path / name).is_file()]
    files = named or files_in(path, (*SAFETENSORS, *PICKLED))
    if not named and len(files) != 1:
        held = ", ".join(file.name for file in files[:8]) or "no file of tensors"
        raise CheckpointError(f"{path} holds {held} and no {WEIGHTS}; give the file of the low-rank updates")
    return files[0]


def _read(file: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """What a file of updates holds, and its metadata."""
    if is_pickled(file):
        return pick(read_pickled(file), file, _NETWORKS, None), {}
    with open_safetensors(file) as opened:
        return {key: opened.get_tensor(key).clone() for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def _settings(file: Path, metadata: Mapping[str, str]) -> Settings:
    config = file.parent / CONFIG
    return settings_from_json(read_json(config), config) if config.is_file() else settings_from_metadata(metadata, file)


def scale_text(folder: Path) -> str:
    """What the `adapter_config.json` in a folder says of scales, in words; that of plain updates is one number."""
    settings = _settings(folder / WEIGHTS, {})
    patterns = "".join(f" {pattern}" for pattern in (settings.ranks, settings.alphas) if pattern)
    return repr(replace(settings, ranks={}, alphas={}).scale("", settings.rank or 1)) + patterns


# ---- names -----------------------------------------------------------------------------------------------------------
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


class _Place(NamedTuple):
    """What a key is: the `slot` of the update of the parameter `leaf` of a `module`."""

    module: str
    slot: str
    leaf: str
    scaled: bool


def _assigned(
    state: Mapping[str, Any], shapes: Mapping[str, Tensor], file: object
) -> tuple[dict[str, Update], list[str]]:
    """The updates by the original Wan name of their parameter, and keys that are none, in words.

    Raises: CheckpointError for kinds of updates that are not read, for whole weights, and for values that are not
    finite or not of a type that weights have.
    """
    found = {key: _place(key, file) for key in state}
    places = {key: place for key, place in found.items() if isinstance(place, _Place)}
    problems = [words for words in found.values() if isinstance(words, str)]
    if not places:
        held = "whole weights of Wan" if is_wan(map(clean_key, state)) else describe(map(clean_key, state))
        raise CheckpointError(
            f"{file} holds no low-rank updates under a name of PEFT, diffusers, ComfyUI, musubi-tuner or LightX2V, but "
            f"{held or '; '.join(problems[:3]) or 'nothing'}; give another file"
        )
    names = _original([place.module for place in places.values()], shapes)
    updates: dict[str, Update] = {}
    used: dict[tuple[str, str], str] = {}
    for key, (module, slot, leaf, scaled) in places.items():
        name, value = f"{names[module]}.{leaf}", state[key]
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
        update.scaled = scaled
    return updates, problems


def _place(key: str, file: object) -> _Place | str:
    """Which part of an update a key is; of one that is none, what it is in words."""
    if kind := next((kind for kind, pattern in _REFUSED.items() if re.search(rf"\.({pattern})", key)), None):
        raise CheckpointError(f"{file} holds updates of the kind {kind} ({key}); {ONLY_PLAIN}")
    match = _FACTOR.fullmatch(key) or _OTHER.fullmatch(key)
    if match is None or (match["leaf"] == "bias" and _SLOTS[match["part"]] == "a"):
        return f"{key} is no lora_A or lora_B weight"
    if key.startswith(("lora_te", "text_encoder")):
        return f"{key} is of a text encoder, whose updates are not read"
    if match["leaf"] == "bias":
        return _Place(match["module"], "difference", "bias", scaled=True)
    part = match["part"]
    return _Place(match["module"], _SLOTS.get(part, "difference"), _LEAVES.get(part, "weight"), scaled=False)


def _original(modules: Sequence[str], shapes: Mapping[str, Tensor]) -> dict[str, str]:
    """Original Wan names of the file's modules; one that is none keeps its own."""
    flat: dict[str, str] = {}
    for name in shapes:
        layer, shown = (form.rpartition(".")[0] for form in (name, shown_key(name)))
        flat |= {layer.replace(".", "_"): layer, shown.replace(".", "_"): layer}
    found = {m: flat.get(m[match.end() :], m) for m in modules if (match := _FLAT.match(m))}
    own = {m: re.sub(_PEFT, "", m).replace(".processor.", ".") for m in modules if m not in found}
    dotted = {m: f"{clean_key(name)}.weight" for m, name in own.items()}
    names = original_names(dotted.values())
    return found | {m: names[name].removesuffix(".weight") for m, name in dotted.items()}


# ---- the folder -----------------------------------------------------------------------------------------------------
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
            fix = f"put them back, or merge by hand: longtake convert BASE TARGET --to longtake --lora {folder}"
            what = f"the updates in {folder} belong to the weights at {path}, which are not there"
            raise CheckpointError(f"{what}; {fix}")
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
    if not isinstance(data, dict) or set(data) != {"source", "identity"} or {str} != set(map(type, data.values())):
        raise CheckpointError(f"{folder / BASE} must hold source and identity of the base; use another checkpoint")
    return Base(**data)
