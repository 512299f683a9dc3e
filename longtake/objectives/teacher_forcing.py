"""Teacher forcing: every block learns to denoise itself given the clean blocks before it.

Source: Self-Forcing's diffusion trainer and Causal-Forcing (arXiv 2602.02214), extended to `[1, n, n, ...]`, a given
picture and 36-channel models: `y` goes to both halves, the picture is clean in both and outside the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtake.flow.path import add_noise, velocity
from longtake.flow.schedule import training_sigma
from longtake.models.dit import VideoDiT
from longtake.objectives.base import LossResult
from longtake.objectives.encoded import EncodedBatch
from longtake.objectives.flow_matching import drop_captions, require_latents
from longtake.randomness import Draws
from longtake.rollout.self_forcing import RollOutRules
from longtake.structs import MaskLayout


class TeacherForcing:
    """Causal training of a bidirectional model on real videos: one noise level a block, clean context before it."""

    def __init__(
        self, model: VideoDiT, draws: Draws, rules: RollOutRules, *, shift: float, caption_dropout: float = 0.0
    ) -> None:
        self.networks: dict[str, nn.Module] = {"generator": model}
        self.model, self.draws, self.rules = model, draws, rules
        self.shift, self.caption_dropout = shift, caption_dropout
        self._layouts: dict[int, MaskLayout] = {}

    def turns(self, step: int) -> list[str]:
        """The one network, every iteration."""
        return ["generator"]

    def discard(self) -> None:
        """Nothing goes on from one iteration to the next."""

    def loss(self, turn: str, batch: EncodedBatch, step: int) -> LossResult:
        """Mean squared error of the velocity over the generated frames."""
        clean = require_latents(batch, "causal").float()
        frames = clean.shape[1]
        noise = self.draws.noise(step, "noise", batch.indices, clean.shape[1:], clean.device)
        sigma = self._sigma(batch, step, frames).to(clean.device)
        noisy = add_noise(clean, noise, sigma)
        both = torch.cat([clean, noisy], 1)
        levels = torch.cat([torch.zeros_like(sigma), sigma], 1)
        condition = drop_captions(batch, self.draws, step, self.caption_dropout)
        predicted = self.model(both, levels, condition, mask=self._layout(frames))[:, frames:]
        error = (predicted - velocity(clean, noise)).square().mean((2, 3, 4))
        counted = (sigma > 0).float()
        loss = (error * counted).sum() / counted.sum()
        return LossResult(loss, {"generator_loss": loss.detach()})

    def _sigma(self, batch: EncodedBatch, step: int, frames: int) -> Tensor:
        """[B, F]: one level a block, uniform before the warp; 0 on the given picture."""
        columns = []
        for part, (start, end) in enumerate(self.rules.plan.blocks(0, frames)):
            u = self.draws.uniform(step, "sigma", batch.indices, dtype=torch.float64, part=part)
            columns.append(training_sigma(u, self.shift)[:, None].expand(-1, end - start))
        sigma = torch.cat(columns, 1).clone()
        if batch.first_latent is not None:
            sigma[:, 0] = 0.0
        return sigma

    def _layout(self, frames: int) -> MaskLayout:
        if frames not in self._layouts:
            rules = self.rules
            self._layouts[frames] = rules.plan.teacher_forcing_layout(
                frames, window_frames=rules.window_frames, sink_frames=rules.sink_frames, rope=rules.rope
            )
        return self._layouts[frames]
