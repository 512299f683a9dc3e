"""The groups of values inside a stage's or a job's configuration; `longtake/config/stage.py` puts them together."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from longtake.condition import VideoShape
from longtake.config.base import PathText, Settings
from longtake.config.formats import FORMATS, check_format
from longtake.errors import ConfigError

WorldFormat = Literal["images", "clips", "lmdb"]


class ModelConfig(Settings):
    """The transformer and how it is told about the given picture."""

    preset: PathText = Field(
        default="toy",
        description="architecture: a name (`toy`, `wan2.1-fun-1.3b-inp`; docs/formats.md lists all), or the folder of "
        "a model whose config.json is used",
    )
    image_condition: Literal["i2v", "t2v"] = Field(
        default="i2v", description="`i2v`: a picture is given and is frame 0; `t2v`: a prompt alone"
    )
    first_frame_sigma: Literal["clip", "zero"] = Field(
        default="clip",
        description="noise level of frame 0 in teacher and critic: `clip` = as the rest of the clip (36-channel Wan2.1 "
        "models, the toy), `zero` = always clean, the only way in which models without y know the picture (TI2V)",
    )
    clip_preprocess: Literal["original", "diffusers"] = Field(
        default="original",
        description="how a picture becomes the square that CLIP sees: `original` = stretched, as Wan's code does; "
        "`diffusers` = the middle cut out, as its pipelines do; kept with the weights",
    )
    text_precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="type of the text encoder; bf16 for umT5-xxl, which is published in it"
    )
    widen: bool = Field(
        default=False,
        description="turn text-to-video weights into image-to-video weights of the sizes of `preset`, which compute "
        "the same until trained",
    )

    @property
    def with_y(self) -> bool:
        """True when the picture enters through the channels of y (and CLIP tokens), not as a clean frame 0 alone."""
        return self.image_condition == "i2v" and self.first_frame_sigma == "clip"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.widen and not self.with_y:
            raise ValueError(
                "widen=true adds y, the condition of i2v; set image_condition=i2v and first_frame_sigma=clip, or "
                "widen=false"
            )
        return self


class DataConfig(Settings):
    """Where a stage reads its samples."""

    path: PathText = Field(min_length=1, description="folder or file of the data set; `{logdir}` is the log folder")
    kind: Annotated[str, AfterValidator(check_format)] = Field(
        default="auto",
        description=f"format (docs/formats.md): {', '.join(FORMATS)}; `auto` looks into the folder",
    )
    buckets: list[list[int]] | None = Field(
        default=None,
        min_length=2,
        description="sizes [height, width] for pictures of different aspect: each row takes the nearest, an update has "
        "rows of one; video.height and video.width are one of them. null = that one size for all",
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail",
        description="an unreadable row stops the run (`fail`) or is replaced by the next good one (`skip`)",
    )
    max_bad_share: float = Field(
        default=0.01, ge=0, le=1, description="share of bad rows above which `skip` stops the run too"
    )
    num_workers: int = Field(default=2, ge=0, description="threads that read a micro-batch")

    def check_buckets(self, video: VideoShape) -> None:
        """Raises ConfigError unless the buckets are sizes that `video` allows, its own among them."""
        buckets = self.buckets
        if buckets is None:
            return
        if any(len(size) != 2 or min(size) < 1 for size in buckets):
            raise ConfigError(f"data.buckets={buckets} must be pairs [height, width] of pixels, e.g. [480, 832]")
        if len({height / width for height, width in buckets}) < len(buckets):
            raise ConfigError(f"data.buckets={buckets} has two of one aspect, and only the first gets rows; remove one")
        for height, width in buckets:
            try:
                video.but(height=height, width=width)
            except ConfigError as error:
                raise ConfigError(f"data.buckets={buckets}: {error}") from None
        if [video.height, video.width] not in buckets:
            raise ConfigError(
                f"data.buckets={buckets} must hold [video.height, video.width]=[{video.height}, "
                f"{video.width}], the size at which videos are generated; add it"
            )


class OptimConfig(Settings):
    """AdamW; after the warm-up the learning rate is constant, unless it falls at the end."""

    lr: float = Field(default=1e-4, gt=0, description="learning rate")
    beta1: float = Field(default=0.0, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(default=1e-8, gt=0, description="term added to the denominator")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(default=10.0, gt=0, description="norm to which gradients are clipped")
    warmup_steps: int = Field(
        default=0, ge=0, description="this optimizer's own first steps, over which the learning rate rises linearly"
    )
    decay_steps: int = Field(
        default=0, ge=0, description="last iterations of `max_steps`, over which the learning rate falls linearly to 0"
    )

    @classmethod
    def familiar_names(cls) -> dict[str, str]:
        return {"moments": "gone: remove the key"}


class LoraConfig(Settings):
    """Low-rank updates of linear layers in the blocks, trained in place of the weights, which stay as they are."""

    rank: int = Field(default=256, gt=0, description="rank of each update")
    alpha: float | None = Field(
        default=None, gt=0, description="updates are scaled by alpha / rank; null = the rank, a scale of 1"
    )
    targets: list[str] | None = Field(
        default=None,
        min_length=1,
        description="linear layers of a block that get updates, e.g. [self_attn.q, ffn.0]; null = all",
    )


class ParallelConfig(Settings):
    """How the ranks of a run are arranged, replicate x shard x sequence (`shard` is what is left of them), and how
    networks are held and computed on them.
    """

    replicate: int = Field(
        default=1,
        gt=0,
        description="with data_parallel=hsdp: copies of the weights, each sharded over ranks of its own, for example "
        "one a machine; a multiple of it must be the number of ranks",
    )
    sequence: int = Field(
        default=1,
        gt=0,
        description="ranks that compute each model call together, by tokens and in attention by heads, and so get the "
        "same samples: for more tokens than one GPU holds, or more GPUs than samples. Must divide the heads: 2, 3, 4, "
        "6 or 12 of the 1.3B models, 2, 4, 5, 8, 10, 20 or 40 of the 14B ones",
    )

    data_parallel: Literal["fsdp", "hsdp", "ddp"] = Field(
        default="fsdp",
        description="what a rank holds of each network: fsdp = its part, with the parts gathered where they are "
        "needed (FSDP2); hsdp = its part of one of `replicate` copies; ddp = everything, optimizer states too: nothing "
        "is gathered, and gradients are averaged once an update",
    )
    graphs: bool = Field(
        default=True,
        description="on a GPU, record as CUDA graphs, and replay, what comes again, where weights are whole on each "
        "rank and not compiled: the student's passes without gradient, unless low-rank updates are trained, and of "
        "small networks (narrower than 1024) every call, with its backward",
    )
    compile: bool = Field(default=False, description="compile the blocks with torch.compile; the first steps are slow")
    fused_shards: bool = Field(
        default=False,
        description="sharded weights with fused functions and activation_checkpointing=auto as whole ones have them: "
        "right on CPU ranks, not measured on GPUs yet; on one rank, where weights are whole, it changes nothing",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fused_shards and self.data_parallel == "ddp":
            raise ValueError(
                "fused_shards=true has no effect with data_parallel=ddp, where weights are whole; remove it"
            )
        if self.fused_shards and self.compile:
            raise ValueError(
                "fused_shards=true compiles functions of blocks, and compile=true whole blocks; set one of them back"
            )
        if (self.data_parallel == "hsdp") != (self.replicate > 1):
            one, more = "set data_parallel=hsdp", "leave replicate at 1"
            fix = f"{one}, or {more}" if self.replicate > 1 else "set replicate to 2 or more, or data_parallel=fsdp"
            raise ValueError(
                f"data_parallel={self.data_parallel} and replicate={self.replicate}: copies (replicate above 1) are "
                f"what hsdp has, and only hsdp; {fix}"
            )
        return self

    @classmethod
    def familiar_names(cls) -> dict[str, str]:
        automatic = ("gather_once", "join_exits", "frozen_weights")
        gone = ("cpu_offload", "reduce_once", "master_weights")
        return {
            "weights": "parallel.data_parallel (sharded = fsdp, or hsdp with replicate above 1; whole = ddp)",
            **dict.fromkeys(automatic, "automatic: remove the key"),
            **dict.fromkeys(gone, "gone: remove the key"),
        }

    def shard(self, world_size: int) -> int:
        """Ranks along the shard axis. Raises: ConfigError when replicate x sequence does not divide `world_size`."""
        together = self.replicate * self.sequence
        if world_size % together:
            raise ConfigError(
                f"parallel.replicate={self.replicate} x parallel.sequence={self.sequence} (in generate "
                f"--sequence-parallel) = {together} must divide the number of ranks, {world_size}; set them lower, or "
                f"start a multiple of {together} ranks"
            )
        return world_size // together

    def data_ranks(self, world_size: int) -> int:
        """Groups of ranks that get samples of their own. Raises: as `shard`."""
        return self.replicate * self.shard(world_size)


class EmaConfig(Settings):
    """Exponential moving average of the weights."""

    enabled: bool = Field(default=True, description="keep an average")
    decay: float = Field(default=0.99, ge=0, lt=1, description="weight of the old average, once a (generator) update")
    start_step: int = Field(default=200, ge=0, description="iteration from whose weights the average starts")


class WandbConfig(Settings):
    """Weights & Biases; nothing of it is imported or asked for unless enabled."""

    enabled: bool = Field(default=False, description="also log to Weights & Biases")
    project: str | None = Field(default=None, description="project name; needed when enabled")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.enabled and not self.project:
            raise ValueError("enabled=true needs project, e.g. wandb.project=longtake")
        return self


class ProfileConfig(Settings):
    """A trace of the PyTorch profiler, written into the stage's folder; off unless `num_steps` is above 0."""

    num_steps: int = Field(default=0, ge=0, le=20, description="iterations to record; 0 = none")
    start_step: int = Field(
        default=2, ge=0, description="iterations before the recording begins, counted from where this process begins"
    )
    every_rank: bool = Field(default=False, description="a trace of each rank, not of the first alone")
    shapes: bool = Field(default=False, description="also record shapes of the operations' inputs")
    memory: bool = Field(default=False, description="also record allocations")


class WorldConfig(Settings):
    """The toy world that is written to `{logdir}/data` as training data."""

    num_worlds: int = Field(default=512, gt=0, le=1_000_000, description="worlds, one sample each")
    num_frames: int = Field(default=33, gt=1, le=100_000, description="pixel frames of each clip")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the worlds")
    formats: list[WorldFormat] = Field(
        default=["images", "clips", "lmdb"], min_length=1, description="formats to write"
    )
    switch_frames: list[Annotated[int, Field(le=1_000_000)]] = Field(
        default=[],
        description="pixel frames at which the caption of each world changes; each row has a prompt for each",
    )
    one_switch: bool = Field(
        default=False,
        description="each world changes its caption once, at one of switch_frames by turns, and not at each of them",
    )
    stops: bool = Field(
        default=False,
        description="sprites may stop at a switch; the shipped weights were not trained on it",
    )


class EvaluationConfig(Settings):
    """The table at the end, over held-out toy worlds."""

    num_worlds: int = Field(default=32, gt=0, le=1_000_000, description="worlds that every row of the table generates")
    num_latent_frames: int | None = Field(
        default=None, gt=0, le=100_000, description="length; null = that of the training clips"
    )
    seed: int = Field(
        default=1_000_003, ge=0, lt=2**63, description="seed of the worlds and the noise; must differ from data.seed"
    )
    batch_size: int = Field(default=8, gt=0, le=10_000, description="worlds generated at once; on a GPU at least 32")
    teacher_steps: int = Field(default=20, gt=0, le=1000, description="sampling steps of the teacher's row")
    teacher_guidance: float = Field(default=1.0, ge=0, description="guidance w of the teacher's row")
    open_worlds: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="further worlds whose captions leave a motion open; a table says how varied the choices are",
    )
    ablations: bool = Field(
        default=True, description="also rows with zeroed y, zeroed CLIP tokens and shuffled captions"
    )
    switch_frames: list[Annotated[int, Field(le=1_000_000)]] = Field(
        default=[],
        description="latent frames at which the captions change in mid-stream, on block boundaries; each student then "
        "has a row with the cache rebuilt and one without, and none with a condition taken away",
    )
