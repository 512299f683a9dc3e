"""Repositories on the Hugging Face hub: what they hold and how large it is, and getting what is needed of them.

The one place that asks a network. That a repository and its files exist is known, and said, before anything is
fetched; where no network is, what lies in the hub's cache is taken. Must know no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from longtake.config.base import read_yaml
from longtake.config.generation import RULES_FILE
from longtake.config.stage import TOY_ASSETS
from longtake.errors import CheckpointError, nearest
from longtake.json_text import parse_json
from longtake.outputs import free_disk
from longtake.progress import Progress, as_size
from longtake.weights.config_json import FILE, config_from_json, read_json
from longtake.weights.file_kind import GGUF
from longtake.weights.locate import (
    ENCODER_PARTS,
    EXPERTS,
    HUB_REPOSITORIES,
    INDEX,
    ON_THE_HUB,
    PICKLED,
    SAFETENSORS,
    EncoderPart,
    file_beside,
    files_in,
    is_hub_name,
    locate,
)

logger = logging.getLogger(__name__)

TABLE = TOY_ASSETS.parent / "students.yaml"  # of published students
_TIMEOUT = 5  # seconds for a list of files
_SMALL = (FILE, RULES_FILE)  # beside weights: their sizes and their rules
_IMAGE_BRANCH = "img_emb."  # in the names of tensors that read CLIP's tokens
_WEIGHTS = (*SAFETENSORS, f".safetensors{INDEX}")


@dataclass(frozen=True)
class Repository:
    """A repository and the bytes of each of its files.

    `cache`: its folder in the hub's cache, whose files these are, where the hub could not be asked.
    """

    name: str
    sizes: Mapping[str, int]
    cache: Path | None = None

    def below(self, folder: str, suffixes: Sequence[str] = ()) -> list[str]:
        """The files of a folder itself ("" is the root), those with one of the suffixes."""
        there = (file for file in self.sizes if file.rpartition("/")[0] == folder)
        return sorted(file for file in there if file.lower().endswith(tuple(suffixes) or ""))

    def present(self, files: Sequence[str]) -> list[str]:
        """Those of the files that it has."""
        return [file for file in files if file in self.sizes]


@dataclass(frozen=True)
class Order:
    """Files of a repository that are wanted, by what they are ("transformer", "VAE", ...), and the `part` of it that is
    asked for.
    """

    repository: Repository
    files: Mapping[str, Sequence[str]]
    part: str = ""

    def __str__(self) -> str:
        sizes = {what: sum(self.repository.sizes[file] for file in held) for what, held in self.files.items()}
        listed = ", ".join(f"{what} {as_size(size)}" for what, size in sizes.items())
        return f"{self.repository.name}: {listed}"

    @property
    def all_files(self) -> list[str]:
        """The files, each once."""
        return list(dict.fromkeys(file for held in self.files.values() for file in held))

    @property
    def size_bytes(self) -> int:
        """How large all are together."""
        return sum(self.repository.sizes[file] for file in self.all_files)


def joined(orders: Sequence[Order]) -> list[Order]:
    """The orders, with those of one repository as one."""
    found: dict[str, Order] = {}
    for order in orders:
        before = found.setdefault(order.repository.name, order)
        found[order.repository.name] = replace(before, files={**before.files, **order.files})
    return list(found.values())


# ---- what there is ---------------------------------------------------------------------------------------------------
def look_up(name: str) -> Repository:
    """The repository of that name (OWNER/NAME), nothing of it fetched.

    Raises: CheckpointError when there is none, or when neither the hub nor its cache here knows it.
    """
    from huggingface_hub import errors, model_info, snapshot_download

    try:
        found = model_info(name, files_metadata=True, timeout=_TIMEOUT)
        return Repository(name, {file.rfilename: file.size or 0 for file in found.siblings or ()})
    except errors.RepositoryNotFoundError as error:
        raise _no_repository(name) from error
    except (OSError, ValueError, errors.HTTPError) as error:  # without a network, or the hub fails
        reason = " ".join(str(error).split()[:20])
        try:
            cache = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError) as missing:
            raise _unreachable(name, reason) from missing
    logger.info("The Hugging Face hub cannot be asked (%s): taking %s as it lies in its cache", reason, name)
    files = (path for path in cache.rglob("*") if path.is_file())
    return Repository(name, {path.relative_to(cache).as_posix(): path.stat().st_size for path in files}, cache)


def _no_repository(name: str) -> CheckpointError:
    table = read_yaml(TABLE)
    rows = (row for kind in ("students", "refused") for row in table[kind])
    near = nearest(name, [*HUB_REPOSITORIES, *(row["repository"] for row in rows if "repository" in row)])
    return CheckpointError(
        f"{name} is neither a local path nor a repository of the Hugging Face hub{near or ';'} A private or gated one "
        "needs `hf auth login`; `longtake students` lists published students"
    )


def _unreachable(name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is no local path, and the Hugging Face hub cannot be asked for it here ({reason}), nor is it in the "
        f"hub's cache. Where there is a network, run `longtake download {name} -o FOLDER`, copy FOLDER here and give "
        "its path"
    )


def order_weights(source: str | Path) -> Order:
    """The files of a transformer on the hub: of OWNER/NAME, or of a folder or file of it that stands behind the name.

    Raises: CheckpointError that says what is there instead, before anything is fetched.
    """
    owner, name, *rest = Path(source).as_posix().split("/")
    part = "/".join(rest)
    if part.lower().endswith(".gguf"):
        raise CheckpointError(f"{source} {GGUF}")
    repository = look_up(f"{owner}/{name}")
    part = part or _only_transformer(repository)
    is_file = part.lower().endswith((*SAFETENSORS, *PICKLED))
    files = repository.present([part]) if is_file else _weights_in(repository, part)
    if not files:
        known = (*SAFETENSORS, *PICKLED)
        held = sorted(file for file in repository.sizes if file.lower().endswith(known))
        what = f"{part} is not in" if part else "no transformer lies where one is looked for in"
        listed = f"{', '.join(held[:12])}{', ...' if len(held) > 12 else ''}" if held else "nothing of the kind"
        where = f"the repository {repository.name} of the Hugging Face hub"
        raise CheckpointError(f"{what} {where}; of weights it holds {listed}; give {repository.name}/FILE")
    folder = part.rpartition("/")[0] if is_file else part
    small = repository.present([f"{folder}/{file}" if folder else file for file in _SMALL])
    return Order(repository, {"transformer": [*files, *small]}, part)


def _only_transformer(repository: Repository) -> str:
    """The folder of the one transformer. Raises: CheckpointError where there are two."""
    if repository.below("", _WEIGHTS):
        return ""
    for first, second in EXPERTS:
        if all(repository.below(folder, _WEIGHTS) for folder in (first, second)):
            both = f"{repository.name}/{first} or {repository.name}/{second}"
            raise CheckpointError(f"{repository.name} holds two transformers; give {both}")
    return "transformer" if repository.below("transformer", _WEIGHTS) else ""


def _weights_in(repository: Repository, folder: str) -> list[str]:
    """The weights of a folder; at the root those that are named as Wan's, where there are such."""
    files = repository.below(folder, _WEIGHTS)
    named = [file for file in files if file.startswith("diffusion_pytorch_model")]
    return files if folder or not named else named


def order_encoders(repository: Repository, *, with_image: bool = True) -> Order:
    """The files of the encoders that a repository has, tokenizer included: in the original layout or in diffusers'."""
    parts = [part for part in ENCODER_PARTS if with_image or part.key != "image"]
    found = {part.name: files for part in parts if (files := _encoder(repository, part))}
    return Order(repository, found)


def _encoder(repository: Repository, part: EncoderPart) -> list[str]:
    if originals := repository.present(list(part.originals)):
        return originals[:1] + repository.present(part.beside)
    if not repository.below(part.folder, SAFETENSORS):
        return []
    tokenizer = repository.below("tokenizer") if part.key == "text" else []
    return [*repository.below(part.folder, (*_WEIGHTS, ".json", ".model")), *tokenizer]


def lacks_encoders(order: Order, *, with_image: bool) -> list[str]:
    """Names of the encoders that an order of `order_encoders` lacks."""
    wanted = (part.name for part in ENCODER_PARTS if with_image or part.key != "image")
    return [name for name in wanted if name not in order.files]


# ---- getting it ------------------------------------------------------------------------------------------------------
def fetch(orders: Sequence[Order], folder: Path | None = None) -> list[Path]:
    """The local folder of each order's repository, after all its files were fetched (or found in the hub's cache).

    Says before what is fetched and how large it is. Args: `folder` to put the files into, in place of the cache.
    Raises: CheckpointError when the disk has too little room, or fetching fails.
    """
    wanted = [_absent(order, folder) for order in orders]
    _check_room(sum(wanted), folder)
    there = "In the hub's cache:" if folder is None else f"In {folder}:"
    for order, size in zip(orders, wanted):
        logger.info("%s %s (%s)", "Fetching" if size else there, order, as_size(order.size_bytes))
    return [_fetched(order, folder, size) for order, size in zip(orders, wanted)]


def _absent(order: Order, folder: Path | None) -> int:
    """Bytes of the files that are not in the cache, or not whole in a folder."""
    from huggingface_hub import try_to_load_from_cache

    name, sizes = order.repository.name, order.repository.sizes

    def is_there(file: str) -> bool:
        if folder is not None:
            return (folder / file).is_file() and (folder / file).stat().st_size == sizes[file]
        return order.repository.cache is not None or isinstance(try_to_load_from_cache(name, file), str)

    return sum(sizes[file] for file in order.all_files if not is_there(file))


def _check_room(size_bytes: int, folder: Path | None) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE if folder is None else folder).absolute()
    if size_bytes > (free := free_disk(place)):
        raise CheckpointError(
            f"{as_size(size_bytes)} are to be fetched to {place}, and its disk has {as_size(free)} left; make room, or "
            "name another place (the variable HF_HOME; `longtake download NAME -o FOLDER`)"
        )


def _fetched(order: Order, folder: Path | None, size_bytes: int) -> Path:
    """The local folder of its files; so many bytes are not there yet."""
    from huggingface_hub import errors, snapshot_download

    repository = order.repository
    if repository.cache is not None and folder is None:
        return repository.cache
    progress, stopped = Progress(f"fetching {repository.name}", size_bytes, "bytes"), Event()
    how: dict[str, Any] = {"allow_patterns": order.all_files, "local_dir": folder}
    library: Any = snapshot_download
    try:
        # Beside: the library's threads would fetch all that they began before Ctrl-C is heard.
        with ThreadPoolExecutor(1) as beside:
            try:
                bars = _bars(progress, stopped)
                return Path(beside.submit(library, repository.name, tqdm_class=bars, **how).result())
            except KeyboardInterrupt:
                stopped.set()
                raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository.name} is gated; accept its terms at https://huggingface.co/{repository.name}, then `hf auth "
            "login`"
        ) from error
    except (OSError, ValueError, errors.HTTPError) as error:
        raise CheckpointError(
            f"{repository.name} could not be fetched from the Hugging Face hub: {error}; run the command again, and it "
            "goes on with what is there"
        ) from error
    finally:
        progress.finish()


class _StoppedError(Exception):
    """Ends a thread that fetches."""


def _bars(progress: Progress, stopped: Event) -> type[Any]:
    """The class of the bars that the hub's library makes, of which one or two count bytes: nothing of them is shown,
    `progress` is. Once it is `stopped`, threads that tell what they have fetched end.
    """
    from tqdm import tqdm

    class Told(tqdm):  # type: ignore[type-arg]
        def __init__(self, *words: Any, **named: Any) -> None:
            super().__init__(*words, **{**named, "disable": True})
            self.counts_bytes = named.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            if stopped.is_set():
                raise _StoppedError
            self.n += n or 0
            if self.counts_bytes and self.n > progress.done:
                progress.update(int(self.n))

    return Told


def fetch_small(order: Order) -> Path:
    """The local folder in which `config.json` and `generation.yaml` of the weights lie, those alone fetched."""
    small = [file for file in order.all_files if file.rpartition("/")[2] in _SMALL]
    smaller = Order(order.repository, {"transformer": small})
    root = _fetched(smaller, None, smaller.size_bytes) if small else Path()
    first = order.files["transformer"][0]
    return root / (small[0] if small else first).rpartition("/")[0]


def local_path(source: str | Path) -> Path:
    """The local path that a source means; the weights of a repository on the hub are fetched first.

    Args: `source`, a path, or OWNER/NAME, with a folder or a file of the repository behind it if it holds several
    transformers (`Wan-AI/Wan2.2-T2V-A14B/high_noise_model`, `gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt`).
    Raises: CheckpointError when there is nothing.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not is_hub_name(source):
        raise CheckpointError(f"{path} does not exist; give a folder or a file of weights, or {ON_THE_HUB}")
    order = order_weights(source)
    return fetch([order])[0] / order.part


def local_encoders(folder: Path, *, with_image: bool = True) -> Path:
    """The local folder of encoders; those of a repository on the hub (OWNER/NAME) are fetched, or in its cache.

    Raises: CheckpointError.
    """
    if folder.exists() or not is_hub_name(folder):
        return folder
    return fetch([encoders_of(folder, with_image=with_image)])[0]


def encoders_of(name: str | Path, *, with_image: bool) -> Order:
    """The encoders of a repository. Raises: CheckpointError when it lacks VAE or text encoder."""
    order = order_encoders(look_up(Path(name).as_posix()), with_image=with_image)
    if lacking := [what for what in lacks_encoders(order, with_image=with_image) if what != "image encoder"]:
        raise no_encoders(order.repository.name, lacking)
    return order


def no_encoders(name: str, lacking: Sequence[str]) -> CheckpointError:
    """The error about a repository without its encoders."""
    return CheckpointError(
        f"{name} on the Hugging Face hub has no {' and no '.join(lacking)}; name the folder of the model's encoders, "
        "or a repository that has them: --encoders Wan-AI/Wan2.1-I2V-14B-480P (for text alone Wan-AI/Wan2.1-T2V-1.3B)"
    )


def needs_image(weights: Path) -> bool:
    """Whether weights may need an image encoder by the `config.json` beside them; they may where there is none."""
    file = file_beside(locate(weights), FILE)
    return config_from_json(read_json(file), file).image_dim is not None if file.is_file() else True


def surely_needs_image(weights: Path, order: Order | None = None) -> bool:
    """Whether weights need one for certain. Wan's own `config.json` does not tell: it says i2v of Wan2.2's, too, which
    need none; the names of their tensors do.

    Args: `weights` with what is small beside them; `order`, that of the tensors where they are on the hub.
    """
    place = locate(weights)
    file = file_beside(place, FILE)
    if not file.is_file() or not needs_image(place):
        return False
    if "image_dim" in read_json(file):  # as diffusers and Longtake write it
        return True
    names = _names_here(place) if order is None else _names_there(order)
    return any(_IMAGE_BRANCH in name for name in names)


def _names_here(place: Path) -> list[str]:
    """Names of the tensors of safetensors files, from their heads."""
    files = files_in(place) if place.is_dir() else [place] if place.suffix.lower() in SAFETENSORS else []
    names: list[str] = []
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = file.read(size) if size <= path.stat().st_size else b""
        with suppress(ValueError):  # reading the weights says what is wrong with them
            names += parse_json(head)
    return names


def _names_there(order: Order) -> list[str]:
    """The same of files that are not fetched: from their index, or from the head of the first one."""
    from huggingface_hub import errors, parse_safetensors_file_metadata

    repository, files = order.repository, order.files["transformer"]
    if repository.cache is not None:
        return _names_here(repository.cache / order.part)
    if indices := [file for file in files if file.endswith(f".safetensors{INDEX}")]:
        only = Order(repository, {"transformer": indices})
        index = read_json(_fetched(only, None, only.size_bytes) / indices[0])
        return list(index.get("weight_map", ()))
    heads = [file for file in files if file.lower().endswith(SAFETENSORS)][:1]
    with suppress(OSError, ValueError, errors.HTTPError):  # fetching says what is wrong
        return [name for file in heads for name in parse_safetensors_file_metadata(repository.name, file).tensors]
    return []


def check_image_encoder(beside: Order) -> None:
    """Raises CheckpointError when a repository lacks the image encoder, which the weights need."""
    if "image encoder" in lacks_encoders(beside, with_image=True):
        raise no_encoders(beside.repository.name, ["image encoder"])
