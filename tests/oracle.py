"""Wan's causal transformer by brute force in float64, from a state dict: the judge of the streaming and masked paths.

Written from the formulas (specification A.3, E.1, E.3 to E.5) with loops over samples, frames and heads, and lists of
frames instead of masks and slots. It imports nothing of Longtake on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Trace:
    """`velocity` [B, F, C, H, W] of the context pass, `noisy` of the passes before it, and per layer and frame the
    keys as a cache would store them and the values: `keys[layer][frame]` [B, L, N, K]."""

    velocity: Tensor
    noisy: Tensor | None
    keys: list[list[Tensor]] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)


def run(
    state: dict[str, Tensor],
    x: Tensor,
    sigma: Tensor,
    text: Tensor,
    image: Tensor | None = None,
    frames: Tensor | None = None,
    *,
    num_heads: int,
    text_len: int,
    blocks: list[tuple[int, int]],
    window: int | None = None,
    sink: int = 0,
    rope: str = "absolute",
    noisy: Tensor | None = None,
    noisy_sigma: Tensor | None = None,
    graph: bool = False,
    detached: int = 0,
    noisy_state: dict[str, Tensor] | None = None,
) -> Trace:
    """Streams every sample on its own. `x`, `noisy` [B, F, C, H, W]; `sigma`, `noisy_sigma` [B, F]; `blocks` of the
    whole video, or those that are still remembered. Each block first gets a pass over `noisy` that nothing remembers,
    then one over `x` that is kept. `graph`: autograd goes into `state`, through the memory too, but for that of frames
    before `detached`. `noisy_state`: weights of the passes that nothing remembers, where these are another network's.
    """

    def network(state: dict[str, Tensor], b: int) -> _Sample:
        weights = {name: (tensor if graph else tensor.detach()).double().cpu() for name, tensor in state.items()}
        context = _text(weights, text[b].double(), text_len)
        tokens = None if image is None else _image(weights, image[b].double())
        y = None if frames is None else frames[b].double()
        return _Sample(weights, context, tokens, y, num_heads, window, sink, rope, detached)

    samples, readers = [], []
    for b in range(x.shape[0]):
        samples.append(network(state, b))
        readers.append(samples[-1] if noisy_state is None else network(noisy_state, b))
        readers[-1].memory = samples[-1].memory
    clean, dirty = [], []
    for b, (sample, reader) in enumerate(zip(samples, readers)):
        own_clean, own_dirty = [], []
        for start, end in blocks:
            if noisy is not None and noisy_sigma is not None:
                reader.held = sample.held
                own_dirty += reader.block(start, noisy[b, start:end].double(), noisy_sigma[b, start:end], keep=False)
            own_clean += sample.block(start, x[b, start:end].double(), sigma[b, start:end], keep=True)
        clean.append(torch.stack(own_clean))
        dirty.append(torch.stack(own_dirty) if own_dirty else None)
    layers, total = len(samples[0].memory), sorted(samples[0].memory[0])
    stored = [
        [[torch.stack([s.stored(layer, f)[part] for s in samples]) for f in total] for layer in range(layers)]
        for part in (0, 1)
    ]
    return Trace(torch.stack(clean), torch.stack(dirty) if dirty[0] is not None else None, *stored)


class _Sample:
    def __init__(
        self,
        weights: dict[str, Tensor],
        context: Tensor,
        image: Tensor | None,
        y: Tensor | None,
        heads: int,
        window: int | None,
        sink: int,
        rope: str,
        detached: int = 0,
    ) -> None:
        self.detached = detached
        self.w, self.context, self.image, self.y = weights, context, image, y
        self.heads, self.window, self.sink, self.rope = heads, window, sink, rope
        layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.memory: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(layers)]  # un-rotated k, and v
        self.held: list[int] = []
        self.grid = (0, 0)

    def stored(self, layer: int, frame: int) -> tuple[Tensor, Tensor]:
        """What a cache stores for one frame: k rotated at its absolute position or un-rotated, and v."""
        k, v = self.memory[layer][frame]
        return (_rotate(k, frame, self.grid) if self.rope == "absolute" else k), v

    def block(self, start: int, x: Tensor, sigma: Tensor, *, keep: bool) -> list[Tensor]:
        count = x.shape[0]
        seen = list(self.held)
        if self.window is not None:
            while len(seen) + count > self.window:
                seen.pop(self.sink)  # first in, first out, after the sink
        own = list(range(start, start + count))
        self.grid = (x.shape[2] // 2, x.shape[3] // 2)
        hidden, times = [], []
        for i, frame in enumerate(own):
            latent = x[i]
            if self.y is not None:
                latent = torch.cat([latent, self.y[min(frame, len(self.y) - 1)]], 0)
            hidden.append(_patches(self.w, latent))
            times.append(_time(self.w, float(sigma[i])))
        for layer in range(len(self.memory)):
            hidden = self._layer(layer, hidden, [modulation for _, modulation in times], seen, own, keep)
        if keep:
            self.held = seen + own
        return [self._head(h, e) for h, (e, _) in zip(hidden, times)]

    def _layer(
        self, layer: int, hidden: list[Tensor], times: list[Tensor], seen: list[int], own: list[int], keep: bool
    ) -> list[Tensor]:
        p = f"blocks.{layer}."
        parts = [(self.w[p + "modulation"][0] + t).unbind(0) for t in times]  # s1 c1 g1 s2 c2 g2
        normed = [_ln(h) * (1 + m[1]) + m[0] for h, m in zip(hidden, parts)]
        q, k, v = {}, {}, {}
        for frame, h in zip(own, normed):
            q[frame] = self._split(_rms(self._linear(p + "self_attn.q", h), self.w[p + "self_attn.norm_q.weight"]))
            k[frame] = self._split(_rms(self._linear(p + "self_attn.k", h), self.w[p + "self_attn.norm_k.weight"]))
            v[frame] = self._split(self._linear(p + "self_attn.v", h))
            if keep:
                kept = k[frame], v[frame]
                self.memory[layer][frame] = (kept[0].detach(), kept[1].detach()) if frame < self.detached else kept
        for frame in seen:
            k[frame], v[frame] = self.memory[layer][frame]
        attended = seen + own
        position = {frame: i if self.rope == "relative" else frame for i, frame in enumerate(attended)}
        keys = torch.cat([_rotate(k[frame], position[frame], self.grid) for frame in attended])
        values = torch.cat([v[frame] for frame in attended])
        out = []
        for h, m, frame in zip(hidden, parts, own):
            query = _rotate(q[frame], position[frame], self.grid)
            h = h + m[2] * self._linear(p + "self_attn.o", _attend(query, keys, values))
            h = h + self._cross(p + "cross_attn.", _ln(h) * self.w[p + "norm3.weight"] + self.w[p + "norm3.bias"])
            inner = _gelu_tanh(self._linear(p + "ffn.0", _ln(h) * (1 + m[4]) + m[3]))
            out.append(h + m[5] * self._linear(p + "ffn.2", inner))
        return out

    def _cross(self, p: str, h: Tensor) -> Tensor:
        q = self._split(_rms(self._linear(p + "q", h), self.w[p + "norm_q.weight"]))
        k = self._split(_rms(self._linear(p + "k", self.context), self.w[p + "norm_k.weight"]))
        out = _attend(q, k, self._split(self._linear(p + "v", self.context)))
        if self.image is not None:
            k = self._split(_rms(self._linear(p + "k_img", self.image), self.w[p + "norm_k_img.weight"]))
            out = out + _attend(q, k, self._split(self._linear(p + "v_img", self.image)))
        return self._linear(p + "o", out)

    def _head(self, h: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.w["head.modulation"][0] + e).unbind(0)
        tokens = self._linear("head.head", _ln(h) * (1 + scale) + shift)
        rows, columns = self.grid
        channels = tokens.shape[1] // 4
        out = torch.zeros(channels, 2 * rows, 2 * columns, dtype=torch.float64)
        for r in range(rows):
            for c in range(columns):
                for i in range(2):
                    for j in range(2):
                        first = (2 * i + j) * channels
                        out[:, 2 * r + i, 2 * c + j] = tokens[r * columns + c, first : first + channels]
        return out

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return _linear(self.w, name, x)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.heads, -1)


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def _ln(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[L, N, K] x [S, N, K] -> [L, N * K]."""
    heads = []
    for n in range(q.shape[1]):
        score = (q[:, n] @ k[:, n].T / math.sqrt(q.shape[2])).exp()
        heads.append(score / score.sum(1, keepdim=True) @ v[:, n])
    return torch.cat(heads, 1)


def _rotate(x: Tensor, frame: int, grid: tuple[int, int]) -> Tensor:
    """Rotates the adjacent channel pairs of one frame's tokens [L, N, K]: time | row | column."""
    width = x.shape[2]
    side = 2 * (width // 6)
    angles = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            token = []
            for place, size in ((frame, width - 2 * side), (row, side), (column, side)):
                token += [place * 10000.0 ** (-2 * i / size) for i in range(size // 2)]
            angles.append(token)
    angle = torch.tensor(angles, dtype=torch.float64)
    turn = torch.complex(angle.cos(), angle.sin())[:, None]
    pairs = torch.complex(x[..., 0::2].contiguous(), x[..., 1::2].contiguous()) * turn
    return torch.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def _patches(w: dict[str, Tensor], latent: Tensor) -> Tensor:
    kernel, bias = w["patch_embedding.weight"][:, :, 0], w["patch_embedding.bias"]
    rows, columns = latent.shape[1] // 2, latent.shape[2] // 2
    tokens = []
    for r in range(rows):
        for c in range(columns):
            patch = latent[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
            tokens.append((kernel * patch).sum((1, 2, 3)) + bias)
    return torch.stack(tokens)


def _time(w: dict[str, Tensor], sigma: float) -> tuple[Tensor, Tensor]:
    half = w["time_embedding.0.weight"].shape[1] // 2
    angles = [1000.0 * sigma * 10000.0 ** (-j / half) for j in range(half)]
    clock = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    e = _linear(w, "time_embedding.2", _silu(_linear(w, "time_embedding.0", clock)))
    return e, _linear(w, "time_projection.1", _silu(e)).reshape(6, -1)


def _text(w: dict[str, Tensor], text: Tensor, text_len: int) -> Tensor:
    padded = torch.zeros(text_len, text.shape[1], dtype=torch.float64)
    padded[: len(text)] = text
    return _linear(w, "text_embedding.2", _gelu_tanh(_linear(w, "text_embedding.0", padded)))


def _image(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    if "img_emb.emb_pos" in w:
        tokens = tokens + w["img_emb.emb_pos"][0]
    h = _ln(tokens, 1e-5) * w["img_emb.proj.0.weight"] + w["img_emb.proj.0.bias"]
    h = _linear(w, "img_emb.proj.1", h)
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    h = _ln(_linear(w, "img_emb.proj.3", h), 1e-5)
    return h * w["img_emb.proj.4.weight"] + w["img_emb.proj.4.bias"]
