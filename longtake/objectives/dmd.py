"""Distribution matching distillation of a causal student on its own roll-outs.

Source: DMD2 (arXiv 2405.14867), Self-Forcing (arXiv 2506.08009) and specification G. Scores are compared in float32
with sigma exact, as clean latents (x0); the critic's velocity is learnt as it comes, never through those and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from longtake.config.base import PathText, Settings
from longtake.config.groups import LoraConfig, OptimConfig
from longtake.config.objective import NetworkConfig, ObjectiveConfig
from longtake.errors import ConfigError
from longtake.objectives.anchor import Anchor, Statistics, anchor_loss, deviation_ratio
from longtake.objectives.base import LossResult, Objective, Parts, Pass
from longtake.objectives.data_forcing import DataForcing, teacher_input
from longtake.objectives.flow_matching import clip_sigma, require_latents
from longtake.objectives.roll_out_passes import roll_out_passes
from longtake.objectives.scores import dmd_gradient, dmd_loss, teacher_velocity
from longtake.objectives.teacher_forcing import TeacherForcing, TeacherForcingConfig
from longtake.plan import Exits, StreamPlan

if TYPE_CHECKING:
    from torch import Tensor

    from longtake.condition import Condition
    from longtake.models.flops import Call
    from longtake.objectives.batch import EncodedBatch
    from longtake.objectives.scores import Score
    from longtake.rollout.self_forcing import RollOut, RollOutNoise


class CriticConfig(OptimConfig):
    """The fake score and its optimizer."""

    lr: float = Field(default=2e-5, gt=0, description="learning rate")
    updates_per_generator: int = Field(default=5, gt=0, description="critic updates to one generator update")
    # It begins as another network than a student that has been trained already, and its first scores would lead that
    # one astray.
    critic_warmup_steps: int = Field(
        default=0,
        ge=0,
        description="first iterations, in which the critic alone is trained, on the student as it begins",
    )
    init_from: PathText | None = Field(
        default=None, description="weights it starts from, as `init_from`; null = those of the teacher"
    )
    lora: LoraConfig | None = Field(default=None, description=LoraConfig.__doc__)


class DataLoss(Settings):
    """Teacher forcing on the rows' own videos beside distribution matching, which settles what captions leave open and
    fades long videos the longer it goes on; teacher forcing does neither (docs/log.md, 2026-11-27).
    """

    weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of its loss in the student's updates; 0 = off. Rows must then be clips",
    )
    num_latent_frames: int | None = Field(
        default=None,
        gt=0,
        description="latent frames of these clips, up to a block boundary; more than plan.window_frames teaches what "
        "to do once frames are evicted; null = video.num_latent_frames",
    )


class DmdConfig(ObjectiveConfig):
    """Distribution matching with a teacher on the student's own roll-outs."""

    kind: Literal["dmd"] = "dmd"  # type: ignore[assignment]
    teacher: PathText = Field(description="weights of the real score, as `init_from`")
    critic: CriticConfig = Field(default=CriticConfig(), description=CriticConfig.__doc__)
    guidance: float = Field(
        default=4.0, ge=0, description="classifier-free guidance w of the teacher, uncond + w (cond - uncond); 1 = off"
    )
    negative_prompt: str = Field(default="", description="text of the unconditional side of guidance; empty = no text")
    sigma_min: float = Field(default=0.02, ge=0, lt=1, description="smallest noise level at which scores are compared")
    sigma_max: float = Field(default=0.98, gt=0, le=1, description="largest noise level at which scores are compared")
    data_loss: DataLoss = Field(default=DataLoss(), description=DataLoss.__doc__)
    anchor: Anchor = Field(default=Anchor(), description=Anchor.__doc__)
    data_forcing: DataForcing = Field(default=DataForcing(), description=DataForcing.__doc__)
    context_gradient: Literal["none", "replay"] = Field(
        default="none",
        description="what of a roll-out carries gradient: `none` = each block's exit step, its context detached "
        "(Self-Forcing); `replay` = the writing of that context too, by one more forward over [context | exit steps] "
        "(Self-Gradient Forcing): later blocks teach earlier ones what to leave them",
    )
    context_writer: Literal["student", "own"] = Field(
        default="student",
        description="what writes the context of a roll-out: `student` = the network that denoises; `own` = low-rank "
        "updates of their own, as large as those of `lora`, on the same frozen weights (Self-Gradient Forcing, plus "
        "form). They learn through context_gradient=replay alone. Such a student is two networks where it is played",
    )
    shared_base: bool = Field(
        default=False,
        description="teacher, and student and critic with `lora`, are one frozen network that is held once, each with "
        "its own low-rank updates (all from the weights of `teacher`)",
    )

    reference: ClassVar[str | None] = "teacher"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}")
        if self.negative_prompt and self.guidance == 1:
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r} is read with guidance other than 1; remove it, or give "
                "empty quotes ''"
            )
        if self.data_loss.num_latent_frames is not None and not self.data_loss.weight:
            raise ValueError(
                f"data_loss.num_latent_frames={self.data_loss.num_latent_frames} has no effect while "
                "data_loss.weight=0; remove it, or give a weight"
            )
        return self

    @property
    def learns_from_videos(self) -> bool:
        return self.data_loss.weight > 0 or self.compares_with_clips

    @property
    def needs_pairs(self) -> bool:
        return self.data_forcing.share > 0

    @property
    def compares_with_clips(self) -> bool:
        """Whether the student's videos are compared with the beginning of the rows' own clips."""
        return self.anchor.weight > 0 or self.needs_pairs

    @property
    def takes_switches(self) -> bool:
        # The teacher of data forcing sees a whole clip under one caption.
        return self.data_loss.weight > 0 and not self.needs_pairs

    @property
    def num_clip_frames(self) -> int | None:
        return self.data_loss.num_latent_frames

    @property
    def replays(self) -> bool:
        return self.context_gradient == "replay"

    @property
    def writes_apart(self) -> bool:
        return self.context_writer == "own"

    @property
    def empty_prompt(self) -> str:
        return self.negative_prompt

    def networks(self) -> Mapping[str, NetworkConfig]:
        """The frozen real score, and the fake one, which begins as the teacher unless it has weights of its own."""
        critic, key = self.critic, "objective.critic.init_from" if self.critic.init_from else "objective.teacher"
        return {
            "teacher": NetworkConfig("objective.teacher", self.teacher, shared=self.shared_base),
            "critic": NetworkConfig(key, critic.init_from or self.teacher, critic, critic.lora),
        }

    def check(self, plan: StreamPlan, num_latent_frames: int, *, with_picture: bool, lora: bool) -> None:
        """Raises ConfigError on clips that do not fit the blocks, and for a shared base that nobody would share."""
        if (frames := self.data_loss.num_latent_frames) is not None:
            if frames == 1 and with_picture:
                raise ConfigError(
                    "objective.data_loss.num_latent_frames=1 leaves nothing to learn after the given picture; "
                    f"set it to {1 + plan.block_frames}"
                )
            plan.check(frames, "objective.data_loss.num_latent_frames")
            if self.compares_with_clips and frames < num_latent_frames:
                raise ConfigError(
                    f"objective.data_loss.num_latent_frames={frames} must be at least video.num_latent_frames="
                    f"{num_latent_frames}, which objective.anchor and objective.data_forcing compare; set it to "
                    f"{num_latent_frames} or to null"
                )
        if self.needs_pairs and not with_picture:
            raise ConfigError(
                f"objective.data_forcing.share={self.data_forcing.share} needs clips that begin with the picture that "
                "the student is given, and model.image_condition=t2v gives it none: clips that share a caption alone "
                "take away its variety; set it to 0"
            )
        if self.writes_apart:
            self._check_writer(plan, lora=lora)
        if self.shared_base and not lora and self.critic.lora is None:
            raise ConfigError(
                "objective.shared_base=true needs low-rank updates of the student (lora), of the critic "
                "(objective.critic.lora), or of both; give them, or set it to false"
            )

    def _check_writer(self, plan: StreamPlan, *, lora: bool) -> None:
        """Raises ConfigError where a writer of its own would be none, or would learn nothing."""
        key = "objective.context_writer=own"
        if not lora:
            raise ConfigError(f"{key} is low-rank updates beside those of the student, and lora=null; give lora")
        if not self.replays:
            raise ConfigError(f"{key} learns through objective.context_gradient=replay alone; set that")
        if plan.context == "last_step":
            raise ConfigError(
                f"plan.context=last_step has the student store its own blocks, which {key} is to do; set it to pass"
            )

    def build(self, parts: Parts) -> Objective:
        """The objective."""
        return Dmd(parts, self)


class Dmd(Objective):
    """Self-Forcing with distribution matching: `updates_per_generator` critic updates to one generator update.

    Networks: `generator` (causal student) and `critic` (fake score) are trained, `teacher` (real score) is frozen. All
    random numbers follow (seed, step, purpose, sample); the exit step is one number for all ranks and blocks.
    """

    def __init__(self, parts: Parts, settings: DmdConfig) -> None:
        super().__init__(parts)
        self.generator, self.critic, self.settings = parts.student, parts.trained["critic"], settings
        self.real = parts.frozen["teacher"].eval().requires_grad_(False)
        self.data_loss = TeacherForcing(parts, TeacherForcingConfig()) if settings.data_loss.weight else None
        self._shared: dict[tuple[int, tuple[int, ...]], RollOut] = {}

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
        self._shared[step, tuple(batch.indices)] = replace(made, latents=made.latents.detach())
        student, told = made.latents, self._conditions(batch, made)
        clip, score = self._own_clip(batch, step), self._score(batch, made, step, "generator")
        with torch.no_grad(), self.phase("scores"):
            noisy, sigma, noise = self._noised(student, batch, step, "generator")
            fake = clean_from_velocity(noisy, score(self.critic, noisy, sigma, told[0]), sigma)
            asked = self._teacher_input(noisy, clip, noise, sigma, batch, step)
            velocity = teacher_velocity(score, self.real, asked, sigma, told, self.settings.guidance)
            real = clean_from_velocity(asked, velocity, sigma)
            gradient = dmd_gradient(fake, real, student, made.generated)
        loss = dmd_loss(student, gradient, made.generated)
        metrics: dict[str, float | Tensor] = {
            "generator_loss": loss.detach(),
            "dmdtrain_gradient_norm": gradient[:, made.generated].abs().mean(),
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
            metrics["deviation_ratio"] = deviation_ratio(mine, own)
            if weight := self.settings.anchor.weight:
                anchor = anchor_loss(mine, own)
                loss, metrics["anchor_loss"] = loss + weight * anchor, anchor.detach()
        return LossResult(loss, metrics)

    def _critic_loss(self, batch: EncodedBatch, step: int) -> LossResult:
        import torch

        from longtake.flow.path import velocity

        made = self._shared.pop((step, tuple(batch.indices)), None)
        if made is None:
            with torch.no_grad():
                made = self._roll_out(batch, step, with_grad=False)
        self._shared = {key: value for key, value in self._shared.items() if key[0] == step}
        noisy, sigma, noise = self._noised(made.latents, batch, step, "critic")
        with self.phase("scores"):
            score = self._score(batch, made, step, "critic")
            predicted = score(self.critic, noisy, sigma, self._conditions(batch, made)[0])
        error = (predicted - velocity(made.latents, noise))[:, made.generated].square()
        loss = error.mean()
        return LossResult(loss, {"critic_loss": loss.detach(), "exit_step": float(self.exit_step(step))})

    def _own_clip(self, batch: EncodedBatch, step: int) -> Tensor | None:
        """The beginning of the rows' own clips, as long as a window; None where nobody compares, or the window has come
        to show something else.
        """
        if not self.settings.compares_with_clips or not self._shows_its_row(step):
            return None
        return require_latents(batch, "the anchor or data forcing")[:, : self.parts.num_frames].float()

    def _shows_its_row(self, step: int) -> bool:
        """Whether the window of an iteration shows what its row's clip does, from beginning to end."""
        return True

    def _teacher_input(
        self, noisy: Tensor, clip: Tensor | None, noise: Tensor, sigma: Tensor, batch: EncodedBatch, step: int
    ) -> Tensor:
        """What the teacher scores: `noisy`, or the clip noised alike. A later window has another picture: no pair."""
        share = self.settings.data_forcing.share
        if clip is None or not share or self.chunk(step):
            return noisy
        return teacher_input(noisy, clip, noise, sigma, share, draws=self.draws, step=step, indices=batch.indices)

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
        u = self.draws.uniform(step, f"{purpose}_sigma", batch.indices, dtype=torch.float64).to(clean.device)
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
        """The roll-out, the scores of it where the student is updated, and the critic's own call."""
        update = "generator" in self.turns(step)
        found = roll_out_passes(
            self.plan, self.generator, clips["generator"], self._generated(step), self.exits(step), with_grad=update
        )
        if update:
            calls = 1 if self.settings.guidance == 1 else 2
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
