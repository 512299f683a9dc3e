"""Bidirectional flow matching: trains the teacher, and scores of any kind.

Source: Wan2.1 technical report; Lipman et al. 2022 (arXiv 2210.02747). The whole clip has one noise level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from longtake.config.objective import ObjectiveConfig
from longtake.errors import TrainingError
from longtake.objectives.base import LossResult, Objective, Parts, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import Condition
    from longtake.models.flops import Call
    from longtake.objectives.batch import EncodedBatch
    from longtake.rng import KeyedRNG


class FlowMatchingConfig(ObjectiveConfig):
    """Bidirectional flow matching of a teacher."""

    kind: Literal["flow_matching"] = "flow_matching"
    caption_dropout: float = Field(default=0.0, ge=0, le=1, description="share of samples trained without caption")

    causal: ClassVar[bool] = False
    from_scratch: ClassVar[bool] = True

    def build(self, parts: Parts) -> Objective:
        """The objective."""
        return FlowMatching(parts, self)


def clip_sigma(sigma: Tensor, num_frames: int, *, first_frame_clean: bool) -> Tensor:
    """Noise level [B, F] of a clip from one level [B] a clip.

    Models of the Wan2.1 kind know the picture from 36 channels and see one level everywhere; models of the TI2V kind
    know it from a clean frame 0 (`first_frame_clean`).
    """
    levels = sigma[:, None].repeat(1, num_frames)
    if first_frame_clean:
        levels[:, 0] = 0.0
    return levels


def require_latents(batch: EncodedBatch, what: str) -> Tensor:
    """The batch's clean latents. Raises: TrainingError when the data hold none."""
    if batch.latents is None:
        raise TrainingError(f"{what} learns from videos and its data have none; use clips, or LMDB with latents")
    return batch.latents


class FlowMatching(Objective):
    """Teacher training: predict the velocity of the whole clip at one noise level.

    Frame 0 is part of the loss where it is noised: this teacher generates it too, from `y` alone.
    """

    def __init__(self, parts: Parts, settings: FlowMatchingConfig) -> None:
        super().__init__(parts)
        self.settings = settings

    def loss(self, turn: str, batch: Any, step: int) -> LossResult:
        """Mean squared error of the velocity."""
        import torch

        from longtake.flow.path import add_noise, velocity
        from longtake.flow.schedule import training_sigma

        clean = require_latents(batch, "flow matching").float()
        noise = self.draws.noise(step, "noise", batch.indices, clean.shape[1:], clean.device)
        u = self.draws.uniform(step, "sigma", batch.indices, dtype=torch.float64, device=clean.device)
        level = training_sigma(u, self.parts.shift)
        sigma = clip_sigma(level, clean.shape[1], first_frame_clean=self.parts.first_frame_clean)
        condition = drop_captions(batch, self.draws, step, self.settings.caption_dropout)
        predicted = self.parts.student.model(add_noise(clean, noise, sigma), sigma, condition)
        error = (predicted - velocity(clean, noise)).square().mean((2, 3, 4))
        counted = (sigma > 0).float()
        loss = (error * counted).sum() / counted.sum()
        return LossResult(loss, {"generator_loss": loss.detach()})

    def passes(self, step: int, clips: Mapping[str, Call]) -> list[Pass]:
        """One call of the whole clip."""
        return [Pass("generator", "forward", clips["generator"], with_grad=True)]


def drop_captions(batch: EncodedBatch, draws: KeyedRNG, step: int, share: float) -> Condition:
    """The batch's condition with the empty prompt, before and after a switch, in a random `share` of the samples."""
    if share <= 0:
        return batch.condition
    import torch

    drawn = draws.uniform(step, "caption_dropout", batch.indices, device=batch.empty_text.device)
    dropped = drawn[:, None, None] < share
    text, later = (
        None if told is None else torch.where(dropped, batch.empty_text, told)
        for told in (batch.condition.text, batch.condition.later_text)
    )
    assert text is not None
    return replace(batch.condition, text=text, later_text=later)
