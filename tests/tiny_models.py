"""Tiny models for tests: real architecture, random weights whose every part matters to the output."""

from __future__ import annotations

from typing import Any

import torch

from longtake.condition import Condition
from longtake.models.attention import Attention, FrameMask, attend
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.models.sizes import DiTConfig

HEIGHT, WIDTH, IMAGE_TOKENS = 4, 6, 5
TINY: dict[str, Any] = {
    "dim": 32,
    "ffn_dim": 48,
    "num_heads": 2,
    "num_layers": 2,
    "out_channels": 4,
    "text_dim": 12,
    "text_len": 8,
    "freq_dim": 32,
}


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a size at which attention is peaked and no gate, norm or head is neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1.3 + 0.3 * noise)
        elif parameter.ndim > 1 and "modulation" not in name and "table" not in name:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.3 * noise)


def make_tiny_model(i2v: bool = False, seed: int = 0, **changes: Any) -> VideoDiT:
    sizes = {**TINY, "in_channels": 12 if i2v else 4, "model_type": "i2v" if i2v else "t2v"}
    model = VideoDiT(DiTConfig(**{**sizes, "image_dim": 10 if i2v else None, **changes}))
    randomize(model, seed)
    return model


def with_self_attention(model: VideoDiT, by: Attention) -> VideoDiT:
    """The same network (of latents of `HEIGHT` x `WIDTH`) with self-attention alone computed by another entry."""
    tokens = model.tokens_per_frame(HEIGHT, WIDTH)

    def either(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: FrameMask | None = None) -> torch.Tensor:
        return (attend if k.shape[1] % tokens else by)(q, k, v, mask=mask)

    return model.executed(Execution(attend=either))


def make_tiny_condition(
    model: VideoDiT, batch: int = 2, seed: int = 1, num_frames: int = 7, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Condition:
    """Another prompt, prompt length and picture for every sample; `num_frames` condition frames."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    text = torch.randn(batch, config.text_len - 2, config.text_dim, generator=generator)
    for sample in range(batch):
        text[sample, 2 + sample % 3 :] = 0
    if config.condition_channels == 0:
        return Condition(text)
    frames = torch.randn(batch, num_frames, config.condition_channels, *size, generator=generator)
    if config.image_dim is None:
        return Condition(text, frames=frames)
    return Condition(text, torch.randn(batch, IMAGE_TOKENS, config.image_dim, generator=generator), frames)


def make_tiny_latents(num_frames: int, batch: int = 2, seed: int = 2, channels: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_frames, channels, HEIGHT, WIDTH, generator=generator)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of `b`, in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())
