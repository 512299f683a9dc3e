"""Distribution matching distillation of a causal student on its own roll-outs.

Source: DMD2 (arXiv 2405.14867), Self-Forcing (arXiv 2506.08009) and specification G. Scores are compared in float32
with sigma exact, as clean latents (x0); the critic's velocity is learnt as it comes, never through those and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from longtake.objectives.anchor import Statistics, anchor_loss, deviation_ratio
from longtake.objectives.base import LossResult, Objective, Parts, Pass
from longtake.objectives.dmd_keys import DmdKeys
from longtake.objectives.flow_matching import clip_sigma, require_latents
from longtake.objectives.held_batches import HeldBatches
from longtake.objectives.roll_out_groups import RollOutGroups
from longtake.objectives.roll_out_passes import roll_out_passes
from longtake.objectives.scores import dmd_gradient, dmd_loss
from longtake.objectives.teacher_forcing import TeacherForcing, TeacherForcingConfig
from longtake.plan import Exits

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import Condition
    from longtake.models.flops import Call
    from longtake.objectives.batch import EncodedBatch
    from longtake.objectives.scores import Score
    from longtake.rollout.self_forcing import RollOut, RollOutNoise


class DmdConfig(DmdKeys):
    """Distribution matching with a teacher on the student's own roll-outs."""

    kind: Literal["dmd"] = "dmd"  # type: ignore[assignment]

    def build(self, parts: Parts) -> Objective:
        """The objective."""
        return Dmd(parts, self)


class Dmd(Objective):
    """Self-Forcing with distribution matching: `updates_per_generator` critic updates to one generator update.

    Networks: `generator` (causal student) and `critic` (fake score) are trained, `teacher` (real score) is frozen. All
    random numbers follow (seed, step, purpose, sample); the exit step is one number for all ranks and blocks.
    """

    def __init__(self, parts: Parts, settings: DmdKeys) -> None:
        super().__init__(parts)
        self.generator, self.critic, self.settings = parts.student, parts.trained["critic"], settings
        self.guided = settings.guided
        self.real = parts.frozen["teacher"].eval().requires_grad_(False)
        self.data_loss = TeacherForcing(parts, TeacherForcingConfig()) if settings.data_loss.weight else None
        critic = settings.critic
        self._groups = RollOutGroups(
            critic.updates_per_rollout, critic.updates_per_generator, critic.critic_warmup_steps
        )
        # By the iteration that made them and the samples: what the critic will learn from.
        self._clips: dict[tuple[int, tuple[int, ...]], RollOut] = {}

    def turns(self, step: int) -> list[str]:
        """The critic always; after `critic_warmup_steps` the generator in every `updates_per_generator`-th one too."""
        return self._turns(step, step - self.settings.critic.critic_warmup_steps)

    def _turns(self, step: int, count: int) -> list[str]:
        """With the generator where `count` is a multiple of `updates_per_generator`, but for the head start."""
        critic = self.settings.critic
        due = step >= critic.critic_warmup_steps and count % critic.updates_per_generator == 0
        return ["generator", "critic"] if due else ["critic"]

    def loss(self, turn: str, batch: Any, step: int) -> LossResult:
        """Generator: the DMD loss through a roll-out, and that of `data_loss`. Critic: flow matching on the
        student's videos. Raises: TrainingError when `data_loss` are wanted and the batch has none.
        """
        return self._generator_loss(batch, step) if turn == "generator" else self._critic_loss(batch, step)

    def batches(self, loaded: Any, batch_size: int) -> Any:
        """The same micro-batches for all iterations that learn from one roll-out."""
        if self.settings.critic.updates_per_rollout == 1:
            return loaded
        return HeldBatches(loaded, self._groups.number, batch_size=batch_size)

    def rollout_step(self, step: int) -> int:
        """The iteration whose roll-out iteration `step` learns from: itself, but where `updates_per_rollout` says."""
        return self._groups.begin(step)

    def exit_step(self, step: int) -> int:
        """Denoising step at which every block of this iteration stops; or, where later blocks have levels of their own,
        the first generated one.
        """
        return self.draws.integer(step, "exit_step", 0, len(self.plan.sigmas))

    def exits(self, step: int) -> Exits:
        """Where the blocks of this iteration stop. Each list of levels has a draw of its own: clamped to a shorter
        list, one draw would leave its first steps too little of the training.
        """
        if (later := self.plan.later_sigmas) is None:
            return self.exit_step(step)
        return self.exit_step(step), self.draws.integer(step, "later_exit_step", 0, len(later))

    # ---- the two losses -------------------------------------------------------------------------------------------
    def _generator_loss(self, batch: EncodedBatch, step: int) -> LossResult:
        import torch

        from longtake.flow.path import clean_from_velocity

        made = self._roll_out(batch, step, with_grad=True)
        # The critic of this iteration learns from the same videos: no second roll-out.
        self._clips[step, tuple(batch.indices)] = replace(made, latents=made.latents.detach())
        student, told = made.latents, self._conditions(batch, made)
        clip, score = self._own_clip(batch, step), self._score(batch, made, step, "generator")
        with torch.no_grad(), self.phase("scores"):
            noisy, sigma, _ = self._noised(student, batch, step, "generator")
            fake = clean_from_velocity(noisy, score(self.critic, noisy, sigma, told[0]), sigma)
            velocity = self.guided.velocity(score, self.real, noisy, sigma, told, always=self.parts.sharded)
            real = clean_from_velocity(noisy, velocity, sigma)
            gradient = dmd_gradient(fake, real, student, made.generated)
        loss = dmd_loss(student, gradient, made.begin)
        metrics: dict[str, float | Tensor] = {
            "generator_loss": loss.detach(),
            "dmdtrain_gradient_norm": gradient[:, made.begin :].abs().mean(),
            "exit_step": float(self.exit_step(step)),
        }
        if self.data_loss is not None:
            forced = self.data_loss.loss("generator", batch, step).loss
            loss = loss + self.settings.data_loss.weight * forced
            metrics["data_loss"] = forced.detach()
        if clip is not None:
            mine, own = (Statistics.of(self._section(video, step)) for video in (student, clip))
            if any(changes := [frame is not None and frame < clip.shape[1] for frame in batch.switch_frames]):
                own = own.except_in(changes, mine)
            anchor = anchor_loss(mine, own)
            loss = loss + self.settings.anchor.weight * anchor
            metrics |= {"deviation_ratio": deviation_ratio(mine, own), "anchor_loss": anchor.detach()}
        return LossResult(loss, metrics)

    def _critic_loss(self, batch: EncodedBatch, step: int) -> LossResult:
        import torch

        from longtake.flow.path import velocity

        made_at = self.rollout_step(step)
        key = made_at, tuple(batch.indices)
        made = self._clips.pop(key, None)
        if made is None:
            with torch.no_grad():
                made = self._roll_out(batch, made_at, with_grad=False)
        self._clips = {key: value for key, value in self._clips.items() if key[0] == made_at}
        if self.rollout_step(step + 1) == made_at:
            self._clips[key] = made
        noisy, sigma, noise = self._noised(made.latents, batch, step, "critic")
        with self.phase("scores"):
            score = self._score(batch, made, step, "critic")
            predicted = score(self.critic, noisy, sigma, self._conditions(batch, made)[0])
        error = (predicted - velocity(made.latents, noise))[:, made.begin :].square()
        loss = error.mean()
        return LossResult(loss, {"critic_loss": loss.detach(), "exit_step": float(self.exit_step(made_at))})

    def _own_clip(self, batch: EncodedBatch, step: int) -> Tensor | None:
        """The beginning of the rows' own clips, as long as a window; None where nobody compares, or the window has come
        to show something else.
        """
        if not self.settings.anchor.weight or not self._shows_its_row(step):
            return None
        return require_latents(batch, "the anchor")[:, : self.parts.num_frames].float()

    def _shows_its_row(self, step: int) -> bool:
        """Whether the window of an iteration shows what its row's clip does, from beginning to end."""
        return True

    # ---- parts ----------------------------------------------------------------------------------------------------
    def _roll_out(self, batch: EncodedBatch, step: int, *, with_grad: bool) -> RollOut:
        from longtake.rollout.self_forcing import roll_out

        with self.phase("rollout"):
            return roll_out(
                self.generator,
                batch.condition,
                batch.first_latent,
                self._roll_out_noise(batch, step),
                self.plan,
                self.parts.num_frames,
                batch.latent_size,
                exit_step=self.exits(step),
                with_grad=with_grad,
            )

    def _roll_out_noise(self, batch: EncodedBatch, step: int) -> RollOutNoise:
        device = batch.condition.text.device
        channels = self.generator.model.config.out_channels

        def noise(start: int, end: int, denoising_step: int) -> Tensor:
            shape = (end - start, channels, *batch.latent_size)
            part = start * self.plan.num_noises + denoising_step
            return self.draws.noise(step, "roll_out", batch.indices, shape, device, part=part)

        return noise

    def _noised(self, clean: Tensor, batch: EncodedBatch, step: int, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, sigma [B, F], noise) at one level a clip."""
        import torch

        from longtake.flow.path import add_noise
        from longtake.flow.schedule import training_sigma

        settings = self.settings
        u = self.draws.uniform(step, f"{purpose}_sigma", batch.indices, dtype=torch.float64, device=clean.device)
        level = training_sigma(u, self.parts.shift, settings.sigma_min, settings.sigma_max)
        sigma = clip_sigma(level, clean.shape[1], first_frame_clean=self.parts.first_frame_clean)
        noise = self.draws.noise(step, f"{purpose}_noise", batch.indices, clean.shape[1:], clean.device)
        return add_noise(clean.detach(), noise, sigma), sigma, noise

    def _conditions(self, batch: EncodedBatch, made: RollOut) -> tuple[Condition, Condition]:
        """What the scores are told of a clip, with its prompt and with the empty one."""
        return batch.condition, batch.unconditional

    def _score(self, batch: EncodedBatch, made: RollOut, step: int, turn: str) -> Score:
        """How a network is asked about a clip."""
        return lambda network, *asked: network(*asked)

    def _score_call(self, step: int, clip: Call) -> Call:
        """The call of a network that this makes."""
        return clip

    def _section(self, clip: Tensor, step: int) -> Tensor:
        """The frames of a window, or of the row's own clip beside it, whose statistics are compared."""
        return clip

    # ---- what an iteration costs ----------------------------------------------------------------------------------
    def passes(self, step: int, clips: Mapping[str, Call]) -> list[Pass]:
        """The roll-out, where one is made, the scores of it where the student is updated, and the critic's own call."""
        update = "generator" in self.turns(step)
        found: list[Pass] = []
        if self.rollout_step(step) == step:
            student, clip, made = self.generator, clips["generator"], self._generated(step)
            found = roll_out_passes(self.plan, student, clip, made, self.exits(step), with_grad=update)
        if update:
            levels = self.parts.shift, self.settings.sigma_min, self.settings.sigma_max
            calls = self.guided.calls(*levels, always=self.parts.sharded)
            found += [
                Pass("critic", "scores", self._score_call(step, clips["critic"])),
                Pass("teacher", "scores", self._score_call(step, clips["teacher"]), times=calls),
            ]
            if self.data_loss is not None:
                frames = self.settings.data_loss.num_latent_frames or self.parts.num_frames
                found.append(self.data_loss.forced_pass(clips["generator"], frames))
        return [*found, Pass("critic", "scores", self._score_call(step, clips["critic"]), with_grad=True)]

    def _generated(self, step: int) -> tuple[int, int]:
        """First and last (exclusive) frame that the roll-out of an iteration generates."""
        return self.parts.given, self.parts.num_frames
