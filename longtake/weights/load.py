"""Reading and writing transformer weights: every published layout, strict, executing nothing.

Where tensors lie is known by `read`, their names by `names`, `config.json` by `config_json`; this file brings them
into a model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from longtake.errors import CheckpointError
from longtake.models.dit import VideoDiT, parameter_type
from longtake.models.sizes import DiTConfig
from longtake.progress import as_size, track
from longtake.weights.config_json import FILE, config_from_json, config_to_json, read_json, write_config
from longtake.weights.fingerprint import check_base
from longtake.weights.hub import local_path
from longtake.weights.locate import SAFETENSORS, file_beside, files_in, locate
from longtake.weights.lora import check_scale, is_adapter, read_base, read_lora
from longtake.weights.names import shown_key
from longtake.weights.presets import PRESETS, fitting_presets
from longtake.weights.read import CheckpointReader, open_published
from longtake.weights.tensor_files import check_finite, misfits, save_tensors, shapes_in
from longtake.weights.two_networks import Part, holds_writer, part_of, updates_of, writer_updates

logger = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def check_state(state: Mapping[str, Tensor], model: VideoDiT, source: object, *, diffusers: bool = False) -> None:
    """Raises CheckpointError that lists missing, surplus and reshaped keys, and names the preset that fits.

    Args: `diffusers`, whether keys are listed under their diffusers names.
    """
    groups = misfits(shapes_in(model.state_dict()), shapes_in(state), shown_key if diffusers else str)
    problems = [
        f"{group} ({len(keys)}): {', '.join(keys[:12])}{', ...' if len(keys) > 12 else ''}"
        for group, keys in groups.items()
    ]
    if problems:
        fitting = fitting_presets(state)
        hint = f". The tensors are those of {' or '.join(fitting)}: config.json should be, too" if fitting else ""
        raise CheckpointError(f"{source} does not fit the model; " + "; ".join(problems) + hint)


def open_dit(
    source: str | Path,
    network: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float | None = None,
    *,
    unmerge: bool = False,
    mend: Callable[[CheckpointReader], CheckpointReader] | None = None,
    part: Part = "alone",
) -> tuple[CheckpointReader, VideoDiT]:
    """The tensors of a source, and a model on the meta device whose parameters are exactly those.

    Args: as `load_dit`; `unmerge` takes the updates out of what is read; `mend` as `open_published`; `part`,
    of a source of two networks (`two_networks.py`).
    Raises: CheckpointError listing missing, surplus or reshaped keys, or when sizes or files are missing; ConfigError.
    """
    check_scale(lora_scale, lora)
    path = locate(local_path(source))
    if is_adapter(path) and network is None:
        path = updates_of(path, part)
        published, model = open_dit(check_base(path, read_base(path)), lora=path)
    else:
        # First: it says what the weights of others are.
        published = open_published(path, network, mend=mend or partial(part_of, part=part))
        with torch.device("meta"):
            model = VideoDiT(_sizes(published, file_beside(path, FILE)))
        check_state(published.shapes(), model, path, diffusers=published.diffusers)
    if lora is None:
        return published, model
    updates = read_lora(lora, published.shapes(), scale=lora_scale)
    merge = dataclasses.replace(updates, sign=-1 if unmerge else 1).merge
    return dataclasses.replace(published, updates=(*published.updates, merge)), model


def _sizes(published: CheckpointReader, file: Path) -> DiTConfig:
    """The sizes in `config.json`; without one, those of the preset that has exactly these tensors."""
    if not file.exists():
        if not (fitting := fitting_presets(published.shapes())):
            what = f"the tensors of {published.path} are those of no preset ({', '.join(PRESETS)})"
            raise CheckpointError(f"{file} does not exist, and {what}; put the model's config.json beside its weights")
        logger.info("%s has no config.json; its tensors are those of %s", published.path, " or ".join(fitting))
        return PRESETS[fitting[0]]
    data, count = read_json(file), len(published.tensors)
    config = config_from_json(data, file)
    if config.num_layers > max(1000, count):  # before a model of that size is made
        what = f"num_layers={config.num_layers}, and {published.path} has {count} tensors"
        raise CheckpointError(f"{file} says {what}; use its own")
    with_image = any(name.startswith("img_emb.") or "_img." in name for name in published.tensors)
    if config.model_type == "i2v" and "image_dim" not in data and not with_image:
        # Wan2.2's I2V-A14B calls itself i2v and has y, but neither CLIP tokens nor their branch.
        return dataclasses.replace(config, image_dim=None, image_positions=None)
    return config


@dataclass(frozen=True)
class Opened:
    """Weights before they are in a model: a `model` on the meta device, and `read`, which yields (name, tensor).

    `read` takes the names wanted (default: all), under original Wan names; a tensor may be a view of its file, of which
    nothing is read until it is copied: the reader checks that what it copies is finite. `place` says where the tensor
    of a name lies; `source`, where all lie, empty for weights that are made and not read.
    """

    model: VideoDiT
    read: Callable[[Iterable[str] | None], Iterator[tuple[str, Tensor]]]
    place: Callable[[str], str]
    source: str = ""

    def told(
        self, values: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], device: object
    ) -> Iterable[tuple[str, Tensor]]:
        """`values`, while it is said how many bytes of all (`sizes`, by name) are in place; weights that are made are
        not spoken of.
        """
        if not self.source:
            return values
        total = sum(sizes.values())
        logger.info("loading the transformer (%s) from %s to %s", as_size(total), self.source, device)
        return track(values, "loading the transformer", "bytes", total, size=lambda pair: sizes[pair[0]])


def open_weights(source: str | Path, *, check: bool = False, part: Part = "alone") -> Opened:
    """Weights that are read later, whole or by slices; `source` as that of `load_dit`, `check` as of `read`, `part` as
    of `open_dit`.

    Raises: CheckpointError, ConfigError.
    """
    published, model = open_dit(source, part=part)
    read, held = partial(published.read, check=check), published.tensors
    return Opened(model, read, lambda name: str(held.get(name, name)), str(source))


def has_writer(source: Path) -> bool:
    """Whether a local source is two networks, one of which writes the context; of files that hold no code."""
    path = locate(source)
    if is_adapter(path):
        return writer_updates(path) is not None
    if not (files_in(path) if path.is_dir() else path.suffix in SAFETENSORS):
        return False
    return holds_writer(open_published(path))


def load_opened(opened: Opened, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> VideoDiT:
    """The model with its weights, one tensor read after the other. Args: as `load_dit`."""
    types = {name: parameter_type(name, dtype or torch.float32) for name, _ in opened.model.named_parameters()}
    sizes = {name: p.numel() * types[name].itemsize for name, p in opened.model.named_parameters()}
    told = opened.told(opened.read(None), sizes, device)
    state = {name: value.to(device, types[name], copy=True) for name, value in told}
    opened.model.load_state_dict(state, assign=True)
    return opened.model.requires_grad_(True)


def load_frozen(opened: Opened, device: str | torch.device, dtype: torch.dtype | None = None) -> VideoDiT:
    """The same for inference alone."""
    return load_opened(opened, device, dtype).eval().requires_grad_(False)


def load_dit(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    network: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float | None = None,
) -> VideoDiT:
    """A transformer from published weights, with `config.json` beside them or of the sizes of a preset.

    One tensor after the other is read, converted and put in its place: never more than one copy of the model.
    Args: `path`, an original Wan or diffusers folder, a pipeline, a .safetensors file or one of torch.save, OWNER/NAME
    on the Hugging Face hub, or a folder of low-rank updates, which are merged in float32 into the base that it names.
    `dtype` of the matrix weights (default: float32); what Wan computes in float32 stays float32. `network` of a file
    that holds several (`generator`, `generator_ema`, `critic`); default: the student, its average where there is one.
    `lora`, a file or folder of low-rank updates that are merged; `lora_scale` = alpha / rank, as in `read_lora`.
    Raises: CheckpointError listing missing, surplus or reshaped keys, or naming a tensor that is not finite.
    """
    published, model = open_dit(path, network, lora, lora_scale)
    return load_opened(Opened(model, published.read, str, str(path)), device, dtype)


def save_dit(
    model_config: DiTConfig, state: Mapping[str, Tensor], folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Writes `config.json` and `diffusion_pytorch_model.safetensors` (original Wan names) into `folder`.

    Raises: CheckpointError when a value is not finite in the type that is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for key, tensor in state.items()}
    for key, tensor in tensors.items():
        check_finite(tensor, f"{key} as {tensor.dtype}")
    save_tensors(tensors, folder / WEIGHTS)
    write_config(folder, config_to_json(model_config))
