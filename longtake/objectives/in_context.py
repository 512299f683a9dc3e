"""Scores of a long video in its context: by causal networks that see what came before, not a window cut out of it.

A causal teacher, trained by teacher forcing, is asked about the new frames in one packed pass `[context | targets]`:
the sink, the latest frames and the new ones as the student made them, then the new ones noised, at one level a window.
Who sees whom follows the plan, as in teacher forcing. So nothing is decoded, no picture is encoded anew, and a window
that has drifted from its beginning is told so. The critic is such a network, too, and learns from the same passes.
Source: Context-Matched Distillation (nv-tlabs/cmd); specification S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from longtake.config.base import Settings
from longtake.errors import ConfigError
from longtake.plan import StreamPlan

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import Condition, MaskLayout
    from longtake.models.dit import VideoDiT
    from longtake.objectives.scores import Score


class ContextScores(Settings):
    """Teacher and critic are causal networks that see the frames before a window. `teacher` must then name weights that
    were trained by teacher forcing, as those of the stage `causal`.
    """

    history_frames: int = Field(
        default=0,
        ge=0,
        description="latest latent frames before a chunk that they see beside the sink, up to plan.window_frames minus "
        "plan.sink_frames; 0 = off: bidirectional networks that see a window and its first picture",
    )
    sigma: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="noise level of what they see, but for the given picture; null = that of plan.context, with which "
        "causal stages train",
    )

    def check(self, plan: StreamPlan) -> None:
        """Raises ConfigError unless a stream of `plan` keeps these frames, and the first of all."""
        key, history = "objective.context_scores.history_frames", self.history_frames
        if not history:
            if self.sigma is not None:
                raise ConfigError(f"objective.context_scores.sigma={self.sigma} has no effect while {key}=0; remove it")
            return
        if history % plan.block_frames:
            fix = max(1, history // plan.block_frames) * plan.block_frames
            raise ConfigError(f"{key}={history} must be a multiple of plan.block_frames={plan.block_frames}; set {fix}")
        if plan.window_frames is None:
            return
        if history > (kept := plan.window_frames - plan.sink_frames):
            raise ConfigError(
                f"{key}={history} must be at most the {kept} that the window keeps beside the sink; set it to "
                f"{kept // plan.block_frames * plan.block_frames}, or raise plan.window_frames"
            )
        if plan.sink_frames < plan.first_frames:
            raise ConfigError(
                f"{key}={history} shows the first frames of the video to the teacher, and plan.sink_frames="
                f"{plan.sink_frames} lets them go; set that to {plan.first_frames} or more, or this to 0"
            )


def score_in(context: Tensor, levels: Tensor, layout: MaskLayout, targets: int) -> Score:
    """The score of the last `targets` frames of a clip after `context` [B, F, C, H, W] at `levels` [B, F], whose first
    frames, all but the last block, are in `layout`; zero elsewhere.
    """
    import torch

    frames, seen = context.shape[1], layout.num_entries - targets

    def score(network: VideoDiT, noisy: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        both = torch.cat([context[:, :seen], noisy[:, -targets:]], 1)
        told = torch.cat([levels[:, :seen], sigma[:, -targets:]], 1)
        velocity = network(both, told, condition, layout)[:, seen:]
        return torch.cat([torch.zeros_like(velocity[:, :1]).expand(-1, frames - targets, -1, -1, -1), velocity], 1)

    return score
