"""Parts of the transformer that carry no state: embeddings, norms, rotary positions, MLPs.

Source: Wan2.1 (Wan-Video/Wan2.1 wan/modules/model.py, checked through the project's specification A.3, A.4). What the
original computes in float32 is computed in float32 here, under autocast as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.models.attention import has_triton
from longtake.models.execution import Execution
from longtake.models.fp8 import (
    FP8Linear,
    Rows,
    entering,
    gelu_quantised,
    gelu_quantised_once,
    quantised,
)
from longtake.models.gelu import mlp_with_gradient
from longtake.models.low_rank import Merging, Plain
from longtake.models.sizes import DiTConfig

_TOKENS_AT_ONCE = 8192  # enough for a GPU's products to be as fast as on all


def read_clock(sigma: Tensor, rounding: str) -> Tensor:
    """Noise levels -> the clock in [0, 1000] that the network reads, float64, rounded as `StreamPlan.clock` says."""
    clock = sigma.double() * 1000.0
    if rounding == "whole":
        return clock.round()
    return clock.bfloat16().double() if rounding == "bf16" else clock


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
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `RMSNorm`, with its weight given."""
    with torch.autocast(x.device.type, enabled=False):  # which would have x copied to float32; statistics are so
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight.to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor | Rows:
    """The norm of `x`, shifted and scaled, as it enters attention or MLP whose weights are of `dtype`."""
    return entering(torch.addcmul(shift, layer_norm(x, eps), 1 + scale), dtype)


def gated(x: Tensor, made: Tensor, gate: Tensor) -> Tensor:
    """`x` and the gated result of attention or MLP."""
    return torch.addcmul(x, made, gate)


class Ungated(NamedTuple):
    """Tokens `x` [B, E, l, D] to which a gated result is still to be added, which what reads them does on the way."""

    x: Tensor
    made: Tensor
    gate: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.x.shape


def gated_then_modulated(
    x: Tensor, made: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """`x` and the gated result of the MLP before, and the sum `modulated`."""
    x = gated(x, made, gate)
    return x, modulated(x, shift, scale, eps, dtype)


def gated_then_normed(
    x: Tensor, made: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """`x` and the gated result of self-attention, and the norm of the sum as it enters weights of `dtype`."""
    x = gated(x, made, gate)
    return x, entering(layer_norm(x, eps, weight, bias), dtype)


def added_then_modulated(
    x: Tensor, made: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | Rows]:
    """`x` and the result of cross-attention, and the sum `modulated`."""
    x = x + made
    return x, modulated(x, shift, scale, eps, dtype)


def rope_turn(frames: Tensor, height: int, width: int, head_width: int) -> Tensor:
    """How tokens of S frames at the given frame positions are `rotated`: [S * height * width, 1, K/2, 2], float32.

    Args: `frames` [S] frame positions (any integer or float type, on the device of the result); patch rows and
    columns. The complex pairs of a head are split time | rows | columns as K - 4 (K//6), 2 (K//6), 2 (K//6) channels.
    Angles are computed in float64, not looked up: no position is out of range. Source: Wan2.1 `rope_params` and
    `rope_apply`.
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
    angles = torch.cat([time, rows, columns], -1).flatten(0, 2)[:, None]
    return torch.stack([angles.cos().float(), angles.sin().float()], -1)


def unturned(turn: Tensor, stays: Tensor) -> Tensor:
    """`turn` [S * L, 1, K/2, 2] with frames that stay as they are, where `stays` [S]."""
    still = torch.tensor([1.0, 0.0], device=turn.device)
    by_frame = turn.unflatten(0, (stays.numel(), -1))
    return torch.where(stays[:, None, None, None, None], still, by_frame).flatten(0, 1)


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Adjacent channel pairs of `x` [B, ..., N, K] rotated; float32 inside, the type of `x` outside.

    Args: `turn` [..., 1, K/2, 2], the cosine and the sine of each pair's angle.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which makes no code for complex numbers
        sign = 2 * torch.arange(2, device=x.device) - 1
        turned = pairs * turn[..., :1] + pairs.flip(-1) * turn[..., 1:] * sign
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return turned.flatten(-2).to(x.dtype)


def into(layer: nn.Module, x: Tensor, execution: Execution) -> Tensor:
    """`layer` of `x`, which is quantised first, by a kernel of its own, where the layer is."""
    return layer(execution.fused(quantised)(x) if isinstance(layer, FP8Linear) else x)


class MLP(nn.Sequential):
    """A linear layer, GELU and another one. Called as one module, whatever computes it: sharded weights are gathered
    and given back around the call.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(nn.Linear(dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, dim))

    def forward(self, x: Tensor | Rows, execution: Execution) -> Tensor:  # type: ignore[override]
        """x [B, E, l, D] -> the same. Where `execution` fuses, GELU is part of the first product where no gradient is
        wanted, of one operator where one is, or of quantising the first product's result.
        """
        first, second = self[0], self[2]
        if isinstance(x, Rows):
            hidden = first(x)
            once = gelu_quantised_once(hidden.device) if execution.fuses and hidden.is_cuda and has_triton() else None
            return second((once or execution.fused(gelu_quantised))(hidden))
        alone = execution.fuses and execution.on_a_gpu(x) and x.dtype == torch.bfloat16
        if torch.is_grad_enabled():
            if not (alone and type(first) is nn.Linear and type(second) is nn.Linear):
                return super().forward(x)
            # Weights as autocast would round them
            weights = (tensor.to(x.dtype) for layer in (first, second) for tensor in (layer.weight, layer.bias))
            return mlp_with_gradient(x.flatten(0, -2), *weights).unflatten(0, x.shape[:-1])
        if isinstance(first, Merging):
            return _by_frames(partial(_mlp, first.plain() or first, _plain(second) or second, alone=alone), x)
        return _mlp(_plain(first) or first, _plain(second) or second, x, alone=alone)


def _plain(layer: nn.Module) -> Plain | None:
    """A layer as one product without gradient, where it is one of weights that are read as they are or merged."""
    if type(layer) is nn.Linear:
        return Plain(layer.weight, layer.bias)
    return layer.plain() if isinstance(layer, Merging) else None


def _mlp(first: Plain | nn.Module, second: Plain | nn.Module, x: Tensor, *, alone: bool) -> Tensor:
    if not (alone and isinstance(first, Plain)):
        return second(F.gelu(first(x), approximate="tanh"))
    # cuBLAS has GELU (tanh) behind its product, before it rounds; for other types torch would start two kernels.
    weight, bias = first.weight.to(x.dtype), first.bias.to(x.dtype)
    hidden = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return second(hidden.unflatten(0, x.shape[:-1]))


def _by_frames(layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`layers` of some frames of `x` [B, E, l, D] at a time: of a whole clip what is between them, wider than all else,
    would be most of what its scores take, where low-rank updates are trained because memory is scarce.
    """
    frames = max(1, _TOKENS_AT_ONCE // (x.shape[0] * x.shape[2]))
    if x.shape[1] <= frames:
        return layers(x)
    return torch.cat([layers(part) for part in x.split(frames, 1)], 1)


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


class Head(nn.Module):
    """Modulated projection to patches, in float32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        size = config.out_channels * config.patch_size[1] * config.patch_size[2]
        self.head = nn.Linear(config.dim, size)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (e[:, :, None] + self.modulation.float()).unsqueeze(3).unbind(2)
        return linear_fp32(self.head, layer_norm(x, self.eps) * (1 + scale) + shift)
