"""All blocks of a clip in one call of a causal network: `[context | noisy]`, each noisy block after its own context.

What a cached call after a roll-out of the context would give, for every block at once. Source: teacher forcing as in
Causal-Forcing (arXiv 2602.02214), extended to `[1, n, n, ...]` and a given picture. It must know no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.condition import Condition, MaskLayout
from longtake.flow.path import add_noise, guided
from longtake.models.dit import VideoDiT
from longtake.plan import StreamPlan
from longtake.rng import KeyedRNG, to_device
from longtake.rollout.recache import Forced, forced


@dataclass(frozen=True)
class PackedClip:
    """The clips of a plan, which knows how many of their frames are given (`StreamPlan.with_given`)."""

    plan: StreamPlan
    _forced: dict[tuple[int, int | None], Forced] = field(default_factory=dict)

    def layout(self, num_frames: int) -> MaskLayout:
        """Who sees whom, of clips of `num_frames` latents."""
        return self._of(num_frames, None).layout

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
        if not any(levels):
            return history, torch.zeros(history.shape[:2], device=history.device)
        sigma = torch.tensor(levels, device=history.device).expand(history.shape[0], -1)
        noise = draws.noise(step, "context_noise", indices, history.shape[1:], history.device)
        return add_noise(history, noise, sigma), sigma

    def velocity(
        self,
        model: VideoDiT,
        condition: Condition,
        context: tuple[Tensor, Tensor],
        noisy: Tensor,
        sigma: Tensor,
        switch: int | None = None,
    ) -> Tensor:
        """What the network predicts of `noisy` [B, F, C, H, W] at `sigma` [B, F], each block after its `context`; zeros
        of given frames.

        Args: `switch`, the block boundary from which the condition's later text holds; None: it does nowhere.
        """
        both, levels = torch.cat([context[0], noisy], 1), torch.cat([context[1], sigma], 1)
        packed, device = self._of(noisy.shape[1], switch), both.device
        if switch is None:
            condition = replace(condition, later_text=None)
        source, entries = (to_device(numbers, device) for numbers in (packed.source, packed.noisy))
        made = model(both.index_select(1, source), levels.index_select(1, source), condition, packed.layout)
        made = made.index_select(1, entries)
        return F.pad(made, (0,) * 6 + (noisy.shape[1] - made.shape[1], 0))

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

    def _of(self, num_frames: int, switch: int | None) -> Forced:
        if (num_frames, switch) not in self._forced:
            self._forced[num_frames, switch] = forced(self.plan, num_frames, switch)
        return self._forced[num_frames, switch]
