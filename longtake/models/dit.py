"""Wan's video transformer: one forward for the bidirectional teacher, masked causal training and cached streaming.

Parameter names are the original Wan ones, so that a state dict is a Wan checkpoint. Source: Wan2.1
(Wan-Video/Wan2.1 wan/modules/model.py) and its causal use in Self-Forcing, checked through the project's
specification A and E. This file must not know block plans, roll-outs, objectives or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longtake.errors import ConfigError, ShapeError
from longtake.models import attention
from longtake.models.attention import Attention
from longtake.models.block import Block, run_again
from longtake.models.cache import KVCache, Place, Reading
from longtake.models.call_checks import check_call
from longtake.models.contexts import CachedContext, CrossContext, MaskedContext, SelfContext
from longtake.models.layers import ImageEmbedding, Rotation, layer_norm, linear_fp32, rope_angles, sinusoid
from longtake.models.pass_graph import Made, PassGraphs
from longtake.models.recompute import made_before, together
from longtake.models.token_split import WHOLE, Share, TokenSplit, check_heads
from longtake.plan import StreamPlan
from longtake.structs import Condition, MaskLayout

# Contexts of one block's forward and of its recomputation in backward, as `torch.utils.checkpoint` asks for them
CheckpointContexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]

# Parts that Wan computes in float32; their weights stay there.
_FLOAT32_PARTS = (
    "time_embedding.",
    "time_projection.",
    "modulation",
    "norm",
    "head.",
    "img_emb.proj.0",
    "img_emb.proj.4",
)


def parameter_type(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a parameter in a model whose matrix products are in `dtype`."""
    keep = any(part in name for part in _FLOAT32_PARTS) and "norm_" not in name
    return torch.float32 if keep else dtype


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
            raise ConfigError(
                f"patch_size={self.patch_size} must be 1 in time: a frame is the unit of blocks and caches"
            )

    @property
    def head_width(self) -> int:
        return self.dim // self.num_heads

    @property
    def condition_channels(self) -> int:
        """Channels of `Condition.frames`: mask and condition latents (0 for text-to-video)."""
        return self.in_channels - self.out_channels

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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


class VideoDiT(nn.Module):
    """Wan's transformer. See `forward`; sizes in `config`; `new_cache` makes the cache for streaming."""

    # Records passes against a cache and replays them; None: every pass is run by Python.
    graphs: PassGraphs | None = None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
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
        # Blocks are recomputed in backward, each under the contexts that these give for its forward: `parallelize` says
        # what is kept nevertheless, shared roles say which updates are on.
        self.activation_checkpointing = False
        self.checkpoint_contexts: list[CheckpointContexts] = []
        # A roll-out's exit steps are recomputed and get their gradient together in the end: `parallelize` says where.
        self.exits_together = False
        # Entered around several calls between which no weight changes (`gathered`): `parallelize` says what it does.
        self.gathering: Callable[[], AbstractContextManager[None]] = nullcontext
        self.token_split: TokenSplit | None = None
        self._lent: tuple[tuple, KVCache] | None = None
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

    def set_attention(self, attend: Attention) -> None:
        """Replaces the attention entry of every self-attention."""
        for block in self.blocks:
            cast(Block, block).self_attn.attend = attend

    def set_token_split(self, split: TokenSplit | None) -> None:
        """From now on each call is computed by all processes of `split` together; caches made before do not fit.

        The attention entry sees all tokens, and of the heads those of this process; caches hold these alone.
        Raises: ConfigError when the heads cannot be divided equally.
        """
        check_heads(self.config.num_heads, 1 if split is None else split.size)
        self.token_split = split

    def gathered(self) -> AbstractContextManager[None]:
        """A context for several calls between which no weight changes: sharded weights are gathered once for them."""
        return self.gathering()

    def cast(self, dtype: torch.dtype) -> VideoDiT:
        """Casts the weights of matrix products to `dtype`; what Wan computes in float32 stays float32."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(parameter_type(name, dtype))
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
        weight = cast(Block, self.blocks[0]).self_attn.q.weight
        device = weight.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        return KVCache(
            num_layers=self.config.num_layers,
            batch_size=batch_size,
            tokens_per_frame=self.tokens_per_frame(*size),
            num_heads=self.config.num_heads // (1 if self.token_split is None else self.token_split.size),
            head_width=self.config.head_width,
            window_frames=plan.window_frames,
            sink_frames=plan.sink_frames,
            rope=plan.rope,
            max_frames=max_frames,
            spare_frames=spare_frames,
            device=device,
            dtype=dtype,
        )

    def lend_cache(self, *sizes: Any) -> KVCache:
        """As `new_cache`, with all its arguments by position, for one roll-out: with `graphs`, the cache that the
        roll-out before had, cleared, where it fits and no backward reads from it any more, so that what was recorded of
        its passes can be replayed.
        """
        if self.graphs is None:
            return self.new_cache(*sizes)
        key = (sizes, torch.is_autocast_enabled(), self.token_split)
        if self._lent is None or self._lent[0] != key or self._lent[1].is_held:
            self._lent = key, self.new_cache(*sizes)
            self._lent[1].passes.lent = True
        cache = self._lent[1]
        cache.clear()
        return cache

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        *,
        mask: MaskLayout | None = None,
        cache: KVCache | None = None,
        commit: bool = False,
        trace: Place | None = None,
        places: Sequence[Place] = (),
    ) -> Tensor:
        """Velocity (noise - clean) of noisy latents, float32 [B, E, C_out, H, W].

        Args: `x` [B, E, C, H, W] latents (E = F frames; 2F entries with a teacher-forcing mask); `sigma` [B] or [B, E]
        noise level in [0, 1]. With neither `mask` nor `cache` every frame sees every frame; a `mask` (made by
        `StreamPlan`) says who sees whom; with a `cache`, the frames are the block at `cache.position` and see the sink,
        the latest committed frames that fit the window, and themselves. `commit=True` stores their keys and values at
        the given `sigma` and advances `cache.position`; it needs `torch.no_grad()`. `trace`, the block's own place
        (`KVCache.place`), gets what each layer made of it, without gradient too. With such `places` of several blocks x
        and `sigma` are theirs as they were traced, one after the other: layers are run in backward alone.
        Raises: ShapeError when `x`, `sigma`, `condition` and the config do not fit; CacheError.
        """
        check_call(self.config, self.tokens_per_frame, x, sigma, condition, mask, cache, commit, trace, places)
        if cache is not None and torch.is_grad_enabled():
            if commit:
                cache.begin_commit(x.shape[1])  # says why not
            return self._forward_graded(x, sigma, condition, cache, places or (cache.place(x.shape[1]),))
        if cache is not None:
            return self._forward_cached(x, sigma, condition, cache, trace, commit=commit)
        share, rotation = self._share_and_rotation(x)
        if mask is not None:
            kit = self._mask_kit(mask, self.tokens_per_frame(*x.shape[3:]), x.device)
            frame_index = kit["frame_index"]
            query, key = Rotation(rotation(frame_index)), Rotation(rotation(kit["key_position"]))
            entry = None if mask.plain_keys else kit["key_entry"]
            context: SelfContext = MaskedContext(query, key, kit["mask"], entry, share)
        else:
            frame_index = torch.arange(x.shape[1], device=x.device)
            query = Rotation(rotation(frame_index))
            context = SelfContext(query, query, share)
        cross = self._fresh_cross(self._padded(condition.text), condition.image, None)
        return self._velocity(x, sigma, condition.frames, frame_index, context, cross)

    def _forward_graded(
        self, x: Tensor, sigma: Tensor, condition: Condition, cache: KVCache, places: Sequence[Place]
    ) -> Tensor:
        """The blocks at `places`, which leaves the cache as it is."""
        reading = Reading.joined([place.reading for place in places])
        context = self._cached_context(x, cache, reading, graded=True, commit=False)
        cross = self._fresh_cross(self._padded(condition.text), condition.image, None)
        made = [place.states for place in places]
        run_later = any(made)
        velocity = self._velocity(x, sigma, condition.frames, reading.frame_index, context, cross, made=made)
        return cache.hold(velocity, places) if self.activation_checkpointing or run_later else velocity

    def _forward_cached(
        self, x: Tensor, sigma: Tensor, condition: Condition, cache: KVCache, trace: Place | None, *, commit: bool
    ) -> Tensor:
        """The block at `cache.position`, without gradient."""
        entries = x.shape[1]
        reading = cache.read(entries, graded=False)
        kept = cache.has_cross(condition)
        texts = (None, None) if kept else (self._padded(condition.text), condition.image)
        if not kept:
            cache.clear_condition()  # a replayed pass writes others, and may not come to its end
        if commit:
            cache.begin_commit(entries)

        def work(
            x: Tensor,
            sigma: Tensor,
            frames: Tensor | None,
            text: Tensor | None,
            image: Tensor | None,
            room: Sequence[Tensor] | None = None,
        ) -> Made:
            context = self._cached_context(x, cache, reading, graded=False, commit=commit)
            cross = CrossContext(None, None, cache) if text is None else self._fresh_cross(text, image, cache)
            states: list[Tensor] = []

            def keep(made: Tensor) -> None:
                states.append(made if room is None else room[len(states)].copy_(made))

            keeping = None if trace is None else keep
            return self._velocity(x, sigma, frames, reading.frame_index, context, cross, trace=keeping), *states

        inputs = (x, sigma, condition.frames, *texts)
        form = (torch.is_autocast_enabled(x.device.type), *(None if t is None else t.shape for t in texts))
        if self.graphs is not None:
            addresses = (*(p.data_ptr() for p in self.parameters()), *cache.cross_addresses())
            kind = (reading.num_past, entries, commit, trace is not None, kept)
            agree = bool if self.token_split is None else self.token_split.agree
            again = kept or cache.has_space_for_cross(form)
            velocity, *states = self.graphs.run(work, kind, inputs, cache, addresses, agree, again=again)
        else:
            velocity, *states = work(*inputs)
        if trace is not None:
            trace.states[:] = states
        if not kept:
            cache.cross_is_for(condition, form)
        if commit:
            cache.end_commit(entries)
        return velocity

    def _cached_context(
        self, x: Tensor, cache: KVCache, reading: Reading, *, graded: bool, commit: bool
    ) -> CachedContext:
        share, rotation = self._share_and_rotation(x)
        query = Rotation(rotation(reading.query_position))
        # Relative positions rotate every attended key now; absolute ones rotate only the block's own, for good.
        key = Rotation(rotation(reading.key_position)) if cache.rope == "relative" else query
        return CachedContext(query, key, cache, reading, share, graded=graded, commit=commit)

    def _velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        frames: Tensor | None,
        frame_index: Tensor,
        context: SelfContext,
        cross: CrossContext,
        *,
        trace: Callable[[Tensor], None] | None = None,
        made: Sequence[list[Tensor]] = (),
    ) -> Tensor:
        """The network itself.

        Args: `frames` of the condition, of which entry e reads number `frame_index[e]`; `trace` is told what each layer
        makes; `made` has that of each of several blocks, from a call without gradient, or nothing; it is used up.
        """
        batch, entries, _, height, width = x.shape
        e, modulation = self._embed_time(sigma if sigma.ndim == 2 else sigma[:, None].expand(batch, entries))
        hidden = self._embed_patches(x, frames, frame_index, context.share)
        recomputed, once_more = torch.is_grad_enabled() and self.activation_checkpointing, any(made)
        for layer, block in enumerate(self.blocks):
            contexts = partial(together, self.checkpoint_contexts)
            if once_more:
                run = partial(run_again, block, context, layer, contexts()[1])
                states = torch.cat([of_block.pop(0) for of_block in made], 1)  # and so freed one by one
                inputs = (hidden, modulation, cross.text, cross.image)
                hidden = made_before(states, run, inputs, list(block.parameters()))
            elif recomputed:
                hidden = checkpoint(
                    block,
                    *(hidden, modulation, context, cross, layer),
                    use_reentrant=False,
                    context_fn=contexts,
                    preserve_rng_state=False,  # nothing in a block is random
                )
            else:
                hidden = block(hidden, modulation, context, cross, layer)
            if trace is not None:
                trace(hidden)
        _, ph, pw = self.config.patch_size
        return self._unpatchify(context.share.whole(self.head(hidden, e)), height // ph, width // pw)

    # ---- parts of forward -------------------------------------------------------------------------------------------
    def _embed_time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sigma [B, E] -> (e [B, E, D], modulation [B, E, 6, D]), all in float32."""
        embedded = sinusoid(sigma.double() * 1000.0, self.config.freq_dim)
        first, second = cast(nn.Linear, self.time_embedding[0]), cast(nn.Linear, self.time_embedding[2])
        e = linear_fp32(second, F.silu(linear_fp32(first, embedded)))
        modulation = linear_fp32(cast(nn.Linear, self.time_projection[1]), F.silu(e))
        return e, modulation.unflatten(-1, (6, -1))

    def _share_and_rotation(self, x: Tensor) -> tuple[Share, Callable[[Tensor], Tensor]]:
        """This process's part of a call with latents `x`, and the rotation angles of frame positions [S]."""
        rows, columns = x.shape[3] // self.config.patch_size[1], x.shape[4] // self.config.patch_size[2]
        rotation = partial(rope_angles, height=rows, width=columns, head_width=self.config.head_width)
        return WHOLE if self.token_split is None else self.token_split.share(rows * columns), rotation

    def _embed_patches(self, x: Tensor, frames: Tensor | None, frame_index: Tensor, share: Share) -> Tensor:
        """Latents and condition frames -> this process's tokens [B, E, l, D] in (frame, row, column) order, float32."""
        if frames is not None:
            index = frame_index.clamp(max=frames.shape[1] - 1)
            x = torch.cat([x, frames.index_select(1, index).to(x.dtype)], 2)
        _, ph, pw = self.config.patch_size
        patches = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph))  # [B, E, C, rows, ph, columns, pw]
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)  # [B, E, L, C * ph * pw]
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(share.take(patches).to(weight.dtype), weight, self.patch_embedding.bias).float()

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """[B, E, L, ph * pw * C_out], channel fastest -> [B, E, C_out, H, W]."""
        _, ph, pw = self.config.patch_size
        grid = tokens.unflatten(3, (ph, pw, -1)).unflatten(2, (rows, columns))  # [B, E, rows, columns, ph, pw, C]
        batch, entries = tokens.shape[:2]
        shape = (batch, entries, self.config.out_channels, rows * ph, columns * pw)
        # A copy, not a view: sharding hooks the output, and a hooked view turns a later in-place change into an error.
        return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(shape)

    def _padded(self, text: Tensor) -> Tensor:
        """[B, M, D_text] -> [B, text_len, D_text], with zero rows."""
        return F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1]))

    def _fresh_cross(self, text: Tensor, image: Tensor | None, cache: KVCache | None) -> CrossContext:
        """Padded text and CLIP tokens as context tokens [B, M, D], from which each block makes keys and values; they
        are kept in the cache, where there is one.
        """
        dtype = cast(nn.Linear, self.text_embedding[0]).weight.dtype
        embedded = self.text_embedding(text.to(dtype))
        image = None if image is None else self.img_emb(image).to(dtype)
        return CrossContext(embedded, image, cache)

    def _mask_kit(self, layout: MaskLayout, tokens: int, device: torch.device) -> dict:
        kits = self._masks.setdefault(layout, {})
        if (tokens, device) not in kits:
            moved = layout.to(device)
            kits[tokens, device] = {
                "mask": attention.make_mask(moved.allowed, tokens, device),
                "frame_index": moved.frame_index,
                "key_position": moved.key_position,
                "key_entry": moved.key_entry,
            }
        return kits[tokens, device]
