"""A session in one safetensors file: its tensors, and as metadata a JSON text with everything else.

What the file holds is what the next frames depend on: keys and values that will be read, kept latents, conditions, the
decoder's features, pictures, prompts, seed and position; and what they were made with (a key of each network's weights,
the rules), which must be the same where the session goes on; and a checksum of all of it, which is compared when it is
read. docs/formats.md lists the names.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longtake.data.encoded import checksum
from longtake.errors import CheckpointError, DataError
from longtake.inference.generator import Generator
from longtake.inference.session import Look, Session, Standing
from longtake.json_text import parse_json
from longtake.models.tensor_files import save_tensors
from longtake.rollout.recache import LatentHistory
from longtake.structs import Condition

VERSION = 1
METADATA = "longtake_session"
# Settings that say nothing about the frames that come
_FREE = ("fps", "num_latent_frames", "history_blocks")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_key(module: nn.Module) -> str:
    """A SHA-256 of names, types, shapes and the sum of bits of every row of a network's tensors, on any device.

    Not of every bit: a network of many gigabytes is read at the speed of its memory, and nothing of its size is copied.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
        rows = bits.reshape(bits.shape[0], -1) if bits.ndim > 1 else bits.reshape(-1, 1)
        digest.update(rows.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def made_with(generator: Generator) -> dict[str, Any]:
    """What a session's frames depend on beside the session: `weights`, a key a network, and `rules`."""
    encoders = generator.encoders
    networks = {"model": generator.model, "vae": encoders.vae.module, "text encoder": encoders.text.model}
    if encoders.image is not None:
        networks["image encoder"] = encoders.image.model
    settings = generator.settings.model_dump(mode="json")
    rules = {name: value for name, value in settings.items() if name not in _FREE}
    return {"weights": {name: weights_key(module) for name, module in networks.items()}, "rules": rules}


def save_session(session: Session, path: Path) -> None:
    """Writes `session` to `path`, whole or not at all. Raises: DataError when the file cannot be written."""
    from safetensors import SafetensorError

    tensors, values = _written(session)
    values |= {"version": VERSION, **made_with(session.generator)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        stored = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        values["checksum"] = checksum(json.loads(json.dumps(values)), stored)
        save_tensors(stored, partial, {METADATA: json.dumps(values)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the session cannot be written to {path} ({error}); name a file in a folder there is"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _written(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    standing = session.standing
    pictures: list[Tensor] = []

    def number(picture: Tensor | None) -> int | None:
        """A picture's place in `pictures`; the same one has the same."""
        if picture is None:
            return None
        if not any(other is picture for other in pictures):
            pictures.append(picture)
        return next(index for index, other in enumerate(pictures) if other is picture)

    looks = {
        name: {"prompt": look.prompt, "picture": number(look.picture), "target": number(look.target)}
        for name, look in (("look", standing.look), ("wanted", session.wanted))
    }
    tensors = {f"picture.{index}": picture for index, picture in enumerate(pictures)}
    values: dict[str, Any] = {
        **looks,
        "cut": session.cut,
        "seed": session.seed,
        "negative": session.negative,
        "max_latent_frames": session.max_latent_frames,
        "scene": standing.scene,
        "num_frames": standing.num_frames,
        "position": session.position,
        "caches": [],
        "decoder": None,
    }
    if standing.stream is None or standing.decoder is None:
        return tensors, values
    stream = standing.stream
    for name in ("text", "image", "frames"):
        if (part := getattr(stream.condition, name)) is not None:
            tensors[f"condition.{name}"] = part
    if stream.guidance is not None:
        tensors["unconditional.text"] = stream.guidance.condition.text
    tensors |= {f"kept.{start}": latents for start, latents in stream.kept.blocks()}
    values["pending"] = stream.pending is not None
    block = session.generator.plan.block_frames if stream.pending is None else stream.pending.shape[1]
    for index, cache in enumerate(stream.caches):
        frames = cache.attended_frames(block)
        tensors[f"cache.{index}.keys"], tensors[f"cache.{index}.values"] = cache.stored(frames)
        values["caches"].append({"position": cache.position, "frames": frames})
    features, values["decoder"] = standing.decoder.state()
    return tensors | {f"decoder.{slot}": kept for slot, kept in features.items()}, values


def load_session(generator: Generator, path: Path, history_blocks: int) -> Session:
    """The session in `path`. Raises: CheckpointError when it is none, or was made with other networks or rules."""
    values, tensors = _read(path)
    try:
        if values["version"] != VERSION:
            raise CheckpointError(f"{path} is a session of version {values['version']}; this version reads {VERSION}")
        if values.pop("checksum", None) not in (None, checksum(values, tensors)):  # files of earlier versions have none
            raise CheckpointError(f"{path} is damaged (another checksum); save the session again, or use another one")
        _compare(path, values, made_with(generator))
        tensors = {name: tensor.to(generator.device) for name, tensor in tensors.items()}
        return _restored(generator, values, tensors, history_blocks)
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
    networks = here["weights"].keys() | saved["weights"].keys()
    if others := sorted(name for name in networks if here["weights"].get(name) != saved["weights"].get(name)):
        raise CheckpointError(
            f"{path} was made with other weights of: {', '.join(others)}; make the generator from those that it was "
            "opened with, or open a new session"
        )
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


def _restored(generator: Generator, values: dict[str, Any], tensors: dict[str, Tensor], history_blocks: int) -> Session:
    pictures = [tensors[f"picture.{index}"] for index in range(sum(name.startswith("picture.") for name in tensors))]

    def look(name: str) -> Look:
        own, target = values[name]["picture"], values[name]["target"]
        return Look(values[name]["prompt"], pictures[own], None if target is None else pictures[target])

    session = Session(
        generator,
        look("look"),
        seed=values["seed"],
        negative=values["negative"],
        history_blocks=history_blocks,
        max_latent_frames=values["max_latent_frames"],
    )
    if values["decoder"] is not None:
        session.standing = _standing(session, values, tensors)
    session.wanted, session.cut = look("wanted"), values["cut"]
    return session


def _standing(session: Session, values: dict[str, Any], tensors: dict[str, Tensor]) -> Standing:
    text = tensors["condition.text"]
    condition = Condition(text, tensors.get("condition.image"), tensors.get("condition.frames"))
    unconditional = condition.with_text(tensors["unconditional.text"]) if "unconditional.text" in tensors else None
    blocks = sorted((int(start), latents) for start, latents in _part(tensors, "kept.").items())
    caches = session.new_caches()
    for index, (cache, saved) in enumerate(zip(caches, values["caches"], strict=True)):
        keys, kept = tensors[f"cache.{index}.keys"], tensors[f"cache.{index}.values"]
        cache.restore(saved["position"], saved["frames"], keys, kept)
    stream = session.new_stream(values["scene"], caches, condition, unconditional, None)
    stream.kept = LatentHistory(stream.plan)
    for start, latents in blocks:
        stream.kept.position = start
        stream.kept.append(latents)
    stream.pending = blocks[-1][1] if values["pending"] else None
    decoder = session.generator.new_decoder()
    decoder.restore(_part(tensors, "decoder."), values["decoder"])
    return Standing(session.wanted, stream, decoder, values["scene"], values["num_frames"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
