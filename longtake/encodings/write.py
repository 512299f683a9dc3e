"""`longtake encode`: writes what the encoders make of a stage's data set, so that training loads none of them.

Ranks share the shards that are still missing; each shard depends on its rows alone, so that a run that was killed and
started again, or one on other ranks, leaves the same bytes.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from longtake.checkpoint.invariants import rows_invariant
from longtake.config.groups import DataConfig
from longtake.config.stage import StageConfig
from longtake.data.encoded import (
    EMPTY_TEXT,
    FORMAT,
    INDEX,
    PARTIAL,
    VERSION,
    EncodedRows,
    EncodedSample,
    differences,
    read_index,
    read_shard_rows,
    shard_name,
    write_empty_text,
    write_index,
    write_shard,
)
from longtake.data.loader import BadRows
from longtake.data.order import Buckets, Pick
from longtake.data.samples import Dataset, Sample
from longtake.encoders.fingerprint import encoder_files
from longtake.encodings.encode import BatchEncoder, SetEncoder, encode_rows
from longtake.encodings.key import contents_of, encoders_key, sizes_key
from longtake.errors import ConfigError, DataError
from longtake.lock import LOCK
from longtake.outputs import check_output_folder, check_own, check_space
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.progress import Progress
from longtake.train.lock import only_run
from longtake.train.stage_data import DataBuilder, find_buckets, open_data, sizes_of

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Layout:
    """How a set is written: `dtype` of what is no text, `rows_per_shard` rows a file, `overwrite` another set.

    Raises: ConfigError.
    """

    dtype: str = "float32"
    rows_per_shard: int = 64
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.rows_per_shard < 1:
            raise ConfigError(
                f"dtype={self.dtype} must be one of {', '.join(DTYPES)}, and rows_per_shard={self.rows_per_shard} >= 1"
            )


@dataclass(frozen=True)
class EncodeReport:
    """What was written; prints as one line."""

    output: Path
    num_rows: int
    num_bad: int
    size_bytes: int
    rows_now: int
    seconds: float
    num_ranks: int

    def __str__(self) -> str:
        each = self.size_bytes / max(1, self.num_rows)
        return (
            f"{self.output}: {self.num_rows} rows, {self.num_bad} bad rows left out, {self.size_bytes / 1e6:.1f} MB, "
            f"{each:.0f} bytes a row; {self.rows_now} rows read now in {self.seconds:.1f} s, "
            f"{self.rows_now / self.seconds:.2f} rows/s on {self.num_ranks} ranks"
        )


def encode(
    config: StageConfig,
    output: str | Path,
    mesh: Mesh | None = None,
    *,
    dtype: str = Layout.dtype,
    rows_per_shard: int = Layout.rows_per_shard,
    overwrite: bool = Layout.overwrite,
) -> EncodeReport:
    """Encodes the data set of a stage on the ranks of a mesh (None: all that torchrun started); the same on each.

    Args: `dtype` in which CLIP tokens and latents are stored (text is bfloat16 always); `rows_per_shard` rows of the
    data set a file; `overwrite` lets another encoded set in `output` make way.
    Raises: DataError for a bad row (`data.on_bad_row`), or when `output` holds something else; OutputError when it
    cannot be written; ConfigError.
    """
    layout = Layout(dtype, rows_per_shard, overwrite)
    with init_mesh() if mesh is None else nullcontext(mesh) as ranks:
        writer = SetWriter(config, Path(output), ranks, layout)
        if isinstance(writer.dataset, EncodedRows):
            raise ConfigError(f"data.path={config.data.path} is an encoded set already; give the data it was made from")
        with writer:
            encoder = writer.encoder(with_latents=config.objective.learns_from_videos)
            return writer.write(encoder, partial(writer.head, encoder))


@dataclass
class SetWriter:
    """Writes encoded sets of the data of a stage; a context, inside which no other command writes there.

    Raises: DataError when `output` holds something else, OutputError when it cannot be written.
    """

    config: StageConfig
    output: Path
    mesh: Mesh
    layout: Layout
    dataset: Dataset = field(init=False)
    _alone: ExitStack = field(init=False, default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.mesh.on_main(lambda: check_output_folder(self.output))
        self.dataset = open_data(self.config.data, self.config.clip_shape)

    def __enter__(self) -> Self:
        self.mesh.on_main(lambda: _check_output(self.output))
        self._alone.enter_context(only_run(self.output, self.mesh, "name another folder"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._alone.__exit__(*error)

    def encoder(self, *, with_latents: bool) -> BatchEncoder:
        """What encodes the rows. Raises: CheckpointError, ConfigError."""
        model = self.config.model
        with_tokens = model.with_y and "image" in encoder_files(self.config.encoders_folder)
        data = DataBuilder(self.config, self.mesh, self.dataset, with_tokens)
        return data.batch_encoder(contents_of(model, with_tokens=with_tokens, with_latents=with_latents))

    def head(self, encoder: BatchEncoder) -> dict[str, Any]:
        """`key` and `files` of a set by that encoder. Reads all weights of the encoders once, for their digests."""
        config, contents = self.config, encoder.contents
        digests, files = encoders_key(config.encoders_folder, contents)
        key = {"encoders": digests, "contents": contents, "text_len": encoder.encoders.text.text_len}
        key |= sizes_key(config.model, config.data, encoder.shape, contents)
        if empty_prompt := config.objective.empty_prompt:
            key["negative_prompt"] = empty_prompt
        return {"key": key, "files": files}

    def write(self, encoder: SetEncoder, head: Callable[[], dict[str, Any]], row_bytes: int = 0) -> EncodeReport:
        """Writes what an encoder makes of the data; all ranks call it.

        Args: `head`, what the index says of the encoder, and to which the rest is added here; `row_bytes` of a row, by
        which the disk is asked first (0: it is not).
        """
        config, output, mesh, dataset, layout = self.config, self.output, self.mesh, self.dataset, self.layout
        buckets = find_buckets(config.data, sizes_of(config.data, config.video), dataset, mesh)
        shards = _ShardWriter(config.data, config.micro_batch_size, dataset, buckets, encoder, layout)
        request = {
            **config.data.model_dump(include={"path", "on_bad_row"}),
            "num_rows": len(dataset),
            "rows": mesh.on_main(lambda: rows_invariant(dataset)),
            "dtype": layout.dtype,
            "rows_per_shard": layout.rows_per_shard,
            "batch_size": config.micro_batch_size,
        }
        missing = mesh.on_main(lambda: _begin(output, _index(head(), request), encoder, layout.overwrite))
        rows_now = sum(len(shards.rows_of(shard)) for shard in missing)
        if row_bytes:
            mesh.on_main(lambda: _check_room(output, rows_now, row_bytes))
        started = time.perf_counter()
        _share(mesh, shards, output, missing)
        seconds = time.perf_counter() - started
        num_shards = -(-len(dataset) // layout.rows_per_shard)
        done = mesh.on_main(lambda: _finish(output, config.data.max_bad_share, num_shards))
        return EncodeReport(
            output,
            num_rows=sum(shard["num_rows"] for shard in done["shards"]),
            num_bad=len(done["bad_rows"]),
            size_bytes=sum(shard["size_bytes"] for shard in done["shards"]),
            rows_now=rows_now,
            seconds=seconds,
            num_ranks=mesh.world_size,
        )


def _index(head: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The index of a set that holds no shard yet."""
    begin = {"format": FORMAT, "version": VERSION, "complete": False}
    return {**begin, **head, "request": request, "shards": [], "bad_rows": []}


def _check_room(output: Path, rows: int, row_bytes: int) -> None:
    """Says how much disk so many rows will take. Raises: OutputError when there is not that much."""
    size = rows * row_bytes
    logger.info("%s: %d rows of about %.3g MB will be written, %.3g GB", output, rows, row_bytes / 1e6, size / 1e9)
    check_space(output / INDEX, size)


def _share(mesh: Mesh, writer: _ShardWriter, output: Path, missing: list[int]) -> None:
    """Writes the missing shards, in each round one on every rank, so that the error of one rank stops all of them."""
    rows = sum(len(writer.rows_of(shard)) for shard in missing)
    progress = Progress(str(output), rows, "rows")
    try:
        for start in range(0, len(missing), mesh.world_size):
            together = missing[start : start + mesh.world_size]
            mesh.every(partial(writer.write, output, together[mesh.rank : mesh.rank + 1]))
            if mesh.is_main:
                progress.update(progress.done + sum(len(writer.rows_of(shard)) for shard in together))
    finally:
        progress.finish()


class _ShardWriter:
    """Encodes the rows of shards. The batches of a shard are a function of its row numbers, whoever writes it."""

    def __init__(
        self,
        data: DataConfig,
        batch_size: int,
        dataset: Dataset,
        buckets: Buckets,
        encoder: SetEncoder,
        layout: Layout,
    ) -> None:
        self.dataset, self.buckets, self.encoder = dataset, buckets, encoder
        self.dtype, self.rows_per_shard = DTYPES[layout.dtype], layout.rows_per_shard
        self.batch_size, self.threads = batch_size, max(1, data.num_workers)
        self.bad = BadRows(len(dataset), data.on_bad_row, data.max_bad_share)

    def rows_of(self, shard: int) -> range:
        """Rows of the data set that belong to a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(len(self.dataset), start + self.rows_per_shard))

    def write(self, output: Path, shards: Sequence[int]) -> None:
        """Writes these shards one after the other."""
        with ThreadPoolExecutor(self.threads) as pool:
            for shard in shards:
                samples, bad = [], []
                for read in self._read_ahead(pool, self.rows_of(shard)):
                    samples += self._encode([(row, found) for row, found in read if isinstance(found, Sample)])
                    bad += [{"row": row, "problem": str(found)} for row, found in read if isinstance(found, DataError)]
                samples.sort(key=lambda sample: sample.row)
                write_shard(output / shard_name(shard), samples, sorted(bad, key=lambda entry: entry["row"]))

    def _read_ahead(self, pool: ThreadPoolExecutor, rows: range) -> Iterator[list[tuple[int, Sample | DataError]]]:
        """Yields the read rows batch by batch, each of one bucket, while the next batch is being read."""
        pending: deque[list[tuple[int, Future[Sample | DataError]]]] = deque()
        for bucket in range(len(self.buckets.rows)):
            mine = [row for row in rows if self.buckets.bucket_of_row[row] == bucket]
            for start in range(0, len(mine), self.batch_size):
                batch = mine[start : start + self.batch_size]
                pending.append([(row, pool.submit(self._read, row)) for row in batch])
                if len(pending) > 1:  # the next batch is read while its taker encodes this one
                    yield [(row, future.result()) for row, future in pending.popleft()]
        while pending:
            yield [(row, future.result()) for row, future in pending.popleft()]

    def _read(self, row: int) -> Sample | DataError:
        try:
            sample = self.dataset[row]
            self.encoder.check(sample)
        except DataError as error:
            self.bad.met(row, error)
            return error
        return sample

    def _encode(self, read: list[tuple[int, Sample]]) -> list[EncodedSample]:
        if not read:
            return []
        picked = [(Pick(index=row, row=row), row, sample) for row, sample in read]
        result = []
        for (row, sample), encoded in zip(read, encode_rows(self.encoder, picked, self.batch_size)):
            texts = [encoded["text"], *self.encoder.later_texts(row, sample)]
            stored = [real_rows(text).to("cpu", torch.bfloat16) for text in texts]
            arrays = {name: encoded[name].to("cpu", self.dtype) for name in self.encoder.contents}
            bucket = int(self.buckets.bucket_of_row[row])
            switches = sample.switch_frames
            result.append(EncodedSample(row, sample.name, sample.prompts, stored, arrays, bucket, switches))
        return result


def real_rows(text: Tensor) -> Tensor:
    """Text rows [m, D] of [M, D] without the zero rows past the prompt."""
    used = (text != 0).any(-1).nonzero()
    return text[: int(used[-1]) + 1 if len(used) else 0]


def _check_output(output: Path) -> None:
    """Raises DataError when the folder holds something else than a set, or the begin of one."""
    if output.is_dir() and (output / INDEX).is_file():
        return
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    if any(name != EMPTY_TEXT and not name.startswith(".") for name in names):
        raise DataError(f"{output} exists and is no encoded set (no {INDEX}); name an empty or a new folder")


def _begin(output: Path, index: dict[str, Any], encoder: SetEncoder, overwrite: bool) -> list[int]:
    """Numbers of the shards that are missing, of a set that is new or that this request began; with `overwrite`
    another set that is there makes way.

    Raises: DataError that names the differences when the folder holds another set.
    """
    request = index["request"]
    numbers = range(-(-request["num_rows"] // request["rows_per_shard"]))
    if not (output / INDEX).is_file():
        write_empty_text(output, real_rows(encoder.empty_text[0]).bfloat16())
        write_index(output, index)
        return list(numbers)
    present = read_index(output)
    if "rows" not in present.get("request", {}):  # a set of an earlier version
        del request["rows"]
    same = ("format", "version", "key", "request")
    if found := list(differences({name: index[name] for name in same}, present)):
        if overwrite:
            check_own(output, (INDEX, EMPTY_TEXT, "shard_*.safetensors", LOCK, PARTIAL))
            for path in [*output.glob(PARTIAL), *output.glob("[!.]*")]:
                if path.name != INDEX:
                    path.unlink()
            (output / INDEX).unlink()  # last: whoever is killed before finds a set, which can be overwritten
            return _begin(output, index, encoder, overwrite)
        raise DataError(
            f"{output} holds another encoded set: {'; '.join(found)}. Name another folder, or give --overwrite"
        )
    missing = [number for number in numbers if not (output / shard_name(number)).is_file()]
    if missing and present["complete"]:
        write_index(output, {**present, "complete": False})
    return missing


def _finish(output: Path, max_bad_share: float, num_shards: int) -> dict[str, Any]:
    """The complete index, from the heads of all shards. Raises: DataError when too many rows were bad."""
    index = read_index(output)
    shards, bad = [], []
    for number in range(num_shards):
        file = output / shard_name(number)
        head = read_shard_rows(file)
        bad += head["bad"]
        buckets = [row["bucket"] for row in head["rows"]]
        shards.append(
            {"file": file.name, "num_rows": len(buckets), "size_bytes": file.stat().st_size, "buckets": buckets}
        )
    num_rows = index["request"]["num_rows"]
    # Each rank counted its own rows only.
    if len(bad) > max_bad_share * num_rows or len(bad) == num_rows:
        raise DataError(
            f"{len(bad)} of {num_rows} rows are bad, more than data.max_bad_share={max_bad_share}; repair "
            f"the data or raise the share, and remove {output}. The last one: {bad[-1]['problem']}"
        )
    index |= {"complete": True, "shards": shards, "bad_rows": bad}
    write_index(output, index)
    return index
