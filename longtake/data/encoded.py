"""An encoded set on disk: what the encoders made of a data set, so that training needs none of them.

A folder with `index.json`, `empty_text.safetensors` and `shard_00000.safetensors`, ...; `docs/formats.md` lists keys
and shapes. A shard holds a fixed number of rows of the data set, less the bad ones, and appears whole or not at all;
the index says at the end that the set is complete. Its `key` says what the numbers depend on. Each row, the text and
the index have a checksum that is compared when they are read. This file must know no encoder and no configuration.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtake.data.rows import AS_STORED, Format, PictureSpec, ShardEnds
from longtake.data.samples import Sample
from longtake.errors import DataError
from longtake.json_text import parse_json

FORMAT, VERSION = "longtake_encoded", 1
INDEX, EMPTY_TEXT = "index.json", "empty_text.safetensors"
PARTIAL = ".*.partial"  # what a writer that was killed leaves
_CHECKSUM = "checksum"  # not in sets of earlier versions
_ROWS = "rows"  # the one entry of a shard's metadata: safetensors orders several at random


@dataclass(frozen=True)
class EncodedSample:
    """What a shard stores of one row.

    Fields: `row` of the data set it was made from; `texts`, one [m, D] for each of `prompts`, without rows past the
    prompt; `arrays`, any of `clip` [L, D], `y` [F, C, H, W] (condition latents up to the steady index, without mask),
    `first` [1, C, H, W] (the latent of the picture, for models without y) and `latents` [F, C, H, W]; `bucket`, the
    index of its size among the key's buckets; `switch_frames` as in `Sample`.
    """

    row: int
    name: str
    prompts: tuple[str, ...]
    texts: Sequence[Tensor]
    arrays: Mapping[str, Tensor]
    bucket: int = 0
    switch_frames: tuple[int, ...] = ()


def checksum(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A CRC-32 of CPU tensors with their names, types and shapes, and of values of JSON; about 1 GB a second."""
    crc = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), crc)  # type: ignore[arg-type]
    return f"{crc:08x}"


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard_{number:05d}.safetensors"


def read_index(path: Path) -> dict[str, Any]:
    """The index of an encoded set. Raises: DataError when it is missing, no JSON object, or not as it was written."""
    if path.is_dir() and not (path / INDEX).exists():
        raise DataError(
            f"{path} is no encoded set, it has no {INDEX}; write one with `longtake encode`, or set data.kind to what "
            "it is"
        )
    try:
        index = parse_json((path / INDEX).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path / INDEX} cannot be read ({error}); write the set with `longtake encode`") from error
    if not isinstance(index, dict):
        raise DataError(f"{path / INDEX} is no JSON object; write the set again with `longtake encode`")
    if index.pop(_CHECKSUM, None) not in (None, checksum(index, {})) and index.get("version") == VERSION:
        raise _damaged(path / INDEX, "")
    return index


def write_index(path: Path, index: Mapping[str, Any]) -> None:
    """Replaces the index in one step."""
    text = json.dumps({**index, _CHECKSUM: checksum(index, {})}, indent=1, ensure_ascii=False) + "\n"
    _publish(path / INDEX, text.encode())


def write_empty_text(path: Path, text: Tensor) -> None:
    """Writes the embedding [m, D] of the empty prompt."""
    _publish(path / EMPTY_TEXT, _bytes({"text": text}, {_CHECKSUM: checksum({}, {"text": text.cpu()})}))


def write_shard(file: Path, samples: Sequence[EncodedSample], bad: Sequence[Mapping[str, Any]]) -> None:
    """Writes a shard in one step; the same arguments give the same bytes.

    Args: `bad` holds `row` and `problem` of each row that the shard leaves out.
    """
    tensors: dict[str, Tensor] = {}
    rows = []
    for place, sample in enumerate(samples):
        own = {_text_key(k): text.cpu() for k, text in enumerate(sample.texts)}
        own |= {name: array.cpu() for name, array in sample.arrays.items()}
        tensors |= {f"{place:06d}.{name}": tensor for name, tensor in own.items()}
        about = {"row": sample.row, "name": sample.name, "prompts": list(sample.prompts), "bucket": sample.bucket}
        if sample.switch_frames:
            about["switch_frames"] = list(sample.switch_frames)
        rows.append(about | {_CHECKSUM: checksum(about, own)})
    _publish(file, _bytes(tensors, {_ROWS: json.dumps({"rows": rows, "bad": list(bad)}, ensure_ascii=False)}))


def read_shard_rows(file: Path) -> dict[str, Any]:
    """`rows` and `bad` of a shard, from its head. Raises: DataError when it is no whole shard."""
    with _opened(file) as shard:
        return parse_json(shard.metadata()[_ROWS])


class EncodedRows(Format):
    """The rows of a complete encoded set, as a data set whose samples have encodings and no pictures.

    Encodings come as float32 (bfloat16 and float16 widen exactly); text is padded with zero rows to `key["text_len"]`.
    A row's further prompts are `text_1`, `text_2`, ...
    Raises: DataError when the set is incomplete, of another version, or a shard is missing or of another size.
    """

    LAYOUT = "what `longtake encode` wrote: index.json and shard_*.safetensors"

    def __init__(self, path: Path, spec: PictureSpec = AS_STORED) -> None:
        super().__init__(path, spec)
        index = _complete_index(path)
        self.key: dict[str, Any] = index["key"]
        self.files: dict[str, Any] = index["files"]
        made_from = index.get("request", {}).get("rows")
        self.made_from: str | None = None if index.get("bad_rows") else made_from
        self._shards = index["shards"]
        for shard in self._shards:
            file = path / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["size_bytes"]:
                raise DataError(
                    f"{file} is missing or not of {shard['size_bytes']} bytes; remove it and run the same "
                    "`longtake encode` command, which writes it again"
                )
        self._ends = ShardEnds(shard["num_rows"] for shard in self._shards)
        if not len(self):
            raise DataError(f"{path} has no rows")

    @classmethod
    def lies_at(cls, path: Path) -> bool:
        """Whether a folder is an encoded set, complete or not, damaged or not."""
        return (path / INDEX).is_file() and ((path / EMPTY_TEXT).is_file() or any(path.glob("shard_*.safetensors")))

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def empty_text(self) -> NDArray[np.float32]:
        """The embedding of the empty prompt, [text_len, D]."""
        with _opened(self.path / EMPTY_TEXT) as file:
            text = file.get_tensor("text")
            if (file.metadata() or {}).get(_CHECKSUM) not in (None, checksum({}, {"text": text})):
                raise _damaged(self.path / EMPTY_TEXT, "")
            return self._padded(text)

    def __getitem__(self, row: int) -> Sample:
        number, local = self._ends.place(row)
        file = self.path / self._shards[number]["file"]
        with _opened(file) as stored:
            about = parse_json(stored.metadata()[_ROWS])["rows"][local]
            names = [_text_key(k) for k in range(len(about["prompts"]))] + self.key["contents"]
            tensors = {name: stored.get_tensor(f"{local:06d}.{name}") for name in names}
            if about.pop(_CHECKSUM, None) not in (None, checksum(about, tensors)):
                raise _damaged(file, f"row {local} of ")
        extras = {
            name: self._padded(tensor) if name.startswith("text") else tensor.float().numpy()
            for name, tensor in tensors.items()
        }
        prompts, where = tuple(about["prompts"]), f"{file} row {local}"
        switches = tuple(about.get("switch_frames", ()))
        return Sample(about["name"], prompts[0], None, None, extras, prompts, where, switches)

    def pixel_size(self, row: int) -> tuple[int, int] | None:
        """(height, width) of the pictures that the row was encoded from; None in sets of text alone."""
        number, local = self._ends.place(row)
        sizes = self.key.get("sizes")
        return None if sizes is None else tuple(sizes[self._shards[number]["buckets"][local]])

    def identities(self) -> Iterable[str]:
        """Name and prompts of each row. Raises: DataError when a shard cannot be read."""
        for shard in self._shards:
            for row in read_shard_rows(self.path / shard["file"])["rows"]:
                yield json.dumps([row["name"], row["prompts"], *([s] if (s := row.get("switch_frames")) else [])])

    def _padded(self, text: Tensor) -> NDArray[np.float32]:
        padded = torch.zeros(self.key["text_len"], text.shape[1])
        padded[: len(text)] = text.float()
        return padded.numpy()


def _complete_index(path: Path) -> dict[str, Any]:
    index = read_index(path)
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise DataError(
            f"{path / INDEX} has format {index.get('format')!r} version {index.get('version')!r}; this version of "
            f"Longtake reads {FORMAT!r} version {VERSION}: write the set again with `longtake encode`"
        )
    if not index.get("complete"):
        raise DataError(f"{path} is not complete; the same `longtake encode` command goes on with it")
    if missing := [name for name in ("key", "files", "shards") if name not in index]:
        raise _damaged(path / INDEX, "", f" (it has no {missing[0]})")
    return index


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields one phrase for each value of `ours` that `theirs` has otherwise, named by its dotted path."""
    for name, value in ours.items():
        other = theirs.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from differences(value, other, f"{prefix}{name}.")
        elif value != other:
            yield f"{prefix}{name}={other!r}, wanted {value!r}"


def _text_key(number: int) -> str:
    return f"text_{number}" if number else "text"


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, opened anew for each read: nothing is shared by threads or forked workers.

    Raises: DataError when it, or what the inside reads of it, is not what was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(file, "", f" ({type(error).__name__}: {error})") from error


def _damaged(file: Path, part: str, why: str = " (another checksum)") -> DataError:
    remove = "the whole set" if file.name in (INDEX, EMPTY_TEXT) else "the file"
    return DataError(
        f"{part}{file} is damaged{why}; remove {remove} and run the same `longtake encode` command, which writes it "
        "again"
    )


def _bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata or None)


def _publish(file: Path, data: bytes) -> None:
    partial = file.with_name(PARTIAL.replace("*", file.name))
    with partial.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, file)
