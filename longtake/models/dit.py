"""Wan's video transformer: one forward for the bidirectional teacher, masked causal training and cached streaming.

Parameter names are the original Wan ones, so that a state dict is a Wan checkpoint. Source: Wan2.1
(Wan-Video/Wan2.1 wan/modules/model.py) and its causal use in Self-Forcing, checked through the project's
specification A and E. This file must not know block plans, roll-outs, objectives or files.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longtake.condition import Condition, MaskLayout
from longtake.errors import ShapeError
from longtake.models.cache import CacheView, KVCache, Layers
from longtake.models.call_checks import check_call
from longtake.models.context import (
    CachedContext,
    CrossContext,
    MaskedContext,
    MaskOverCache,
    PreparedMask,
    SelfContext,
)
from longtake.models.execution import WHOLE_NETWORK, Execution
from longtake.models.fp8 import FP8Linear, Rows
from longtake.models.layers import (
    MLP,
    Head,
    ImageEmbedding,
    RMSNorm,
    Ungated,
    gated,
    gated_then_modulated,
    into,
    linear_fp32,
    read_clock,
    rope_turn,
    sinusoid,
    unturned,
)
from longtake.models.norms import added_then_modulated, at_once, gated_then_normed, kept_and_modulated, rms_norm
from longtake.models.sequence_parallel import NO_SPLIT, TokenShard, check_heads
from longtake.models.sizes import DiTConfig
from longtake.plan import StreamPlan

Context = MaskLayout | PreparedMask | MaskOverCache | CacheView | None

# Parts that Wan computes in float32; their weights stay there.
_FLOAT32_PARTS = (
    *("time_embedding.", "time_projection.", "modulation", "norm", "head."),
    *("img_emb.proj.0", "img_emb.proj.4"),
)


def parameter_type(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a parameter in a model whose matrix products are in `dtype`."""
    keep = any(part in name for part in _FLOAT32_PARTS) and "norm_" not in name
    return torch.float32 if keep else dtype


class SelfAttention(nn.Module):
    """Self-attention with normalised queries and keys over the whole width and rotary positions."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x: Tensor | Rows, context: SelfContext, layer: int) -> Tensor:
        """x [B, E, l, D] -> the same: this process's tokens of each frame."""
        entries, execution = x.shape[1], context.execution
        projected, norms = (self.q(x), self.k(x), self.v(x)), (self.norm_q, self.norm_k)
        q, k, v, mask = context.attended(layer, projected, norms, self.num_heads)
        out = execution.attend(q, k.to(q.dtype), v.to(q.dtype), mask=mask)
        return into(self.o, context.shard.to_tokens(out.unflatten(1, (entries, -1))).flatten(3), execution)


class CrossAttention(nn.Module):
    """Attention to text and, separately, to image tokens; the two results are added before the output projection."""

    def __init__(self, dim: int, num_heads: int, eps: float, *, image: bool) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.image = image
        if image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def project(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values: (k, v) [B, M, N, K] of the text, then (k_img, v_img) of the image tokens."""
        heads = (self.num_heads, -1)
        out = [self.norm_k(self.k(text)).unflatten(-1, heads), self.v(text).unflatten(-1, heads)]
        if self.image:
            assert image is not None
            out += [self.norm_k_img(self.k_img(image)).unflatten(-1, heads), self.v_img(image).unflatten(-1, heads)]
        return tuple(out)

    def forward(
        self, x: Tensor | Rows, parts: Sequence[tuple[int, tuple[Tensor, ...]]], tokens: int, execution: Execution
    ) -> Tensor:
        """x [B, E * tokens, D] -> the same. Args: `parts` as those of a `CrossContext`."""
        q = rms_norm(self.q(x), self.norm_q.weight, self.eps, execution).unflatten(-1, (self.num_heads, -1))
        queries = [q] if len(parts) == 1 else q.split([entries * tokens for entries, _ in parts], 1)
        made = [self._attended(part, kept, execution) for part, (_, kept) in zip(queries, parts, strict=True)]
        return into(self.o, (made[0] if len(made) == 1 else torch.cat(made, 1)).flatten(2), execution)

    def _attended(self, q: Tensor, keys_values: tuple[Tensor, ...], execution: Execution) -> Tensor:
        out = execution.attend(q, keys_values[0].to(q.dtype), keys_values[1].to(q.dtype))
        if self.image:
            out = out + execution.attend(q, keys_values[2].to(q.dtype), keys_values[3].to(q.dtype))
        return out


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
        self.ffn = MLP(dim, config.ffn_dim)

    def forward(
        self,
        x: Tensor | Ungated,
        modulation: Tensor,
        self_context: SelfContext,
        cross_context: CrossContext,
        layer: int,
        *,
        leaves_gate: bool = False,
    ) -> Tensor | Ungated:
        """x [B, E, l, D] float32, this process's tokens of each frame -> the same; `modulation` [B, E, 6, D].

        Args: `leaves_gate`: what reads the result adds the MLP's.
        """
        entries, tokens = x.shape[1], x.shape[2]
        layers = cast(tuple[nn.Linear, ...], (self.self_attn.q, self.cross_attn.q, self.ffn[0]))
        execution = self_context.execution
        own, across, within = (execution.entering(layer.weight) for layer in layers)
        # [6][B, E, 1, D] in float32: shift, scale, gate of the attention, then of the MLP
        s1, c1, g1, s2, c2, g2 = (modulation + self.modulation.float()).unsqueeze(3).unbind(2)

        if isinstance(x, Ungated):
            x, h = at_once(execution, gated_then_modulated)(*x, s1, c1, self.eps, own)
        else:
            x, h = kept_and_modulated(x, s1, c1, self.eps, own, execution)
        h = self.self_attn(h, self_context, layer)
        x, h = gated_then_normed(x, h, g1, self.norm3.weight, self.norm3.bias, self.eps, across, execution)
        cross = cross_context.parts(self.cross_attn, layer, entries)
        h = self.cross_attn(h.flatten(1, 2), cross, tokens, execution).unflatten(1, (entries, tokens))
        x, h = added_then_modulated(x, h, s2, c2, self.eps, within, execution)
        left = Ungated(x, self.ffn(h, execution), g2)
        return left if leaves_gate else execution.fused(gated)(*left)


class VideoDiT(nn.Module):
    """Wan's transformer. See `forward`; sizes in `config`; `new_cache` makes the cache for streaming."""

    def __init__(self, config: DiTConfig, execution: Execution = WHOLE_NETWORK) -> None:
        super().__init__()
        check_heads(config.num_heads, 1 if execution.split is None else execution.split.size)
        self.config, self.execution = config, execution
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim, config.image_positions)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self._masks: WeakKeyDictionary[MaskLayout, dict] = WeakKeyDictionary()
        if self.head.head.weight.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Wan's initialisation (specification A.5): Xavier, small embeddings, zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for sequence in (self.text_embedding, self.time_embedding):
            for layer in sequence:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def executed(self, execution: Execution) -> VideoDiT:
        """The same network, of the same modules, computed another way. Caches of another split do not fit.

        Raises: ConfigError when the heads cannot be divided equally over the processes of a split.
        """
        check_heads(self.config.num_heads, 1 if execution.split is None else execution.split.size)
        other = copy.copy(self)
        other.execution = execution
        return other

    def cast(self, dtype: torch.dtype) -> VideoDiT:
        """Casts the weights of matrix products to `dtype`; what Wan computes in float32 stays float32."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(parameter_type(name, dtype))
        return self

    def quantise(self) -> VideoDiT:
        """Keeps the MLPs' weights, and those of blocks' other layers that are large, as 8-bit floats (`fp8.py`)."""
        for block in self.blocks:
            for path, linear in list(block.named_modules()):
                if type(linear) is nn.Linear and self.config.quantises(linear.in_features, linear.out_features):
                    block.set_submodule(path, FP8Linear.of(linear))
        return self

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame. Raises: ShapeError unless height and width are multiples of the patch."""
        _, ph, pw = self.config.patch_size
        if height % ph or width % pw:
            raise ShapeError(f"latent height x width = {height}x{width} must be a multiple of the patch {ph}x{pw}")
        return (height // ph) * (width // pw)

    def new_cache(
        self,
        plan: StreamPlan,
        batch_size: int,
        size: tuple[int, int],
        max_frames: int | None = None,
        spare_frames: int = 0,
    ) -> KVCache:
        """An empty cache for videos of latents of `size` (H, W) that stream by `plan`.

        Args: `max_frames` latent frames of a video, for a plan without a window. `spare_frames` more frames are kept
        for recomputation in backward.
        Raises: ConfigError, ShapeError on sizes that cannot work.
        """
        weight = cast(Block, self.blocks[0]).self_attn.norm_q.weight  # keys are of its type
        device = weight.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        return KVCache(
            num_layers=self.config.num_layers,
            batch_size=batch_size,
            tokens_per_frame=self.tokens_per_frame(*size),
            num_heads=self.config.num_heads // (1 if self.execution.split is None else self.execution.split.size),
            head_width=self.config.head_width,
            window_frames=plan.window_frames,
            sink_frames=plan.sink_frames,
            rope=plan.rope,
            clock=plan.clock,
            max_frames=max_frames,
            spare_frames=spare_frames,
            device=device,
            dtype=dtype,
        )

    def check(self, x: Tensor, sigma: Tensor, condition: Condition, context: Context | KVCache = None) -> None:
        """Raises ShapeError when arguments of `forward`, or the cache of a view to come, and the config do not fit."""
        check_call(self.config, self.tokens_per_frame, x, sigma, condition, context)

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition, context: Context = None) -> Tensor:
        """Velocity (noise - clean) of noisy latents, float32 [B, E, C_out, H, W].

        Args: `x` [B, E, C, H, W] latents (E = F frames; up to 2F with a teacher-forcing mask); `sigma` [B] or [B, E]
        noise level in [0, 1]. `context` says who sees whom: None, every frame sees every frame; a mask of a
        `StreamPlan`, prepared or not, which may reach into a cache; or a view of a cache (`KVCache.view`): the frames
        are the block where the cache stands and see its past and themselves. `rollout/denoise.py` makes such calls, and
        moves the cache on.
        Raises: ShapeError when `x`, `sigma`, `condition`, `context` and the config do not fit.
        """
        self.check(x, sigma, condition, context)
        made_by = self.execution.made_by
        return (self.computed if made_by is None else partial(made_by, self))(x, sigma, condition, context)

    def computed(self, x: Tensor, sigma: Tensor, condition: Condition, context: Context = None) -> Tensor:
        """As `forward`, of arguments that fit: this is what the execution's `calls` make, or record."""
        frame_index, seen = self._self_context(x, context)
        cross = self._cross_context(condition, context)
        layers = context.layers if isinstance(context, CacheView) else None
        rounding = context.cache.clock if isinstance(context, CacheView | MaskOverCache) else "exact"
        return self._velocity(x, read_clock(sigma, rounding), condition.frames, frame_index, seen, cross, layers)

    def _velocity(
        self,
        x: Tensor,
        clock: Tensor,
        frames: Tensor | None,
        frame_index: Tensor,
        seen: SelfContext,
        cross: CrossContext,
        layers: Layers | None = None,
    ) -> Tensor:
        """The network itself; of the condition's `frames`, entry e reads number `frame_index[e]`."""
        batch, entries, _, height, width = x.shape
        e, modulation = self._embed_time(clock if clock.ndim == 2 else clock[:, None].expand(batch, entries))
        hidden: Tensor | Ungated = self._embed_patches(x, frames, frame_index, seen.shard)
        for layer, block in enumerate(self.blocks):
            hidden = self._run(block, layer, hidden, modulation, seen, cross, layers)
        if isinstance(hidden, Ungated):
            hidden = self.execution.fused(gated)(*hidden)
        _, ph, pw = self.config.patch_size
        return self._unpatchify(seen.shard.all_gather(self.head(hidden, e)), height // ph, width // pw)

    def _run(
        self,
        block: nn.Module,
        layer: int,
        hidden: Tensor | Ungated,
        modulation: Tensor,
        seen: SelfContext,
        cross: CrossContext,
        layers: Layers | None,
    ) -> Tensor | Ungated:
        """One block: as the caller wants it (`layers`), recomputed in backward, or as it is."""
        if self.execution.fuses and layers is None and not torch.is_grad_enabled():
            return block(hidden, modulation, seen, cross, layer, leaves_gate=True)
        assert isinstance(hidden, Tensor)
        if layers is not None:
            around, cache = self.execution.contexts()[1] if torch.is_grad_enabled() else nullcontext(), cross.cache

            def run(hidden: Tensor, modulation: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor:
                with around:  # the condition's tokens are inputs, for the gradient of what a backward runs again
                    return block(hidden, modulation, seen, CrossContext(text, image, cache), layer)

            return layers(block, run, (hidden, modulation, cross.text, cross.image))
        if torch.is_grad_enabled() and (again := self.execution.again(layer)):
            with self.execution.keeping(hidden):
                return checkpoint(
                    block,
                    *(hidden, modulation, seen, cross, layer),
                    use_reentrant=False,
                    context_fn=partial(self.execution.contexts, again),
                    preserve_rng_state=False,  # nothing in a block is random
                )
        return block(hidden, modulation, seen, cross, layer)

    def _self_context(self, x: Tensor, context: Context) -> tuple[Tensor, SelfContext]:
        """Absolute frames of the entries of `x`, and what their self-attention sees."""
        rows, columns = x.shape[3] // self.config.patch_size[1], x.shape[4] // self.config.patch_size[2]
        turn = partial(rope_turn, height=rows, width=columns, head_width=self.config.head_width)
        split = self.execution.split
        shard = NO_SPLIT if split is None else split.shard(rows * columns)

        def common(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, TokenShard, Execution]:
            """What every context has, from frame positions of queries and keys."""
            query = turn(queries)
            mine = shard.shard(query.unflatten(0, (-1, rows * columns))[None])[0]
            return mine, query if keys is queries else turn(keys), shard, self.execution

        if isinstance(context, CacheView):
            queries = context.query_position
            # Relative positions rotate every attended key now; absolute ones rotate only the block's own, for good.
            keys = context.key_position if context.cache.rope == "relative" else queries
            return context.frame_index, CachedContext(context, *common(queries, keys))
        past, offset = (context, context.offset) if isinstance(context, MaskOverCache) else (None, 0)
        if isinstance(context, MaskLayout | MaskOverCache):
            layout = context.layout if isinstance(context, MaskOverCache) else context
            context = self._prepared(layout, rows * columns, x.device)
        if isinstance(context, PreparedMask):
            mine, keys, shard, execution = common(context.frame_index, context.key_position)
            stored = None if past is None or past.cache.rope == "relative" else context.key_entry
            if stored is not None:  # frames of a cache among them are rotated already
                keys = unturned(keys, stored >= context.num_entries)
            return context.frame_index + offset, MaskedContext(context, past, mine, keys, shard, execution)
        frame_index = torch.arange(x.shape[1], device=x.device)
        return frame_index, SelfContext(*common(frame_index, frame_index))

    def _cross_context(self, condition: Condition, context: Context) -> CrossContext:
        """Where cross-attention finds the condition: context tokens [B, M, D], from which each block makes keys and
        values, or what the cache keeps of them.
        """
        view = context if isinstance(context, CacheView) else None
        if view is not None and view.cross_kept:
            return CrossContext(None, None, view.cache)
        dtype = cast(nn.Linear, self.text_embedding[0]).weight.dtype

        def tokens(text: Tensor) -> Tensor:
            return self.text_embedding(F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1])).to(dtype))

        image = None if condition.image is None else self.img_emb(condition.image).to(dtype)
        keeps = None if view is None or view.with_grad else view.cache
        later = None
        if isinstance(context, (MaskLayout, PreparedMask)) and context.later_from is not None:
            assert condition.later_text is not None
            later = context.later_from, tokens(condition.later_text)
        return CrossContext(tokens(condition.text), image, keeps, later, self.execution.runs())

    # ---- parts of forward -------------------------------------------------------------------------------------------
    def _embed_time(self, clock: Tensor) -> tuple[Tensor, Tensor]:
        """clock [B, E] -> (e [B, E, D], modulation [B, E, 6, D]), all in float32."""
        embedded = sinusoid(clock, self.config.freq_dim)
        first, second = cast(nn.Linear, self.time_embedding[0]), cast(nn.Linear, self.time_embedding[2])
        e = linear_fp32(second, F.silu(linear_fp32(first, embedded)))
        modulation = linear_fp32(cast(nn.Linear, self.time_projection[1]), F.silu(e))
        return e, modulation.unflatten(-1, (6, -1))

    def _embed_patches(self, x: Tensor, frames: Tensor | None, frame_index: Tensor, shard: TokenShard) -> Tensor:
        """Latents and condition frames -> this process's tokens [B, E, l, D] in (frame, row, column) order, float32."""
        if frames is not None:
            index = frame_index.clamp(max=frames.shape[1] - 1)
            x = torch.cat([x, frames.index_select(1, index).to(x.dtype)], 2)
        _, ph, pw = self.config.patch_size
        patches = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph))  # [B, E, C, rows, ph, columns, pw]
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)  # [B, E, L, C * ph * pw]
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(shard.shard(patches).to(weight.dtype), weight, self.patch_embedding.bias).float()

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """[B, E, L, ph * pw * C_out], channel fastest -> [B, E, C_out, H, W]."""
        _, ph, pw = self.config.patch_size
        grid = tokens.unflatten(3, (ph, pw, -1)).unflatten(2, (rows, columns))  # [B, E, rows, columns, ph, pw, C]
        batch, entries = tokens.shape[:2]
        shape = (batch, entries, self.config.out_channels, rows * ph, columns * pw)
        # A copy, not a view: sharding hooks the output, and a hooked view turns a later in-place change into an error.
        return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(shape)

    def _prepared(self, layout: MaskLayout, tokens: int, device: torch.device) -> PreparedMask:
        """A mask for frames of `tokens`, made once and forgotten with its layout."""
        known = self._masks.setdefault(layout, {})
        if (tokens, device) not in known:
            flex = self.execution.flex(device, self.config.head_width)
            joins = None if flex is not False else self.execution.joins
            known[tokens, device] = PreparedMask.of(layout, tokens, device, flex=flex, joins=joins)
        return known[tokens, device]
