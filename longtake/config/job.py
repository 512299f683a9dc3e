"""A job, several stages in order, and how a file becomes a stage or a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

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
from longtake.config.groups import EvaluationConfig, WorldConfig
from longtake.config.recipes import find_recipe
from longtake.config.stage import TOY, StageConfig, is_path, resolve_source
from longtake.errors import ConfigError


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
        """Raises ConfigError when a stage does not fit the job, or the toy world that it writes."""
        if stage.name != key:
            raise ConfigError(f"name={stage.name} must be the key of the stage; set it to {key}")
        if stage.logdir != self.logdir:
            raise ConfigError(f"logdir={stage.logdir} must be that of the job, {self.logdir}; set only the job's")
        if stage.save_every == 0:
            raise ConfigError("save_every=0 leaves nothing for the next stage and the table; set it to 1 or more")
        for network in stage.networks.values():
            source = network.source or TOY
            known = source == TOY or is_path(source) or source in earlier
            if not known and not resolve_source(source, self.logdir).is_dir():
                raise ConfigError(
                    f"{network.key}={source} is no earlier stage of this job "
                    f"({', '.join(earlier) or 'there is none'}); name one of them, a path (with a slash) or toy"
                )
        if (world := self.data) is None:
            return
        if stage.validation.seed == world.seed:
            raise ConfigError(f"validation.seed={stage.validation.seed} equals data.seed: worlds would not be held out")
        path, needed = Path(stage.data.path), stage.clip_shape.num_pixel_frames
        if path.parent == self.data_folder and path.name not in world.formats:
            raise ConfigError(f"data.path={path} is not written by the job: add it to data.formats={world.formats}")
        reads_clips = path.is_relative_to(self.data_folder) and stage.objective.learns_from_videos
        if reads_clips and world.num_frames < needed:
            name = "video" if stage.objective.num_clip_frames is None else "objective.data_loss"
            raise ConfigError(
                f"{name}.num_latent_frames={stage.clip_shape.num_latent_frames} needs clips of {needed} frames and the "
                f"job writes data.num_frames={world.num_frames}; set data.num_frames={needed}"
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig | JobConfig:
    """The configuration in a YAML file (a job when it has `stages:`), or in the recipe of a name such as toy/i2v, with
    `a.b=c` overrides on top.

    In a job `causal.optim.lr=1e-4` means the stage named causal; a stage file's `logdir` gives way to the job's.
    Raises: ConfigError naming every wrong key, its value and the rule.
    """
    path = find_recipe(path)
    tree, sources = read_recipe(path)
    model: type[StageConfig | JobConfig] = StageConfig
    if "stages" in tree:
        model, sources = JobConfig, [*_read_stages(tree, path, sources), *sources]
    elif not tree.keys() & {"objective", "stage"}:  # what a stage was told by before: refused below, with its new name
        raise ConfigError(f"config {path} has neither `objective:` (one stage) nor `stages:` (a job); add one of them")
    stages = tree["stages"] if model is JobConfig else {}
    for override in overrides:
        keys, text = split_override(override)
        keys = ["stages", *keys] if keys[0] in stages else keys
        said = set_path(tree, keys, text, model)
        for key in reversed(keys):
            said = {key: said}
        sources.append((path, said))
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
