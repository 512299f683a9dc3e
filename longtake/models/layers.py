"""Parts of the transformer that carry no state: embeddings, norms, rotary positions, MLPs.

Source: Wan2.1 (Wan-Video/Wan2.1 wan/modules/model.py, checked through the project's specification A.3, A.4). What the
original computes in float32 is computed in float32 here, under autocast as well.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Wan's timestep embedding: [..., width] float32 from a clock in [0, 1000]; cosines first, float64 inside."""
    half = width // 2
    frequency = torch.pow(10000.0, -torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer` applied in float32, whatever type its weights have and whether autocast is on or not."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return F.linear(x.float(), layer.weight.float(), bias)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Layer norm over the last axis in float32, result float32."""
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width D (before splitting heads); statistics in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # which would have x copied to float32; statistics are so
            return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight.to(x.dtype)


def rope_angles(frames: Tensor, height: int, width: int, head_width: int) -> Tensor:
    """Rotation angles [S * height * width, K/2] in float64 for tokens of S frames at the given frame positions.

    Args: `frames` [S] frame positions (any integer or float type, on the device of the result); patch rows and
    columns. The complex pairs of a head are split time | rows | columns as K - 4 (K//6), 2 (K//6), 2 (K//6) channels.
    Angles are computed, not looked up: no position is out of range. Source: Wan2.1 `rope_params`, `rope_apply`.
    """
    side = 2 * (head_width // 6)
    device = frames.device

    def axis(position: Tensor, channels: int) -> Tensor:
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        return position.double()[:, None] * torch.pow(10000.0, -exponent)

    shape = (frames.numel(), height, width)
    time = axis(frames, head_width - 2 * side)[:, None, None].expand(*shape, -1)
    rows = axis(torch.arange(height, device=device), side)[None, :, None].expand(*shape, -1)
    columns = axis(torch.arange(width, device=device), side)[None, None, :].expand(*shape, -1)
    return torch.cat([time, rows, columns], -1).flatten(0, 2)


class Rotation:
    """Cosines and sines of a set of token positions, ready to rotate [B, L, N, K]."""

    def __init__(self, angles: Tensor) -> None:
        self.cos, self.sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        self.turn = torch.complex(self.cos, self.sin)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates adjacent channel pairs; float32 inside, the type of `x` outside."""
        pairs = x.float().unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():  # which makes no code for complex numbers
            even, odd = pairs.unbind(-1)
            turned = torch.stack([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], -1)
        else:
            turned = torch.view_as_real(torch.view_as_complex(pairs) * self.turn)
        return turned.flatten(-2).to(x.dtype)


class ImageEmbedding(nn.Module):
    """CLIP tokens [B, L, image_dim] -> context tokens [B, L, D]; two images carry a learned position each."""

    def __init__(self, image_dim: int, dim: int, num_positions: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )
        self.emb_pos = None if num_positions is None else nn.Parameter(torch.zeros(1, num_positions, image_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.emb_pos is not None:
            tokens = tokens + self.emb_pos
        first, last = cast(nn.LayerNorm, self.proj[0]), cast(nn.LayerNorm, self.proj[4])
        x = layer_norm(tokens, first.eps, first.weight, first.bias)
        x = self.proj[3](self.proj[2](self.proj[1](x.to(cast(nn.Linear, self.proj[1]).weight.dtype))))
        return layer_norm(x, last.eps, last.weight, last.bias)
