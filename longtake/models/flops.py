"""Floating-point operations of one call of the transformer and of its backward, 2 for a multiply-add.

Every matrix product of `models/dit.py` is listed once, with what its backward needs: the gradient of its input, that of
its weight, or both; so the counts are exact for all weights trained, for low-rank updates and for frozen weights. Tests
compare them with `torch.utils.flop_counter`. With D the width, M that of the MLP, L tokens and P pairs of a query and a
key token, a block costs 2 L (6 D^2 + 2 D M) + 4 D P (self) + 4 D L C (cross, C context tokens) + 4 C D^2.

Attention's backward counts twice its forward, what its mathematics needs; kernels that keep no scores compute them once
more. Norms, rotations and other element-wise operations are not counted.

Must know no stage and no device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longtake.condition import MaskLayout
    from longtake.config.groups import LoraConfig
    from longtake.models.sizes import DiTConfig


@dataclass(frozen=True)
class Work:
    """Operations, by kind of kernel; can be added and multiplied by a number."""

    products: float = 0.0
    attention: float = 0.0
    attention_backward: float = 0.0

    @property
    def total(self) -> float:
        """All operations that the mathematics needs."""
        return self.products + self.attention + self.attention_backward

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.attention_backward + other.attention_backward,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(self.products * factor, self.attention * factor, self.attention_backward * factor)


@dataclass(frozen=True)
class Call:
    """Sizes of one call: `batch` videos of `entries` frames with `tokens` each.

    Fields: `pairs`, pairs of query and key tokens of a video's self-attention; `context_tokens` of text (padded) and
    `image_tokens` of CLIP; `with_context` False where the keys and values of both are kept from an earlier call.
    """

    batch: int
    entries: int
    tokens: int
    pairs: float
    text_tokens: int
    image_tokens: int = 0
    with_context: bool = True

    @property
    def all_tokens(self) -> int:
        """Tokens of all videos and frames."""
        return self.batch * self.entries * self.tokens

    @property
    def context_tokens(self) -> int:
        """Tokens that cross-attention sees."""
        return self.text_tokens + self.image_tokens

    @classmethod
    def bidirectional(cls, batch: int, frames: int, tokens: int, text_tokens: int, image_tokens: int = 0) -> Call:
        """Every frame sees every frame."""
        return cls(batch, frames, tokens, (frames * tokens) ** 2, text_tokens, image_tokens)

    def masked(self, layout: MaskLayout) -> Call:
        """The same tokens under a mask of this layout, the masked pairs left out as block-sparse kernels do."""
        return replace(self, entries=layout.num_entries, pairs=int(layout.allowed.sum()) * self.tokens**2)

    def cached(self, frames: int, past_frames: int, *, with_context: bool) -> Call:
        """A block of `frames` that sees itself and `past_frames` of a cache."""
        pairs = frames * (past_frames + frames) * self.tokens**2
        return replace(self, entries=frames, pairs=pairs, with_context=with_context)

    @classmethod
    def joined(cls, calls: Sequence[Call]) -> Call:
        """Several such blocks in one call."""
        sums = {name: sum(getattr(call, name) for call in calls) for name in ("entries", "pairs")}
        return replace(calls[0], **sums)


@dataclass(frozen=True)
class _Product:
    """[rows, inputs] x [inputs, outputs]; `to_input` where backward goes on to what came before."""

    rows: int
    inputs: int
    outputs: int
    to_input: bool = True
    name: str = ""

    def __call__(self, lora: LoraConfig | None) -> tuple[float, float]:
        """Operations forward and backward; with `lora` the weight is frozen and its update, if it has one, is added."""
        cost = 2.0 * self.rows * self.inputs * self.outputs
        if lora is None:
            return cost, cost * (1 + self.to_input)
        down, up = (2.0 * self.rows * lora.rank * width for width in (self.inputs, self.outputs))
        if not self.name or (lora.targets is not None and self.name not in lora.targets):
            return cost, cost * self.to_input
        return cost + down + up, (cost + down) * self.to_input + down + 2 * up


def _block(config: DiTConfig, call: Call, *, first: bool, lora: LoraConfig | None) -> Iterator[_Product]:
    """`first`: nothing before the first block is trained with low-rank updates, so no gradient goes there."""
    dim, tokens = config.dim, call.all_tokens
    before = lora is None
    for name in "qkv":
        yield _Product(tokens, dim, dim, before or not first, f"self_attn.{name}")
    yield _Product(tokens, dim, dim, name="self_attn.o")
    yield _Product(tokens, dim, dim, name="cross_attn.q")
    if call.with_context:
        for name in "kv":
            yield _Product(call.batch * call.text_tokens, dim, dim, before, f"cross_attn.{name}")
            if call.image_tokens:
                yield _Product(call.batch * call.image_tokens, dim, dim, before, f"cross_attn.{name}_img")
    yield _Product(tokens, dim, dim, name="cross_attn.o")
    yield _Product(tokens, dim, config.ffn_dim, name="ffn.0")
    yield _Product(tokens, config.ffn_dim, dim, name="ffn.2")


def _outside(config: DiTConfig, call: Call, lora: LoraConfig | None) -> Iterator[_Product]:
    """Embeddings and head. Inputs of the embeddings are data."""
    dim, patch = config.dim, config.patch_size[1] * config.patch_size[2]
    frames, before = call.batch * call.entries, lora is None
    yield _Product(call.all_tokens, config.in_channels * patch, dim, False)
    yield _Product(frames, config.freq_dim, dim, False)
    yield _Product(frames, dim, dim, before)
    yield _Product(frames, dim, 6 * dim, before)
    if call.with_context:
        yield _Product(call.batch * call.text_tokens, config.text_dim, dim, False)
        yield _Product(call.batch * call.text_tokens, dim, dim, before)
        if (width := config.image_dim) is not None:
            yield _Product(call.batch * call.image_tokens, width, width, before)
            yield _Product(call.batch * call.image_tokens, width, dim, before)
    yield _Product(call.all_tokens, dim, config.out_channels * patch)


def _attention(config: DiTConfig, call: Call) -> float:
    """One block's forward: scores and weighted values, of both attentions."""
    cross = call.entries * call.tokens * call.context_tokens
    return 4.0 * config.dim * call.batch * (call.pairs + cross)


def _attention_backward(config: DiTConfig, call: Call, lora: LoraConfig | None) -> float:
    """One block's backward. Gradients of frozen keys or values of the context are not needed: half a forward each."""
    cost, tokens = 4.0 * config.dim * call.batch, call.entries * call.tokens
    total = 2.0 * call.pairs
    for count, suffix in ((call.text_tokens, ""), (call.image_tokens, "_img")):
        names = [f"cross_attn.{part}{suffix}" for part in "kv"]
        trained = sum(lora is None or lora.targets is None or name in lora.targets for name in names)
        total += tokens * count * (1 + trained / 2)
    return cost * total


def _products(config: DiTConfig, call: Call, lora: LoraConfig | None) -> tuple[float, float]:
    """Forward and backward of all matrix products."""
    blocks = [list(_block(config, call, first=first, lora=lora)) for first in (True, False)]
    costs = [[product(lora) for product in block] for block in blocks]
    costs.append([product(lora) for product in _outside(config, call, lora)])
    (f1, b1), (f2, b2), (f3, b3) = ((sum(f for f, _ in part), sum(b for _, b in part)) for part in costs)
    rest = config.num_layers - 1
    return f1 + rest * f2 + f3, b1 + rest * b2 + b3


def products(config: DiTConfig, call: Call) -> Counter[tuple[int, int, int]]:
    """The matrix products of one forward by (rows, inputs, outputs), and how often each occurs."""
    found: Counter[tuple[int, int, int]] = Counter()
    for count, part in (
        (config.num_layers, _block(config, call, first=False, lora=None)),
        (1, _outside(config, call, None)),
    ):
        for product in part:
            found[product.rows, product.inputs, product.outputs] += count
    return found


def attentions(config: DiTConfig, call: Call) -> Counter[tuple[int, int]]:
    """The attentions of one forward by tokens of a video's (queries, keys), and how often each occurs."""
    queries = call.entries * call.tokens
    keys = [round(call.pairs / queries), call.text_tokens, *([call.image_tokens] if call.image_tokens else [])]
    return Counter({(queries, count): config.num_layers * keys.count(count) for count in keys})


def forward(config: DiTConfig, call: Call, lora: LoraConfig | None = None) -> Work:
    """One forward, with unmerged low-rank updates where `lora` is given."""
    return Work(_products(config, call, lora)[0], config.num_layers * _attention(config, call))


def backward(config: DiTConfig, call: Call, lora: LoraConfig | None = None) -> Work:
    """The backward of one forward in which all weights are trained, or their low-rank updates; no recomputation."""
    attention = config.num_layers * _attention_backward(config, call, lora)
    return Work(_products(config, call, lora)[1], attention_backward=attention)
