"""The networks of the Wan VAE (2.1 and 2.2), computed from the library's weights with its results, as a GPU likes it.

Frames are [B, T, H, W, C] inside (channels last). Five things are done other than the library does them:
- What a causal convolution remembers is a value that goes into a call and comes out of it; the modules hold nothing.
- Its input is written once, behind the frames that it remembers, by the norm before it (`norm_silu.py`).
- Nearest-neighbour upsampling and the 3x3 convolution after it are one convolution of 2x2 (`folded`).
- For some widths a convolution of videos is one of pictures (`_StackedConv`, `_PixelConv`).
- Any number of latent frames but the first go through together, at the finest level a few frames at a time.

Must know no statistics of latents and no session.
Source: huggingface/diffusers `models/autoencoders/autoencoder_kl_wan.py` (0.42), which tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.encoders.doubling import doubled, folded
from longtake.encoders.norm_silu import Sum, norm_silu, settle
from longtake.encoders.past import Call, Past, wide

_MULTIPLE = 8  # of channels that GPUs convolve without copying them
FINEST_FRAMES = 4  # that are at the decoder's finest level together: it is what takes memory


class _CausalConv:
    """A convolution over frames; its result comes without the bias, which the next pass over memory adds.

    Its input gets channels of zeros up to a multiple of `_MULTIPLE` where it is the network's.
    """

    def __init__(self, conv: Any, slots: Iterator[int], *, outermost: bool = False) -> None:
        weight, self.bias = conv.weight.detach(), conv.bias.detach()
        zeros = -weight.shape[1] % _MULTIPLE if outermost else 0
        self.weight = F.pad(weight, (0,) * 7 + (zeros,)).contiguous(memory_format=torch.channels_last_3d)
        self.stride, self.slot = conv.stride, next(slots)
        self.padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)

    def __call__(self, buffer: Tensor) -> Tensor:
        x = _conv3d(buffer.permute(0, 4, 1, 2, 3), self.weight, self.stride, self.padding)
        return x.permute(0, 2, 3, 4, 1).contiguous()

    def after_norm(self, x: Sum, gamma: Tensor, call: Call, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        """The convolution of the normalised `x`; and where `keep` the sum `x`."""
        buffer = self._buffer(x, call, 2)
        total = norm_silu(x, gamma, buffer[:, 2:], keep=keep)
        call.keep(self.slot, buffer[:, -2:])
        return self(buffer), total

    def of(self, x: Sum | Tensor, call: Call, frames: int = 2) -> Tensor:
        """The convolution of `x` as it is. Args: `frames` that it remembers."""
        buffer = self._buffer(x, call, frames)
        if isinstance(x, Sum):
            settle(x, buffer[:, frames:])
        else:
            buffer[:, frames:].copy_(x)
        call.keep(self.slot, buffer[:, -frames:])
        return self(buffer)

    def _buffer(self, x: Sum | Tensor, call: Call, frames: int) -> Tensor:
        """Memory [B, frames + T, H, W, C] for the input `x`: what was before it is there, `x` is not."""
        batch, time, *rest = x.shape
        buffer = self.bias.new_empty(batch, frames + time, *rest)
        buffer[:, :frames] = call.past(self.slot, self.bias.device)
        return buffer


class _StackedConv(_CausalConv):
    """The same of a 3x3x3 kernel as a 3x3 convolution of pictures that have the two frames before beside them.

    It takes three times the memory, and for some widths cuDNN has faster kernels for pictures than for videos.
    """

    def __init__(self, conv: Any, slots: Iterator[int]) -> None:
        super().__init__(conv, slots)
        weight = conv.weight.detach().transpose(1, 2).flatten(1, 2)  # [O, 3 C, 3, 3]
        self.weight = weight.contiguous(memory_format=torch.channels_last)

    def after_norm(self, x: Sum, gamma: Tensor, call: Call, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        batch, time, height, width, channels = x.shape
        stacked = self.bias.new_empty(batch, time, height, width, 3, channels)
        frames = stacked.permute(4, 0, 1, 2, 3, 5)  # by their age: two before, one before, the same
        before = call.past(self.slot, self.bias.device)
        if isinstance(before, Tensor):
            wide(frames[:2, :, 0]).copy_(wide(before.transpose(0, 1)))
            wide(frames[0, :, 1:2]).copy_(wide(before[:, 1:]))  # nowhere, where there is one frame
        else:
            frames[:2, :, 0] = frames[0, :, 1:2] = before
        total = norm_silu(x, gamma, stacked, keep=keep)
        call.keep(self.slot, frames[1:, :, -1].transpose(0, 1))
        pictures = stacked.flatten(4, 5).flatten(0, 1).permute(0, 3, 1, 2)
        made = F.conv2d(pictures, self.weight, padding=1).permute(0, 2, 3, 1)
        return made.contiguous().unflatten(0, (batch, time)), total


class _PixelConv(_CausalConv):
    """The same of a 3x3x3 kernel with few outputs: every frame is convolved once, for the three that read it, and those
    parts are added up in float32. GPUs have no kernels for three outputs; for nine it takes half the time.
    """

    def __init__(self, conv: Any, slots: Iterator[int]) -> None:
        super().__init__(conv, slots)
        outputs = conv.out_channels
        by_age = conv.weight.detach().permute(2, 0, 1, 3, 4).flatten(0, 1)  # [3 O, C, 3, 3]
        by_age = F.pad(by_age, (0,) * 7 + (-3 * outputs % _MULTIPLE,))
        self.weight, self.outputs = by_age.contiguous(memory_format=torch.channels_last), outputs

    def __call__(self, buffer: Tensor) -> Tensor:
        parts = F.conv2d(buffer.flatten(0, 1).permute(0, 3, 1, 2), self.weight, padding=1).permute(0, 2, 3, 1)
        parts = parts.unflatten(0, buffer.shape[:2])[..., : 3 * self.outputs].unflatten(-1, (3, -1))
        time = buffer.shape[1] - 2
        total = parts[:, :time, :, :, 0].float()
        return total.add_(parts[:, 1:-1, :, :, 1]).add_(parts[:, 2:, :, :, 2])


class _ResidualBlock:
    def __init__(self, block: Any, slots: Iterator[int]) -> None:
        self.gamma1, self.gamma2 = (norm.gamma.detach().flatten() for norm in (block.norm1, block.norm2))
        kinds = [_StackedConv if _stacks(conv.weight) else _CausalConv for conv in (block.conv1, block.conv2)]
        self.conv1, self.conv2 = kinds[0](block.conv1, slots), kinds[1](block.conv2, slots)
        self.shortcut = None if isinstance(block.conv_shortcut, torch.nn.Identity) else _linear(block.conv_shortcut)

    def __call__(self, x: Sum, call: Call) -> Sum:
        hidden, total = self.conv1.after_norm(x, self.gamma1, call, keep=True)
        assert total is not None
        between = Sum(hidden, self.conv1.bias)
        del hidden  # its memory is free when the second norm has read it
        out, _ = self.conv2.after_norm(between, self.gamma2, call, keep=False)
        return Sum(out, self.conv2.bias, total if self.shortcut is None else F.linear(total, *self.shortcut))


class _Attention:
    """Attention among the pixels of each frame, one head."""

    def __init__(self, block: Any) -> None:
        self.gamma = block.norm.gamma.detach().flatten()
        self.qkv, (self.out, self.bias) = _linear(block.to_qkv), _linear(block.proj)

    def __call__(self, x: Sum, call: Call) -> Sum:
        normed = self.gamma.new_empty(x.shape)
        total = norm_silu(x, self.gamma, normed, silu=False)
        assert total is not None
        q, k, v = F.linear(normed.flatten(2, 3).flatten(0, 1)[:, None], *self.qkv).chunk(3, dim=-1)  # [B T, 1, H W, C]
        mixed = F.scaled_dot_product_attention(q, k, v)
        return Sum(F.linear(mixed, self.out).view_as(total), self.bias, total)


class _Upsample:
    """Twice the height and width, and with a convolution over time twice the frames, all but a video's first one."""

    def __init__(self, resample: Any, slots: Iterator[int]) -> None:
        self.time = _CausalConv(resample.time_conv, slots) if resample.mode == "upsample3d" else None
        conv = resample.resample[1]
        self.weight, self.bias = folded(conv.weight.detach()), conv.bias.detach()

    def __call__(self, x: Sum, call: Call) -> Sum:
        if self.time is None or call.first:
            return Sum(doubled(settle(x), self.weight), self.bias)
        pairs = self.time.of(x, call).unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5)  # [B, T, 2, H, W, C]
        frames = pairs.new_empty(pairs.shape)
        torch.add(pairs, self.time.bias.view(2, 1, 1, -1), out=frames)
        return Sum(doubled(frames.flatten(1, 2), self.weight), self.bias)


class _Downsample:
    """Half the height and width, and with a convolution over time half the frames, all but a video's first one."""

    def __init__(self, resample: Any, slots: Iterator[int]) -> None:
        self.time = _CausalConv(resample.time_conv, slots) if resample.mode == "downsample3d" else None
        conv = resample.resample[1]
        self.weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.detach()

    def __call__(self, x: Sum, call: Call) -> Sum:
        frames = F.pad(settle(x), (0, 0, 0, 1, 0, 1))  # below and to the right, as the library does
        images = F.conv2d(frames.flatten(0, 1).permute(0, 3, 1, 2), self.weight, stride=2).permute(0, 2, 3, 1)
        half = Sum(images.contiguous().unflatten(0, frames.shape[:2]), self.bias)
        if self.time is None:
            return half
        if call.first:
            only = settle(half)
            call.keep(self.time.slot, only[:, -1:])
            return Sum(only)
        return Sum(self.time.of(half, call, 1), self.time.bias)


class _UpBlock:
    """Residual blocks and an upsampling; in 2.2 with a shortcut around all of it."""

    def __init__(self, block: Any, slots: Iterator[int]) -> None:
        self.resnets = [_ResidualBlock(resnet, slots) for resnet in block.resnets]
        upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
        self.upsample = None if upsampler is None else _Upsample(upsampler, slots)
        self.shortcut: Any = getattr(block, "avg_shortcut", None)

    def __call__(self, x: Sum, call: Call) -> Sum:
        start = None
        if self.shortcut is not None:
            start = settle(x)
            x = Sum(start)
        for resnet in self.resnets:
            x = resnet(x, call)
        if self.upsample is not None:
            x = self.upsample(x, call)
        return x if start is None else Sum(settle(x), None, self._repeated(start, first=call.first))

    def _repeated(self, start: Tensor, *, first: bool) -> Tensor:
        dup = self.shortcut
        repeated = start.repeat_interleave(dup.repeats, dim=-1)
        pixels = repeated.unflatten(-1, (dup.out_channels, dup.factor_t, dup.factor_s, dup.factor_s))
        spread = pixels.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, T, ft, H, fs, W, fs, C]
        frames = spread.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return (frames[:, dup.factor_t - 1 :] if first else frames).contiguous()


class _DownBlock:
    """2.2: residual blocks and a downsampling, with a shortcut of averages around all of it."""

    def __init__(self, block: Any, slots: Iterator[int]) -> None:
        self.resnets = [_ResidualBlock(resnet, slots) for resnet in block.resnets]
        self.downsample = None if block.downsampler is None else _Downsample(block.downsampler, slots)
        self.shortcut = block.avg_shortcut

    def __call__(self, x: Sum, call: Call) -> Sum:
        start = settle(x)
        x, average = Sum(start), self._average(start)
        del start
        for resnet in self.resnets:
            x = resnet(x, call)
        if self.downsample is not None:
            x = self.downsample(x, call)
        return Sum(settle(x), None, average)

    def _average(self, x: Tensor) -> Tensor:
        time, space = self.shortcut.factor_t, self.shortcut.factor_s
        x = F.pad(x, (0, 0, 0, 0, 0, 0, -x.shape[1] % time, 0))
        parts = x.unflatten(3, (-1, space)).unflatten(2, (-1, space)).unflatten(1, (-1, time))
        last = parts.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)  # [B, T, H, W, C ft fs fs]
        return last.unflatten(-1, (self.shortcut.out_channels, self.shortcut.group_size)).mean(-1)


class _MidBlock:
    def __init__(self, block: Any, slots: Iterator[int]) -> None:
        first, *rest = block.resnets
        self.layers: list[Any] = [_ResidualBlock(first, slots)]
        for attention, resnet in zip(block.attentions, rest, strict=True):
            self.layers += [_Attention(attention), _ResidualBlock(resnet, slots)]

    def __call__(self, x: Sum, call: Call) -> Sum:
        for layer in self.layers:
            x = layer(x, call)
        return x


class _Network:
    """What encoder and decoder share: a convolution, blocks, a norm and a convolution."""

    def __init__(self, network: Any) -> None:
        slots = count()
        self.conv_in = _CausalConv(network.conv_in, slots, outermost=True)
        self.blocks = self._blocks(network, slots)
        self.gamma = network.norm_out.gamma.detach().flatten()
        self.conv_out = self._last(network.conv_out, slots)
        self.num_slots = next(slots)

    def _blocks(self, network: Any, slots: Iterator[int]) -> list[Any]:
        raise NotImplementedError

    def _last(self, conv: Any, slots: Iterator[int]) -> _CausalConv:
        return _CausalConv(conv, slots)

    def _run(self, frames: Tensor, call: Call, *, begin: int | None = None, finest: int | None = None) -> Tensor:
        """The network's result, in float32 whatever the weights are. Args: `begin`, how many frames the first
        convolution and `_beginning` take at a time, `finest`, how many the last block does; None = all.
        """
        frames = F.pad(frames, (0, self.conv_in.weight.shape[1] - frames.shape[-1]))
        first = 0 if begin is None else self._beginning()
        pieces = [frames] if begin is None or not first else list(frames.split(begin, dim=1))
        x = Sum.joined([self._begun(piece, call, first) for piece in pieces])
        for block in self.blocks[first:-1]:
            x = block(x, call)
        parts, made = [x] if finest is None else x.split(finest), []
        while parts:  # each is gone when it has been read
            last = self.blocks[-1](parts.pop(0), call)
            made.append(self.conv_out.after_norm(last, self.gamma, call, keep=False)[0])
        return torch.cat(made, dim=1) + self.conv_out.bias.float()

    def _begun(self, frames: Tensor, call: Call, blocks: int) -> Sum:
        x = Sum(self.conv_in.of(frames, call), self.conv_in.bias)
        for block in self.blocks[:blocks]:
            x = block(x, call)
        return x

    def _beginning(self) -> int:
        """How many blocks there are up to the first one that makes pictures smaller; 0 where it joins frames."""
        for index, block in enumerate(self.blocks):
            down = block if isinstance(block, _Downsample) else getattr(block, "downsample", None)
            if down is not None:
                return 0 if down.time is not None else index + 1
        return 0

    def new_past(self) -> list[Tensor | None]:
        """The past at the beginning of a video."""
        return [None] * self.num_slots


class WanDecoder(_Network):
    """From latents to pixels.

    Args: `vae`, a library `AutoencoderKLWan`, whose weights are read once; `finest_frames`, how many frames are at the
    finest level together.
    """

    def __init__(self, vae: Any, finest_frames: int = FINEST_FRAMES) -> None:
        self.patch_size: int = vae.config.patch_size or 1
        self.finest_frames = finest_frames
        self.post_quant = _linear(vae.post_quant_conv)
        super().__init__(vae.decoder)

    def _blocks(self, network: Any, slots: Iterator[int]) -> list[Any]:
        return [_MidBlock(network.mid_block, slots), *(_UpBlock(block, slots) for block in network.up_blocks)]

    def _last(self, conv: Any, slots: Iterator[int]) -> _CausalConv:
        return _PixelConv(conv, slots)

    @property
    def reach(self) -> int:
        """How many latent frames before its own a frame depends on: each convolution over time looks at two frames
        before its own, of which there are `rate` a latent.
        """
        frames, rate = 2.0, 1
        for block in self.blocks:
            layers = block.layers if isinstance(block, _MidBlock) else block.resnets
            frames += sum(4 for layer in layers if isinstance(layer, _ResidualBlock)) / rate
            if isinstance(block, _UpBlock) and block.upsample is not None and block.upsample.time is not None:
                frames += 2 / rate
                rate *= 2
        return math.ceil(frames + 2 / rate)

    def __call__(
        self, latents: Tensor, past: Past, *, first: bool, into: Past | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Pixels [B, T, 3, h, w], float32, not clamped, of the next latents [B, F, H, W, C], and the new past.

        Args: `latents` as the VAE has them, not normalised, in its type; `first`, whether this is the first latent of a
        video, which must come alone and gives one frame; `into`, where the new past goes: None makes new tensors,
        `past` updates it in place.
        """
        call = Call(past, into, first=first)
        x = self._run(F.linear(latents, *self.post_quant), call, finest=self.finest_frames)
        size = self.patch_size
        x = x.unflatten(-1, (-1, size, size)).permute(0, 1, 4, 2, 6, 3, 5)  # [B, T, 3, H, p, W, p]
        return x.flatten(5, 6).flatten(3, 4), call.new


class WanEncoder(_Network):
    """From pixels to means of latents.

    Args: `vae`, a library `AutoencoderKLWan`, whose weights are read once; `finest_frames`, how many frames are at the
    finest level together, None = all of a call; `past_on_host` as `Call`'s `on_host`.
    """

    def __init__(self, vae: Any, finest_frames: int | None = None, *, past_on_host: bool = False) -> None:
        self.patch_size: int = vae.config.patch_size or 1
        self.finest_frames, self.past_on_host = finest_frames, past_on_host
        weight, bias = _linear(vae.quant_conv)
        self.quant = weight[: vae.config.z_dim].float(), bias[: vae.config.z_dim].float()  # the means alone
        super().__init__(vae.encoder)

    def _blocks(self, network: Any, slots: Iterator[int]) -> list[Any]:
        kinds = {"WanResidualBlock": _ResidualBlock, "WanResample": _Downsample, "WanResidualDownBlock": _DownBlock}
        blocks = [kinds[type(block).__name__](block, slots) for block in network.down_blocks]
        return [*blocks, _MidBlock(network.mid_block, slots)]

    def __call__(
        self, video: Tensor, past: Past, *, first: bool, into: Past | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Means [B, F, H, W, C], float32, not normalised, of the next frames [B, T, 3, h, w], and the new past.

        Args: `first`, whether this is the first frame of a video, which must come alone; else T is a multiple of the
        temporal stride; `into` as that of `WanDecoder`.
        """
        call = Call(past, into, first=first, on_host=self.past_on_host)
        size = self.patch_size
        x = video.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # [B, T, 3, H, p, W, p]
        x = x.permute(0, 1, 3, 5, 2, 6, 4).flatten(4)
        return F.linear(self._run(x, call, begin=self.finest_frames), *self.quant), call.new


def _conv3d(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`F.conv3d`; on a CPU by oneDNN whatever the size, where torch takes three times as long for one small item."""
    plain = type(x) is Tensor  # oneDNN's entry knows no tensors without data
    if plain and x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x, weight, None, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, stride=tuple(stride), padding=tuple(padding))


def _stacks(weight: Tensor) -> bool:
    """Whether `_StackedConv` is the faster way.

    As cuDNN 9.19 chooses kernels, an H200 does so many TFLOP/s for pictures and for videos: with 96 outputs 525 and
    260, 160: 435 and 605, 192: 530 and 575, 256: 670 and 705, 320: 700 and 490, 384: 745 and 575.
    """
    outputs, half = weight.shape[0], weight.dtype in (torch.bfloat16, torch.float16)
    return weight.is_cuda and half and (64 < outputs <= 128 or outputs > 256)


def _linear(conv: Any) -> tuple[Tensor, Tensor]:
    """A convolution of one pixel as a matrix and its bias."""
    return conv.weight.detach().flatten(1), conv.bias.detach()
