"""Where weights and encoders lie on disk, in every published layout and in our own, and where published ones come from.

The one place that knows names of files and folders. Reads no weights and must know no torch, so that a source can be
checked before anything is loaded.
Source: the file lists of Wan-AI/Wan2.1-T2V-1.3B, Wan-AI/Wan2.1-I2V-14B-480P, Wan-AI/Wan2.2-TI2V-5B, their
`-Diffusers` forms and alibaba-pai/Wan2.1-Fun-1.3B-InP on the Hugging Face hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longtake.errors import CheckpointError, ConfigError
from longtake.run_folder import MANIFEST, exported_weights, find_checkpoint
from longtake.weights.config_json import read_json
from longtake.weights.file_kind import is_pickled

PICKLED = (".pt", ".pth", ".bin", ".ckpt")  # suffixes of torch.save files; what a file is, its contents tell
SAFETENSORS = (".safetensors",)
INDEX = ".index.json"
TOKENIZER_FOLDER = Path("google") / "umt5-xxl"  # beside the original text encoder
# Two transformers of one model, under original and under diffusers' names
EXPERTS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
# Networks in a checkpoint, the average first
_NETWORKS = ("generator_ema", "generator_ema_lora", "generator", "generator_lora")
CLIP_TOKENS = 257  # ViT-H/14 at 224 pixels; specification C.2
ON_THE_HUB = "OWNER/NAME of a repository on the Hugging Face hub"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w.+-]+)*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "special_tokens_map.json")

# Published repositories: weights of a transformer together with its encoders
_IN_BOTH_LAYOUTS = ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-720P", "Wan2.2-TI2V-5B")
HUB_REPOSITORIES = (
    "alibaba-pai/Wan2.1-Fun-1.3B-InP",
    "Wan-AI/Wan2.1-FLF2V-14B-720P",
    "Wan-AI/Wan2.2-T2V-A14B",
    "Wan-AI/Wan2.2-I2V-A14B",
    *(f"Wan-AI/{name}{layout}" for name in _IN_BOTH_LAYOUTS for layout in ("", "-Diffusers")),
)


def hub_repository(path: str | Path) -> str | None:
    """The published repository that has the name of a folder, if there is one."""
    names = {repository.rpartition("/")[2].lower(): repository for repository in HUB_REPOSITORIES}
    return names.get(Path(path).name.lower())


def is_hub_name(source: str | Path) -> bool:
    """True for OWNER/NAME or OWNER/NAME/PART without a leading dot, unless the folder OWNER is there locally."""
    name = os.fspath(source)
    return bool(_HUB_NAME.fullmatch(name)) and not Path(name.split("/")[0]).exists()


def files_in(folder: Path, suffixes: tuple[str, ...] = SAFETENSORS) -> list[Path]:
    """The files of a folder with these suffixes in any case, sorted, without hidden ones as macOS adds (`._`)."""
    found = (path for path in folder.glob("*") if path.name.lower().endswith(suffixes) and path.is_file())
    return sorted(path for path in found if not path.name.startswith("."))


def file_beside(weights: Path, name: str) -> Path:
    """A file of that name in a folder of weights, or beside a file of them; it need not be there."""
    return (weights if weights.is_dir() else weights.parent) / name


def pickles_in(folder: Path) -> list[Path]:
    """The torch.save files of a folder that may hold a transformer: those that are no encoder's by their names."""
    encoders = {name for part in ENCODER_PARTS for name in part.originals}
    return [file for file in files_in(folder, PICKLED) if file.name not in encoders]


# ---- weights of a transformer ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WeightSource:
    """`path`, a file, folder or name of the hub that `load_dit` reads; `checkpoint` of a training run that it belongs
    to, whose rules the weights follow, None for weights of other origin.
    """

    path: Path
    checkpoint: Path | None = None


def find_weights(source: str | Path, logdir: str | Path | None = None) -> WeightSource:
    """The weights that a source means: the one answer of training, generation, evaluation and `longtake doctor`.

    Args: `source`, a file; a folder of safetensors or a pipeline; a checkpoint, stage folder or log folder of a
    training run (its newest student, the average where there is one); or OWNER/NAME on the Hugging Face hub, which is
    returned as it is. Below `logdir` is never a name of the hub.
    Raises: CheckpointError that says what was looked for.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in (*SAFETENSORS, *PICKLED):
            is_pickled(path)  # says what it is, unless it holds weights under another name
        return WeightSource(path, _checkpoint_of(path.parent))
    if path.is_dir():
        return _in_folder(path)
    if is_hub_name(source) and not (logdir is not None and path.is_relative_to(logdir)):
        return WeightSource(path)
    raise CheckpointError(f"{path} does not exist; give a folder or file of weights, a training run, or {ON_THE_HUB}")


def _in_folder(folder: Path) -> WeightSource:
    if (folder / MANIFEST).is_file():
        return WeightSource(exported_weights(folder), folder)
    place, places = locate(folder), ("transformer", *_NETWORKS)
    for found in (place, *(folder / name for name in _NETWORKS)):
        if files_in(found, (*SAFETENSORS, f".safetensors{INDEX}")):
            return WeightSource(found, _checkpoint_of(found))
    try:
        checkpoint = find_checkpoint(folder)
    except CheckpointError as error:
        if files_in(place, (*PICKLED, ".gguf", f".bin{INDEX}")):
            return WeightSource(place)  # reading says what they hold
        raise CheckpointError(
            f"{folder} holds no *.safetensors, nor do {', '.join(places)} in it, and as a training run: {error}"
        ) from error
    return WeightSource(exported_weights(checkpoint), checkpoint)


def _checkpoint_of(folder: Path) -> Path | None:
    """The checkpoint that a folder of exported weights lies in."""
    return folder.parent if (folder.parent / MANIFEST).is_file() else None


def locate(path: Path) -> Path:
    """The file or the folder in which the transformer of a local path lies. Raises: CheckpointError."""
    if not path.is_dir():
        return path
    if not files_in(path, (*SAFETENSORS, INDEX)):
        for first, second in EXPERTS:
            if (path / first).is_dir() and (path / second).is_dir():
                raise CheckpointError(f"{path} holds two transformers; give {path / first} or {path / second}")
        if (path / "transformer").is_dir():
            return path / "transformer"
    return path


# ---- encoders --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EncoderPart:
    """One encoder: its `folder` in diffusers' layout; `originals`, its files in the original layout (any one of them)
    with the repository that has it; `beside`, what else of that repository it needs; `prefix` of the tensors that are
    used (the published CLIP file also holds a text tower).
    """

    key: str
    name: str
    folder: str
    originals: Mapping[str, str]
    beside: tuple[str, ...] = ()
    prefix: str = ""

    def places(self, root: Path) -> list[Path]:
        """Where it lies: a folder in the library's layout, original files."""
        folder = [root / self.folder] if files_in(root / self.folder) else []
        return folder + [root / file for file in self.originals if (root / file).is_file()]

    def wanted(self, root: Path) -> str:
        """What is missing, and the command that gets it."""
        fetched = [" ".join((repository, file, *self.beside)) for file, repository in self.originals.items()]
        ways = " or ".join(f"`hf download {files} --local-dir {root}`" for files in fetched)
        files = " or ".join(self.originals)
        return f"the {self.name} ({files}, or {self.folder}/ of a diffusers repository; get it with {ways})"


_TOKENIZER = tuple((TOKENIZER_FOLDER / file).as_posix() for file in _TOKENIZER_FILES)
_VAES = {"Wan2.1_VAE.pth": "Wan-AI/Wan2.1-T2V-1.3B", "Wan2.2_VAE.pth": "Wan-AI/Wan2.2-TI2V-5B"}
_T5 = {"models_t5_umt5-xxl-enc-bf16.pth": "Wan-AI/Wan2.1-T2V-1.3B"}
_CLIP = {"models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "Wan-AI/Wan2.1-I2V-14B-480P"}
ENCODER_PARTS = (
    EncoderPart("vae", "VAE", "vae", _VAES),
    EncoderPart("text", "text encoder", "text_encoder", _T5, beside=_TOKENIZER),
    EncoderPart("image", "image encoder", "image_encoder", _CLIP, prefix="visual."),
)


@dataclass(frozen=True)
class EncoderPaths:
    """A folder in the library's format or an original `.pth` file for each encoder; `image` None where not wanted."""

    vae: Path
    text: Path
    image: Path | None


def find_encoders(model: str | Path) -> Path:
    """The folder of the encoders that belong to weights: in their folder, in its `encoders/`, or beside it.

    Raises: CheckpointError listing where it looked.
    """
    path = Path(model).expanduser()
    root = path if path.is_dir() else path.parent
    places = [root, root / "encoders", root.parent, root.parent / "encoders"]
    if found := next((place for place in places if ENCODER_PARTS[0].places(place)), None):
        return found
    looked, original = ", ".join(map(str, places)), next(iter(_VAES))
    wanted = f"vae/, text_encoder/ and image_encoder/, or {original} and the files published with it"
    raise CheckpointError(
        f"no encoders were found in {looked} ({wanted}); name their folder, or a repository of the Hugging Face hub "
        "that has them, with --encoders"
    )


@dataclass(frozen=True)
class DecoderFile:
    """A file with what decodes in the VAE's place, and the published `name` that it has."""

    path: Path
    name: str

    @property
    def is_super(self) -> bool:
        """Whether it is TAEHV's wider kind."""
        return self.name.endswith("_super")

    @property
    def reads_denormalised(self) -> bool:
        """Whether it reads latents as the VAE has them (LightTAE)."""
        return self.name.startswith("lighttae")


_TAEHV, _LIGHT = "github.com/madebyollin/taehv", "lightx2v/Autoencoders on the Hugging Face hub"
# Published names without their suffixes, by kind and channels of the latents, and where they are
_DECODERS = {
    ("tiny", 16): {"taew2_1": _TAEHV, "lighttaew2_1": _LIGHT},
    ("tiny", 48): {"taew2_2_super": _TAEHV, "taew2_2": _TAEHV, "lighttaew2_2": _LIGHT},
    ("light", 16): {"lightvaew2_1": _LIGHT},
}


def find_decoder(kind: str, weights: str | Path | None, folder: Path, latent_channels: int) -> DecoderFile:
    """The file of a decoder of a kind (`tiny`, `light`) for latents of so many channels.

    Args: `weights`, its path; None: the one in the encoders' folder that has a published name. A name may go on behind
    the published one (`taew2_1-fp16.safetensors`).
    Raises: ConfigError where no such decoder is published; CheckpointError when there is no file, or more than one.
    """
    known = _DECODERS.get((kind, latent_channels))
    if known is None:
        raise ConfigError(
            f"decoder={kind} is not published for {latent_channels} latent channels; use decoder=exact, or leave it out"
        )
    suffixes = " or ".join((*SAFETENSORS, ".pth"))
    where = "; ".join(f"{name} is in {place}" for name, place in known.items())
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise CheckpointError(f"decoder_weights={weights} does not exist; give the file of {' or '.join(known)}")
        name = _decoder_name(path, known)
        if name is None:
            raise CheckpointError(
                f"decoder_weights={weights}: the name says what the file is, which keys do not, and must begin with "
                f"{' or '.join(known)} for decoder={kind} and {latent_channels} latent channels; rename it"
            )
        return DecoderFile(path, name)
    files = files_in(folder, (*SAFETENSORS, *PICKLED))
    found = [DecoderFile(file, name) for file in files if (name := _decoder_name(file, known)) is not None]
    if not found:
        raise CheckpointError(
            f"decoder={kind} needs {' or '.join(known)} ({suffixes}) in {folder}, or decoder_weights=FILE ({where})"
        )
    if len(found) > 1:
        names = " and ".join(file.path.name for file in found)
        raise CheckpointError(f"{folder} holds {names}; say which one decodes with decoder_weights=FILE")
    return found[0]


def _decoder_name(file: Path, known: Mapping[str, str]) -> str | None:
    """The published name that a file has; the longest, of which another may be a part."""
    return next((name for name in sorted(known, key=len, reverse=True) if file.name.startswith(name)), None)


def encoder_paths(folder: str | Path, *, with_image: bool = True) -> EncoderPaths:
    """The encoders of an original Wan folder, of a diffusers pipeline folder, or of a mixture of both.

    Raises: CheckpointError that names every missing encoder and where to get it, or two that are in each other's way.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"the encoder folder {root} does not exist; give the folder of a Wan model")
    if missing := [part.wanted(root) for part in _parts(with_image) if not part.places(root)]:
        raise CheckpointError(f"{root} lacks {'; '.join(missing)}")
    found: dict[str, Path] = {}
    for part in _parts(with_image):
        found[part.key], *others = places = part.places(root)
        if others:
            names = " and ".join(place.name for place in places)
            raise CheckpointError(f"{root} holds more than one {part.name}, {names}; keep one of them there")
    return EncoderPaths(found["vae"], found["text"], found.get("image"))


def tokenizer_places(text_encoder: Path) -> tuple[Path, Path]:
    """Folders in which the tokenizer of a text encoder (a folder or an original file) may lie."""
    original = text_encoder.suffix in PICKLED
    return (text_encoder.parent / TOKENIZER_FOLDER if original else text_encoder), text_encoder.parent / "tokenizer"


def encoder_files(folder: Path, part: EncoderPart) -> list[Path]:
    """The weight files of one encoder in `folder`, in either layout; empty when there is none."""
    places = part.places(folder)[:1]
    return [file for place in places for file in (files_in(place) if place.is_dir() else [place])]


def encoder_sizes(folder: Path, *, with_image: bool) -> dict[str, int]:
    """Bytes of the weight files of each encoder in `folder`, by its name."""
    return {part.name: sum(f.stat().st_size for f in encoder_files(folder, part)) for part in _parts(with_image)}


def image_token_count(folder: Path) -> int:
    """Tokens of the image encoder in `folder`; where its config.json is not there, those of the published one."""
    file = folder / "image_encoder" / "config.json"
    if not file.is_file():
        return CLIP_TOKENS
    data = read_json(file)
    try:
        return (data["image_size"] // data["patch_size"]) ** 2 + 1
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file} has no usable image_size and patch_size ({error!r})") from error


def _parts(with_image: bool) -> list[EncoderPart]:
    return [part for part in ENCODER_PARTS if with_image or part.key != "image"]
