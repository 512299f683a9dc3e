"""A stage's configuration: all values of a training stage, and the rules across its groups.

A value given on the command line (`a.b=c`) wins over the YAML file, which wins over the default in the model field.
Whatever can be refused without building a model is refused here, when the configuration is read. Must know no tensor
and no model, so that the command line can read it without importing torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, model_validator

from longtake.condition import VideoShape
from longtake.config.base import PathText, Settings
from longtake.config.groups import (
    DataConfig,
    EmaConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
)
from longtake.config.objective import ChosenObjective, NetworkConfig, ObjectiveConfig
from longtake.config.run import RunConfig
from longtake.config.validation import ValidationConfig
from longtake.errors import ConfigError
from longtake.plan import FlowConfig, PlanConfig, Rope, StreamPlan

TOY_ASSETS = Path(__file__).parents[1] / "assets" / "toy"
TOY = "toy"


class StageConfig(RunConfig):
    """One training stage."""

    objective: ChosenObjective = Field(description=ObjectiveConfig.__doc__)
    init_from: PathText | None = Field(
        default=None,
        description="weights to start from: name of a stage of the log folder, a path (with a slash), OWNER/NAME on "
        "the Hugging Face hub, or `toy`; null = random weights (flow_matching only)",
    )
    encoders: PathText = Field(
        default="toy",
        description="folder with VAE, text and image encoder (a Wan model, original or diffusers), or `toy`",
    )
    model: ModelConfig = Field(default=ModelConfig(), description=ModelConfig.__doc__)
    video: VideoShape = Field(default=VideoShape(), description=VideoShape.__doc__)
    plan: PlanConfig = Field(default=PlanConfig(), description=PlanConfig.__doc__)
    rope: Rope = Field(
        default="relative",
        description="frame positions counted in the attended window or since the start; kept with the weights",
    )
    flow: FlowConfig = Field(default=FlowConfig(), description=FlowConfig.__doc__)
    data: DataConfig = Field(description=DataConfig.__doc__)
    batch_size: int = Field(default=8, gt=0, description="samples of one update, over all ranks")
    micro_batch_size: int = Field(
        default=4, gt=0, description="most samples of one forward on one rank; the rest is accumulated"
    )
    parallel: ParallelConfig = Field(default=ParallelConfig(), description=ParallelConfig.__doc__)
    optim: OptimConfig = Field(default=OptimConfig(), description=OptimConfig.__doc__)
    lora: LoraConfig | None = Field(default=None, description=LoraConfig.__doc__)
    ema: EmaConfig = Field(default=EmaConfig(), description=EmaConfig.__doc__)
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="type of the matrix products; weights stay fp32"
    )
    activation_checkpointing: bool | Literal["none", "full", "selective", "auto"] = Field(
        default="auto",
        description="recompute blocks in backward, less memory for more time: none or false, full or true; selective = "
        "all but the results of self-attention; auto = on a GPU only as much as its memory asks for, on a CPU nothing",
    )
    recompute_from: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="type in which the inputs of recomputed blocks are kept: bf16 takes half of the memory, and rounds "
        "what gradients are computed from once more",
    )
    validation: ValidationConfig = Field(default=ValidationConfig(), description=ValidationConfig.__doc__)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_sizes()
        self._check_sources()
        # The model is frozen for its users; these follow from other values of the same file.
        if self.activation_checkpointing in ("none", "full"):
            object.__setattr__(self, "activation_checkpointing", self.activation_checkpointing == "full")
        if self.recompute_from != "fp32" and not self.activation_checkpointing:
            raise ConfigError(
                f"recompute_from={self.recompute_from} has no effect while activation_checkpointing=none; remove it, "
                "or set that to full or selective"
            )
        if "{logdir}" in self.data.path:
            path = self.data.path.replace("{logdir}", self.logdir)
            object.__setattr__(self, "data", self.data.model_copy(update={"path": path}))
        return self

    def _check_sizes(self) -> None:
        if self.model.image_condition == "i2v":
            if self.plan.first_frames != 1:
                raise ConfigError(
                    f"plan.first_frames={self.plan.first_frames} must be 1 for model.image_condition=i2v: the given "
                    "picture is a block of its own; set it to 1"
                )
            if self.video.num_latent_frames < 2:
                raise ConfigError(
                    "video.num_latent_frames=1 leaves nothing to generate after the given picture; "
                    f"set it to {1 + self.plan.block_frames}"
                )
        self.plan.check(self.video.num_latent_frames, "video.num_latent_frames")
        if self.validation.num_latent_frames is not None:
            self.plan.check(self.validation.num_latent_frames, "validation.num_latent_frames")
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(_batch_rule(self.batch_size, self.micro_batch_size, 1))
        self.data.check_buckets(self.video)
        self.objective.check(
            self.stream_plan,
            self.video.num_latent_frames,
            with_picture=self.model.image_condition == "i2v",
            lora=self.lora is not None,
        )

    def _check_sources(self) -> None:
        kind = self.objective.kind
        if self.init_from is None and not self.objective.from_scratch:
            raise ConfigError(f"init_from=null: {kind} needs trained weights; name a stage, a path or toy")
        if self.lora is not None and self.init_from is None:
            raise ConfigError("lora needs trained weights to update and init_from=null; name them, or set lora=null")
        if self.name in (TOY, "truth", "frozen", *["teacher"] * self.objective.causal):
            raise ConfigError(f"name={self.name} is taken (shipped weights or a row of the table); choose another")
        for network in self.networks.values():
            if network.source == self.name:
                raise ConfigError(
                    f"{network.key}={self.name} is the stage itself; name an earlier stage, a path or toy"
                )
        if self.objective.writes_apart and self.parallel.compile:
            raise ConfigError(
                "parallel.compile=true compiles blocks for one kind of low-rank updates, and "
                "objective.context_writer=own has two in one call; set one of them back"
            )
        if self.objective.learns_from_videos and self.data.kind in ("images", "texts"):
            raise ConfigError(
                f"data.kind={self.data.kind} has no motion to learn from, as this objective ({kind}) does; use clips, "
                "webdataset or lmdb"
            )
        if self.model.image_condition == "i2v" and self.data.kind == "texts":
            raise ConfigError(
                "data.kind=texts has no pictures for model.image_condition=i2v; use images or set it to t2v"
            )

    def without_a_gpu(self) -> Self:
        """The stage as a CPU computes it, where `activation_checkpointing=auto` recomputes nothing."""
        if self.activation_checkpointing != "auto":
            return self
        return self.model_copy(update={"activation_checkpointing": False})

    @property
    def lighter(self) -> list[str]:
        """What would take less memory than this stage does, the least harm first."""
        video, batch, again = self.video, self.micro_batch_size, self.activation_checkpointing
        how = ", which decides by what the first iterations took" if again == "auto" else ""
        ways = {
            f"activation_checkpointing=full (it is {again}{how})": again not in ("full", True),
            f"micro_batch_size=1 (it is {batch})": batch > 1,
            "parallel.graphs=false (what is recorded keeps memory of its own)": self.parallel.graphs,
            f"fewer latents, video.num_latent_frames (it is {video.num_latent_frames})": True,
            f"smaller pictures, video.height and video.width (they are {video.height} and {video.width})": True,
            "low-rank updates, lora.rank=64": self.lora is None,
        }
        return [way for way, helps in ways.items() if helps] + ["more GPUs"]

    @property
    def networks(self) -> Mapping[str, NetworkConfig]:
        """The networks of the stage by name; the generator first."""
        generator = NetworkConfig("init_from", self.init_from, self.optim, self.lora)
        return {"generator": generator, **self.objective.networks()}

    @property
    def reference(self) -> str | None:
        """Source of the bidirectional weights beside which the student is measured, where there are such."""
        name = self.objective.reference
        return None if name is None else self.networks[name].source

    @property
    def stream_plan(self) -> StreamPlan:
        """How the student streams, in training as at inference."""
        return self.plan.stream(self.flow, rope=self.rope)

    @property
    def clip_shape(self) -> VideoShape:
        """Sizes of the videos that rows are read as."""
        frames = self.objective.num_clip_frames
        return self.video if frames is None else self.video.but(num_latent_frames=frames)

    @property
    def gathers_once(self) -> bool:
        """Whether a sharded student is gathered once for a whole roll-out. Not under selective recomputation, which
        counts operators: a forward and its recomputation must gather alike, but with `parallel.fused_shards`.
        """
        return self.activation_checkpointing != "selective" or self.parallel.fused_shards

    def batches_exit_backward(self, *, whole: bool, sequence: int) -> bool:
        """Whether the exit steps of a roll-out are recomputed and differentiated together, where each rank holds
        `whole` networks and `sequence` ranks share a video: where these would wait for Python, and on one GPU where all
        may be recomputed, but not with low-rank updates, which are there to save memory.
        """
        if not whole or self.activation_checkpointing == "selective":
            return False
        return sequence > 1 or (bool(self.activation_checkpointing) and self.lora is None)

    @property
    def validates(self) -> bool:
        """Whether validation is asked for."""
        return self.validate_every > 0 and (self.validation.num_worlds > 0 or self.validation.num_rows > 0)

    @property
    def longer_frames(self) -> int:
        """Latent frames of the longer videos of a validation, which end on a block boundary as those of training do."""
        first = self.plan.first_frames
        return first + self.validation.times_longer * (self.video.num_latent_frames - first)

    @property
    def teacher_samples(self) -> Path:
        """Folder that keeps the teacher's samples of validated rows."""
        return Path(self.validation.teacher_samples or Path(self.logdir).absolute().parent / "teacher_samples")

    @property
    def encoders_folder(self) -> Path:
        """Folder of the encoders."""
        return encoders_at(self.encoders)

    def source(self, weights: str) -> Path:
        """The path that a value of `init_from` or `teacher` means: the packaged toy, a path, or a stage by its name."""
        return resolve_source(weights, self.logdir)

    def micro_batch(self, world_size: int) -> int:
        """Samples of one forward on one of `world_size` ranks: `micro_batch_size`, or a rank's whole share if smaller.

        The ranks of a sequence group have one share together.
        Raises: ConfigError with the nearest valid values of `batch_size` when it is not divisible, or when `parallel`
        does not fit the number of ranks.
        """
        groups, together = self.parallel.data_ranks(world_size), self.parallel.sequence
        share, rest = divmod(self.batch_size, groups)
        if rest:
            raise ConfigError(_batch_rule(self.batch_size, 1, groups, together))
        if share > self.micro_batch_size and share % self.micro_batch_size:
            raise ConfigError(_batch_rule(self.batch_size, self.micro_batch_size, groups, together))
        return min(share, self.micro_batch_size)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` ranks accumulates for one update. Raises: as `micro_batch`."""
        return self.batch_size // (self.micro_batch(world_size) * self.parallel.data_ranks(world_size))

    @classmethod
    def familiar_names(cls) -> dict[str, str]:
        return {
            "adapter": "lora (of the generator) and objective.critic.lora",
            "batch_size_per_gpu": "micro_batch_size",
            "denoising_step_list": "flow.steps (divided by 1000)",
            "dfake_gen_update_ratio": "objective.critic.updates_per_generator",
            "ema_weight": "ema.decay",
            "ema_start_step": "ema.start_step",
            "generator_ckpt": "init_from",
            "gradient_accumulation_steps": "batch_size / (micro_batch_size x ranks)",
            "gradient_checkpointing": "activation_checkpointing",
            "guidance_scale": "objective.guidance (as w: guidance_scale + 1)",
            "independent_first_frame": "plan.first_frames (true = 1)",
            "local_attn_size": "plan.window_frames",
            "lr_critic": "objective.critic.lr",
            "max_checkpoints": "keep_checkpoints",
            "max_iters": "max_steps",
            "mixed_precision": "precision (true = bf16)",
            "num_frame_per_block": "plan.block_frames",
            "real_name": "objective.teacher",
            "sink_size": "plan.sink_frames",
            "streaming_chunk_size": "video.num_latent_frames",
            "streaming_max_length": "objective.num_chunks (chunks, not frames)",
            "streaming_min_new_frame": "objective.new_frames",
            "switch_choices": "objective.switch_frames",
            "global_sink": "plan.keep_sink",
            "timestep_shift": "flow.shift",
            "total_batch_size": "batch_size",
            # What keys were called before
            "stage": "objective.kind (teacher = flow_matching, causal = teacher_forcing, distill = dmd, "
            "long = long_tuning)",
            "long": "objective: num_chunks, new_frames and switch_frames are keys of kind long_tuning",
            "roles": "objective.shared_base (shared = true)",
            "own_history": "objective.error_recycling",
            "real_videos": "objective.data_loss",
            "head_start": "objective.critic.critic_warmup_steps",
            **{key: f"objective.{key}" for key in ("teacher", "critic", "error_recycling", "data_loss")},
            "caption_dropout": "objective.caption_dropout",
        }


def is_path(source: str) -> bool:
    """True when a weight source is written as a path: with a slash, or `.`, or absolute."""
    return "/" in source or os.sep in source or source.startswith((".", "~"))


def encoders_at(encoders: str | Path) -> Path:
    """The folder that a value of `encoders` means: those of the packaged toy, a path, or OWNER/NAME on the hub."""
    return TOY_ASSETS if str(encoders) == TOY else Path(encoders).expanduser()


def resolve_source(source: str, logdir: str | Path) -> Path:
    """The path of a weight source: `toy` = the packaged teacher, a path, or the stage of that name in `logdir`.

    OWNER/NAME of a repository on the Hugging Face hub stays as it is; `./OWNER/NAME` is always a local path.
    """
    if source == TOY:
        return TOY_ASSETS / "teacher"
    if source.startswith("."):
        return Path(source).absolute()
    return Path(source).expanduser() if is_path(source) else Path(logdir) / source


def _batch_rule(batch_size: int, micro_batch_size: int, groups: int, together: int = 1) -> str:
    unit = micro_batch_size * groups
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    fix = f"{below} or {above}" if below else f"{above}"
    factors = [f"micro_batch_size={micro_batch_size}"] if micro_batch_size > 1 else []
    ranks = "ranks" if together == 1 else f"sequence groups of {together} ranks"
    factors += [f"{groups} {ranks}"] if groups > 1 else []
    lower = ", or micro_batch_size lower" if micro_batch_size > 1 else ""
    product = " x ".join(factors) + (f" = {unit}" if groups > 1 else "")
    return f"batch_size={batch_size} must be a multiple of {product}; set batch_size to {fix}{lower}"


def dump(config: Settings) -> str:
    """The resolved configuration as YAML; reading it back gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
