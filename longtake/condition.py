"""Sizes, masks and conditions: every size is derived here, once (block boundaries: `plan.py`).

Axes, the one legend: `B` batch, `F` latent frames, `E` entries of a forward (F, up to 2F in teacher forcing), `T` pixel
frames, `C` channels, `H W` latent height and width, `h w` pixel height and width, `L` tokens, `M` text tokens,
`D` model width, `N` heads, `K` head width. Latents are `[B, F, C, H, W]`; videos are uint8 `[T, h, w, 3]` for people
and float `[B, T, 3, h, w]` in [-1, 1] for encoders. Noise level `sigma` is in [0, 1], 1 = pure noise.

This file must know no model, no file format and no training stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from longtake.config.base import Settings
from longtake.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class VideoShape(Settings):
    """The size of videos, in pixels and in latents, and how fast they play."""

    height: int = Field(
        default=64, gt=0, le=8192, description="height in pixels, a multiple of twice the spatial stride of the VAE"
    )
    width: int = Field(
        default=64, gt=0, le=8192, description="width in pixels, a multiple of twice the spatial stride of the VAE"
    )
    num_latent_frames: int = Field(default=9, gt=0, description="latent frames of a clip; must end on a block boundary")
    fps: int = Field(
        default=16, gt=0, le=1000, description="frames a second, at which clips are read and videos are written"
    )
    temporal_stride: int = Field(default=4, gt=0, description="pixel frames a latent frame; must be that of the VAE")
    spatial_stride: int = Field(default=8, gt=0, description="pixels a latent pixel; must be that of the VAE")

    @model_validator(mode="after")
    def _check(self) -> Self:
        unit = 2 * self.spatial_stride
        for name in ("height", "width"):
            size = getattr(self, name)
            if size < unit or size % unit:
                below = max(unit, size // unit * unit)
                raise ConfigError(
                    f"{name}={size} must be a positive multiple of {unit}; set it to {below} or {below + unit}"
                )
        return self

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
    eviction, where the sink appears once more for every distance at which it is seen, and where frames of a cache are
    seen too, whose numbers in `key_entry` come after those of the entries. `later_from`: entries from this one on read
    the condition's `later_text` in place of its text; None = no entry does. `stored` [E]: entries that stand for what a
    cache holds, not for what is denoised; None = nobody asks.
    """

    frame_index: Tensor
    key_entry: Tensor
    key_position: Tensor
    allowed: Tensor
    later_from: int | None = None
    stored: tuple[bool, ...] | None = None

    @property
    def num_entries(self) -> int:
        return self.frame_index.numel()

    @property
    def plain_keys(self) -> bool:
        """True when key slot s is entry s (no extra copies)."""
        return self.key_entry.numel() == self.frame_index.numel()

    def to(self, device: torch.device | str) -> MaskLayout:
        tensors = ("frame_index", "key_entry", "key_position", "allowed")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass(frozen=True, eq=False)
class Condition:
    """What a video is generated from. Compared by identity: another object means another condition.

    Fields: `text` [B, M, text_dim], rows past each prompt exactly zero; `image` [B, L_image, image_dim] CLIP tokens or
    None; `frames` [B, F_total, C_y, H, W] (mask channels first, then condition latents) by absolute frame, the last
    frame standing for all later ones, or None; `later_text`, as `text`, what the later entries of a mask read
    (`MaskLayout.later_from`), or None.
    Raises: ShapeError when ranks or batch sizes disagree.
    """

    text: Tensor
    image: Tensor | None = None
    frames: Tensor | None = None
    later_text: Tensor | None = None

    def __post_init__(self) -> None:
        for name, rank in (("text", 3), ("image", 3), ("frames", 5), ("later_text", 3)):
            tensor = getattr(self, name)
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

    def __repr__(self) -> str:
        parts = {"text": self.text, "image": self.image, "frames": self.frames}
        sizes = (f"{name}={None if part is None else list(part.shape)}" for name, part in parts.items())
        return f"Condition({', '.join(sizes)})"

    @property
    def batch_size(self) -> int:
        return self.text.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """The same condition on another device (and in another floating-point type)."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype or tensor.dtype)

        return self._mapped(move)

    def rows(self, which: slice | list[int]) -> Condition:
        """That of some rows alone."""
        return self._mapped(lambda tensor: tensor[which])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Condition:
        parts = (getattr(self, field.name) for field in fields(self))
        return Condition(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    def with_text(self, text: Tensor) -> Condition:
        """The same picture under other text (classifier-free guidance: same `frames`, same `image`)."""
        return replace(self, text=text)
