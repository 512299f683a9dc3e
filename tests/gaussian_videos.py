"""Videos whose exact velocity and flow map are known: each block is Gaussian about a share of the frame before it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from longtake.condition import Condition
from longtake.flow.path import per_frame
from longtake.objectives.batch import EncodedBatch
from longtake.plan import StreamPlan

SHAPE = (2, 3, 3)  # of a frame: C, H, W


@dataclass(frozen=True)
class GaussianVideos:
    """Given the frames before it, a frame of the block that begins at s is N(share * frame s - 1, sd^2)."""

    plan: StreamPlan
    num_frames: int
    share: float = 0.8
    sd: float = 0.5

    def mean(self, clean: Tensor) -> Tensor:
        """[B, F, C, H, W] of each frame, after the frames of `clean`."""
        mean = torch.zeros_like(clean)
        for start, end in self.plan.blocks(0, self.num_frames):
            if start:
                mean[:, start:end] = self.share * clean[:, start - 1 : start]
        return mean

    def state(self, mean: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        """Where the flow is at `sigma` [B, F] that ends at mean + sd z."""
        level = per_frame(sigma)
        return (1 - level) * mean + self._spread(level) * z

    def end(self, mean: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The flow map: where the flow from `x` at `sigma` ends."""
        level = per_frame(sigma)
        return mean + self.sd * (x - (1 - level) * mean) / self._spread(level)

    def velocity(self, mean: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """E[noise - clean | x]."""
        level = per_frame(sigma)
        away = (x - (1 - level) * mean) / self._spread(level) ** 2
        return level * away - (mean + (1 - level) * self.sd**2 * away)

    def batch(self, num_rows: int, *, seed: int = 0, given: int = 0, **more: Any) -> EncodedBatch:
        """Clips, the first `given` frames of which are the picture."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(num_rows, self.num_frames, *SHAPE, generator=generator)
        clean = self.sd * z
        for start, end in self.plan.blocks(0, self.num_frames):
            clean[:, start:end] += self.mean(clean)[:, start:end]
        text, first = torch.zeros(num_rows, 1, 1), clean[:, :1] if given else None
        return EncodedBatch(list(range(num_rows)), Condition(text), text, SHAPE[1:], clean, first, **more)

    def path(self, batch: EncodedBatch, levels: list[float], *, seed: int = 1) -> Tensor:
        """[B, K + 1, F, C, H, W]: exact states at the levels and the end, each block after the clip's own frames."""
        assert batch.latents is not None
        z = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(seed))
        mean, flat = self.mean(batch.latents), torch.ones(batch.latents.shape[:2])
        return torch.stack([self.state(mean, z, level * flat) for level in (*levels, 0.0)], 1)

    def _spread(self, level: Tensor) -> Tensor:
        return ((1 - level) ** 2 * self.sd**2 + level**2).sqrt()


class ExactNetwork(nn.Module):
    """A network over the `[context | noisy]` of `PackedClip` that knows the exact answer: of a diffusion model, or (`few_step`) of a model
    whose one step ends where the flow does.
    """

    def __init__(self, videos: GaussianVideos, *, few_step: bool, i2v: bool = False) -> None:
        super().__init__()
        self.videos, self.few_step = videos, few_step
        self.config = SimpleNamespace(condition_channels=int(i2v), out_channels=SHAPE[0])

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition, context: Any = None) -> Tensor:
        frames, plan = self.videos.num_frames, self.videos.plan
        last = plan.block_of(frames - 1)[0]  # which no later block sees
        clean = torch.cat([x[:, :last], x.new_zeros(len(x), frames - last, *x.shape[2:])], 1)
        mean, noisy, level = self.videos.mean(clean)[:, plan.given_frames :], x[:, last:], sigma[:, last:]
        if self.few_step:
            velocity = (noisy - self.videos.end(mean, noisy, level)) / per_frame(level).clamp(min=1e-6)
        else:
            velocity = self.videos.velocity(mean, noisy, level)
        return torch.cat([torch.zeros_like(x[:, :last]), velocity], 1)
