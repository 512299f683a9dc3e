"""Where the encoders lie in a model folder, under original Wan names or in diffusers' sub-folders.

Must know no torch and no library, so that a folder can be checked before anything is loaded.
Source: the hub repositories Wan-AI/Wan2.1-T2V-1.3B, Wan-AI/Wan2.1-I2V-14B-480P, Wan-AI/Wan2.2-TI2V-5B (original) and
their `-Diffusers` forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longtake.errors import CheckpointError

TOKENIZER_FOLDER = Path("google") / "umt5-xxl"  # beside the original text encoder
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "special_tokens_map.json")


@dataclass(frozen=True)
class _Part:
    """One encoder: its name, its folder in diffusers' layout, and by original file the hub repository that has it."""

    name: str
    folder: str
    originals: Mapping[str, str]
    beside: tuple[str, ...] = ()  # what the original file does not work without

    def candidates(self, root: Path) -> list[Path]:
        """Those of its places that exist."""
        folder = [root / self.folder] if (root / self.folder).is_dir() else []
        return folder + [root / file for file in self.originals if (root / file).is_file()]

    def wanted(self, root: Path) -> str:
        """What is missing, and the command that gets it."""
        ways = " or ".join(
            f"`hf download {repository} {' '.join((file, *self.beside))} --local-dir {root}`"
            for file, repository in self.originals.items()
        )
        files = " or ".join(self.originals)
        return f"the {self.name} ({files}, or {self.folder}/ of a diffusers repository; get it with {ways})"


_PARTS = {
    "vae": _Part("VAE", "vae", {"Wan2.1_VAE.pth": "Wan-AI/Wan2.1-T2V-1.3B", "Wan2.2_VAE.pth": "Wan-AI/Wan2.2-TI2V-5B"}),
    "text": _Part(
        "text encoder",
        "text_encoder",
        {"models_t5_umt5-xxl-enc-bf16.pth": "Wan-AI/Wan2.1-T2V-1.3B"},
        tuple((TOKENIZER_FOLDER / file).as_posix() for file in _TOKENIZER_FILES),
    ),
    "image": _Part(
        "image encoder",
        "image_encoder",
        {"models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "Wan-AI/Wan2.1-I2V-14B-480P"},
    ),
}


@dataclass(frozen=True)
class EncoderPaths:
    """A folder in the library's format or an original `.pth` file for each encoder; `image` None where not wanted."""

    vae: Path
    text: Path
    image: Path | None


def find_encoders(folder: str | Path, *, with_image: bool = True) -> EncoderPaths:
    """The encoders of an original Wan folder, of a diffusers pipeline folder, or of a mixture of both.

    Raises: CheckpointError that names every missing encoder and where to get it, or two that are in each other's way.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"the encoder folder {root} does not exist; give the folder of a Wan model")
    parts = {key: part for key, part in _PARTS.items() if with_image or key != "image"}
    found = {key: part.candidates(root) for key, part in parts.items()}
    if missing := [parts[key].wanted(root) for key, paths in found.items() if not paths]:
        raise CheckpointError(f"{root} lacks {'; '.join(missing)}")
    for key, paths in found.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise CheckpointError(f"{root} holds more than one {parts[key].name}, {names}; keep one of them there")
    return EncoderPaths(found["vae"][0], found["text"][0], found["image"][0] if with_image else None)
