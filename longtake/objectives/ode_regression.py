"""ODE regression: the student learns in one step where a teacher's sampler ends, from the states it passes on its way.

The paths are made beforehand and stored (`longtake teacher-data`). Source: CausVid (arXiv 2412.07772, section 4.3) for
those of a bidirectional teacher; Causal-Forcing (arXiv 2602.02214, `model/ode_regression.py`) for those of a causal
one. Extended to `[1, n, n, ...]` and a given picture, which is clean and outside the loss. Unlike there a state is
drawn for each block, not for each clip: blocks of one call do not see each other's noisy halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from longtake.config.base import PathText
from longtake.config.objective import ObjectiveConfig, TeacherSampling
from longtake.errors import TrainingError
from longtake.objectives.base import LossResult, Objective, Parts, Pass
from longtake.objectives.flow_matching import require_latents

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.models.flops import Call
    from longtake.objectives.batch import EncodedBatch


class OdeRegressionConfig(ObjectiveConfig):
    """Regression to the ends of a teacher's stored paths (ODE pairs), from their states at the student's levels."""

    kind: Literal["ode_regression"] = "ode_regression"
    teacher: PathText = Field(description="weights whose paths the rows hold, as `init_from`")
    teacher_kind: Literal["causal", "bidirectional"] = Field(
        default="causal",
        description="`causal` = it was trained by teacher forcing, and makes each block after the real frames before "
        "it, so that rows must be videos; `bidirectional` = it makes whole clips of pictures and prompts alone",
    )
    teacher_steps: int = Field(
        default=48, gt=0, description="Euler steps of a path, to which the student's levels come"
    )
    guidance: float = Field(
        default=4.0, ge=0, description="classifier-free guidance w of the paths, uncond + w (cond - uncond); 1 = off"
    )
    negative_prompt: str = Field(default="", description="text of the unconditional side of guidance; empty = no text")

    @property
    def paths(self) -> TeacherSampling:
        causal = self.teacher_kind == "causal"
        return TeacherSampling(
            "objective.teacher", self.teacher, causal, self.teacher_steps, self.guidance, keeps_path=True
        )

    @property
    def empty_prompt(self) -> str:
        return self.negative_prompt

    def build(self, parts: Parts) -> Objective:
        """The objective."""
        return OdeRegression(parts, self)


class OdeRegression(Objective):
    """Mean squared error between clean predictions and the ends of the paths, each block after clean context."""

    def __init__(self, parts: Parts, settings: OdeRegressionConfig) -> None:
        super().__init__(parts)
        from longtake.rollout.packed import PackedClip

        self.model, self.packed = parts.student.model, PackedClip(self.plan)

    def loss(self, turn: str, batch: Any, step: int) -> LossResult:
        """The loss over the generated frames. Raises: TrainingError when the rows hold no paths."""
        from longtake.flow.path import clean_from_velocity

        clean = require_latents(batch, "ODE regression").float()
        if batch.path is None:
            raise TrainingError("ODE regression learns from a teacher's paths and its data have none")
        end = batch.path[:, -1].float()
        noisy, sigma = self._states(batch, step, clean)
        context = self.packed.context(clean, self.draws, step, batch.indices)
        velocity = self.packed.velocity(self.model, batch.condition, context, noisy, sigma)
        error = (clean_from_velocity(noisy, velocity, sigma) - end)[:, self.plan.given_frames :]
        loss = error.square().mean()
        return LossResult(loss, {"generator_loss": loss.detach()})

    def _states(self, batch: EncodedBatch, step: int, clean: Tensor) -> tuple[Tensor, Tensor]:
        """(states [B, F, C, H, W], levels [B, F]): of each block one that it is denoised from; the picture is clean."""
        import torch

        frames, given, stored = clean.shape[1], self.plan.given_frames, self.plan.all_levels

        def drawn(block: int, start: int) -> Tensor:
            levels = self.plan.levels(start)
            place = torch.tensor([stored.index(level) for level in levels])
            u = self.draws.uniform(step, "level", batch.indices, dtype=torch.float64, part=block)
            return place[(u * len(levels)).long()]

        place = self.packed.by_block(frames, drawn).to(clean.device)
        path = batch.path
        assert path is not None
        states = path.gather(1, place[:, None, :, None, None, None].expand_as(path[:, :1]))[:, 0].float()
        sigma = torch.tensor(stored, device=clean.device)[place]
        states[:, :given], sigma[:, :given] = clean[:, :given], 0.0
        return states, sigma

    def passes(self, step: int, clips: Mapping[str, Call]) -> list[Pass]:
        """One call of context and states."""
        clip = clips["generator"]
        return [Pass("generator", "forward", clip.masked(self.packed.layout(clip.entries)), with_grad=True)]
