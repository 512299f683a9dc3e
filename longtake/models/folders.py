"""What folders of weights and encoders look like on disk, and where published ones come from. Loads nothing.

Source: the file lists of Wan-AI/Wan2.1-T2V-1.3B, Wan-AI/Wan2.1-I2V-14B-480P-Diffusers and
alibaba-pai/Wan2.1-Fun-1.3B-InP on the Hugging Face hub, as their own loaders name them (Wan-Video/Wan2.1
wan/configs/*.py, huggingface/diffusers pipelines/wan).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longtake.errors import CheckpointError

# Published repositories: weights of a transformer together with its encoders
HUB_REPOSITORIES = (
    "alibaba-pai/Wan2.1-Fun-1.3B-InP",
    "Wan-AI/Wan2.1-T2V-1.3B",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan-AI/Wan2.1-T2V-14B",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan-AI/Wan2.1-I2V-14B-480P",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "Wan-AI/Wan2.1-I2V-14B-720P",
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "Wan-AI/Wan2.1-FLF2V-14B-720P",
    "Wan-AI/Wan2.2-TI2V-5B",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "Wan-AI/Wan2.2-T2V-A14B",
    "Wan-AI/Wan2.2-I2V-A14B",
)

# Sub-folders of a pipeline or of a checkpoint that hold a transformer, in the order of preference
_WEIGHTS = ("transformer", "generator_ema", "generator_ema_lora", "generator", "generator_lora")


@dataclass(frozen=True)
class EncoderPart:
    """One encoder: its sub-folder in diffusers' layout, its files in the original layout (any one of them), and the
    beginning of the names of the tensors that are used (the published CLIP file also holds a text tower).
    """

    name: str
    folder: str
    files: tuple[str, ...]
    prefix: str = ""


ENCODER_PARTS = (
    EncoderPart("VAE", "vae", ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")),
    EncoderPart("text encoder", "text_encoder", ("models_t5_umt5-xxl-enc-bf16.pth",)),
    EncoderPart(
        "image encoder", "image_encoder", ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",), "visual."
    ),
)
_TOKENIZERS = ("tokenizer", "text_encoder", "google/umt5-xxl")


def find_weights(model: str | Path) -> Path:
    """The folder or file with a transformer's weights that `model` means; a file is taken as it is.

    Looks for safetensors in the folder itself, then in `transformer/`, `generator_ema/` and `generator/`, or for
    low-rank updates in `generator_ema_lora/` and `generator_lora/`.
    Raises: CheckpointError listing where it looked.
    """
    path = Path(model)
    if path.is_file():
        return path
    places = [path, *(path / name for name in _WEIGHTS)]
    for place in places:
        if any(place.glob("*.safetensors")):
            return place
    looked = "does not exist" if not path.is_dir() else f"holds no *.safetensors, nor do {', '.join(_WEIGHTS)} in it"
    raise CheckpointError(
        f"{path} {looked}; give a folder of Wan weights (config.json and safetensors), or a training run with --run"
    )


def find_encoders(model: str | Path) -> Path:
    """The folder of the encoders that belong to a model folder: in it, in its `encoders/`, or beside it.

    Raises: CheckpointError listing where it looked.
    """
    path = Path(model)
    root = path if path.is_dir() else path.parent
    places = [root, root / "encoders", root.parent, root.parent / "encoders"]
    for place in places:
        if encoder_files(place, ENCODER_PARTS[0]):
            return place
    raise CheckpointError(
        f"no encoders were found in {', '.join(map(str, places))} (vae/, text_encoder/ and image_encoder/, or "
        f"{ENCODER_PARTS[0].files[0]} and the files published with it); name their folder with --encoders"
    )


def encoder_files(folder: Path, part: EncoderPart) -> list[Path]:
    """The weight files of one encoder in `folder`, in either layout; empty when there is none."""
    library = sorted((folder / part.folder).glob("*.safetensors"))
    original = [folder / name for name in part.files if (folder / name).is_file()]
    return library or original


def missing_encoders(folder: Path, *, with_image: bool) -> list[str]:
    """What is not in an encoder folder, in words; empty when it is complete."""
    parts = [part for part in ENCODER_PARTS if with_image or part.folder != "image_encoder"]
    missing = [
        f"{part.name}: {folder / part.folder} with config.json and safetensors, or {' or '.join(part.files)}"
        for part in parts
        if not encoder_files(folder, part)
    ]
    tokenizers = [folder / name for name in _TOKENIZERS]
    if not any(any(place.glob("tokenizer*")) or any(place.glob("spiece*")) for place in tokenizers):
        missing.append(f"tokenizer: {' or '.join(map(str, tokenizers))}")
    return missing


def hub_repository(path: str | Path) -> str | None:
    """The published repository that has the name of a folder, if there is one."""
    names = {repository.rpartition("/")[2].lower(): repository for repository in HUB_REPOSITORIES}
    return names.get(Path(path).name.lower())
