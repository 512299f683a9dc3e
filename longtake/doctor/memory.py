"""Bytes that networks, optimizers, caches and activations take, as functions of shapes; nothing is built or loaded.

Exact (tests compare with allocated bytes): parameters P, AdamW's state 8 P + 4 for each tensor, the average 4 P, and
the cache: two buffers [layers, B, slots, tokens, D], two of what one layer attends to, and the cross-attention's keys
and values of text and CLIP tokens. Slots are window + spare frames, or the whole video without a window.

Estimated from the operations of `models/dit.py`, within 5 % on a CPU: what one transformer block keeps for backward.
With D the width and M the hidden width of the MLP, a token keeps

    float32:   4 (22 D + 2 M) bytes                   2 D more with CLIP tokens
    bfloat16:  64 D + 4 M bytes (under autocast)       4 D more with CLIP tokens

and each attended past frame of a roll-out 2 D values a token and layer. With activation checkpointing a layer keeps
its float32 input, 4 D bytes a token, and one block at a time is recomputed. Under autocast float32 matrices also have
bfloat16 copies. A rank with whole weights keeps those of every trained network until the loss is there, because torch
caches them; where weights are sharded they are made anew in each call (`InPrecision`), so that one block's are there at
a time, or without recomputation those of every graded call.

What comes and goes is not all there at once. An update has a moment at the end of its forward, with the copies and
what one pass without gradient holds (the scores), and one in its backward, with gradients and the block that is
recomputed; its gradients are dropped before the other network is updated. A stage needs the moment that needs most
(`need.py`). On one H200 these moments were within -1 and 5 % of what was allocated (docs/log.md, 2026-11-26).

Loading fills shards from the files (`distributed/materialize.py`); only random first weights are whole on each rank.

Must know no file and no device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longtake.config import LoraConfig
    from longtake.models.dit import DiTConfig
    from longtake.plan import StreamPlan

_FLOAT, _BF16 = 4, 2
_INT8_BLOCK, _INT8_FROM = 256, 4096  # numbers with one scale; the smallest tensor that has any (train/moments.py)
VAE_WIDTH = 96  # `base_dim` of Wan2.1's VAE


@dataclass(frozen=True)
class _Shape:
    """Numbers in one parameter and in a row of it; `cast` is False for what `VideoDiT.cast` leaves in float32."""

    numel: int
    cast: bool = True
    row: int = 1


def _linear(inputs: int, outputs: int, *, cast: bool = True) -> list[_Shape]:
    return [_Shape(inputs * outputs, cast, inputs), _Shape(outputs, cast)]


def _norm(width: int) -> list[_Shape]:
    return [_Shape(width, False)] * 2


def _block(config: DiTConfig) -> list[_Shape]:
    dim = config.dim
    attention = _linear(dim, dim) * 4 + [_Shape(dim)] * 2  # q, k, v, o and the norms of q and k
    image = _linear(dim, dim) * 2 + [_Shape(dim)] if config.image_dim is not None else []
    mlp = _linear(dim, config.ffn_dim) + _linear(config.ffn_dim, dim)
    return [_Shape(6 * dim, False, 6 * dim), *_norm(dim), *attention, *attention, *image, *mlp]


def _outside(config: DiTConfig) -> list[_Shape]:
    dim, patch = config.dim, config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    shapes = _linear(config.in_channels * patch, dim)
    shapes += _linear(config.text_dim, dim) + _linear(dim, dim)
    shapes += _linear(config.freq_dim, dim, cast=False) + _linear(dim, dim, cast=False)
    shapes += _linear(dim, 6 * dim, cast=False)
    if (width := config.image_dim) is not None:
        shapes += _norm(width) + _linear(width, width) + _linear(width, dim) + _norm(dim)
        if (positions := config.image_positions) is not None:
            shapes += [_Shape(positions * width, row=positions * width)]
    return [*shapes, *_linear(dim, config.out_channels * patch, cast=False), _Shape(2 * dim, False, 2 * dim)]


def _shapes(config: DiTConfig) -> Iterator[_Shape]:
    for _ in range(config.num_layers):
        yield from _block(config)
    yield from _outside(config)


def _trained(config: DiTConfig, lora: LoraConfig | None) -> Iterator[_Shape]:
    """What is trained of a transformer: everything, or factors [rank, in] and [out, rank] of each updated layer."""
    if lora is None:
        yield from _shapes(config)
        return
    dim, hidden = config.dim, config.ffn_dim
    layers = {f"{part}.{name}": (dim, dim) for part in ("self_attn", "cross_attn") for name in "qkvo"}
    layers |= {"ffn.0": (dim, hidden), "ffn.2": (hidden, dim)}
    if config.image_dim is not None:
        layers |= dict.fromkeys(("cross_attn.k_img", "cross_attn.v_img"), (dim, dim))
    for name, widths in layers.items():
        if lora.targets is None or name in lora.targets:
            inputs, outputs = widths
            yield from [_Shape(lora.rank * inputs, row=inputs), _Shape(lora.rank * outputs, row=lora.rank)] * (
                config.num_layers
            )


def parameter_count(config: DiTConfig) -> int:
    """Parameters of a transformer."""
    return trained_count(config, None)


def trained_count(config: DiTConfig, lora: LoraConfig | None) -> int:
    """Parameters that are trained: all, or those of low-rank updates."""
    return sum(shape.numel for shape in _trained(config, lora))


def tensor_count(config: DiTConfig) -> int:
    """Parameter tensors of a transformer."""
    return sum(1 for _ in _shapes(config))


def weight_bytes(config: DiTConfig, precision: str = "fp32") -> int:
    """The weights; with `bf16` after `VideoDiT.cast`, which leaves some in float32."""
    bf16 = precision == "bf16"
    return sum(shape.numel * (_BF16 if bf16 and shape.cast else _FLOAT) for shape in _shapes(config))


def master_bytes(config: DiTConfig, lora: LoraConfig | None = None, masters: str = "float32") -> int:
    """What is trained, and as much again its gradients; `bfloat16` masters are `VideoDiT.cast_blocks`."""
    if lora is not None or masters == "float32":
        return _FLOAT * trained_count(config, lora)
    halved = config.num_layers * sum(shape.numel for shape in _block(config) if shape.cast)
    return _FLOAT * parameter_count(config) - (_FLOAT - _BF16) * halved


def optimizer_bytes(config: DiTConfig, lora: LoraConfig | None = None, moments: str = "float32") -> int:
    """AdamW: two moments and a step counter for each tensor that is trained.

    A moment is float32, or with `int8` a byte a number and a float32 scale for each 256 where `train/moments.py` can.
    """
    return sum(_FLOAT + 2 * _moment_bytes(shape, moments) for shape in _trained(config, lora))


def _moment_bytes(shape: _Shape, moments: str) -> int:
    if moments == "int8" and shape.numel >= _INT8_FROM and shape.row % _INT8_BLOCK == 0:
        return shape.numel + _FLOAT * (shape.numel // _INT8_BLOCK)
    return _FLOAT * shape.numel


def autocast_bytes(config: DiTConfig, lora: LoraConfig | None = None, masters: str = "float32") -> int:
    """The bfloat16 copies that autocast makes of the float32 matrices that are trained."""
    outside = _outside(config) if lora is None and masters == "bfloat16" else _trained(config, lora)
    return _BF16 * sum(shape.numel for shape in outside if shape.cast)


def gathered_bytes(config: DiTConfig, world_size: int) -> int:
    """What sharding needs beside the shards: two blocks gathered (the next one early), one block's gradients, the
    root. Zero for one rank.
    """
    if world_size == 1:
        return 0
    block, outside = (sum(shape.numel for shape in part) for part in (_block(config), _outside(config)))
    return _FLOAT * (3 * block + outside)


@dataclass(frozen=True)
class Clip:
    """What passes through a network at once: batch, latent frames, tokens of a frame, tokens of the two contexts;
    `pixels` of a frame.
    """

    batch: int
    frames: int
    tokens: int
    text_tokens: int
    image_tokens: int = 0
    pixels: int = 0


def cache_bytes(
    config: DiTConfig, clip: Clip, *, window_frames: int | None, spare_frames: int = 0, precision: str = "fp32"
) -> int:
    """A cache of `VideoDiT.new_cache` for a clip, cross-attention included; `clip.frames` counts without a window."""
    attended = clip.frames if window_frames is None else window_frames
    slots = attended if window_frames is None else window_frames + spare_frames
    frame = clip.batch * clip.tokens * config.dim
    context = clip.batch * (clip.text_tokens + clip.image_tokens) * config.dim
    numbers = 2 * (config.num_layers * (slots * frame + context) + attended * frame)
    return numbers * (_BF16 if precision == "bf16" else _FLOAT)


def block_bytes_per_token(config: DiTConfig, precision: str) -> int:
    """What one transformer block keeps for backward, a token; the formulas above."""
    image = config.image_dim is not None
    if precision == "bf16":
        return (68 if image else 64) * config.dim + 4 * config.ffn_dim
    return _FLOAT * ((24 if image else 22) * config.dim + 2 * config.ffn_dim)


def _context_bytes(config: DiTConfig, clip: Clip, precision: str) -> int:
    """What a layer keeps of text and CLIP tokens: keys before and after their norm, and values."""
    width = 14 if precision == "bf16" else 4 * _FLOAT
    return clip.batch * (clip.text_tokens + clip.image_tokens) * width * config.dim


def _ends_bytes(config: DiTConfig, clip: Clip) -> int:
    """What patch embedding and head keep, in float32."""
    patch = config.patch_size[1] * config.patch_size[2]
    return _FLOAT * clip.batch * clip.frames * clip.tokens * (4 * config.dim + config.in_channels * patch)


@dataclass(frozen=True)
class Activations:
    """Bytes that graded calls keep: `stored` until their backward, `last` of them by the call whose backward is first,
    and `layer` where a block is computed again.
    """

    stored: int
    last: int
    layer: int = 0

    @property
    def total(self) -> int:
        return self.stored + self.layer

    def beside(self, other: Activations) -> Activations:
        """Of both, where those of `other` have their backward first."""
        return Activations(self.stored + other.stored, other.last, max(self.layer, other.layer))


def pass_bytes(config: DiTConfig, clip: Clip, *, precision: str, checkpointing: bool) -> Activations:
    """Activations of one graded forward over `clip.frames` entries, and of the recomputation in its backward."""
    tokens = clip.batch * clip.frames * clip.tokens
    layer = tokens * block_bytes_per_token(config, precision) + _context_bytes(config, clip, precision)
    inputs = config.num_layers * (_FLOAT * config.dim * tokens if checkpointing else layer)
    return Activations(inputs + _ends_bytes(config, clip), inputs, layer if checkpointing else 0)


def roll_out_bytes(
    config: DiTConfig,
    clip: Clip,
    plan: StreamPlan,
    *,
    given_frames: int,
    precision: str,
    checkpointing: bool,
    together: bool = False,
) -> Activations:
    """Activations of a graded roll-out: every block's exit step, each with the past that it attended to.

    `together` they are recomputed at once, in any case, with two float32 copies of all attended keys while these are
    rotated.
    """
    size = _BF16 if precision == "bf16" else _FLOAT
    total = largest = inputs = all_inputs = all_layers = 0
    for start, end in plan.blocks(given_frames, clip.frames):
        one = Clip(clip.batch, end - start, clip.tokens, clip.text_tokens, clip.image_tokens)
        past = len(plan.attended(start, end))
        keys = clip.batch * past * clip.tokens * 2 * config.dim * size
        tokens = one.batch * one.frames * one.tokens
        layer = tokens * block_bytes_per_token(config, precision) + keys + _context_bytes(config, one, precision)
        inputs = config.num_layers * (_FLOAT * config.dim * tokens if checkpointing or together else layer)
        total += inputs + _ends_bytes(config, one)
        largest = max(largest, layer)
        attended = clip.batch * (past + one.frames) * clip.tokens * config.dim
        all_inputs, all_layers = all_inputs + inputs, all_layers + layer + 2 * _FLOAT * attended
    if together:
        return Activations(total, all_inputs, all_layers)
    return Activations(total, inputs, largest if checkpointing else 0)


def left_bytes(config: DiTConfig, clip: Clip, plan: StreamPlan, given_frames: int) -> int:
    """Where recorded exit steps leave what each layer makes, in float32: once for each length of a block."""
    lengths = {end - start for start, end in plan.blocks(given_frames, clip.frames)}
    return _FLOAT * config.num_layers * config.dim * clip.batch * clip.tokens * sum(lengths)


def working_bytes(config: DiTConfig, clip: Clip, precision: str) -> int:
    """What a forward without gradient holds at once: the stream, a norm, q, k, v and float32 copies, the MLP."""
    size = _BF16 if precision == "bf16" else _FLOAT
    return clip.batch * clip.frames * clip.tokens * (12 * config.dim + size * (4 * config.dim + 2 * config.ffn_dim))


def vae_bytes(clip: Clip, vae_width: int) -> tuple[int, int]:
    """Of the VAE in long tuning: what a decoder keeps from call to call, and what decoding and encoding hold beside.

    A pixel, for Wan2.1's VAE of width 96: 9458 bytes, counted; 18,000, of which 14,300 were counted (encoding) and the
    rest is what convolutions took on one H200.
    """
    pixels = clip.batch * clip.pixels * vae_width // VAE_WIDTH
    return 9458 * pixels, 18_000 * pixels


@dataclass(frozen=True)
class Networks:
    """Sizes of a stage's networks; None where it has none. `shown` is the teacher of the validation, held whole."""

    generator: DiTConfig
    critic: DiTConfig | None = None
    teacher: DiTConfig | None = None
    shown: DiTConfig | None = None

    @property
    def trained(self) -> list[DiTConfig]:
        return [network for network in (self.generator, self.critic) if network is not None]

    @property
    def loaded(self) -> list[DiTConfig]:
        """All networks."""
        return [n for n in (self.generator, self.critic, self.teacher, self.shown) if n is not None]
