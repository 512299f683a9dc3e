"""The sizes of a Wan transformer, which its parts, its files and its counts of operations follow from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from longtake.errors import ConfigError

# From so many weights on a product of 8-bit floats takes less time than it takes to quantise its input: on an H200 the
# MLP of 1.3B (1536 x 8960) gains, its other layers (1536 x 1536) do not.
_QUANTISED_WEIGHTS = 2**23


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a Wan transformer; `image_dim=None`: no CLIP branch; `in_channels - out_channels` = channels of y."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    model_type: str = "t2v"
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    image_dim: int | None = None
    image_positions: int | None = None
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(f"dim={self.dim} must split into num_heads={self.num_heads} heads of an even width")
        if self.patch_size[0] != 1:
            raise ConfigError(f"patch_size={self.patch_size} must be 1 in time: blocks consist of whole frames")

    @property
    def head_width(self) -> int:
        return self.dim // self.num_heads

    @property
    def condition_channels(self) -> int:
        """Channels of `Condition.frames`: mask and condition latents (0 for text-to-video)."""
        return self.in_channels - self.out_channels

    @property
    def vae_stride(self) -> int:
        """Pixels a latent pixel of the VAE whose latents have so many channels: 16 of TI2V-5B's, which has 48."""
        return 16 if self.out_channels == 48 else 8

    def quantises(self, inputs: int, outputs: int) -> bool:
        """Whether a linear layer of a block is quantised where 8-bit floats are asked for: the MLP, and large ones."""
        return self.ffn_dim in (inputs, outputs) or inputs * outputs >= _QUANTISED_WEIGHTS

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
