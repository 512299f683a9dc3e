"""The heavy kernels by themselves: matrix products, attentions and convolutions of given shapes, their rates, and the
time that all of a pass or of a decoding take with nothing in between: the floor.

Nothing here calls a network of ours; a decoder of the library is run without data to see its convolutions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from longtake.bench.clock import seconds_of
from longtake.encoders.tiny import TinyNetwork, TinySizes
from longtake.models.attention import attend, attend_fastest, choose_kernels
from longtake.models.flops import Call, attentions, products
from longtake.models.fp8 import FP8Linear, quantised
from longtake.models.sizes import DiTConfig
from longtake.rollout.cuda_graphs import CUDAGraphCapture

_WIDEST = 256  # head that the fast kernels take; the VAE's one head is wider
_SMALL = 0.01  # of all operations
_SCRATCH_BYTES = (
    1 << 28
)  # several times a GPU's level-2 cache: what an operation reads is not there from the one before


class Scratch:
    """Random numbers that operations read, on a device in a type. Each tensor taken begins where the last one ended, so
    that no operation finds its inputs in a cache only because they are those of the operation before.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._all, self._next = torch.empty(0, device=device, dtype=dtype), 0

    def reserve(self, sizes: Iterable[int]) -> None:
        """Room for tensors of so many numbers; what was taken before is another's."""
        least = _SCRATCH_BYTES // self.dtype.itemsize if self.device.type == "cuda" else 0
        self._all = torch.randn(max(least, *sizes), device=self.device, dtype=self.dtype)

    def take(self, *shape: int) -> Tensor:
        """A tensor of this shape."""
        size = prod(shape)
        if self._next + size > self._all.numel():
            self._next = 0
        start, self._next = self._next, self._next + -(-size // 128) * 128  # kernels want aligned addresses
        return self._all[start : start + size].view(shape)


class Operation(Protocol):
    """One kernel: its name, its operations (2 a multiply-add), numbers of its largest input, and the work itself."""

    @property
    def name(self) -> str: ...
    @property
    def operations(self) -> float: ...
    @property
    def largest(self) -> int: ...
    def work(self, scratch: Scratch) -> Callable[[], Any]: ...


@dataclass(frozen=True)
class Product:
    """[rows, inputs] x [inputs, outputs] with a bias; of 8-bit floats where `fp8`."""

    rows: int
    inputs: int
    outputs: int
    fp8: bool = False

    @property
    def name(self) -> str:
        return f"matmul {self.rows}x{self.inputs}x{self.outputs}{' fp8' if self.fp8 else ''}"

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def largest(self) -> int:
        return max(self.rows * self.inputs, self.inputs * self.outputs)

    def work(self, scratch: Scratch) -> Callable[[], Any]:
        x, weight = scratch.take(self.rows, self.inputs), scratch.take(self.outputs, self.inputs)
        bias = scratch.take(self.outputs)
        if self.fp8:
            layer, rows = FP8Linear(quantised(weight), bias), quantised(x)
            return lambda: layer(rows)
        return lambda: F.linear(x, weight, bias)


@dataclass(frozen=True)
class Attention:
    """Of one video, by the fastest kernel without gradient."""

    queries: int
    keys: int
    heads: int
    width: int

    @property
    def name(self) -> str:
        return f"attention {self.queries}x{self.keys}"

    @property
    def operations(self) -> float:
        return 4.0 * self.queries * self.keys * self.heads * self.width

    @property
    def largest(self) -> int:
        return max(self.queries, self.keys) * self.heads * self.width

    def work(self, scratch: Scratch) -> Callable[[], Any]:
        q, k, v = (scratch.take(1, n, self.heads, self.width) for n in (self.queries, self.keys, self.keys))
        run = attend_fastest if self.width <= _WIDEST else attend
        return lambda: run(q, k, v)


@dataclass(frozen=True)
class Convolution:
    """Of an input [B, C, (T,) H, W] that is padded already, as `layout` has it in memory: as it is ("contiguous"),
    channels last, or ("frames") a convolution in space alone whose input has the taps in time stacked in its channels.
    Without a bias, which torch adds in a pass of its own and what follows a convolution can add as it reads.
    """

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        sizes = "x".join(map(str, self.shape[2:]))
        kernel = "x".join(map(str, self.weight[2:]))
        return f"convolution {kernel}, {self.shape[1]} to {self.weight[0]} channels, {sizes}"

    @property
    def operations(self) -> float:
        sizes = zip(self.shape[2:], self.weight[2:], self.stride, self.padding, strict=True)
        return 2.0 * self.shape[0] * prod((n + 2 * p - k) // s + 1 for n, k, s, p in sizes) * prod(self.weight)

    @property
    def largest(self) -> int:
        return max(3 * prod(self.shape), prod(self.weight))

    @property
    def layouts(self) -> list[str]:
        """Those that can be tried."""
        frames = len(self.weight) == 5 and self.stride[0] == 1 and self.padding[0] == 0 and self.shape[0] == 1
        return ["contiguous", "channels last", *(["frames"] if frames else [])]

    def work(self, scratch: Scratch) -> Callable[[], Any]:
        shape, weight, stride, padding = self.shape, self.weight, self.stride, self.padding
        if self.layout == "frames":
            taps = weight[2]
            shape = (shape[2] - taps + 1, taps * shape[1], *shape[3:])
            weight, stride, padding = (weight[0], taps * weight[1], *weight[3:]), stride[1:], padding[1:]
        x, w = (self._taken(scratch, sizes) for sizes in (shape, weight))
        convolve = F.conv3d if len(weight) == 5 else F.conv2d
        return lambda: convolve(x, w, None, stride, padding)

    def _taken(self, scratch: Scratch, shape: tuple[int, ...]) -> Tensor:
        if self.layout == "contiguous":
            return scratch.take(*shape)
        return scratch.take(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


# ---- what a pass and a decoding are made of --------------------------------------------------------------------------
def pass_operations(sizes: DiTConfig, call: Call, *, fp8: bool = False) -> Counter[Operation]:
    """The products and attentions of one call of a transformer, and how often each occurs; `fp8`: those of layers that
    are quantised are of 8-bit floats.
    """
    found: Counter[Operation] = Counter()
    for (rows, inputs, outputs), count in products(sizes, call).items():
        found[Product(rows, inputs, outputs, fp8 and sizes.quantises(inputs, outputs))] += count
    for (queries, keys), count in attentions(sizes, call).items():
        found[Attention(queries, keys, sizes.num_heads, sizes.head_width)] += count
    return found


class _Listener(TorchFunctionMode):
    """Notes the convolutions and attentions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Operation] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv2d, torch.conv3d):
            x, weight, _, stride, padding = args[:5]
            self.found[Convolution(tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding))] += 1
        elif func is F.scaled_dot_product_attention:
            query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
            batch, heads, queries, width = query.shape
            self.found[Attention(queries, key.shape[2], heads, width)] += batch
        return func(*args, **(kwargs or {}))


def decode_operations(module: Any, latents: int, height: int, width: int) -> Counter[Operation]:
    """The convolutions and attentions by which a library's VAE decodes the next `latents` of a running video at once.

    Args: `height`, `width` of the latents. Only the configuration of `module` is read.
    """
    with torch.device("meta"):
        empty = type(module).from_config(module.config)
        clip = torch.empty(1, module.config.z_dim, latents, height, width)
    features = [None] * sum(type(m).__name__ == "WanCausalConv3d" for m in empty.decoder.modules())
    with torch.no_grad(), _Listener() as listener:
        for part in (clip[:, :, :1], clip, clip):  # from the third call on each is like the one before
            listener.found.clear()
            first = part.shape[2] == 1 and features[0] is None
            inner = empty.post_quant_conv(part)
            empty.decoder(inner, feat_cache=features, feat_idx=[0], first_chunk=first)
    return listener.found


def tiny_operations(sizes: TinySizes, latents: int, height: int, width: int) -> Counter[Operation]:
    """The convolutions by which a TAEHV decoder decodes `latents` at once."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in sizes.shapes().items()}
    clip = torch.empty(1, latents, height, width, sizes.latent_channels, device="meta")
    network = TinyNetwork(sizes, empty)
    with torch.no_grad(), _Listener() as listener:
        network(clip, network.new_past(), first=False)
    return listener.found


# ---- rates and floors ------------------------------------------------------------------------------------------------
def rates(found: Mapping[Operation, int], device: torch.device, dtype: torch.dtype, most: int = 6) -> dict[str, float]:
    """TFLOP/s of the operations that most work goes to, each by itself."""
    heavy = sorted(found, key=lambda one: one.operations * found[one], reverse=True)[:most]
    scratch = _scratch(heavy, device, dtype)
    return {one.name: one.operations / _seconds(one, scratch) / 1e12 for one in heavy}


def floor_seconds(found: Mapping[Operation, int], device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of all operations one after the other, replayed as one CUDA graph (on a CPU: called one by one)."""
    scratch = _scratch(found, device, dtype)
    with _chosen_kernels(), torch.no_grad():
        works = [one.work(scratch) for one, count in found.items() for _ in range(count)]

        def all_of_them() -> tuple[()]:
            for work in works:
                work()
            return ()

        if device.type == "cuda":
            all_of_them()  # kernels are chosen
            ((replay, _),) = CUDAGraphCapture()(all_of_them)
            return seconds_of(replay, device)
        return seconds_of(all_of_them, device)


def best_layouts(found: Mapping[Operation, int], device: torch.device, dtype: torch.dtype) -> Counter[Operation]:
    """The same operations, each convolution in the layout in which it is fastest here.

    Those that together do next to nothing are not tried: choosing takes cuDNN a second each.
    """
    total = sum(one.operations * count for one, count in found.items())
    chosen: Counter[Operation] = Counter()
    for one, count in found.items():
        if isinstance(one, Convolution) and one.operations * count > _SMALL * total:
            one = _fastest(one, device, dtype)
        chosen[one] += count
    return chosen


def _fastest(one: Convolution, device: torch.device, dtype: torch.dtype) -> Convolution:
    tried = [Convolution(one.shape, one.weight, one.stride, one.padding, layout) for layout in one.layouts]
    scratch = _scratch(tried, device, dtype)
    return min(tried, key=lambda each: _seconds(each, scratch, about=0.02))


def _seconds(one: Operation, scratch: Scratch, about: float = 0.05) -> float:
    with _chosen_kernels(), torch.no_grad():
        return seconds_of(one.work(scratch), scratch.device, about=about)


def _scratch(found: Iterable[Operation], device: torch.device, dtype: torch.dtype) -> Scratch:
    scratch = Scratch(device, dtype)
    scratch.reserve(one.largest for one in found)
    return scratch


@contextmanager
def _chosen_kernels() -> Iterator[None]:
    """cuDNN tries its convolutions and keeps the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def backward_rate(one: Attention, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the backward of an attention, twice its forward, by the difference of two timings; of the
    kernel that is the fastest forward and backward.
    """
    if device.type == "cuda":
        choose_kernels(device, dtype, one.width)
    scratch = _scratch([one], device, dtype)
    q, k, v = (
        scratch.take(1, n, one.heads, one.width).clone().requires_grad_() for n in (one.queries, one.keys, one.keys)
    )

    def both() -> None:
        torch.autograd.grad(attend_fastest(q, k, v).sum(), (q, k, v))

    alone = seconds_of(lambda: attend_fastest(q, k, v), device, about=0.05)
    return 2 * one.operations / max(seconds_of(both, device, about=0.1) - alone, 1e-9)
