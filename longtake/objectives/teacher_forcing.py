"""Teacher forcing: every block learns to denoise itself given the blocks before it, clean or as the student makes them.

Source: Self-Forcing's diffusion trainer and Causal-Forcing (arXiv 2602.02214), extended to `[1, n, n, ...]`, a given
picture and 36-channel models: `y` goes to both halves, the picture is clean in both and outside the loss. A video whose
caption changes on the way is learnt as a stream meets the change, its context rebuilt (`rollout/recache.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from longtake.config.base import Settings
from longtake.config.objective import ObjectiveConfig
from longtake.errors import ConfigError, TrainingError
from longtake.objectives.base import LossResult, Objective, Parts, Pass
from longtake.objectives.flow_matching import drop_captions, require_latents
from longtake.plan import StreamPlan

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import Condition
    from longtake.models.flops import Call
    from longtake.objectives.batch import EncodedBatch

SHARE_PARTS = 1 << 20  # a share of iterations is drawn in this many parts


class ErrorRecycling(Settings):
    """Causal training after the student's own version of earlier frames (`rollout.recycle`): it learns to correct its
    errors.
    """

    share: float = Field(
        default=0.0, ge=0, le=1, description="share of the iterations with such a context; the others have the real one"
    )
    # The first generated block never begins at step 0: what a picture and a caption leave open is decided there, and
    # the video that is learnt has decided it.
    from_step: int = Field(
        default=1,
        ge=0,
        description="each earlier block is noised to the level of one of the denoising steps, from this one on, and "
        "made again from there; 0 = also from noise alone, where captions and pictures decide all of the motion",
    )


class TeacherForcingConfig(ObjectiveConfig):
    """Causal training on real videos, clean context before each block."""

    kind: Literal["teacher_forcing"] = "teacher_forcing"
    caption_dropout: float = Field(default=0.0, ge=0, le=1, description="share of samples trained without caption")
    error_recycling: ErrorRecycling = Field(default=ErrorRecycling(), description=ErrorRecycling.__doc__)

    reference: ClassVar[str | None] = "generator"  # which begins with a teacher's weights

    @property
    def takes_switches(self) -> bool:
        return True

    def check(self, plan: StreamPlan, num_latent_frames: int, *, with_picture: bool, lora: bool) -> None:
        """Raises ConfigError unless there is a denoising step to begin from."""
        if self.error_recycling.share and self.error_recycling.from_step >= len(plan.sigmas):
            raise ConfigError(
                f"objective.error_recycling.from_step={self.error_recycling.from_step} must be below the "
                f"{len(plan.sigmas)} flow.steps; set it to {len(plan.sigmas) - 1} or less"
            )

    def build(self, parts: Parts) -> Objective:
        """The objective."""
        return TeacherForcing(parts, self)


def filled(rows: list[int], most: int) -> list[int]:
    """Some of `most` rows, the last one repeated up to a quarter, half or all of these: on a GPU masked attention is
    compiled for each number of rows, and each iteration would have another one.
    """
    sizes = (-(-most // 4), -(-most // 2), most)
    return [*rows, *rows[-1:] * (next(size for size in sizes if size >= len(rows)) - len(rows))]


class TeacherForcing(Objective):
    """Causal training of a bidirectional model on real videos: one noise level a block, clean context before it.

    With `error_recycling` the context is at times what the student itself would have made of the video; the loss is
    against the real video as ever. So it learns to correct errors, where clean context alone teaches to go on from
    exact frames, which a roll-out never sees.
    """

    def __init__(self, parts: Parts, settings: TeacherForcingConfig) -> None:
        super().__init__(parts)
        from longtake.rollout.packed import PackedClip

        self.denoiser, self.model, self.settings = parts.student, parts.student.model, settings
        self.packed = PackedClip(self.plan)

    def loss(self, turn: str, batch: Any, step: int) -> LossResult:
        """Mean squared error of the velocity over the generated frames."""
        from longtake.flow.path import add_noise, velocity
        from longtake.rng import to_device

        clean = require_latents(batch, "teacher forcing").float()
        frames = clean.shape[1]
        noise = self.draws.noise(step, "noise", batch.indices, clean.shape[1:], clean.device)
        sigma = to_device(self._sigma(batch, step, frames), clean.device)
        noisy = add_noise(clean, noise, sigma)
        switches = self._switches(batch, step, frames)
        if any(switches):
            batch = replace(batch, condition=replace(batch.condition, later_text=batch.later_text))
        condition = drop_captions(batch, self.draws, step, self.settings.caption_dropout)
        history = self._history(clean, condition, batch, step)
        context = self.packed.context(history, self.draws, step, batch.indices)
        predicted = self._predicted(condition, context, noisy, sigma, switches)
        error = (predicted - velocity(clean, noise)).square().mean((2, 3, 4))
        counted = (sigma > 0).float()
        loss = (error * counted).sum() / counted.sum()
        return LossResult(loss, {"generator_loss": loss.detach()})

    def remakes(self, step: int) -> bool:
        """Whether iteration `step` has the student's own version of the video as context; the same on every rank."""
        drawn = self.draws.integer(step, "own_history", 0, SHARE_PARTS)
        return drawn < self.settings.error_recycling.share * SHARE_PARTS

    def starts(self, step: int, num_frames: int) -> list[int]:
        """The denoising step from which each block is made again."""
        low, found = self.settings.error_recycling.from_step, []
        for block, (start, _) in enumerate(self.plan.blocks(0, num_frames)):
            steps = len(self.plan.levels(start))
            least = max(low, 1) if start == self.plan.given_frames else low
            found.append(self.draws.integer(step, "own_history_step", min(least, steps - 1), steps, part=block))
        return found

    def passes(self, step: int, clips: Mapping[str, Call]) -> list[Pass]:
        """The student's own version of the clip, where this iteration makes one, and the loss on both halves."""
        clip = clips["generator"]
        return [*self._recycle_passes(step, clip), self.forced_pass(clip, clip.entries)]

    def forced_pass(self, clip: Call, num_frames: int) -> Pass:
        """The call of the loss, on videos of `num_frames` latents."""
        return Pass("generator", "forward", clip.masked(self.packed.layout(num_frames)), with_grad=True)

    def _recycle_passes(self, step: int, clip: Call) -> Iterator[Pass]:
        """As `recycle` makes them; only the first call makes keys and values of the text."""
        if not self.remakes(step):
            return
        plan, fresh = self.plan, True
        blocks = list(plan.blocks(0, clip.entries))
        for (start, end), begin in zip(blocks[:-1], self.starts(step, clip.entries)):
            call = clip.cached(end - start, len(plan.attended(start, end)), with_context=fresh)
            if start >= plan.given_frames:
                times = len(plan.levels(start)) - begin - plan.stores_itself(start)
                yield Pass("generator", "rollout", replace(call, with_context=False), times=times)
            yield Pass("generator", "rollout", call)  # what stores it: a call of its own, or the last step
            fresh = False

    def _history(self, clean: Tensor, condition: Condition, batch: EncodedBatch, step: int) -> Tensor:
        """The context of this iteration, [B, F, C, H, W]."""
        if not self.remakes(step):
            return clean
        from longtake.rollout.self_forcing import recycle

        def noise(start: int, end: int, part: int) -> Tensor:
            shape = (end - start, *clean.shape[2:])
            key = start * self.plan.num_noises + part
            return self.draws.noise(step, "history", batch.indices, shape, clean.device, part=key)

        with self.phase("rollout"):
            starts = self.starts(step, clean.shape[1])
            return recycle(self.denoiser, condition, clean, noise, self.plan, starts)

    def _sigma(self, batch: EncodedBatch, step: int, frames: int) -> Tensor:
        """[B, F]: one level a block, uniform before the warp; 0 on the given picture."""
        import torch

        from longtake.flow.schedule import training_sigma

        def level(block: int, start: int) -> Tensor:
            u = self.draws.uniform(step, "sigma", batch.indices, dtype=torch.float64, part=block)
            return training_sigma(u, self.parts.shift)

        sigma = self.packed.by_block(frames, level)
        sigma[:, : self.plan.given_frames] = 0.0
        return sigma

    def _switches(self, batch: EncodedBatch, step: int, frames: int) -> list[int | None]:
        """For each row the block boundary at which its caption changes, None where it does not within its blocks."""
        asked = batch.switch_frames or [None] * len(batch.indices)
        found = [None if frame is None else self.plan.boundary_after(frame) for frame in asked]
        switches = [None if frame is None or frame >= frames else frame for frame in found]
        if any(switches) and self.remakes(step):
            raise TrainingError(
                "objective.error_recycling cannot make a video again whose caption changes on the way; set its share "
                "to 0, or give rows without switch_frames"
            )
        return switches

    def _predicted(
        self,
        condition: Condition,
        context: tuple[Tensor, Tensor],
        noisy: Tensor,
        sigma: Tensor,
        switches: Sequence[int | None],
    ) -> Tensor:
        """Velocities of the noisy frames after their context; rows that change at the same frame share a call."""
        import torch

        groups: dict[int | None, list[int]] = {}
        for row, switch in enumerate(switches):
            groups.setdefault(switch, []).append(row)
        if len(groups) == 1:
            return self.packed.velocity(self.model, condition, context, noisy, sigma, switches[0])
        if self.parts.sharded:
            raise TrainingError(
                f"the captions of a micro-batch change at latent frames {list(groups)}, which takes a call each, and "
                "ranks that share a network must make as many calls; set micro_batch_size=1, or "
                "parallel.data_parallel=ddp"
            )
        rows = [row for group in groups.values() for row in group]
        made = []
        for switch, group in groups.items():
            some = filled(group, len(noisy)) if noisy.is_cuda else group
            past, told = (context[0][some], context[1][some]), condition.rows(some)
            predicted = self.packed.velocity(self.model, told, past, noisy[some], sigma[some], switch)
            made.append(predicted[: len(group)])
        return torch.cat(made)[torch.tensor(rows).argsort()]
