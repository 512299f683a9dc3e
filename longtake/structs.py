"""Sizes, block boundaries and conditions: every size and every block boundary is derived here, once.

Axes, the one legend: `B` batch, `F` latent frames, `E` entries of a forward (F, or 2F in teacher forcing), `T` pixel
frames, `C` channels, `H W` latent height and width, `h w` pixel height and width, `L` tokens, `M` text tokens,
`D` model width, `N` heads, `K` head width. Latents are `[B, F, C, H, W]`; videos are uint8 `[T, h, w, 3]` for people
and float `[B, T, 3, h, w]` in [-1, 1] for encoders. Noise level `sigma` is in [0, 1], 1 = pure noise.

This file must know no model, no file format and no training stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from longtake.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class VideoShape:
    """Sizes of one video: pixels, latents and the strides of the VAE between them.

    Args (fields): `height`, `width` in pixels; `num_latent_frames` F; strides of the VAE.
    Raises: ConfigError when the pixel size is not a multiple of twice the spatial stride (the DiT's patch is 2x2).
    """

    height: int
    width: int
    num_latent_frames: int
    temporal_stride: int = 4
    spatial_stride: int = 8

    def __post_init__(self) -> None:
        unit = 2 * self.spatial_stride
        for name in ("height", "width"):
            size = getattr(self, name)
            if size < unit or size % unit:
                below = max(unit, size // unit * unit)
                raise ConfigError(
                    f"{name}={size} must be a positive multiple of {unit}; set it to {below} or {below + unit}"
                )
        if self.num_latent_frames < 1:
            raise ConfigError(f"num_latent_frames={self.num_latent_frames} must be at least 1")

    @property
    def latent_height(self) -> int:
        return self.height // self.spatial_stride

    @property
    def latent_width(self) -> int:
        return self.width // self.spatial_stride

    @property
    def num_pixel_frames(self) -> int:
        return pixel_frames(self.num_latent_frames, self.temporal_stride)


def pixel_frames(num_latent_frames: int, temporal_stride: int = 4) -> int:
    """Pixel frames of a clip of `num_latent_frames` latents: 1 for the first, `temporal_stride` for each later one."""
    return 1 + (num_latent_frames - 1) * temporal_stride


def latent_frames(num_pixel_frames: int, temporal_stride: int = 4) -> int:
    """Fewest latent frames that cover `num_pixel_frames` pixel frames."""
    return 1 + -(-(num_pixel_frames - 1) // temporal_stride)


@dataclass(frozen=True, eq=False)
class MaskLayout:
    """Who may attend to whom in one masked forward, at the granularity of whole frames ("entries").

    Fields: `frame_index` [E] absolute frame of every entry of `x` (queries rotate there, `condition.frames` is read
    there); `key_entry` [S] the entry that key slot s is computed from; `key_position` [S] the frame position at which
    key slot s is rotated; `allowed` [E, S] boolean. S = E with `key_entry = 0..E-1`, except for the relative RoPE with
    eviction, where the sink appears once more for every distance at which it is seen.
    """

    frame_index: Tensor
    key_entry: Tensor
    key_position: Tensor
    allowed: Tensor

    @property
    def num_entries(self) -> int:
        return self.frame_index.numel()

    @property
    def plain_keys(self) -> bool:
        """True when key slot s is entry s (no extra copies)."""
        return self.key_entry.numel() == self.frame_index.numel()

    def to(self, device: torch.device | str) -> MaskLayout:
        return MaskLayout(*(t.to(device) for t in (self.frame_index, self.key_entry, self.key_position, self.allowed)))


@dataclass(frozen=True)
class BlockPlan:
    """Boundaries of the blocks of a video: `[first, n, n, ...]`.

    `block_frames` is n; `first_frames` is 1 for image-to-video (the given picture is a block of its own) and n for
    text-to-video. Every roll-out, mask, cache and data check asks this object, nothing else knows a boundary.
    """

    block_frames: int
    first_frames: int = 1

    def __post_init__(self) -> None:
        if self.block_frames < 1 or self.first_frames < 1:
            raise ConfigError(
                f"block_frames={self.block_frames} and first_frames={self.first_frames} must be at least 1"
            )

    def check(self, num_frames: int, name: str = "num_latent_frames") -> None:
        """Raises ConfigError, naming the nearest valid values, unless `num_frames` ends on a block boundary."""
        if num_frames >= self.first_frames and self.is_boundary(num_frames):
            return
        below = self.first_frames + max(0, (num_frames - self.first_frames) // self.block_frames) * self.block_frames
        above = below + self.block_frames
        layout = f"[{self.first_frames}, {self.block_frames}, {self.block_frames}, ...]"
        raise ConfigError(f"{name}={num_frames} does not fit the block plan {layout}; set it to {below} or {above}")

    def is_boundary(self, frame: int) -> bool:
        """True when a block starts at `frame` (frame 0 included)."""
        return frame == 0 or (frame >= self.first_frames and (frame - self.first_frames) % self.block_frames == 0)

    def block_of(self, frame: int) -> tuple[int, int]:
        """The block `(start, end)` that holds `frame`."""
        if frame < self.first_frames:
            return 0, self.first_frames
        start = self.first_frames + (frame - self.first_frames) // self.block_frames * self.block_frames
        return start, start + self.block_frames

    def blocks(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yields `(start, end)` of the blocks from frame `start` on, for ever when `end` is None.

        Raises: ConfigError when `start` or `end` is not a boundary.
        """
        for frame in (start, end):
            if frame is not None and not self.is_boundary(frame):
                raise ConfigError(
                    f"frame {frame} is no block boundary of [{self.first_frames}, {self.block_frames}, ...]"
                )
        while end is None or start < end:
            block = self.block_of(start)
            yield block
            start = block[1]

    def num_blocks(self, num_frames: int) -> int:
        return len(list(self.blocks(0, num_frames)))

    def check_window(self, window_frames: int | None, sink_frames: int) -> None:
        """Raises ConfigError unless window and sink respect the block boundaries (the rule of recipes)."""
        if sink_frames < 0 or not self.is_boundary(sink_frames):
            below = self.block_of(sink_frames)[0] if sink_frames > 0 else 0
            above = self.block_of(max(sink_frames, 0))[1]
            raise ConfigError(f"sink_frames={sink_frames} must be 0 or a block boundary; set it to {below} or {above}")
        if window_frames is None:
            return
        n = self.block_frames
        room = window_frames - sink_frames
        fewest = max(1, -(-(self.first_frames - sink_frames) // n))  # a larger first block must fit, too
        if room < fewest * n or room % n:
            below = sink_frames + max(fewest, room // n) * n
            raise ConfigError(
                f"window_frames={window_frames} minus sink_frames={sink_frames} must be a multiple of "
                f"block_frames={n} (at least {fewest * n}); set window_frames to {below} or {below + n}"
            )

    def attended(self, start: int, end: int, window_frames: int | None, sink_frames: int) -> list[int]:
        """Absolute past frames that block `[start, end)` attends to, ascending (itself not included).

        Sink frames that exist, then the latest frames that fit the window; the window counts sink and current block.
        """
        if window_frames is None:
            return list(range(start))
        oldest = end - (window_frames - sink_frames)
        return [p for p in range(start) if p < sink_frames or p >= oldest]

    def causal_layout(
        self, num_frames: int, *, window_frames: int | None = None, sink_frames: int = 0, rope: str = "relative"
    ) -> MaskLayout:
        """Layout of one pass over `num_frames` frames, each block seeing itself and its attended past."""
        return self._layout(num_frames, window_frames, sink_frames, rope, teacher_forcing=False)

    def teacher_forcing_layout(
        self, num_frames: int, *, window_frames: int | None = None, sink_frames: int = 0, rope: str = "relative"
    ) -> MaskLayout:
        """Layout of `[clean F | noisy F]`: a noisy block sees itself and the clean frames it would find in the cache.

        Clean blocks see clean frames as in `causal_layout`. Source: spec of Self-Forcing's teacher forcing, extended
        to a first block of another size.
        """
        return self._layout(num_frames, window_frames, sink_frames, rope, teacher_forcing=True)

    def _layout(
        self, num_frames: int, window_frames: int | None, sink_frames: int, rope: str, *, teacher_forcing: bool
    ) -> MaskLayout:
        import torch

        self.check(num_frames)
        halves = 2 if teacher_forcing else 1
        frame_index = torch.arange(num_frames).repeat(halves)
        key_entry = list(range(halves * num_frames))
        key_position = frame_index.tolist()
        pairs: list[tuple[int, int, list[int]]] = []  # (first query entry, last query entry, key slots)
        for start, end in self.blocks(0, num_frames):
            if window_frames is not None and end - start > window_frames - min(sink_frames, start):
                # A cache refuses this block, so the mask that stands for it must not invent an answer.
                raise ConfigError(
                    f"the block of frames [{start}, {end}) does not fit window_frames={window_frames} beside "
                    f"sink_frames={sink_frames}; set window_frames to {end - start + min(sink_frames, start)} or more"
                )
            past = self.attended(start, end, window_frames, sink_frames)
            slots = list(past)
            # Relative RoPE: inside the attended list the sink sits right before the window. Attention only sees
            # differences of positions, so the sink moves up by the number of evicted frames instead.
            evicted = start - len(past)
            if rope == "relative" and evicted > 0:
                slots = [p for p in past if p >= sink_frames]
                for p in range(min(sink_frames, start)):
                    slots.append(len(key_entry))
                    key_entry.append(p)
                    key_position.append(p + evicted)
            for half in range(halves):
                offset = half * num_frames
                pairs.append((offset + start, offset + end, slots + list(range(offset + start, offset + end))))
        allowed = torch.zeros(halves * num_frames, len(key_entry), dtype=torch.bool)
        for first, last, slots in pairs:
            allowed[first:last, torch.tensor(slots)] = True
        return MaskLayout(frame_index, torch.tensor(key_entry), torch.tensor(key_position), allowed)


@dataclass(frozen=True, eq=False)
class Condition:
    """What a video is generated from. Compared by identity: another object means another condition.

    Fields: `text` [B, M, text_dim], rows past each prompt exactly zero; `image` [B, L_image, image_dim] CLIP tokens or
    None; `frames` [B, F_total, C_y, H, W] (mask channels first, then condition latents) by absolute frame, the last
    frame standing for all later ones, or None.
    Raises: ShapeError when ranks or batch sizes disagree.
    """

    text: Tensor
    image: Tensor | None = None
    frames: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor, rank in (("text", self.text, 3), ("image", self.image, 3), ("frames", self.frames, 5)):
            if tensor is None:
                continue
            if tensor.ndim != rank:
                raise ShapeError(
                    f"Condition.{name} has shape {tuple(tensor.shape)}; it must have {rank} dimensions, batch first"
                )
            if tensor.shape[0] != self.text.shape[0]:
                raise ShapeError(
                    f"Condition.{name} has batch {tensor.shape[0]} and text has batch {self.text.shape[0]}; "
                    "they must be equal"
                )

    @property
    def batch_size(self) -> int:
        return self.text.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """The same condition on another device (and in another floating-point type)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype or tensor.dtype)

        image = None if self.image is None else move(self.image)
        return Condition(move(self.text), image, None if self.frames is None else move(self.frames))

    def with_text(self, text: Tensor) -> Condition:
        """The same picture under other text (classifier-free guidance: same `frames`, same `image`)."""
        return replace(self, text=text)
