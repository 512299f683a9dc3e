"""One block of Wan's transformer.

Source: Wan2.1 (Wan-Video/Wan2.1 wan/modules/model.py), checked through the project's specification A. It must not know
caches, masks or roll-outs: contexts do (`contexts.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from longtake.models import attention
from longtake.models.attention import Attention
from longtake.models.context import CrossContext, SelfContext
from longtake.models.layers import RMSNorm, layer_norm

if TYPE_CHECKING:
    from longtake.models.cache import KVCache
    from longtake.models.sizes import DiTConfig


class SelfAttention(nn.Module):
    """Self-attention with normalised queries and keys over the whole width and rotary positions."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.attend: Attention = attention.attend

    def forward(self, x: Tensor, context: SelfContext, layer: int) -> Tensor:
        """x [B, E, l, D] -> the same: this process's tokens of each frame."""
        entries, heads = x.shape[1], (self.num_heads, -1)
        q, k = self.norm_q(self.q(x)).unflatten(-1, heads), self.norm_k(self.k(x)).unflatten(-1, heads)
        # From here on all tokens of the call, and where processes shard them, some of the heads: [B, E * L, n, K].
        q, k, v = (t.flatten(1, 2) for t in context.shard.to_heads(q, k, self.v(x).unflatten(-1, heads)))
        q = context.query(q)
        k, v, mask = context.extend(layer, k, v)
        out = self.attend(q, k.to(q.dtype), v.to(q.dtype), mask=mask)
        return self.o(context.shard.to_tokens(out.unflatten(1, (entries, -1))).flatten(3))


class CrossAttention(nn.Module):
    """Attention to text and, separately, to image tokens; the two results are added before the output projection."""

    def __init__(self, dim: int, num_heads: int, eps: float, *, image: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.image = image
        if image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)
        self.attend: Attention = attention.attend

    def project(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values: (k, v) [B, M, N, K] of the text, then (k_img, v_img) of the image tokens."""
        heads = (self.num_heads, -1)
        out = [self.norm_k(self.k(text)).unflatten(-1, heads), self.v(text).unflatten(-1, heads)]
        if self.image:
            assert image is not None
            out += [self.norm_k_img(self.k_img(image)).unflatten(-1, heads), self.v_img(image).unflatten(-1, heads)]
        return tuple(out)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, ...]) -> Tensor:
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))
        out = self.attend(q, keys_values[0].to(q.dtype), keys_values[1].to(q.dtype))
        if self.image:
            out = out + self.attend(q, keys_values[2].to(q.dtype), keys_values[3].to(q.dtype))
        return self.o(out.flatten(2))


class Block(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated MLP."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = SelfAttention(dim, config.num_heads, config.eps)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.cross_attn = CrossAttention(dim, config.num_heads, config.eps, image=config.image_dim is not None)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        self_context: SelfContext,
        cross_context: CrossContext,
        layer: int,
    ) -> Tensor:
        """x [B, E, l, D] float32, this process's tokens of each frame -> the same; `modulation` [B, E, 6, D]."""
        entries, tokens = x.shape[1], x.shape[2]
        dtype = cast(nn.Linear, self.ffn[0]).weight.dtype
        # [6][B, E, 1, D] in float32: shift, scale, gate of the attention, then of the MLP
        s1, c1, g1, s2, c2, g2 = (modulation + self.modulation.float()).unsqueeze(3).unbind(2)

        h = torch.addcmul(s1, layer_norm(x, self.eps), 1 + c1)
        x = torch.addcmul(x, self.self_attn(h.to(dtype), self_context, layer), g1)

        h = layer_norm(x, self.eps, self.norm3.weight, self.norm3.bias)
        cross = cross_context.keys_values(self.cross_attn, layer)
        x = x + self.cross_attn(h.flatten(1, 2).to(dtype), cross).unflatten(1, (entries, tokens))

        h = torch.addcmul(s2, layer_norm(x, self.eps), 1 + c2)
        return torch.addcmul(x, self.ffn(h.to(dtype)), g2)


def run_block(
    block: nn.Module,
    context: SelfContext,
    layer: int,
    cache: KVCache | None,
    around: AbstractContextManager,
    hidden: Tensor,
    modulation: Tensor,
    text: Tensor | None,
    image: Tensor | None,
) -> Tensor:
    """A block within `around`; the condition's context tokens are given by themselves, as inputs of the layer."""
    with around:
        return block(hidden, modulation, context, CrossContext(text, image, cache), layer)
