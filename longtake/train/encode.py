"""From a batch of pictures, prompts and videos to what objectives need; each row is encoded once and remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from longtake.data.loader import Batch, Loader, Pick, collate
from longtake.distributed.mesh import Mesh
from longtake.errors import DataError
from longtake.models.conditioning import condition_frames
from longtake.models.encoders import Encoders
from longtake.objectives.encoded import EncodedBatch
from longtake.structs import Condition, VideoShape


@dataclass(frozen=True)
class EncodedRow:
    """Encodings of one row: text [M, D], CLIP tokens [L, D], y [F_total, C_y, H, W], latents
    [F, C, H, W]."""

    text: Tensor
    image: Tensor | None = None
    frames: Tensor | None = None
    latents: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        tensors = (getattr(self, field.name) for field in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> EncodedRow:
        """The same row on a device."""
        parts = (getattr(self, field.name) for field in fields(self))
        return EncodedRow(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


class BatchEncoder:
    """Turns pictures, prompts and videos into encodings on the device.

    Args: `with_image` gives the picture's conditions (image-to-video); `with_latents` encodes the videos.
    """

    def __init__(
        self, encoders: Encoders, shape: VideoShape, *, with_image: bool, with_latents: bool, device: torch.device
    ) -> None:
        self.encoders, self.shape, self.device = encoders, shape, device
        self.with_image, self.with_latents = with_image, with_latents
        self.empty_text = encoders.text.encode([""]).to(device)

    @torch.no_grad()
    def rows(self, batch: Batch) -> list[EncodedRow]:
        """Encodings of each sample. Raises: DataError when pictures or videos are missing."""
        names = ", ".join(batch.names)
        text: Tensor = self.encoders.text.encode(batch.prompts)
        image = frames = latents = None
        if self.with_image:
            if batch.images is None:
                raise DataError(f"samples {names} have no image; image-to-video needs one a row")
            pictures = batch.images.to(self.device)
            frames = condition_frames(self.encoders.vae, pictures)
            image = None if self.encoders.image is None else self.encoders.image.encode(pictures)
        if self.with_latents:
            latents = self._latents(batch, names)

        def pick(part: Tensor | None, k: int) -> Tensor | None:
            return None if part is None else part[k].clone()

        return [
            EncodedRow(text[k].clone(), pick(image, k), pick(frames, k), pick(latents, k)) for k in range(len(batch))
        ]

    def _latents(self, batch: Batch, names: str) -> Tensor:
        """Latents of the videos, or those stored with the rows."""
        if batch.videos is not None:
            return self.encoders.vae.encode(batch.videos.to(self.device))
        stored = batch.extras.get("latents")
        if stored is None:
            raise DataError(f"samples {names} have neither video nor latents; this stage learns from videos")
        shape, channels = self.shape, self.encoders.vae.latent_channels
        wanted = (shape.num_latent_frames, channels, shape.latent_height, shape.latent_width)
        if tuple(stored.shape[1:]) != wanted:
            raise DataError(f"stored latents of samples {names} are {tuple(stored.shape[1:])}; they must be {wanted}")
        return stored.to(self.device, torch.float32)

    def batch(self, rows: Sequence[EncodedRow], indices: Sequence[int]) -> EncodedBatch:
        """The micro-batch of encoded rows with their global sample indices."""
        condition = Condition(
            torch.stack([row.text for row in rows]),
            _stack([row.image for row in rows]),
            _stack([row.frames for row in rows]),
        )
        first = None
        if condition.frames is not None:
            # The latent of a picture does not depend on what follows it, so y already holds the given picture's.
            first = condition.frames[:, :1, -self.encoders.vae.latent_channels :]
        return EncodedBatch(
            indices=indices,
            condition=condition,
            empty_text=self.empty_text.expand(len(rows), -1, -1),
            latent_size=(self.shape.latent_height, self.shape.latent_width),
            latents=_stack([row.latents for row in rows]),
            first_latent=first,
        )


class EncodedLoader:
    """Micro-batches after the encoders; a row is read and encoded once and remembered, up to `memory_bytes`.

    Position and seeking are those of the loader.
    """

    def __init__(self, loader: Loader, encoder: BatchEncoder, *, memory_bytes: int = 4 << 30) -> None:
        self.loader, self.encoder, self.memory_bytes = loader, encoder, memory_bytes
        self._rows: OrderedDict[int, EncodedRow] = OrderedDict()
        self._used_bytes = 0
        self._pending: list[list[Pick]] = []

    @property
    def position(self) -> int:
        """Samples taken by all ranks together."""
        return self.loader.position

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return len(self.loader.dataset)

    def seek(self, position: int) -> None:
        """Makes the next micro-batch the first one of the update at `position`."""
        self._pending = []
        self.loader.seek(position)

    def __next__(self) -> EncodedBatch:
        """The next micro-batch; `position` moves with the last one of an update."""
        if not self._pending:
            self._pending = self.loader.picks(self.position)
        picks = self._pending.pop(0)
        if not self._pending:
            self.loader.seek(self.position + self.loader.batch_size)
        if missing := {pick.row: pick for pick in picks if pick.row not in self._rows}:
            self._encode(list(missing.values()), len(picks))
        rows = [self._rows[pick.row] for pick in picks]
        self._forget()
        return self.encoder.batch(rows, [pick.index for pick in picks])

    def prefill(self, mesh: Mesh) -> None:
        """Encodes every row now, each on one rank, and shares the encodings: without it every rank encodes them all.

        For data sets that are small enough to be remembered whole and to travel between the ranks.
        """
        size = self.loader.micro_batch_size
        chunks = [range(start, start + size) for start in range(0, len(self.loader.dataset), size)]
        for chunk in chunks[mesh.rank :: mesh.world_size]:
            picks = [Pick(index=row, row=row) for row in chunk if row < len(self.loader.dataset)]
            self._encode(picks, size)
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
            read = list(pool.map(self.loader.read, [pick.row for pick in picks]))
        # Always as many at once, filled up with repeats: kernels, and with them the last bits of an encoding, depend on
        # the batch size, and a resumed run misses other rows than one that remembers earlier epochs.
        filled = [min(k, len(picks) - 1) for k in range(batch_size)]
        batch = collate([read[k][1] for k in filled], [picks[k] for k in filled], [read[k][0] for k in filled])
        for pick, row in zip(picks, self.encoder.rows(batch)):
            self._rows[pick.row] = row
            self._used_bytes += row.size_bytes

    def _forget(self) -> None:
        while self._used_bytes > self.memory_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._used_bytes -= oldest.size_bytes


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
