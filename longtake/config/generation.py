"""How a student streams at inference, or a teacher samples: picture size, blocks, noise levels, guidance, precision.

Weights that Longtake trained bring these values along; for weights of other origin they come from a stage's YAML file
or the command line, and from the defaults here. Must know no tensor and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from longtake.condition import VideoShape
from longtake.config.base import PathText, read_yaml, set_path, split_override
from longtake.config.groups import ModelConfig
from longtake.config.job import load_config
from longtake.config.stage import StageConfig
from longtake.errors import ConfigError
from longtake.plan import MAX_STEPS, Clock, FlowConfig, PlanConfig, Rope, StreamPlan

# Beside the weights of a student: the rules it streams by
RULES_FILE = "generation.yaml"

MAX_FRAMES = 10_000_000  # a week at 16 frames a second
_TOY_HISTORY_BLOCKS = 8  # 0.4 MB of cache a block
# Short options of the command line that have a name of their own, and the keys that they mean
SHORT = {
    "block": "plan.block_frames",
    "window": "plan.window_frames",
    "sink": "plan.sink_frames",
    "dtype": "precision",
}


class GenerationConfig(FlowConfig):
    """How a student streams. The defaults are those of the image-to-video recipe at full size."""

    height: int = Field(default=480, gt=0, le=8192, description="height in pixels")
    width: int = Field(default=832, gt=0, le=8192, description="width in pixels")
    fps: int = Field(default=16, gt=0, le=1000, description="frames a second of the written video")
    num_latent_frames: int = Field(default=21, gt=0, le=MAX_FRAMES, description="length where none is asked for")
    plan: PlanConfig = Field(
        default=PlanConfig(block_frames=4, window_frames=13, sink_frames=5), description=PlanConfig.__doc__
    )
    rope: Rope = Field(default="relative", description="rule of temporal positions")
    picture: Literal["trained", "none", "frame", "still"] | None = Field(
        default=None,
        description="how a picture enters: `trained` = as in training, `none` = the student knows text alone and "
        "refuses one; zero-shot, for which it was not trained: `frame` = a clean latent as a block of its own, `still` "
        "= a first block that shows nothing else; null = what the weights say: with `y`, and TI2V, trained, else none",
    )
    sampler: Literal["stream", "whole"] = Field(
        default="stream",
        description="`stream` = block by block, as students do; `whole` = all frames at once in Euler steps, as "
        "teachers do, which are not causal",
    )
    clock: Clock = Field(
        default="exact",
        description="what the network reads of a noise level: 1000 times it, or that rounded to whole numbers or to "
        "bfloat16, for published students that were trained so",
    )
    guidance: float = Field(
        default=1.0, ge=0, description="classifier-free guidance w of the student; 1 = off, else twice the work"
    )
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        default="fp32",
        description="type of the matrix weights and the cache; fp8 = bf16, and large weights (the MLP) and their "
        "products in 8-bit floats: faster on GPUs that have them, another video",
    )
    clip_preprocess: Literal["original", "diffusers"] = Field(
        default=ModelConfig().clip_preprocess, description="as `model.clip_preprocess` of the stage that trained it"
    )
    text_precision: Literal["fp32", "bf16"] = Field(
        default=ModelConfig().text_precision, description="type of the text encoder where `precision` is fp32"
    )
    vae_precision: Literal["fp32", "bf16"] | None = Field(
        default=None, description="type of the VAE; null = that of `precision`"
    )
    decoder: Literal["exact", "tiny", "light"] = Field(
        default="exact",
        description="what makes pixels: `exact` = the VAE; `tiny` = TAEHV or LightTAE, `light` = LightVAE: faster, in "
        "less memory, and not as good",
    )
    decoder_weights: str | None = Field(
        default=None, description="file of that decoder; null = the one in the encoders' folder, by its published name"
    )
    low_memory: bool = Field(
        default=False,
        description="the same video in less of a GPU's memory: text and image encoder lie in this process's memory, of "
        "which one matrix at a time is on the GPU, and pixels are encoded and decoded one latent frame at a time",
    )
    encoders: PathText | None = Field(
        default=None,
        description="folder with VAE, text and image encoder, OWNER/NAME of a repository on the Hugging Face hub that "
        "has them, or `toy`; null = in the folder of the weights or beside it",
    )
    history_blocks: int = Field(
        default=0,
        ge=0,
        le=MAX_FRAMES,
        description="blocks that a session can be rewound by (8 for runs of the toy); each costs a block of cache",
    )

    @classmethod
    def familiar_names(cls) -> dict[str, str]:
        """The short options, where one is written as a key."""
        return SHORT

    @property
    def is_half(self) -> bool:
        """Whether what is computed, the cache and the encoders are bfloat16."""
        return self.precision != "fp32"

    @property
    def has_half_vae(self) -> bool:
        """Whether the VAE is bfloat16."""
        return self.is_half if self.vae_precision is None else self.vae_precision == "bf16"

    def shape(self, temporal_stride: int, spatial_stride: int) -> VideoShape:
        """The size of the videos, where the VAE has these strides. Raises: ConfigError when it does not fit them."""
        sizes = self.model_dump(include={"height", "width", "fps", "num_latent_frames"})
        return VideoShape(**sizes, temporal_stride=temporal_stride, spatial_stride=spatial_stride)

    @property
    def stream_plan(self) -> StreamPlan:
        """How the student streams."""
        return self.plan.stream(self, rope=self.rope, clock=self.clock)

    @model_validator(mode="after")
    def _check_rules(self) -> Self:  # beside those of the noise levels, `_check`
        _ = self.stream_plan
        count = len(self.steps)
        even = all(abs(level - (1 - k / count)) < 1e-6 for k, level in enumerate(self.steps))
        if self.sampler == "whole" and not even:
            raise ValueError(f"steps={self.steps} must be evenly spaced with sampler=whole; give their number")
        if self.decoder_weights is not None and self.decoder == "exact":
            raise ValueError(
                f"decoder_weights={self.decoder_weights} says nothing with decoder=exact; use tiny or light"
            )
        return self


def write_rules(folder: Path, settings: GenerationConfig) -> None:
    """Writes `generation.yaml` beside the weights in `folder`."""
    (folder / RULES_FILE).write_text(yaml.safe_dump(settings.model_dump(), sort_keys=False), encoding="utf-8")


def read_rules(weights: Path) -> GenerationConfig | None:
    """The rules beside weights (a folder or a file), None where there are none. Raises: ConfigError."""
    file = (weights if weights.is_dir() else weights.parent) / RULES_FILE
    return GenerationConfig.from_tree(read_yaml(file)) if file.is_file() else None


def generation_settings(
    stage: StageConfig | None = None,
    changes: Mapping[str, Any] | None = None,
    rules: GenerationConfig | None = None,
) -> GenerationConfig:
    """The values of a stage (else `rules`, else the defaults), with `changes` (a nested mapping) on top.

    Raises: ConfigError naming every wrong value.
    """
    tree = (rules or GenerationConfig()).model_dump()
    if stage is not None:
        tree |= stage.video.model_dump(include={"height", "width", "fps", "num_latent_frames"})
        tree |= stage.flow.model_dump()
        tree |= stage.model.model_dump(include={"clip_preprocess", "text_precision"})
        given = "trained" if stage.model.image_condition == "i2v" else "none"
        tree |= {"plan": stage.plan.model_dump(), "rope": stage.rope, "picture": given}
        if stage.model.preset == "toy":
            tree["history_blocks"] = _TOY_HISTORY_BLOCKS
    for key, value in (changes or {}).items():
        tree[key] = {**tree[key], **value} if key == "plan" and isinstance(value, dict) else value
    return GenerationConfig.from_tree(tree)


def read_stage(path: str | Path) -> StageConfig:
    """The stage in a YAML file. Raises: ConfigError when it is a job, which has several."""
    config = load_config(path)
    if not isinstance(config, StageConfig):
        raise ConfigError(f"{path} is a job of several stages; give the YAML file of one of them")
    return config


def changes_of(*overrides: str, **options: Any) -> dict[str, Any]:
    """The nested changes that `a.b=c` overrides and short options of the command line mean; None = not given.

    An option wins over an override of the same key. `steps` is a number of evenly spaced levels or a list
    ("1,0.75,0.5,0.25"); `window` a number or "all".
    Raises: ConfigError for a text that is none of these.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        set_path(changes, *split_override(override), GenerationConfig)
    for name, value in options.items():
        if value is not None:
            text = _READ[name](value) if name in _READ else str(value)
            set_path(changes, SHORT.get(name, name).split("."), text, GenerationConfig)
    return changes


def frames_of(num_frames: int | None, seconds: float | None, fps: int) -> int | None:
    """A length in pixel frames, given so or in seconds; None where neither is given. Raises: ConfigError."""
    if num_frames is not None and seconds is not None:
        raise ConfigError(f"seconds={seconds:g} and num_frames={num_frames} were given; give one of them")
    if seconds is not None:
        if not 0 < seconds * fps <= MAX_FRAMES:  # not a number is neither
            raise ConfigError(f"seconds={seconds:g} must be above 0 and at most {MAX_FRAMES // fps}")
        return max(1, round(seconds * fps))
    if num_frames is not None and not 1 <= num_frames <= MAX_FRAMES:
        raise ConfigError(f"num_frames={num_frames} must be at least 1 and at most {MAX_FRAMES}")
    return num_frames


def _steps(text: str) -> str:
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--steps {text} must be a number of steps or levels like 1,0.75,0.5,0.25") from None
    if len(levels) == 1 and levels[0] >= 1 and levels[0].is_integer():
        if levels[0] > MAX_STEPS:
            raise ConfigError(f"--steps {text} must be at most {MAX_STEPS}")
        count = int(levels[0])
        levels = [1 - k / count for k in range(count)]
    return str(levels)


def _window(text: str) -> str:
    if text != "all" and not (text.isdecimal() and len(text) < 10):
        raise ConfigError(f"--window {text} must be a number of latent frames, or all")
    return "null" if text == "all" else str(int(text))


# Options whose text is not that of the value
_READ = {"steps": _steps, "window": _window}
