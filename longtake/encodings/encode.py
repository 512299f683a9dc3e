"""From a batch of pictures, prompts and videos to what objectives need; each row is encoded once and remembered.

Rows come from the encoders, or from an encoded set on disk (`data/encoded.py`), and then no encoder is loaded.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from longtake.condition import Condition, VideoShape, latent_frames
from longtake.data.encoded import EncodedRows
from longtake.data.loader import Batch, Loader, collate
from longtake.data.order import Pick
from longtake.data.samples import FileSize, Sample
from longtake.encoders.bundle import Encoders
from longtake.encoders.condition import condition_frames, with_mask
from longtake.errors import DataError
from longtake.objectives.batch import EncodedBatch
from longtake.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

# Pixels of all frames that a GPU encodes at once ahead of the training: over micro-batches of small videos it waits for
# Python, which starts some thousand kernels for each. A clip of 480x832 alone has more.
PIXELS_AT_ONCE = 1 << 24

# Encodings of one row by the names of `data/encoded.py`: `text` [M, D], `clip` [L, D], `y` [F, C, H, W] without its
# mask, `first` [1, C, H, W] where there is no y, `latents` [F, C, H, W], `text_1` [M, D] of the second prompt, `path`
# [K + 1, F, C, H, W] of a teacher. Which of them a stage reads beside the text are its `contents` (`key.contents_of`).
# `switch` [], where a stage learns from videos whose caption changes on the way: the latent frame from which the second
# prompt holds, 0 = it never does.
EncodedRow = dict[str, Tensor]


class BatchEncoder:
    """Turns pictures, prompts and videos into encodings on the device.

    Args: `contents`, what is encoded beside the text; `empty_prompt`, the text of the unconditional side; `switches`,
    whether videos may be learnt from whose caption changes on the way.
    """

    def __init__(
        self,
        encoders: Encoders,
        shape: VideoShape,
        contents: Sequence[str],
        *,
        device: torch.device,
        empty_prompt: str = "",
        switches: bool = False,
    ) -> None:
        self.encoders, self.shape, self.contents, self.device = encoders, shape, list(contents), device
        self.switches = switches
        self.with_image = not {"y", "first"}.isdisjoint(contents)
        self.empty_text = encoders.text.encode([empty_prompt]).to(device)

    def check(self, sample: Sample) -> None:
        """Raises DataError naming file and row: no picture, no video or latents, or latents of a wrong shape; no second
        prompt.
        """
        where = sample.where or sample.name
        _check_prompts(sample, where, self)
        if self.with_image and sample.image is None:
            raise DataError(f"{where}: has no image; image-to-video needs one a row")
        if "latents" not in self.contents or sample.video is not None:
            return
        stored = sample.extras.get("latents")
        if stored is None:
            raise DataError(f"{where}: has neither video nor latents; this stage learns from videos")
        stride, shape = self.shape.spatial_stride, self.shape
        height, width = (shape.height, shape.width) if sample.image is None else sample.image.shape[:2]
        wanted = (shape.num_latent_frames, self.encoders.vae.latent_channels, height // stride, width // stride)
        if stored.shape[-4:] != wanted or stored.ndim > 5:
            raise DataError(f"{where}: stored latents are {stored.shape}; they must be {wanted}")

    def reading(self, contents: Sequence[str]) -> Self:
        """The same that gives other contents beside the text."""
        return _with_contents(self, contents)

    @torch.no_grad()
    def rows(self, batch: Batch) -> list[EncodedRow]:
        """Encodings of each sample of a batch whose samples were checked."""
        vae = self.encoders.vae
        pictures: Any = batch.images.to(self.device) if self.with_image and batch.images is not None else None
        makers: dict[str, Callable[[], Tensor]] = {
            "text": lambda: self._texts(batch, batch.prompts, "its prompt"),
            "clip": lambda: self.encoders.image.encode(pictures),  # type: ignore[union-attr]
            "y": lambda: condition_frames(vae, pictures)[:, :, self.shape.temporal_stride :],
            "first": lambda: vae.encode(pictures[:, None]),
            "latents": lambda: self._latents(batch),
            "text_1": lambda: self._texts(batch, batch.later_prompts, "its second prompt"),
        }
        switch = _switches(batch, self)
        contents = dict.fromkeys(["text", *self.contents, *["text_1"] * any(switch)])
        return _by_row({name: makers[name]() for name in contents}, switch)

    def later_texts(self, row: int, sample: Sample) -> list[Tensor]:
        """[M, D] of each prompt of a row but the first."""
        place = f"row {row} ({sample.name}): its prompt"
        texts = enumerate(sample.prompts[1:], start=2)
        return [self.encoders.text.encode([text], places=[f"{place} {k}"])[0] for k, text in texts]

    def release(self) -> None:
        """Lets the encoders go, with their memory; nothing can be encoded any more."""
        del self.encoders

    def _texts(self, batch: Batch, prompts: list[str], which: str) -> Tensor:
        places = [f"row {row} ({name}): {which}" for row, name in zip(batch.rows, batch.names)]
        return self.encoders.text.encode(prompts, places=places)

    def _latents(self, batch: Batch) -> Tensor:
        """Latents of the videos, or those stored with the rows."""
        if batch.videos is not None:
            return self.encoders.vae.encode(batch.videos.to(self.device))
        stored = batch.extras["latents"].to(self.device, torch.float32)
        # Published rows of ODE pairs hold a whole trajectory [K, F, C, H, W] that ends at the clean latents (spec K.1).
        return stored[:, -1] if stored.ndim == 6 else stored


class StoredEncoder:
    """Gives the encodings that an encoded set holds; no encoder is needed.

    Args: `dataset`, the set, which was compared with the stage's configuration; `contents`, what the stage reads of it;
    `switches` as in `BatchEncoder`.
    """

    encoders = None

    def __init__(
        self,
        dataset: EncodedRows,
        shape: VideoShape,
        contents: Sequence[str],
        *,
        device: torch.device,
        switches: bool = False,
    ) -> None:
        self.shape, self.contents, self.device, self.switches = shape, list(contents), device, switches
        self.empty_text = torch.from_numpy(dataset.empty_text)[None].to(device)

    def check(self, sample: Sample) -> None:
        """Raises DataError without a second prompt; every row of an encoded set has all else that it was made with."""
        _check_prompts(sample, sample.where or sample.name, self)

    def reading(self, contents: Sequence[str]) -> Self:
        """The same that gives other contents beside the text, as far as the set has them."""
        return _with_contents(self, contents)

    def rows(self, batch: Batch) -> list[EncodedRow]:
        """Encodings of each sample, on the device."""
        switch = _switches(batch, self)
        contents = dict.fromkeys(["text", *self.contents, *["text_1"] * any(switch)])
        parts = {name: batch.extras[name].to(self.device) for name in contents}
        if "latents" in parts:  # a set's clips may be longer than the stage's
            parts["latents"] = parts["latents"][:, : self.shape.num_latent_frames]
        if "path" in parts:
            parts["path"] = parts["path"][:, :, : self.shape.num_latent_frames]
        return _by_row(parts, switch)

    def later_texts(self, row: int, sample: Sample) -> list[Tensor]:
        """[M, D] of each prompt of a row but the first."""
        return [torch.from_numpy(sample.extras[f"text_{k}"]) for k in range(1, len(sample.prompts))]


class SetEncoder(Protocol):
    """What makes the rows of an encoded set, as the two above do."""

    contents: list[str]
    empty_text: Tensor

    def check(self, sample: Sample) -> None:
        """Raises DataError for a sample that cannot be used."""
        ...

    def rows(self, batch: Batch) -> list[EncodedRow]:
        """Encodings of each sample of a batch."""
        ...

    def later_texts(self, row: int, sample: Sample) -> list[Tensor]:
        """[M, D] of each prompt of a row but the first."""
        ...


RowEncoder = BatchEncoder | StoredEncoder
E = TypeVar("E", bound=RowEncoder)


def _with_contents(encoder: E, contents: Sequence[str]) -> E:
    other = copy.copy(encoder)
    other.contents = list(contents)
    return other


def _by_row(parts: EncodedRow, switch: Sequence[int] = ()) -> list[EncodedRow]:
    """The rows of encodings [B, ...], each with memory of its own: one that is remembered does not keep the others."""
    rows = [{name: part[k].clone() for name, part in parts.items()} for k in range(len(parts["text"]))]
    return [row | {"switch": torch.tensor(frame)} for row, frame in zip(rows, switch, strict=True)] if switch else rows


def _inside(sample_switches: Sequence[int], encoder: RowEncoder) -> list[int]:
    """The pixel frames of a row's clip at which its caption changes."""
    clip = encoder.shape.num_pixel_frames if "latents" in encoder.contents else 0
    return [frame for frame in sample_switches if frame < clip]


def _switches(batch: Batch, encoder: RowEncoder) -> list[int]:
    """`switch` of each row; none of all where the stage does not ask."""
    if not encoder.switches:
        return []
    found = [_inside(frames, encoder) for frames in batch.switch_frames]
    return [latent_frames(frames[0], encoder.shape.temporal_stride) if frames else 0 for frames in found]


def encode_rows(encoder: SetEncoder, read: Sequence[tuple[Pick, int, Sample]], batch_size: int) -> list[EncodedRow]:
    """Encodings of at most `batch_size` samples, each with its pick and the row that it was read from.

    Always as many at once, filled up with repeats: kernels, and with them the last bits of an encoding, depend on the
    batch size, and a resumed run misses other rows than one that remembers earlier epochs.
    """
    filled = [read[min(k, len(read) - 1)] for k in range(batch_size)]
    batch = collate([sample for _, _, sample in filled], [pick for pick, _, _ in filled], [row for _, row, _ in filled])
    return encoder.rows(batch)[: len(read)]


def _check_prompts(sample: Sample, where: str, encoder: RowEncoder) -> None:
    if "text_1" in encoder.contents and len(sample.prompts) < 2:
        raise DataError(f"{where}: has one prompt; objective.switch_frames needs two a row, or leave it empty")
    if len(inside := _inside(sample.switch_frames, encoder)) > encoder.switches:
        most = "only once" if encoder.switches else "not with this objective"
        raise DataError(
            f"{where}: its caption changes at frames {inside}, inside the clip of {encoder.shape.num_pixel_frames} "
            f"frames, and this can be learnt {most}; cut the video"
        )


def make_batch(
    encoder: RowEncoder, rows: Sequence[EncodedRow], indices: Sequence[int], size: FileSize | None = None
) -> EncodedBatch:
    """The micro-batch of encoded rows with their global sample indices.

    Args: `size` in pixels of the rows' bucket, None for that of the stage.
    """

    def stacked(name: str) -> Tensor | None:
        return torch.stack([row[name] for row in rows]) if name in rows[0] else None

    text, y, shape = torch.stack([row["text"] for row in rows]), stacked("y"), encoder.shape
    frames = None if y is None else with_mask(y, shape.temporal_stride)
    height, width = (shape.height, shape.width) if size is None else (size.height, size.width)
    has_later = any("text_1" in row for row in rows)
    later = torch.stack([row.get("text_1", row["text"]) for row in rows]) if has_later else None
    frames_told = [int(row["switch"]) or None for row in rows if "switch" in row]
    switches = frames_told if any(frames_told) else ()
    return EncodedBatch(
        indices=indices,
        condition=Condition(text, stacked("clip"), frames),
        empty_text=encoder.empty_text.expand(len(rows), -1, -1),
        latent_size=(height // shape.spatial_stride, width // shape.spatial_stride),
        latents=stacked("latents"),
        later_text=later,
        switch_frames=switches,
        path=stacked("path"),
        # The latent of a picture does not depend on what follows it, so y already holds the given picture's.
        first_latent=stacked("first") if frames is None else frames[:, :1, shape.temporal_stride :],
    )


class EncodedLoader:
    """Micro-batches after the encoders; a row is read and encoded once and remembered, up to `memory_bytes`.

    Position and seeking are those of the loader.
    """

    def __init__(self, loader: Loader, encoder: RowEncoder, *, memory_bytes: int = 4 << 30) -> None:
        self.loader, self.encoder, self.memory_bytes = loader, encoder, memory_bytes
        self._rows: OrderedDict[int, EncodedRow] = OrderedDict()
        self._used_bytes = 0
        self._said_unused = False

    @property
    def position(self) -> int:
        """Samples taken by all ranks together."""
        return self.loader.position

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return len(self.loader.dataset)

    @property
    def is_complete(self) -> bool:
        """True when every row is remembered and none will be forgotten: nothing is encoded any more."""
        return len(self._rows) == self.num_rows and self._used_bytes <= self.memory_bytes

    def seek(self, position: int) -> None:
        """Makes the update at `position` the next one."""
        self.loader.seek(position)

    def __next__(self) -> list[EncodedBatch]:
        """The micro-batches of the next update."""
        batches = [self._micro_batch(picks) for picks in self.loader.picks(self.position)]
        self.loader.seek(self.position + self.loader.batch_size)
        return batches

    def _micro_batch(self, picks: list[Pick]) -> EncodedBatch:
        if missing := {pick.row: pick for pick in picks if pick.row not in self._rows}:
            self._encode(list(missing.values()), len(picks))
        rows = [self._rows[pick.row] for pick in picks]
        self._forget()
        size = self.loader.size_of(picks[0].row)
        return make_batch(self.encoder, rows, [pick.index for pick in picks], size)

    def prefill(self, mesh: Mesh) -> None:
        """Encodes every row now, each on one rank, and shares the encodings: without it every rank encodes them all.

        For data sets that are small enough to be remembered whole and to travel between the ranks.
        """
        most = rows_at_once(self.encoder.shape, self.loader.micro_batch_size, self.encoder.device)
        chunks = []
        for rows in self.loader.buckets.rows:
            size = max(self.loader.micro_batch_size, -(-len(rows) // max(1, -(-len(rows) // most))))
            chunks += [(rows[start : start + size], size) for start in range(0, len(rows), size)]
        for chunk, size in chunks[mesh.rank :: mesh.world_size]:
            self._encode([Pick(index=int(row), row=int(row)) for row in chunk], size)
        # Through the CPU: a tensor that is sent from a GPU would arrive on the sender's.
        mine = {number: _moved(row, "cpu") for number, row in self._rows.items()} if mesh.is_distributed else {}
        for part in mesh.every(lambda: mine):
            for number, row in part.items():
                self._remember(number, _moved(row, self.encoder.device))
        # Like lazy encoding, leave the oldest first: here rows in order, the same on every rank.
        self._rows = OrderedDict(sorted(self._rows.items()))

    def _encode(self, picks: Sequence[Pick], batch_size: int) -> None:
        with ThreadPoolExecutor(max(1, self.loader.workers)) as pool:
            found = pool.map(lambda pick: (pick, *self.loader.read(pick.row, self.encoder.check)), picks)
            read = list(found)
        self._say_unused([sample for _, _, sample in read])
        for (pick, _, _), row in zip(read, encode_rows(self.encoder, read, batch_size)):
            self._remember(pick.row, row)

    def _remember(self, number: int, row: EncodedRow) -> None:
        if number not in self._rows:
            self._rows[number] = row
            self._used_bytes += _size_bytes(row)

    def _say_unused(self, samples: Sequence[Sample]) -> None:
        """Warns once where rows have more prompts than the stage trains on, such as captions of several paragraphs."""
        used = 1 + ("text_1" in self.encoder.contents)
        longer = next((s for s in samples if len(s.prompts) > max(used, 1 + len(s.switch_frames))), None)
        if longer is not None and not self._said_unused:
            self._said_unused = True
            logger.warning(
                "%s has %d prompts (lines of its caption), and this stage trains on the first %s only, in all rows; "
                "to train on the whole text, write it in one line",
                longer.where or longer.name,
                len(longer.prompts),
                "two" if used == 2 else "one",
            )

    def _forget(self) -> None:
        while self._used_bytes > self.memory_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._used_bytes -= _size_bytes(oldest)


def rows_at_once(shape: VideoShape, micro_batch_size: int, device: torch.device) -> int:
    """How many rows are encoded at once ahead of a training."""
    if device.type != "cuda":
        return micro_batch_size
    return max(micro_batch_size, PIXELS_AT_ONCE // (shape.num_pixel_frames * shape.height * shape.width))


def _size_bytes(row: EncodedRow) -> int:
    return sum(part.nbytes for part in row.values())


def _moved(row: EncodedRow, device: torch.device | str) -> EncodedRow:
    return {name: part.to(device) for name, part in row.items()}
