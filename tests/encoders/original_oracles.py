"""The published formulas of Wan's encoders in plain torch, on parameters under their original names.

Written from the formulas (spec B.1, B.2, B.4, C.1, C.2; Wan-Video/Wan2.1 `wan/modules/`), one shot over the whole
video instead of streamed, and with no part of Longtake, transformers or diffusers.
"""

import math

import torch
import torch.nn.functional as F

Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Random tensors; matrices and kernels keep the size of what passes through them, gains lie around 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator)
        if "norm" in name or "gamma" in name:
            return 0.1 * tensor + (0 if name.endswith("bias") else 1)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 and "embedding" not in name else 1
        return tensor * (0.1 if name.endswith("bias") else fan_in**-0.5)

    return {name: draw(name, shape) for name, shape in shapes.items()}


# ---- umT5 -----------------------------------------------------------------------------------------------------------
def t5_shapes(vocabulary: int, width: int, inner: int, hidden: int, heads: int, layers: int) -> Shapes:
    shapes: Shapes = {"token_embedding.weight": (vocabulary, width), "norm.weight": (width,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.norm{n}.weight": (width,) for n in (1, 2)}
        shapes |= {f"blocks.{i}.attn.{m}.weight": (inner, width) for m in "qkv"}
        shapes |= {f"blocks.{i}.attn.o.weight": (width, inner), f"blocks.{i}.ffn.fc2.weight": (width, hidden)}
        shapes |= {f"blocks.{i}.ffn.{m}.weight": (hidden, width) for m in ("gate.0", "fc1")}
        shapes[f"blocks.{i}.pos_embedding.embedding.weight"] = (32, heads)
    return shapes


def t5_bucket(distance: int, buckets: int = 32, most: int = 128) -> int:
    """Bucket of key position - query position: half for each sign, of these half exact and half logarithmic."""
    half = buckets // 2
    exact = half // 2
    base, distance = (half, distance) if distance > 0 else (0, -distance)
    if distance < exact:
        return base + distance
    return base + min(half - 1, exact + int(math.log(distance / exact) / math.log(most / exact) * (half - exact)))


def t5_forward(s: State, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, M, D] of token ids [B, M]."""

    def rms(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    length = ids.shape[1]
    buckets = torch.tensor([[t5_bucket(k - q) for k in range(length)] for q in range(length)])
    x = s["token_embedding.weight"][ids]
    for i in range(sum(name.endswith("norm1.weight") for name in s)):
        p = f"blocks.{i}."
        table = s[p + "pos_embedding.embedding.weight"]
        heads = table.shape[1]
        normed = rms(x, s[p + "norm1.weight"])
        q, k, v = ((normed @ s[f"{p}attn.{m}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2) for m in "qkv")
        scores = q @ k.transpose(-1, -2) + table[buckets].permute(2, 0, 1)  # not divided by the root of the width
        scores = scores.masked_fill(~mask[:, None, None].bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ s[p + "attn.o.weight"].T
        normed = rms(x, s[p + "norm2.weight"])
        gate = F.gelu(normed @ s[p + "ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (normed @ s[p + "ffn.fc1.weight"].T * gate) @ s[p + "ffn.fc2.weight"].T
    return rms(x, s["norm.weight"])


# ---- CLIP -----------------------------------------------------------------------------------------------------------
def clip_shapes(width: int, hidden: int, layers: int, size: int, patch: int, out: int) -> Shapes:
    """The vision half."""
    shapes: Shapes = {
        "visual.cls_embedding": (1, 1, width),
        "visual.pos_embedding": (1, (size // patch) ** 2 + 1, width),
        "visual.patch_embedding.weight": (width, 3, patch, patch),
        "visual.head": (width, out),
    }
    norms = ["pre_norm", "post_norm", *(f"transformer.{i}.norm{n}" for i in range(layers) for n in (1, 2))]
    shapes |= {f"visual.{norm}.{leaf}": (width,) for norm in norms for leaf in ("weight", "bias")}
    for i in range(layers):
        for module, a, b in (
            ("attn.to_qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.0", hidden, width),
            ("mlp.2", width, hidden),
        ):
            name = f"visual.transformer.{i}.{module}"
            shapes |= {f"{name}.weight": (a, b), f"{name}.bias": (a,)}
    return shapes


def clip_forward(s: State, pixels: torch.Tensor, heads: int = 16) -> torch.Tensor:
    """Tokens [B, 1 + patches, D] after all blocks but the last, of normalised pixels [B, 3, s, s]."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt() * s[name + ".weight"] + s[name + ".bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ s[name + ".weight"].T + s[name + ".bias"]

    kernel = s["visual.patch_embedding.weight"]
    n = kernel.shape[-1]
    patches = pixels.unfold(2, n, n).unfold(3, n, n)  # [B, 3, rows, columns, n, n]
    x = torch.einsum("bcrsij,dcij->brsd", patches, kernel).flatten(1, 2)
    x = torch.cat([s["visual.cls_embedding"].expand(len(x), -1, -1), x], dim=1) + s["visual.pos_embedding"]
    x = norm(x, "visual.pre_norm")
    layers = sum(name.endswith("to_qkv.bias") for name in s)
    for i in range(layers - 1):
        p = f"visual.transformer.{i}."
        qkv = linear(norm(x, p + "norm1"), p + "attn.to_qkv").unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), p + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, p + "norm2"), p + "mlp.0")), p + "mlp.2")
    return x


# ---- VAE ------------------------------------------------------------------------------------------------------------
_MULTIPLIERS = (1, 2, 4, 4)
_HALVES_TIME = (False, True, True)


def vae_shapes(width: int, decoder_width: int, channels: int, *, nested: bool) -> Shapes:
    """Wan2.1 (one list of modules in each half) or, `nested`, Wan2.2 (a list in each block, pixels in 2x2 patches)."""
    pixels, deepest = 12 if nested else 3, _MULTIPLIERS[-1]
    return {
        **_conv("encoder.conv1", width, pixels, 3, 3, 3),
        **_down_shapes(width, nested),
        **_middle_shapes("encoder", width * deepest),
        "encoder.head.0.gamma": (width * deepest, 1, 1, 1),
        **_conv("encoder.head.2", 2 * channels, width * deepest, 3, 3, 3),
        **_conv("conv1", 2 * channels, 2 * channels, 1, 1, 1),
        **_conv("conv2", channels, channels, 1, 1, 1),
        **_conv("decoder.conv1", decoder_width * deepest, channels, 3, 3, 3),
        **_middle_shapes("decoder", decoder_width * deepest),
        **_up_shapes(decoder_width, nested),
        "decoder.head.0.gamma": (decoder_width, 1, 1, 1),
        **_conv("decoder.head.2", pixels, decoder_width, 3, 3, 3),
    }


def _conv(name: str, a: int, b: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (a, b, *kernel), f"{name}.bias": (a,)}


def _residual_shapes(name: str, a: int, b: int) -> Shapes:
    return {
        f"{name}.residual.0.gamma": (a, 1, 1, 1),
        **_conv(f"{name}.residual.2", b, a, 3, 3, 3),
        f"{name}.residual.3.gamma": (b, 1, 1, 1),
        **_conv(f"{name}.residual.6", b, b, 3, 3, 3),
        **(_conv(f"{name}.shortcut", b, a, 1, 1, 1) if a != b else {}),
    }


def _middle_shapes(half: str, a: int) -> Shapes:
    return {
        **_residual_shapes(f"{half}.middle.0", a, a),
        f"{half}.middle.1.norm.gamma": (a, 1, 1),
        **_conv(f"{half}.middle.1.to_qkv", 3 * a, a, 1, 1),
        **_conv(f"{half}.middle.1.proj", a, a, 1, 1),
        **_residual_shapes(f"{half}.middle.2", a, a),
    }


def _down_shapes(width: int, nested: bool) -> Shapes:
    shapes: Shapes = {}
    a = width
    for block, multiplier in enumerate(_MULTIPLIERS):
        names = [
            f"encoder.downsamples.{block}.downsamples.{n}" if nested else f"encoder.downsamples.{3 * block + n}"
            for n in range(3)
        ]
        b = width * multiplier
        shapes |= _residual_shapes(names[0], a, b) | _residual_shapes(names[1], b, b)
        if block < 3:
            shapes |= _conv(f"{names[2]}.resample.1", b, b, 3, 3)
            shapes |= _conv(f"{names[2]}.time_conv", b, b, 3, 1, 1) if _HALVES_TIME[block] else {}
        a = b
    return shapes


def _up_shapes(width: int, nested: bool) -> Shapes:
    shapes: Shapes = {}
    a = width * _MULTIPLIERS[-1]
    for block, multiplier in enumerate(reversed(_MULTIPLIERS)):
        names = [
            f"decoder.upsamples.{block}.upsamples.{n}" if nested else f"decoder.upsamples.{4 * block + n}"
            for n in range(4)
        ]
        b = width * multiplier
        shapes |= _residual_shapes(names[0], a, b) | _residual_shapes(names[1], b, b) | _residual_shapes(names[2], b, b)
        a = b
        if block < 3:
            a = b if nested else b // 2
            shapes |= _conv(f"{names[3]}.resample.1", a, b, 3, 3)
            shapes |= _conv(f"{names[3]}.time_conv", 2 * b, b, 3, 1, 1) if _HALVES_TIME[2 - block] else {}
    return shapes


class VaeOracle:
    """Encoder and decoder over a whole video [B, C, T, H, W], without normalisation of latents."""

    def __init__(self, state: State) -> None:
        self.s = state
        self.nested = any(".0.downsamples." in name for name in state)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        x = _to_patches(video) if self.nested else video
        x = self._conv(x, "encoder.conv1")
        x = self._blocks(x, "encoder.downsamples")
        x = self._head(self._middle(x, "encoder"), "encoder")
        return self._conv(x, "conv1").chunk(2, dim=1)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        x = self._conv(self._conv(latents, "conv2"), "decoder.conv1")
        x = self._blocks(self._middle(x, "decoder"), "decoder.upsamples")
        x = self._head(x, "decoder")
        return (_from_patches(x) if self.nested else x).clamp(-1, 1)

    def _blocks(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        if not self.nested:
            return self._list(x, prefix)
        for block in range(4):
            inner = f"{prefix}.{block}.{prefix.split('.')[1]}"
            y = self._list(x, inner)
            last = f"{inner}.{2 if prefix.startswith('encoder') else 3}"
            time = 2 if f"{last}.time_conv.weight" in self.s else 1
            space = 2 if f"{last}.resample.1.weight" in self.s else 1
            if prefix.startswith("encoder"):
                x = y + _average(x, y.shape[1], time, space)
            else:
                x = y + _duplicate(x, y.shape[1], time, space) if space == 2 else y
        return x

    def _list(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        number = 0
        while any(name.startswith(f"{prefix}.{number}.") for name in self.s):
            name = f"{prefix}.{number}"
            if f"{name}.residual.0.gamma" in self.s:
                x = self._residual(x, name)
            else:
                x = self._down(x, name) if name.startswith("encoder") else self._up(x, name)
            number += 1
        return x

    def _conv(self, x: torch.Tensor, name: str, past: int | None = None) -> torch.Tensor:
        """Sees the present and earlier frames: zeros before the first one."""
        weight, bias = self.s[f"{name}.weight"], self.s[f"{name}.bias"]
        side = weight.shape[-1] // 2
        past = weight.shape[2] - 1 if past is None else past
        return F.conv3d(F.pad(x, (side, side, side, side, past, 0)), weight, bias)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gain = self.s[f"{name}.gamma"].view(-1, 1, 1, 1)
        return x / x.square().sum(1, keepdim=True).sqrt() * x.shape[1] ** 0.5 * gain

    def _residual(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = self._conv(F.silu(self._norm(x, f"{name}.residual.0")), f"{name}.residual.2")
        y = self._conv(F.silu(self._norm(y, f"{name}.residual.3")), f"{name}.residual.6")
        return y + (self._conv(x, f"{name}.shortcut") if f"{name}.shortcut.weight" in self.s else x)

    def _middle(self, x: torch.Tensor, half: str) -> torch.Tensor:
        x = self._residual(x, f"{half}.middle.0")
        y = _each_frame(self._norm(x, f"{half}.middle.1.norm"), f"{half}.middle.1.to_qkv", self.s)
        q, k, v = y.flatten(3).permute(0, 2, 3, 1).chunk(3, dim=-1)  # [B, T, H W, C]
        y = ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).permute(0, 3, 1, 2)
        x = x + _each_frame(y.reshape(x.shape), f"{half}.middle.1.proj", self.s)
        return self._residual(x, f"{half}.middle.2")

    def _head(self, x: torch.Tensor, half: str) -> torch.Tensor:
        return self._conv(F.silu(self._norm(x, f"{half}.head.0")), f"{half}.head.2")

    def _down(self, x: torch.Tensor, name: str) -> torch.Tensor:
        x = _each_frame(x, f"{name}.resample.1", self.s, down=True)
        if f"{name}.time_conv.weight" not in self.s:
            return x
        if x.shape[2] == 1:
            return x
        # The first frame stays alone; each later one is made of two frames and the one before them.
        later = F.conv3d(x, self.s[f"{name}.time_conv.weight"], self.s[f"{name}.time_conv.bias"], stride=(2, 1, 1))
        return torch.cat([x[:, :, :1], later], dim=2)

    def _up(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.time_conv.weight" in self.s and x.shape[2] > 1:
            # The first frame stays alone and is not seen by the others.
            pairs = self._conv(x[:, :, 1:], f"{name}.time_conv")
            batch, channels, frames, height, width = pairs.shape
            pairs = pairs.view(batch, 2, channels // 2, frames, height, width).permute(0, 2, 3, 1, 4, 5)
            x = torch.cat([x[:, :, :1], pairs.flatten(2, 3)], dim=2)
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        return _each_frame(x, f"{name}.resample.1", self.s)


def _each_frame(x: torch.Tensor, name: str, s: State, *, down: bool = False) -> torch.Tensor:
    weight, bias = s[f"{name}.weight"], s[f"{name}.bias"]
    frames = x.transpose(1, 2).flatten(0, 1)
    side = weight.shape[-1] // 2
    padding = (0, 1, 0, 1) if down else (side,) * 4
    frames = F.conv2d(F.pad(frames, padding), weight, bias, stride=2 if down else 1)
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _to_patches(x: torch.Tensor) -> torch.Tensor:
    """Channel c, then column, then row of the 2x2 patch."""
    parts = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return torch.stack(parts, dim=2).flatten(1, 2)


def _from_patches(x: torch.Tensor) -> torch.Tensor:
    parts = x.unflatten(1, (-1, 4))
    whole = x.new_zeros(*parts.shape[:2], x.shape[2], 2 * x.shape[3], 2 * x.shape[4])
    for n, (column, row) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        whole[..., row::2, column::2] = parts[:, :, n]
    return whole


def _average(x: torch.Tensor, channels: int, time: int, space: int) -> torch.Tensor:
    """Wan2.2's shortcut downwards: each cell of time x space x space becomes channels, averaged in groups."""
    if time == 2:
        x = torch.cat([torch.zeros_like(x[:, :, :1]), x], dim=2)  # the first frame is a cell with nothing before it
    cells = [
        x[:, :, t::time, row::space, column::space]
        for t in range(time)
        for row in range(space)
        for column in range(space)
    ]
    stacked = torch.stack(cells, dim=2).flatten(1, 2)
    return stacked.unflatten(1, (channels, -1)).mean(2)


def _duplicate(x: torch.Tensor, channels: int, time: int, space: int) -> torch.Tensor:
    """Wan2.2's shortcut upwards: channels, repeated, become cells; of the first frame only the later half is kept."""
    cells = x.repeat_interleave(channels * time * space**2 // x.shape[1], dim=1).unflatten(1, (channels, -1))
    batch, _, _, frames, height, width = cells.shape
    whole = x.new_zeros(batch, channels, frames * time, height * space, width * space)
    places = [(t, row, column) for t in range(time) for row in range(space) for column in range(space)]
    for n, (t, row, column) in enumerate(places):
        whole[:, :, t::time, row::space, column::space] = cells[:, :, n]
    return whole[:, :, time - 1 :]
