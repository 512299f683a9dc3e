"""The keys of distribution matching, and what of them contradicts each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from longtake.config.base import PathText, Settings
from longtake.config.groups import LoraConfig, OptimConfig
from longtake.config.objective import NetworkConfig, ObjectiveConfig
from longtake.errors import ConfigError
from longtake.objectives.anchor import Anchor
from longtake.objectives.scores import Guidance
from longtake.plan import StreamPlan


class CriticConfig(OptimConfig):
    """The fake score and its optimizer."""

    lr: float = Field(default=2e-5, gt=0, description="learning rate")
    updates_per_generator: int = Field(default=5, gt=0, description="critic updates to one generator update")
    updates_per_rollout: int = Field(
        default=1,
        gt=0,
        description="critic updates that learn from one roll-out, each with noise of its own: fewer videos, less time. "
        "None learns from clips of a student that was updated since",
    )
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


class DmdKeys(ObjectiveConfig):
    """What distribution matching reads and needs, of clips as of running videos."""

    teacher: PathText = Field(description="weights of the real score, as `init_from`")
    critic: CriticConfig = Field(default=CriticConfig(), description=CriticConfig.__doc__)
    guidance: float = Field(
        default=4.0, ge=0, description="classifier-free guidance w of the teacher, uncond + w (cond - uncond); 1 = off"
    )
    guidance_interval: list[float] | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="lowest and highest noise level at which the teacher is guided (arXiv 2404.07724); at others it is "
        "asked once, with the prompt, which saves a pass; null = guided at all. Sharded networks save none",
    )
    negative_prompt: str = Field(default="", description="text of the unconditional side of guidance; empty = no text")
    sigma_min: float = Field(default=0.02, ge=0, lt=1, description="smallest noise level at which scores are compared")
    sigma_max: float = Field(default=0.98, gt=0, le=1, description="largest noise level at which scores are compared")
    data_loss: DataLoss = Field(default=DataLoss(), description=DataLoss.__doc__)
    anchor: Anchor = Field(default=Anchor(), description=Anchor.__doc__)
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
    teacher_precision: Literal["fp8"] | None = Field(
        default=None,
        description="type of the teacher's large matrix products: fp8 = 8-bit floats, half the memory of their "
        "weights, and faster on GPUs that have such products (Ada, Hopper, later); null = `precision` of the stage",
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
        if self.guidance_interval is not None:
            self._check_interval(*self.guidance_interval)
        critic = self.critic
        if critic.updates_per_rollout > max(1, between := critic.updates_per_generator - 1):
            raise ValueError(
                f"critic.updates_per_rollout={critic.updates_per_rollout} must be at most the {between} updates "
                "between two of the generator, whose own roll-out serves the critic's beside it; set it to "
                f"{max(1, between)}, or raise critic.updates_per_generator={critic.updates_per_generator}"
            )
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

    def _check_interval(self, low: float, high: float) -> None:
        if self.guidance == 1:
            raise ValueError(f"guidance_interval=[{low}, {high}] is read with guidance other than 1; remove it")
        if not (low < high and low <= self.sigma_max and high >= self.sigma_min):
            raise ValueError(
                f"guidance_interval=[{low}, {high}] must rise and meet [sigma_min, sigma_max]=[{self.sigma_min}, "
                f"{self.sigma_max}]; guidance=1 guides nowhere, guidance_interval=null everywhere"
            )

    @property
    def guided(self) -> Guidance:
        """How the teacher is guided."""
        low_high = self.guidance_interval
        return Guidance(self.guidance, None if low_high is None else (low_high[0], low_high[1]))

    @property
    def resume_keys(self) -> tuple[str, ...]:  # type: ignore[override]
        # Then the position in the data is that of the iteration.
        return ("batch_size",) if self.critic.updates_per_rollout > 1 else ()

    @property
    def learns_from_videos(self) -> bool:
        return self.data_loss.weight > 0 or self.anchor.weight > 0

    @property
    def takes_switches(self) -> bool:
        return self.data_loss.weight > 0

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
            "teacher": NetworkConfig(
                "objective.teacher", self.teacher, shared=self.shared_base, fp8=self.teacher_precision == "fp8"
            ),
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
            if self.anchor.weight and frames < num_latent_frames:
                raise ConfigError(
                    f"objective.data_loss.num_latent_frames={frames} must be at least video.num_latent_frames="
                    f"{num_latent_frames}, which objective.anchor compares; set it to {num_latent_frames} or to null"
                )
        if self.writes_apart:
            self._check_writer(plan, lora=lora)
        if self.shared_base and self.teacher_precision is not None:
            raise ConfigError(
                f"objective.teacher_precision={self.teacher_precision} rounds the teacher, and objective.shared_base="
                "true makes its weights those of student and critic too, whose updates would be trained on the rounded "
                "ones and played on others; set one of them back to its default"
            )
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
