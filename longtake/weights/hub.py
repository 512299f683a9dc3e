"""Weight sources as a user names them: a local path first, else a repository on the Hugging Face hub.

The network is used only for a name like `Wan-AI/Wan2.1-T2V-1.3B` that is no local path, and only for the files of the
transformer. Must know no tensor.
"""

from __future__ import annotations

import logging
from pathlib import Path

from longtake.errors import CheckpointError
from longtake.weights.file_kind import GGUF
from longtake.weights.locate import PICKLED, SAFETENSORS, is_hub_name, locate

logger = logging.getLogger(__name__)

# An asterisk of these patterns matches slashes too: they are anchored so that text encoder and VAE stay away.
_WEIGHTS = ("config.json", "diffusion_pytorch_model*.safetensors*", "transformer/*")
_FOLDERS = ("transformer", "transformer_2", "high_noise_model", "low_noise_model")


def local_path(source: str | Path) -> Path:
    """The local path that a source means; a repository on the hub is downloaded (or found in its cache) first.

    Args: `source`, a path, or OWNER/NAME, with a folder or a file of the repository behind it if it holds several
    transformers (`Wan-AI/Wan2.2-T2V-A14B/high_noise_model`, `gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt`).
    Raises: CheckpointError when there is nothing.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not is_hub_name(source):
        raise CheckpointError(
            f"{path} does not exist; give a folder or a file of weights, or OWNER/NAME of a repository on the Hugging "
            "Face hub"
        )
    owner, name, *rest = path.as_posix().split("/")
    if rest and rest[-1].lower().endswith(".gguf"):
        raise CheckpointError(f"{source} {GGUF}")
    logger.info("%s is no local path; asking the Hugging Face hub for %s/%s", source, owner, name)
    root = _download(f"{owner}/{name}", _patterns("/".join(rest)))
    if not rest:
        locate(root)  # before gigabytes of the wrong one of two transformers are fetched
        root = _download(f"{owner}/{name}", _WEIGHTS)
    found = root.joinpath(*rest)
    if not found.exists():
        raise CheckpointError(f"{'/'.join(rest)} is not in the repository {owner}/{name} of the Hugging Face hub")
    return found


def _patterns(part: str) -> tuple[str, ...]:
    """The files to ask for first: those of the part that was named, or the configurations of all transformers."""
    if part.lower().endswith((*SAFETENSORS, *PICKLED)):
        folder = part.rpartition("/")[0]
        return (part, f"{folder}/config.json" if folder else "config.json")
    if part:
        return (f"{part}/config.json", f"{part}/*.safetensors", f"{part}/*.safetensors.index.json")
    return ("config.json", *(f"{folder}/config.json" for folder in _FOLDERS))


def _download(repository: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # all errors of the hub and of the network are among these
        raise CheckpointError(
            f"{repository} is neither a local path nor could it be fetched from the Hugging Face hub: {error}"
        ) from error
