"""From a batch of pictures, prompts and videos to what objectives need; each row is encoded once and remembered.

Rows come from the encoders, or from an encoded set on disk (`data/encoded.py`), and then no encoder is loaded.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from longtake.condition import Condition, VideoShape
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


@dataclass(frozen=True)
class EncodedRow:
    """Encodings of one row: text [M, D], CLIP tokens [L, D], y [F_total, C_y, H, W], latents [F, C, H, W]; `first`
    [1, C, H, W] is the latent of the picture where there is no y; `later_text` [M, D] of the row's second prompt.
    """

    text: Tensor
    image: Tensor | None = None
    frames: Tensor | None = None
    latents: Tensor | None = None
    first: Tensor | None = None
    later_text: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> EncodedRow:
        """The same row on a device."""
        parts = (getattr(self, field.name) for field in fields(self))
        return EncodedRow(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


class RowEncoder(Protocol):
    """Where the encodings of rows come from."""

    shape: VideoShape
    device: torch.device
    empty_text: Tensor
    with_later: bool

    def check(self, sample: Sample) -> None:
        """Raises DataError naming file and row when the stage cannot use the sample."""
        ...

    def rows(self, batch: Batch) -> list[EncodedRow]:
        """Encodings of each sample of a batch whose samples were checked."""
        ...


class BatchEncoder:
    """Turns pictures, prompts and videos into encodings on the device.

    Args: `with_image` gives the picture's conditions (image-to-video): y and CLIP tokens, or without `with_y` its
    latent alone; `with_latents` encodes the videos, `with_later` the second prompts. `empty_prompt` is the text of the
    unconditional side.
    """

    def __init__(
        self,
        encoders: Encoders,
        shape: VideoShape,
        *,
        with_image: bool,
        with_latents: bool,
        device: torch.device,
        with_y: bool = True,
        with_later: bool = False,
        empty_prompt: str = "",
    ) -> None:
        self.encoders, self.shape, self.device, self.with_later = encoders, shape, device, with_later
        self.with_image, self.with_latents, self.with_y = with_image, with_latents, with_y
        self.empty_text = encoders.text.encode([empty_prompt]).to(device)

    def check(self, sample: Sample) -> None:
        """Raises DataError naming file and row: no picture, no video or latents, or latents of a wrong shape; no second
        prompt.
        """
        where = sample.where or sample.name
        _check_prompts(sample, where, with_later=self.with_later)
        if self.with_image and sample.image is None:
            raise DataError(f"{where}: has no image; image-to-video needs one a row")
        if not self.with_latents or sample.video is not None:
            return
        stored = sample.extras.get("latents")
        if stored is None:
            raise DataError(f"{where}: has neither video nor latents; this stage learns from videos")
        stride, shape = self.shape.spatial_stride, self.shape
        height, width = (shape.height, shape.width) if sample.image is None else sample.image.shape[:2]
        wanted = (shape.num_latent_frames, self.encoders.vae.latent_channels, height // stride, width // stride)
        if stored.shape[-4:] != wanted or stored.ndim > 5:
            raise DataError(f"{where}: stored latents are {stored.shape}; they must be {wanted}")

    @torch.no_grad()
    def rows(self, batch: Batch) -> list[EncodedRow]:
        """Encodings of each sample."""
        places = [f"row {row} ({name}): its prompt" for row, name in zip(batch.rows, batch.names)]
        text: Tensor = self.encoders.text.encode(batch.prompts, places=places)
        image = frames = first = None
        if self.with_image:
            assert batch.images is not None
            pictures = batch.images.to(self.device)
            if self.with_y:
                frames = condition_frames(self.encoders.vae, pictures)
                image = None if self.encoders.image is None else self.encoders.image.encode(pictures)
            else:
                first = self.encoders.vae.encode(pictures[:, None])
        latents = self._latents(batch) if self.with_latents else None

        def pick(part: Tensor | None, k: int) -> Tensor | None:
            return None if part is None else part[k].clone()

        later = None
        if self.with_later:
            places = [f"row {row} ({name}): its second prompt" for row, name in zip(batch.rows, batch.names)]
            later = self.encoders.text.encode(batch.later_prompts, places=places)
        parts = (image, frames, latents, first, later)
        return [EncodedRow(text[k].clone(), *(pick(part, k) for part in parts)) for k in range(len(batch))]

    def release(self) -> None:
        """Lets the encoders go, with their memory; nothing can be encoded any more."""
        del self.encoders

    def _latents(self, batch: Batch) -> Tensor:
        """Latents of the videos, or those stored with the rows."""
        if batch.videos is not None:
            return self.encoders.vae.encode(batch.videos.to(self.device))
        stored = batch.extras["latents"].to(self.device, torch.float32)
        # Published rows of ODE pairs hold a whole trajectory [K, F, C, H, W] that ends at the clean latents (spec K.1).
        return stored[:, -1] if stored.ndim == 6 else stored


class StoredEncoder:
    """Gives the encodings that an encoded set holds; no encoder is needed.

    Args: `dataset`, the set, which was compared with the stage's configuration; `with_image`, `with_y`, `with_tokens`,
    `with_latents` and `with_later` (second prompts) say what the stage needs of it.
    """

    encoders = None

    def __init__(
        self,
        dataset: EncodedRows,
        shape: VideoShape,
        *,
        with_image: bool,
        with_tokens: bool,
        with_latents: bool,
        device: torch.device,
        with_y: bool = True,
        with_later: bool = False,
    ) -> None:
        self.shape, self.device, self.with_later = shape, device, with_later
        self.with_y, self.with_first = with_image and with_y, with_image and not with_y
        self.with_tokens, self.with_latents = with_image and with_tokens, with_latents
        self.empty_text = torch.from_numpy(dataset.empty_text)[None].to(device)

    def check(self, sample: Sample) -> None:
        """Raises DataError without a second prompt; every row of an encoded set has all else that it was made with."""
        _check_prompts(sample, sample.where or sample.name, with_later=self.with_later)

    def rows(self, batch: Batch) -> list[EncodedRow]:
        """Encodings of each sample, on the device."""
        parts = {name: part.to(self.device) for name, part in batch.extras.items()}
        frames = with_mask(parts["y"], self.shape.temporal_stride) if self.with_y else None
        return [
            EncodedRow(
                parts["text"][k],
                parts["clip"][k] if self.with_tokens else None,
                None if frames is None else frames[k],
                parts["latents"][k, : self.shape.num_latent_frames] if self.with_latents else None,
                parts["first"][k] if self.with_first else None,
                parts["text_1"][k] if self.with_later else None,
            )
            for k in range(len(batch))
        ]


def _check_prompts(sample: Sample, where: str, *, with_later: bool) -> None:
    if with_later and len(sample.prompts) < 2:
        raise DataError(f"{where}: has one prompt; long.switch_frames needs two a row, or leave it empty")


def make_batch(
    encoder: RowEncoder, rows: Sequence[EncodedRow], indices: Sequence[int], size: FileSize | None = None
) -> EncodedBatch:
    """The micro-batch of encoded rows with their global sample indices.

    Args: `size` in pixels of the rows' bucket, None for that of the stage.
    """
    condition = Condition(
        torch.stack([row.text for row in rows]),
        _stack([row.image for row in rows]),
        _stack([row.frames for row in rows]),
    )
    shape = encoder.shape
    height, width = (shape.height, shape.width) if size is None else (size.height, size.width)
    first = _stack([row.first for row in rows])
    if condition.frames is not None:
        # The latent of a picture does not depend on what follows it, so y already holds the given picture's.
        first = condition.frames[:, :1, shape.temporal_stride :]
    return EncodedBatch(
        indices=indices,
        condition=condition,
        empty_text=encoder.empty_text.expand(len(rows), -1, -1),
        latent_size=(height // shape.spatial_stride, width // shape.spatial_stride),
        latents=_stack([row.latents for row in rows]),
        later_text=_stack([row.later_text for row in rows]),
        first_latent=first,
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
        size = self.loader.micro_batch_size
        groups = self.loader.buckets.rows
        chunks = [rows[start : start + size] for rows in groups for start in range(0, len(rows), size)]
        for chunk in chunks[mesh.rank :: mesh.world_size]:
            self._encode([Pick(index=int(row), row=int(row)) for row in chunk], size)
        # Through the CPU: a tensor that is sent from a GPU would arrive on the sender's.
        mine = {number: row.to("cpu") for number, row in self._rows.items()} if mesh.is_distributed else {}
        for part in mesh.every(lambda: mine):
            for number, row in part.items():
                if number not in self._rows:
                    self._rows[number] = row.to(self.encoder.device)
                    self._used_bytes += row.size_bytes
        # Like lazy encoding, leave the oldest first: here rows in order, the same on every rank.
        self._rows = OrderedDict(sorted(self._rows.items()))

    def _encode(self, picks: Sequence[Pick], batch_size: int) -> None:
        with ThreadPoolExecutor(max(1, self.loader.workers)) as pool:
            read = list(pool.map(lambda pick: self.loader.read(pick.row, self.encoder.check), picks))
        self._say_unused([sample for _, sample in read])
        # Always as many at once, filled up with repeats: kernels, and with them the last bits of an encoding, depend on
        # the batch size, and a resumed run misses other rows than one that remembers earlier epochs.
        filled = [min(k, len(picks) - 1) for k in range(batch_size)]
        batch = collate([read[k][1] for k in filled], [picks[k] for k in filled], [read[k][0] for k in filled])
        for pick, row in zip(picks, self.encoder.rows(batch)):
            self._rows[pick.row] = row
            self._used_bytes += row.size_bytes

    def _say_unused(self, samples: Sequence[Sample]) -> None:
        """Warns once where rows have more prompts than the stage trains on, such as captions of several paragraphs."""
        used = 1 + self.encoder.with_later
        longer = next((sample for sample in samples if len(sample.prompts) > used), None)
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
            self._used_bytes -= oldest.size_bytes


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
