"""TAEHV's decoders: few 2-D convolutions in place of the VAE's decoder, from latents to pixels with a short memory.

Two kinds: the plain one (`taew2_1`, `taew2_2` and LightTAE, which has the same parts) and `super`. What a block
remembers is its input of the frame before; all frames of a call go through a layer together, channels last. Of a
video's first latent frame the last raw frame alone is shown, as the VAE has one frame for it. Must know no session.
Source: madebyollin/taehv `taehv.py`; its key names; lightx2v `wan/vae_tiny.py` for what LightTAE reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.encoders.doubling import doubled, folded
from longtake.encoders.past import Call, Past, wide

_WIDTHS = {False: (256, 128, 64, 64), True: (512, 256, 128, 64)}  # of the levels, by whether it is `super`
_GROWTH = (1, 2, 2)  # frames that each one becomes between the levels
_BLOCKS = 3  # of a level
_FINEST_FRAMES = 2  # of the last level but one that are brought to the finest together: it is what takes memory
_MULTIPLE = 8  # of channels that GPUs have fast kernels for
TEMPORAL_STRIDE = 4
# Latent frames that a frame depends on besides its own: three blocks at latent rate, twice, and three at twice that.
REACH = 8


@dataclass(frozen=True)
class TinySizes:
    """What tells the networks apart: channels of latents, the side of the patches of pixels, the kind."""

    latent_channels: int
    patch_size: int
    is_super: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the decoder by their published names."""
        widths, pixels = _WIDTHS[self.is_super], 3 * self.patch_size**2
        return _super_shapes(self, widths, pixels) if self.is_super else _plain_shapes(self, widths, pixels)


def _plain_shapes(sizes: TinySizes, widths: tuple[int, ...], pixels: int) -> dict[str, tuple[int, ...]]:
    found = _conv("decoder.1", widths[0], sizes.latent_channels)
    for level, growth in enumerate(_GROWTH):
        n, place = widths[level], 3 + 6 * level
        for block in range(place, place + _BLOCKS):
            for part, inputs in ((0, 2 * n), (2, n), (4, n)):
                found |= _conv(f"decoder.{block}.conv.{part}", n, inputs)
        found[f"decoder.{place + 4}.conv.weight"] = (n * growth, n, 1, 1)
        found[f"decoder.{place + 5}.weight"] = (widths[level + 1], n, 3, 3)
    return found | _conv("decoder.22", pixels, widths[3])


def _super_shapes(sizes: TinySizes, widths: tuple[int, ...], pixels: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"decoder.0.weight": (widths[0], sizes.latent_channels, 1, 1)}
    for level, growth in enumerate(_GROWTH):
        n, after, place = widths[level], widths[level + 1], 1 + 7 * level
        for block in range(place, place + _BLOCKS):
            found[f"decoder.{block}.conv.0.weight"] = (2 * n, 1, 7, 7)
            found |= _conv(f"decoder.{block}.conv.1", 4 * n, 2 * n, 1)
            found[f"decoder.{block}.conv.3.weight"] = (n, 4 * n, 1, 1)
        found |= _conv(f"decoder.{place + 3}", 4 * after, n)
        found[f"decoder.{place + 6}.conv.weight"] = (after * growth, after, 1, 1)
    return found | _conv("decoder.22", pixels, widths[3])


def _conv(name: str, outputs: int, inputs: int, side: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


class _Weights:
    """Tensors by their published names, as convolutions of channels-last pictures read them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def of(self, name: str) -> Tensor:
        return self._tensors[f"decoder.{name}"]

    def conv(self, name: str, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """A 3x3 convolution and its bias, its outputs filled up with zeros to a multiple."""
        weight, bias = self.of(f"{name}.weight"), self.of(f"{name}.bias")
        zeros = -weight.shape[0] % multiple
        weight, bias = F.pad(weight, (0,) * 7 + (zeros,)), F.pad(bias, (0, zeros))
        return weight.contiguous(memory_format=torch.channels_last), bias

    def matrix(self, name: str) -> Tensor:
        """A convolution of one pixel."""
        return self.of(f"{name}.weight").flatten(1)


class _Block:
    """Three convolutions of a frame and the one before it, around a shortcut."""

    def __init__(self, weights: _Weights, name: str, slot: int) -> None:
        self.slot = slot
        self.convs = [weights.conv(f"{name}.conv.{part}") for part in (0, 2, 4)]

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        hidden = _with_before(x, self.slot, call)
        for index, (weight, bias) in enumerate(self.convs):
            hidden = _convolved(hidden, weight, bias)
            hidden = hidden.relu_() if index < 2 else hidden.add_(x).relu_()
        return hidden


class _SuperBlock:
    """A wide convolution of each channel of a frame and the one before it, and two layers of pixels, on a shortcut."""

    def __init__(self, weights: _Weights, name: str, slot: int) -> None:
        self.slot = slot
        self.each = weights.of(f"{name}.conv.0.weight").contiguous(memory_format=torch.channels_last)
        self.up, self.bias = weights.matrix(f"{name}.conv.1"), weights.of(f"{name}.conv.1.bias")
        self.down = weights.matrix(f"{name}.conv.3")

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        both = _with_before(x, self.slot, call)
        pictures = both.flatten(0, 1).permute(0, 3, 1, 2)
        each = F.conv2d(pictures, self.each, None, (1, 1), (3, 3), (1, 1), both.shape[-1])
        inner = F.linear(each.permute(0, 2, 3, 1), self.up, self.bias).relu_()
        return F.linear(inner, self.down).view_as(x).add_(x)


class _Finer:
    """Twice the height and width and `growth` times the frames: of the plain kind doubling, a matrix and a convolution,
    which together are one convolution.
    """

    def __init__(self, weights: _Weights, place: int, growth: int) -> None:
        grow, conv = weights.matrix(f"{place + 4}.conv"), weights.of(f"{place + 5}.weight")
        wide_type = torch.promote_types(conv.dtype, torch.float32)
        frames = grow.to(wide_type).unflatten(0, (growth, -1))
        both = torch.einsum("omyx,gmc->gocyx", conv.to(wide_type), frames).flatten(0, 1)
        self.weight, self.growth = folded(both).to(conv.dtype), growth

    def __call__(self, x: Tensor) -> Tensor:
        return doubled(x, self.weight, self.growth)


class _SuperFiner:
    """The same of the other kind: a convolution to four pixels, and a matrix to frames."""

    def __init__(self, weights: _Weights, place: int, growth: int) -> None:
        weight, bias = weights.conv(f"{place + 3}")  # outputs by channel, then pixel: pixels shall come first
        weight, self.bias = (part.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1) for part in (weight, bias))
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.grow, self.growth = weights.matrix(f"{place + 6}.conv"), growth

    def __call__(self, x: Tensor) -> Tensor:
        pixels = _convolved(x, self.weight, self.bias).relu_().unflatten(-1, (4, -1))
        grown = F.linear(pixels, self.grow).unflatten(-1, (self.growth, -1)).unflatten(-3, (2, 2))
        frames = grown.permute(0, 1, 6, 2, 4, 3, 5, 7)  # of [B, T, H, W, 2, 2, growth, C]
        return wide(frames).contiguous().view(x.dtype).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class TinyNetwork:
    """From latents to pixels. Args: `tensors`, those of `TinySizes.shapes`, all on one device in one type."""

    reach = REACH

    def __init__(self, sizes: TinySizes, tensors: Mapping[str, Tensor]) -> None:
        weights, slots = _Weights(tensors), count()
        self.sizes = sizes
        each, first, step = (_SuperBlock, 1, 7) if sizes.is_super else (_Block, 3, 6)
        finer = _SuperFiner if sizes.is_super else _Finer
        places = [first + step * level for level in range(len(_GROWTH))]
        self.levels = [[each(weights, str(place + n), next(slots)) for n in range(_BLOCKS)] for place in places]
        self.finer = [finer(weights, place, growth) for place, growth in zip(places, _GROWTH, strict=True)]
        self.first = None if sizes.is_super else weights.conv("1")
        self.matrix = weights.matrix("0") if sizes.is_super else None
        self.last = weights.conv("22", _MULTIPLE)
        self.num_slots = next(slots)

    def new_past(self) -> list[Tensor | None]:
        """The past at the beginning of a video."""
        return [None] * self.num_slots

    def __call__(
        self, latents: Tensor, past: Past, *, first: bool, into: Past | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Pixels [B, T, 3, h, w], float32 or float64, in [-1, 1], of the next latents [B, F, H, W, C]; the new past.

        Args: as those of `WanDecoder`.
        """
        call, x = Call(past, into, first=first), self._begun(latents)
        for level, (blocks, finer) in enumerate(zip(self.levels, self.finer, strict=True)):
            for block in blocks:
                x = block(x, call)
            if level < len(self.levels) - 1:
                x = finer(x)
        pixels = torch.cat([self._finest(part) for part in x.split(_FINEST_FRAMES, dim=1)], dim=1)
        return (pixels[:, TEMPORAL_STRIDE - 1 :] if first else pixels), call.new

    def _begun(self, latents: Tensor) -> Tensor:
        if self.matrix is not None:
            return F.linear(latents, self.matrix)
        assert self.first is not None
        return _convolved((latents / 3).tanh_().mul_(3), *self.first).relu_()

    def _finest(self, x: Tensor) -> Tensor:
        x = self.finer[-1](x)
        size = self.sizes.patch_size
        x = _convolved(x if self.sizes.is_super else x.relu_(), *self.last)[..., : 3 * size**2]
        x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(0, 1).mul_(2).sub_(1)
        x = x.unflatten(-1, (3, size, size)).permute(0, 1, 4, 2, 5, 3, 6)  # [B, T, 3, H, p, W, p]
        return x.flatten(5, 6).flatten(3, 4)


def _with_before(x: Tensor, slot: int, call: Call) -> Tensor:
    """Each frame of [B, T, H, W, C] beside the one before it, [B, T, H, W, 2 C]."""
    width = x.shape[-1]
    both = x.new_empty(*x.shape[:-1], 2 * width)
    both[..., :width] = x
    both[:, 1:, ..., width:] = x[:, :-1]
    both[:, :1, ..., width:] = call.past(slot, x.device)
    call.keep(slot, x[:, -1:])
    return both


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution of the frames [B, T, H, W, C]."""
    made = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, (1, 1), (1, 1)).permute(0, 2, 3, 1)
    return made.contiguous().unflatten(0, x.shape[:2])
