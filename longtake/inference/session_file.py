"""A session in one safetensors file: its tensors, and as metadata a JSON text with everything else.

What the file holds is what the next frames depend on: keys and values that will be read, kept latents, conditions, the
latents that the decoder's state is made of, pictures, prompts, seed and position; and what they were made with (a key
of each network's weights, the rules), which must be the same where the session goes on; and a checksum of all of it,
which is compared when it is read. docs/formats.md lists the names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.data.encoded import checksum
from longtake.errors import CheckpointError
from longtake.inference.pipeline import Pipeline
from longtake.json_text import parse_json
from longtake.weights.tensor_files import save_tensors

VERSION = 3
METADATA = "longtake_session"
# Settings that say nothing about the frames that come
_FREE = ("fps", "num_latent_frames", "history_blocks", "decoder_weights", "low_memory", "encoders")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_key(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names, types, shapes and the sum of bits of every row of a network's tensors, on any device.

    Not of every bit: a network of many gigabytes is read at the speed of its memory, and nothing of its size is copied.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
        rows = bits.reshape(bits.shape[0], -1) if bits.ndim > 1 else bits.reshape(-1, 1)
        digest.update(rows.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def made_with(pipeline: Pipeline) -> dict[str, Any]:
    """What a session's frames depend on beside the session: `weights`, a key a network, and `rules`."""
    encoders = pipeline.encoders
    networks = {"model": pipeline.model.state_dict(), "vae": encoders.vae.tensors()}
    networks["text encoder"] = encoders.text.model.state_dict()
    if encoders.image is not None:
        networks["image encoder"] = encoders.image.model.state_dict()
    if pipeline.decoder is not None and pipeline.settings.decoder != "exact":
        networks["decoder"] = pipeline.decoder.tensors()
    settings = pipeline.settings.model_dump(mode="json")
    rules = {name: value for name, value in settings.items() if name not in _FREE}
    return {"weights": {name: weights_key(tensors) for name, tensors in networks.items()}, "rules": rules}


def write_session(path: Path, values: dict[str, Any], tensors: dict[str, Tensor], pipeline: Pipeline) -> None:
    """Writes what a session of `pipeline` consists of to `path`, whole or not at all.

    Raises: OutputError when the file cannot be written.
    """
    values |= {"version": VERSION, **made_with(pipeline)}
    stored = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    values["checksum"] = checksum(json.loads(json.dumps(values)), stored)
    save_tensors(stored, path, {METADATA: json.dumps(values)}, synced=True)


def read_session(path: Path, pipeline: Pipeline) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_session` was given, on the device of `pipeline`.

    Raises: CheckpointError when the file is no session, or one that was made with other networks or rules.
    """
    values, tensors = _read(path)
    with damage(path):
        if values["version"] != VERSION:
            raise CheckpointError(
                f"{path} is a session of version {values['version']} and this version reads {VERSION}; go on with the "
                "version of Longtake that saved it, or open a new session"
            )
        if values.pop("checksum", None) not in (None, checksum(values, tensors)):  # files of earlier versions have none
            raise CheckpointError(f"{path} is damaged (another checksum); save the session again, or use another one")
        _compare(path, values, made_with(pipeline))
    return values, {name: tensor.to(pipeline.device) for name, tensor in tensors.items()}


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """What does not fit inside is an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); use another one") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
            if text is None:
                raise CheckpointError(f"{path} holds no session; give a file that Session.save wrote")
            return parse_json(text), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a session ({error}); use another file") from error


def _compare(path: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    names = sorted(here["rules"].keys() | saved["rules"].keys())
    differences = [
        f"{name}: saved {saved['rules'].get(name)}, here {here['rules'].get(name)}"
        for name in names
        if saved["rules"].get(name) != here["rules"].get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{path} was made by other rules ({'; '.join(differences)}); make the generator with them"
        )
    networks = here["weights"].keys() | saved["weights"].keys()
    if others := sorted(name for name in networks if here["weights"].get(name) != saved["weights"].get(name)):
        raise CheckpointError(
            f"{path} was made with other weights of: {', '.join(others)}; make the generator from those that it was "
            "opened with, or open a new session"
        )
