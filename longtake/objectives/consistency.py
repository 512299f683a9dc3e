"""Consistency distillation of a causal teacher: what the student says of a point is what it says one step further on.

Noisy points lie around real clips, each block after the real frames before it, so that nothing is made beforehand. The
teacher takes one Euler step of a grid from there; the student's average says where the flow from that point ends.
Source: Song et al. 2023 (arXiv 2303.01469, algorithm 2); causal, with clean context: Causal-Forcing++ (arXiv
2605.15141, `model/naive_consistency.py`). Extended to `[1, n, n, ...]` and a given picture. Unlike there each block
draws a level of its own, and the last step, to level 0, is among them: there the target is the teacher's clean frame.

The teacher must be causal: a bidirectional one goes from noise to another clip than the one whose frames are context.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from longtake.config.base import PathText
from longtake.config.objective import NetworkConfig, ObjectiveConfig
from longtake.objectives.base import Average, LossResult, Objective, Parts, Pass
from longtake.objectives.flow_matching import require_latents

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.models.flops import Call
    from longtake.objectives.batch import EncodedBatch


class ConsistencyConfig(ObjectiveConfig):
    """Consistency distillation: the student's answer stays the same along the flow of a causal teacher. The target is
    the average of its weights (`ema`), or these themselves where none is kept.
    """

    kind: Literal["consistency"] = "consistency"
    teacher: PathText = Field(description="weights that teacher forcing trained, as `init_from`")
    teacher_steps: int = Field(default=48, gt=0, description="steps of the grid from noise to clean frames")
    guidance: float = Field(
        default=3.0, ge=0, description="classifier-free guidance w of the teacher, uncond + w (cond - uncond); 1 = off"
    )
    negative_prompt: str = Field(default="", description="text of the unconditional side of guidance; empty = no text")

    @property
    def empty_prompt(self) -> str:
        return self.negative_prompt

    def networks(self) -> Mapping[str, NetworkConfig]:
        """The frozen teacher."""
        return {"teacher": NetworkConfig("objective.teacher", self.teacher)}

    def build(self, parts: Parts) -> Objective:
        """The objective."""
        return Consistency(parts, self)


class Consistency(Objective):
    """Mean squared error between clean predictions at neighbouring levels, of the student and of its average."""

    def __init__(self, parts: Parts, settings: ConsistencyConfig) -> None:
        super().__init__(parts)
        from longtake.flow.schedule import sampling_sigmas
        from longtake.rollout.packed import PackedClip

        self.model, self.packed, self.settings = parts.student.model, PackedClip(self.plan), settings
        self.teacher = parts.frozen["teacher"].eval().requires_grad_(False)
        self.grid = sampling_sigmas(settings.teacher_steps, parts.shift)
        self.averaged: Average = nullcontext

    def take_averages(self, averages: Mapping[str, Average]) -> None:
        """The target is the generator's average, where one is kept."""
        self.averaged = averages.get("generator", nullcontext)

    def loss(self, turn: str, batch: Any, step: int) -> LossResult:
        """The loss over the generated frames."""
        from longtake.flow.path import add_noise, clean_from_velocity

        clean = require_latents(batch, "consistency distillation").float()
        noise = self.draws.noise(step, "noise", batch.indices, clean.shape[1:], clean.device)
        sigma, following = self._levels(batch, step, clean)
        noisy = add_noise(clean, noise, sigma)
        context = self.packed.context(clean, self.draws, step, batch.indices)
        # Before the student's own call: its backward must find the weights that it was made with.
        target = self._target(batch, context, noisy, sigma, following)
        velocity = self.packed.velocity(self.model, batch.condition, context, noisy, sigma)
        error = (clean_from_velocity(noisy, velocity, sigma) - target)[:, self.plan.given_frames :]
        loss = error.square().mean()
        return LossResult(loss, {"generator_loss": loss.detach()})

    def _target(
        self,
        batch: EncodedBatch,
        context: tuple[Tensor, Tensor],
        noisy: Tensor,
        sigma: Tensor,
        following: Tensor,
    ) -> Tensor:
        """Where the average says that the flow ends from one step of the teacher further on; without gradient."""
        import torch

        from longtake.flow.path import clean_from_velocity, per_frame

        condition, guidance = batch.condition, self.settings.guidance
        with torch.no_grad(), self.phase("scores"):
            velocity = self.packed.guided(
                self.teacher, condition, batch.unconditional, guidance, context, noisy, sigma
            ).float()
            further = noisy + per_frame(following - sigma) * velocity
            with self.averaged():
                velocity = self.packed.velocity(self.model, condition, context, further, following)
            return clean_from_velocity(further, velocity, following)

    def _levels(self, batch: EncodedBatch, step: int, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Two neighbouring levels of the grid [B, F] each, one pair a block; 0 on the given picture."""
        import torch

        def drawn(block: int, start: int) -> Tensor:
            u = self.draws.uniform(step, "level", batch.indices, dtype=torch.float64, part=block)
            return (u * self.settings.teacher_steps).long()

        place = self.packed.by_block(clean.shape[1], drawn).to(clean.device)
        grid = torch.tensor(self.grid, device=clean.device)
        levels = grid[place], grid[place + 1]
        for level in levels:
            level[:, : self.plan.given_frames] = 0.0
        return levels

    def passes(self, step: int, clips: Mapping[str, Call]) -> list[Pass]:
        """The teacher's calls, the target's and the student's own, all of context and noisy frames."""
        calls = {name: clip.masked(self.packed.layout(clip.entries)) for name, clip in clips.items()}
        return [
            Pass("teacher", "scores", calls["teacher"], times=1 if self.settings.guidance == 1 else 2),
            Pass("generator", "scores", calls["generator"]),
            Pass("generator", "forward", calls["generator"], with_grad=True),
        ]
