"""Every configuration value of Longtake: its name, type, default, meaning and rules, each in exactly one place.

A value given on the command line (`a.b=c`) wins over the YAML file, which wins over the default in the model field.
Whatever can be refused without building a model is refused here, when the configuration is read. This file must know
no tensor and no model, so that the command line can read it without importing torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from longtake.condition import VideoShape
from longtake.config.base import (
    PathText,
    Settings,
    Sources,
    located,
    read_recipe,
    said_in,
    set_path,
    split_override,
)
from longtake.config.groups import (
    CriticConfig,
    DataConfig,
    DataLossConfig,
    EmaConfig,
    ErrorRecyclingConfig,
    EvaluationConfig,
    FlowConfig,
    LongConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PlanConfig,
    ValidationConfig,
    VideoConfig,
    WorldConfig,
)
from longtake.config.run import RunConfig
from longtake.errors import ConfigError
from longtake.plan import StreamPlan

__all__ = [
    *("CriticConfig", "DataConfig", "EmaConfig", "EvaluationConfig", "FlowConfig", "JobConfig", "LongConfig"),
    *("CheckpointConfig", "LoraConfig", "ModelConfig", "OptimConfig", "ParallelConfig", "PlanConfig", "ProfileConfig"),
    *("StageConfig", "ValidationConfig", "VideoConfig", "WandbConfig", "WatchdogConfig", "WorldConfig"),
    *("TOY", "TOY_ASSETS", "dump", "is_path", "load_config", "resolve_source"),
]

TOY_ASSETS = Path(__file__).parents[1] / "assets" / "toy"
TOY = "toy"


class StageConfig(RunConfig):
    """One training stage."""

    stage: Literal["teacher", "causal", "distill", "long"] = Field(description="what is trained: the kind of stage")
    init_from: PathText | None = Field(
        default=None,
        description="weights to start from: name of a stage of the log folder, a path (with a slash), OWNER/NAME on "
        "the Hugging Face hub, or `toy`; null = random weights (teacher only)",
    )
    teacher: PathText | None = Field(
        default=None, description="weights of the real score, as `init_from` (distill and long, required)"
    )
    encoders: PathText = Field(
        default="toy",
        description="folder with VAE, text and image encoder (a Wan model, original or diffusers), or `toy`",
    )
    model: ModelConfig = Field(default=ModelConfig(), description=ModelConfig.__doc__)
    video: VideoConfig = Field(default=VideoConfig(), description=VideoConfig.__doc__)
    plan: PlanConfig = Field(default=PlanConfig(), description=PlanConfig.__doc__)
    rope: Literal["relative", "absolute"] = Field(
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
    critic: CriticConfig | None = Field(default=None, description=CriticConfig.__doc__)
    long: LongConfig | None = Field(default=None, description=LongConfig.__doc__)
    error_recycling: ErrorRecyclingConfig = Field(
        default=ErrorRecyclingConfig(), description=ErrorRecyclingConfig.__doc__
    )
    data_loss: DataLossConfig = Field(default=DataLossConfig(), description=DataLossConfig.__doc__)
    ema: EmaConfig = Field(default=EmaConfig(), description=EmaConfig.__doc__)
    caption_dropout: float = Field(default=0.0, ge=0, le=1, description="share of samples trained without caption")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="type of the matrix products; weights stay fp32"
    )
    roles: Literal["separate", "shared"] = Field(
        default="separate",
        description="`shared`: teacher, and student and critic with `lora`, are one frozen network that is held once, "
        "each with its own low-rank updates (distill and long; all from the weights of `teacher`)",
    )
    activation_checkpointing: bool | Literal["none", "full", "selective"] = Field(
        default=False,
        description="recompute blocks in backward, less memory for more time: none or false, full or true; selective = "
        "all but the results of attention",
    )
    validation: ValidationConfig = Field(default=ValidationConfig(), description=ValidationConfig.__doc__)

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self._check_sizes()
            self._check_sources()
            self._check_scores()
            self._check_memory()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        # The model is frozen for its users; these follow from other values of the same file.
        if self.activation_checkpointing in ("none", "full"):
            object.__setattr__(self, "activation_checkpointing", self.activation_checkpointing == "full")
        if self.distils and self.critic is None:
            object.__setattr__(self, "critic", CriticConfig())
        if self.stage == "long" and self.long is None:
            object.__setattr__(self, "long", LongConfig())
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
            if self.data_loss.num_latent_frames == 1:
                raise ConfigError(
                    "data_loss.num_latent_frames=1 leaves nothing to learn after the given picture; "
                    f"set it to {1 + self.plan.block_frames}"
                )
        blocks = self.plan.stream()
        blocks.check(self.video.num_latent_frames, "video.num_latent_frames")
        if self.validation.num_latent_frames is not None:
            blocks.check(self.validation.num_latent_frames, "validation.num_latent_frames")
        if self.data_loss.num_latent_frames is not None:
            blocks.check(self.data_loss.num_latent_frames, "data_loss.num_latent_frames")
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(_batch_rule(self.batch_size, self.micro_batch_size, 1))
        self.data.check_buckets(self.video)
        if self.long is not None:
            self.long.check(self.video.num_latent_frames, self.plan)

    def _check_sources(self) -> None:
        if self.stage != "teacher" and self.init_from is None:
            raise ConfigError(f"init_from=null: stage {self.stage} needs trained weights; name a stage, a path or toy")
        if self.lora is not None and self.init_from is None:
            raise ConfigError("lora needs trained weights to update and init_from=null; name them, or set lora=null")
        taken = (TOY, "truth", "frozen") if self.stage == "teacher" else (TOY, "truth", "frozen", "teacher")
        if self.name in taken:
            raise ConfigError(f"name={self.name} is taken (shipped weights or a row of the table); choose another")
        for key, source in (("init_from", self.init_from), ("teacher", self.teacher)):
            if source == self.name:
                raise ConfigError(f"{key}={source} is the stage itself; name an earlier stage, a path or toy")
        if self.learns_from_videos and self.data.kind in ("images", "texts"):
            where = f"stage {self.stage}" + (" with data_loss.weight" if self.distils else "")
            raise ConfigError(
                f"data.kind={self.data.kind} has no motion to learn from in {where}; use clips, webdataset or lmdb"
            )
        if self.model.image_condition == "i2v" and self.data.kind == "texts":
            raise ConfigError(
                "data.kind=texts has no pictures for model.image_condition=i2v; use images or set it to t2v"
            )

    def _check_scores(self) -> None:
        if self.distils and self.teacher is None:
            raise ConfigError(f"teacher=null: stage {self.stage} needs a real score; name a stage, a path or toy")
        if self.distils and self.caption_dropout:
            raise ConfigError(
                f"caption_dropout={self.caption_dropout} has no effect in stage {self.stage}; set it to 0"
            )
        if not self.distils and (self.teacher is not None or self.critic is not None):
            raise ConfigError(
                f"teacher and critic belong to stages distill and long, this is stage {self.stage}; remove them"
            )
        if self.flow.negative_prompt and (not self.distils or self.flow.guidance == 1):
            raise ConfigError(
                f"flow.negative_prompt={self.flow.negative_prompt!r} is read by stages distill and long with "
                f"flow.guidance other than 1 (stage {self.stage}, flow.guidance={self.flow.guidance:g}); remove it, or "
                "give empty quotes ''"
            )
        if self.stage != "causal" and self.error_recycling.share:
            raise ConfigError(
                f"error_recycling.share={self.error_recycling.share} belongs to stage causal, this is stage "
                f"{self.stage}; set it to 0"
            )
        if self.error_recycling.share and self.error_recycling.from_step >= len(self.flow.steps):
            raise ConfigError(
                f"error_recycling.from_step={self.error_recycling.from_step} must be below the {len(self.flow.steps)} "
                f"flow.steps; set it to {len(self.flow.steps) - 1} or less"
            )
        if not self.distils and self.data_loss.weight:
            raise ConfigError(
                f"data_loss.weight={self.data_loss.weight} belongs to stages distill and long, this is stage "
                f"{self.stage}; set it to 0"
            )
        if self.data_loss.num_latent_frames is not None and not self.data_loss.weight:
            raise ConfigError(
                f"data_loss.num_latent_frames={self.data_loss.num_latent_frames} has no effect while "
                "data_loss.weight=0; remove it, or give a weight (stages distill and long)"
            )
        if self.stage != "long" and self.long is not None:
            raise ConfigError(f"long belongs to stage long, this is stage {self.stage}; remove it")

    def _check_memory(self) -> None:
        self.parallel.check()
        if self.roles == "separate":
            return
        if not self.distils:
            raise ConfigError(f"roles=shared is for stages distill and long, this is stage {self.stage}; remove it")
        if self.lora is None and (self.critic is None or self.critic.lora is None):
            raise ConfigError(
                "roles=shared needs low-rank updates of the student (lora), of the critic (critic.lora), or of both; "
                "give them, or set roles=separate"
            )

    @property
    def distils(self) -> bool:
        """True for the stages that match a teacher's distribution: a teacher and a critic are needed."""
        return self.stage in ("distill", "long")

    @property
    def learns_from_videos(self) -> bool:
        """Whether rows must be videos, or latents of videos."""
        return not self.distils or self.data_loss.weight > 0

    @property
    def stream_plan(self) -> StreamPlan:
        """How the student streams, in training as at inference."""
        return self.plan.stream(self.rope, self.flow.steps, self.flow.shift)

    @property
    def clip_shape(self) -> VideoShape:
        """Sizes of the videos that rows are read as."""
        frames = self.data_loss.num_latent_frames
        return self.video.shape if frames is None else replace(self.video.shape, num_latent_frames=frames)

    @property
    def gathers_once(self) -> bool:
        """Whether a sharded student is gathered once for a whole roll-out. Not under selective recomputation, which
        counts operators: a forward and its recomputation must gather alike.
        """
        return self.activation_checkpointing != "selective"

    def batches_exit_backward(self, *, whole: bool, sequence: int) -> bool:
        """Whether the exit steps of a roll-out are recomputed and differentiated together, where each rank holds
        `whole` networks and `sequence` ranks share a video: where these would wait for Python, and on one GPU with full
        activation checkpointing, but not with low-rank updates, which are there to save memory.
        """
        if not whole or self.activation_checkpointing == "selective":
            return False
        return sequence > 1 or (bool(self.activation_checkpointing) and self.lora is None)

    @property
    def new_frames(self) -> int:
        """Latent frames of each later chunk of long tuning."""
        return (self.long or LongConfig()).chunk_frames(self.video.num_latent_frames)

    @property
    def encoders_folder(self) -> Path:
        """Folder of the encoders."""
        return TOY_ASSETS if self.encoders == TOY else Path(self.encoders)

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
            "adapter": "lora (of the generator) and critic.lora",
            "batch_size_per_gpu": "micro_batch_size",
            "denoising_step_list": "flow.steps (divided by 1000)",
            "dfake_gen_update_ratio": "critic.updates_per_generator",
            "ema_weight": "ema.decay",
            "ema_start_step": "ema.start_step",
            "generator_ckpt": "init_from",
            "gradient_accumulation_steps": "batch_size / (micro_batch_size x ranks)",
            "gradient_checkpointing": "activation_checkpointing",
            "guidance_scale": "flow.guidance (as w: guidance_scale + 1)",
            "independent_first_frame": "plan.first_frames (true = 1)",
            "local_attn_size": "plan.window_frames",
            "lr_critic": "critic.lr",
            "max_checkpoints": "keep_checkpoints",
            "max_iters": "max_steps",
            "mixed_precision": "precision (true = bf16)",
            "num_frame_per_block": "plan.block_frames",
            "real_name": "teacher",
            "sink_size": "plan.sink_frames",
            "streaming_chunk_size": "video.num_latent_frames",
            "streaming_max_length": "long.num_chunks (chunks, not frames)",
            "streaming_min_new_frame": "long.new_frames",
            "switch_choices": "long.switch_frames",
            "global_sink": "plan.keep_sink",
            "timestep_shift": "flow.shift",
            "total_batch_size": "batch_size",
        }


class JobConfig(Settings):
    """A whole run: write the toy world, train the stages in order, evaluate in toy worlds."""

    logdir: PathText = Field(min_length=1, description="log folder: data and a folder a stage")
    data: WorldConfig | None = Field(
        default=WorldConfig(), description=f"{WorldConfig.__doc__} null = none, the stages name data of their own."
    )
    stages: dict[str, StageConfig] = Field(
        min_length=1, description="stages in the order they run, each the path of its YAML file beside this one"
    )
    evaluation: EvaluationConfig | None = Field(
        default=EvaluationConfig(), description=f"{EvaluationConfig.__doc__} null = none, for other sizes than its own."
    )

    @property
    def data_folder(self) -> Path:
        """Folder of the written toy world."""
        return Path(self.logdir) / "data"

    @model_validator(mode="after")
    def _check(self) -> Self:
        earlier: list[str] = []
        for key, stage in self.stages.items():
            try:
                self._check_stage(key, stage, earlier)
            except ConfigError as error:
                raise ValueError(f"stages.{key}: {error}") from None
            earlier.append(key)
        if self.evaluation is not None and self.data is not None and self.evaluation.seed == self.data.seed:
            raise ValueError(f"evaluation.seed={self.evaluation.seed} equals data.seed: worlds would not be held out")
        return self

    def _check_stage(self, key: str, stage: StageConfig, earlier: list[str]) -> None:
        if stage.name != key:
            raise ConfigError(f"name={stage.name} must be the key of the stage; set it to {key}")
        if stage.logdir != self.logdir:
            raise ConfigError(f"logdir={stage.logdir} must be that of the job, {self.logdir}; set only the job's")
        if stage.save_every == 0:
            raise ConfigError("save_every=0 leaves nothing for the next stage and the table; set it to 1 or more")
        critic = stage.critic.init_from if stage.critic is not None else None
        for field, source in (("init_from", stage.init_from), ("teacher", stage.teacher), ("critic.init_from", critic)):
            known = source is None or source == TOY or is_path(source) or source in earlier
            if not known and not resolve_source(source or "", self.logdir).is_dir():
                raise ConfigError(
                    f"{field}={source} is no earlier stage of this job ({', '.join(earlier) or 'there is none'}); "
                    "name one of them, a path (with a slash) or toy"
                )
        if self.data is not None:
            self._check_data(stage, self.data)

    def _check_data(self, stage: StageConfig, world: WorldConfig) -> None:
        """Raises ConfigError when a stage does not fit the toy world that the job writes."""
        if stage.validation.seed == world.seed:
            raise ConfigError(f"validation.seed={stage.validation.seed} equals data.seed: worlds would not be held out")
        if Path(stage.data.path).parent == self.data_folder and Path(stage.data.path).name not in world.formats:
            raise ConfigError(
                f"data.path={stage.data.path} is not written by the job: add it to data.formats={world.formats}"
            )
        needed = stage.clip_shape.num_pixel_frames
        reads_clips = Path(stage.data.path).is_relative_to(self.data_folder) and stage.learns_from_videos
        if reads_clips and world.num_frames < needed:
            name = "data_loss" if stage.distils else "video"
            raise ConfigError(
                f"{name}.num_latent_frames={stage.clip_shape.num_latent_frames} needs clips of {needed} frames and the "
                f"job writes data.num_frames={world.num_frames}; set data.num_frames={needed}"
            )


def is_path(source: str) -> bool:
    """True when a weight source is written as a path: with a slash, or `.`, or absolute."""
    return "/" in source or os.sep in source or source.startswith((".", "~"))


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
    return (
        f"batch_size={batch_size} must be a multiple of {' x '.join(factors)} = {unit}; set batch_size to {fix}{lower}"
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig | JobConfig:
    """The configuration in a YAML file (a job when it has `stages:`), with `a.b=c` overrides on top.

    In a job `causal.optim.lr=1e-4` means the stage named causal; a stage file's `logdir` gives way to the job's.
    Raises: ConfigError naming every wrong key, its value and the rule.
    """
    path = Path(path)
    tree, sources = read_recipe(path)
    model: type[StageConfig | JobConfig] = StageConfig
    if "stages" in tree:
        model, sources = JobConfig, [*_read_stages(tree, path, sources), *sources]
    elif "stage" not in tree:
        raise ConfigError(f"config {path} has neither `stage:` (one stage) nor `stages:` (a job); add one of them")
    stages = tree["stages"] if model is JobConfig else {}
    for override in overrides:
        keys, text = split_override(override)
        keys = ["stages", *keys] if keys[0] in stages else keys
        set_path(tree, keys, text, model)
        sources.append((path, {}))
        set_path(sources[-1][1], keys, text, model)
    for stage in stages.values():
        if isinstance(stage, dict) and "logdir" in tree:
            stage.setdefault("logdir", tree["logdir"])
    try:
        return model.from_tree(tree)
    except ConfigError as error:
        raise located(error, sources) from None


def _read_stages(tree: dict[str, Any], path: Path, sources: Sources) -> Sources:
    """Puts the recipe of each stage into the `stages` of a job, and returns who says what in them."""
    files = tree["stages"]
    if not isinstance(files, dict) or not files:
        raise ConfigError(f"config {path}: stages must map a name to the YAML file of each stage, got {files!r}")
    if clash := set(files) & set(JobConfig.model_fields):
        raise ConfigError(f"config {path}: a stage cannot be called {min(clash)}, which is a key of the job; rename it")
    found: Sources = []
    for name, file in files.items():
        where = said_in(sources, ["stages", name, *(["extends"] if isinstance(file, dict) else [])]) or path
        if isinstance(file, str | dict):
            stage, said = read_recipe(where, file) if isinstance(file, dict) else read_recipe(where.parent / file)
            # The log folder of a job has one home, the job; a stage file's own is for running it alone.
            stage.pop("logdir", None)
            files[name] = stage
            found += [(source, {"stages": {name: values}}) for source, values in said]
    return found


def dump(config: Settings) -> str:
    """The resolved configuration as YAML; reading it back gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
