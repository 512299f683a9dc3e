"""Distribution matching distillation of a causal student on its own roll-outs.

Source: DMD2 (arXiv 2405.14867), Self-Forcing (arXiv 2506.08009) and specification G. Scores are compared in float32
with sigma exact; the velocity of the critic is used as it comes, never through clean latents and back.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from longtake.condition import Condition
from longtake.flow.path import add_noise, clean_from_velocity, guided, velocity
from longtake.flow.schedule import training_sigma
from longtake.models.dit import VideoDiT
from longtake.objectives.base import LossResult, Phase
from longtake.objectives.batch import EncodedBatch
from longtake.objectives.flow_matching import clip_sigma
from longtake.objectives.teacher_forcing import TeacherForcing
from longtake.plan import StreamPlan
from longtake.rng import KeyedRNG
from longtake.rollout.denoise import Denoiser
from longtake.rollout.self_forcing import RollOut, RollOutNoise, roll_out


@dataclass(frozen=True)
class DmdSettings:
    """Numbers of the objective; `guidance` is w in uncond + w (cond - uncond).

    In the first `critic_warmup_steps` iterations the critic alone is trained: it begins as another network than a
    student that has been trained already, and its first scores would lead that one astray.
    """

    shift: float
    guidance: float
    sigma_min: float = 0.02
    sigma_max: float = 0.98
    updates_per_generator: int = 5
    critic_warmup_steps: int = 0
    first_frame_clean: bool = False


@dataclass(frozen=True)
class DataLoss:
    """Teacher forcing of the same student on the rows' own videos, and the weight of its loss in the student's updates.

    Distribution matching settles what captions leave open, and fades long videos the longer it goes on; teacher forcing
    does neither (docs/log.md, 2026-11-27).
    """

    objective: TeacherForcing
    weight: float


def dmd_gradient(fake: Tensor, real: Tensor, student: Tensor, counted: Tensor) -> Tensor:
    """The normalised gradient (p_fake - p_real) / mean |x - p_real|, zero outside `counted`.

    Args: clean predictions of the fake and the real score and the student's latents, all [B, F, C, H, W];
    `counted` [F] boolean. The mean runs over the counted frames of each sample. Source: DMD2 eq. 8; specification G.1.
    """
    weight = counted.float()[None, :, None, None, None]
    count = weight.sum() * student[0, 0].numel()
    scale = ((student - real).abs() * weight).sum((1, 2, 3, 4), keepdim=True) / count
    return (fake - real) / scale * weight


def dmd_loss(student: Tensor, gradient: Tensor, counted: Tensor) -> Tensor:
    """0.5 mean (x - sg(x - gradient))^2 over the counted frames: its gradient in x is `gradient / count`."""
    target = (student - gradient).detach()
    return 0.5 * (student - target)[:, counted].square().mean()


class Dmd:
    """Self-Forcing with distribution matching: `updates_per_generator` critic updates to one generator update.

    Networks: `generator` (causal student) and `critic` (fake score) are trained, `real` is frozen. All random numbers
    follow (seed, step, purpose, sample); the exit step is one number for all ranks and blocks. `phase` is entered
    around each roll-out ("rollout") and each call of the scores ("scores"), for timing.
    """

    def __init__(
        self,
        generator: Denoiser,
        critic: VideoDiT,
        real: VideoDiT,
        draws: KeyedRNG,
        plan: StreamPlan,
        num_frames: int,
        settings: DmdSettings,
        *,
        data_loss: DataLoss | None = None,
        phase: Phase = nullcontext,
    ) -> None:
        self.networks: dict[str, nn.Module] = {"generator": generator.model, "critic": critic}
        self.generator, self.critic = generator, critic
        self.real = real.eval().requires_grad_(False)
        self.draws, self.plan, self.num_frames, self.settings = draws, plan, num_frames, settings
        self.data_loss, self.phase = data_loss, phase
        self._shared: dict[tuple[int, tuple[int, ...]], RollOut] = {}

    def turns(self, step: int) -> list[str]:
        """The critic always; after `critic_warmup_steps` the generator in every `updates_per_generator`-th one too."""
        return self._turns(step, step - self.settings.critic_warmup_steps)

    def _turns(self, step: int, count: int) -> list[str]:
        """With the generator where `count` is a multiple of `updates_per_generator`, but for the head start."""
        due = step >= self.settings.critic_warmup_steps and count % self.settings.updates_per_generator == 0
        return ["generator", "critic"] if due else ["critic"]

    def loss(self, turn: str, batch: EncodedBatch, step: int) -> LossResult:
        """Generator: the DMD loss through a roll-out, and that of `data_loss`. Critic: flow matching on the
        student's videos. Raises: TrainingError when `data_loss` are wanted and the batch has none.
        """
        return self._generator_loss(batch, step) if turn == "generator" else self._critic_loss(batch, step)

    def discard(self) -> None:
        """Nothing goes on from one iteration to the next."""

    def exit_step(self, step: int) -> int:
        """Denoising step at which every block of this iteration stops."""
        return self.draws.integer(step, "exit_step", 0, len(self.plan.sigmas))

    # ---- the two losses -------------------------------------------------------------------------------------------
    def _generator_loss(self, batch: EncodedBatch, step: int) -> LossResult:
        made = self._roll_out(batch, step, with_grad=True)
        # The critic of this iteration learns from the same videos: no second roll-out.
        self._shared[step, tuple(batch.indices)] = replace(made, latents=made.latents.detach())
        student, (condition, unconditional) = made.latents, self._conditions(batch, made)
        with torch.no_grad(), self.phase("scores"):
            noisy, sigma, _ = self._noised(student, batch, step, "generator")
            fake = clean_from_velocity(noisy, self.critic(noisy, sigma, condition), sigma)
            real = clean_from_velocity(noisy, self._real_velocity(noisy, sigma, condition, unconditional), sigma)
            gradient = dmd_gradient(fake, real, student, made.generated)
        loss = dmd_loss(student, gradient, made.generated)
        metrics: dict[str, float | Tensor] = {
            "generator_loss": loss.detach(),
            "dmdtrain_gradient_norm": gradient[:, made.generated].abs().mean(),
            "exit_step": float(self.exit_step(step)),
        }
        if self.data_loss is not None:
            forced = self.data_loss.objective.loss("generator", batch, step).loss
            loss = loss + self.data_loss.weight * forced
            metrics["data_loss"] = forced.detach()
        return LossResult(loss, metrics)

    def _critic_loss(self, batch: EncodedBatch, step: int) -> LossResult:
        made = self._shared.pop((step, tuple(batch.indices)), None)
        if made is None:
            with torch.no_grad():
                made = self._roll_out(batch, step, with_grad=False)
        self._shared = {key: value for key, value in self._shared.items() if key[0] == step}
        noisy, sigma, noise = self._noised(made.latents, batch, step, "critic")
        with self.phase("scores"):
            predicted = self.critic(noisy, sigma, self._conditions(batch, made)[0])
        error = (predicted - velocity(made.latents, noise))[:, made.generated].square()
        loss = error.mean()
        return LossResult(loss, {"critic_loss": loss.detach(), "exit_step": float(self.exit_step(step))})

    # ---- parts ----------------------------------------------------------------------------------------------------
    def _roll_out(self, batch: EncodedBatch, step: int, *, with_grad: bool) -> RollOut:
        with self.phase("rollout"):
            return roll_out(
                self.generator,
                batch.condition,
                batch.first_latent,
                self._roll_out_noise(batch, step),
                self.plan,
                self.num_frames,
                batch.latent_size,
                exit_step=self.exit_step(step),
                with_grad=with_grad,
            )

    def _roll_out_noise(self, batch: EncodedBatch, step: int) -> RollOutNoise:
        device = batch.condition.text.device
        channels = self.generator.model.config.out_channels

        def noise(start: int, end: int, denoising_step: int) -> Tensor:
            shape = (end - start, channels, *batch.latent_size)
            part = start * len(self.plan.sigmas) + denoising_step
            return self.draws.noise(step, "roll_out", batch.indices, shape, device, part=part)

        return noise

    def _noised(self, clean: Tensor, batch: EncodedBatch, step: int, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, sigma [B, F], noise) at one level a clip."""
        settings = self.settings
        u = self.draws.uniform(step, f"{purpose}_sigma", batch.indices, dtype=torch.float64).to(clean.device)
        level = training_sigma(u, settings.shift, settings.sigma_min, settings.sigma_max)
        sigma = clip_sigma(level, clean.shape[1], first_frame_clean=settings.first_frame_clean)
        noise = self.draws.noise(step, f"{purpose}_noise", batch.indices, clean.shape[1:], clean.device)
        return add_noise(clean.detach(), noise, sigma), sigma, noise

    def _conditions(self, batch: EncodedBatch, made: RollOut) -> tuple[Condition, Condition]:
        """What the scores are told of a clip, with its prompt and with the empty one."""
        return batch.condition, batch.unconditional

    def _real_velocity(self, noisy: Tensor, sigma: Tensor, condition: Condition, unconditional: Condition) -> Tensor:
        conditional = self.real(noisy, sigma, condition)
        if self.settings.guidance == 1:
            return conditional
        return guided(conditional, self.real(noisy, sigma, unconditional), self.settings.guidance)
