"""All blocks of a clip in one call of a causal network: `[context | noisy]`, each noisy block after its own context.

What a cached call after a roll-out of the context would give, for every block at once. Source: teacher forcing as in
Causal-Forcing (arXiv 2602.02214), extended to `[1, n, n, ...]` and a given picture. It must know no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtake.condition import Condition, MaskLayout
from longtake.flow.path import add_noise, guided
from longtake.models.dit import VideoDiT
from longtake.plan import StreamPlan
from longtake.rng import KeyedRNG


@dataclass(frozen=True)
class PackedClip:
    """The clips of a plan, which knows how many of their frames are given (`StreamPlan.with_given`)."""

    plan: StreamPlan
    _layouts: dict[int, MaskLayout] = field(default_factory=dict)

    def layout(self, num_frames: int) -> MaskLayout:
        """Who sees whom, of clips of `num_frames` latents."""
        if num_frames not in self._layouts:
            self._layouts[num_frames] = self.plan.teacher_forcing_layout(num_frames)
        return self._layouts[num_frames]

    def by_block(self, num_frames: int, draw: Callable[[int, int], Tensor]) -> Tensor:
        """[B, F] of one value a block: `draw(number, start)` [B] of the block with that number and first frame."""
        columns = [
            draw(number, start)[:, None].expand(-1, end - start)
            for number, (start, end) in enumerate(self.plan.blocks(0, num_frames))
        ]
        return torch.cat(columns, 1).clone()

    def context(self, history: Tensor, draws: KeyedRNG, step: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What a cache would hold of clean frames `history` [B, F, C, H, W]: these at the levels of the plan, by noise
        of (`step`, global sample indices) where a level is not 0; and the levels, [B, F].
        """
        levels = self.plan.context_levels(history.shape[1])
        sigma = torch.tensor(levels, device=history.device).expand(history.shape[0], -1)
        if not any(levels):
            return history, sigma
        noise = draws.noise(step, "context_noise", indices, history.shape[1:], history.device)
        return add_noise(history, noise, sigma), sigma

    def velocity(
        self, model: VideoDiT, condition: Condition, context: tuple[Tensor, Tensor], noisy: Tensor, sigma: Tensor
    ) -> Tensor:
        """What the network predicts of `noisy` [B, F, C, H, W] at `sigma` [B, F], each block after its `context`."""
        frames = noisy.shape[1]
        both, levels = torch.cat([context[0], noisy], 1), torch.cat([context[1], sigma], 1)
        return model(both, levels, condition, self.layout(frames))[:, frames:]

    def guided(
        self,
        model: VideoDiT,
        condition: Condition,
        unconditional: Condition,
        guidance: float,
        context: tuple[Tensor, Tensor],
        noisy: Tensor,
        sigma: Tensor,
    ) -> Tensor:
        """`velocity` with classifier-free guidance w: uncond + w (cond - uncond); 1 = off, one call."""
        predicted = self.velocity(model, condition, context, noisy, sigma)
        if guidance == 1:
            return predicted
        return guided(predicted, self.velocity(model, unconditional, context, noisy, sigma), guidance)
