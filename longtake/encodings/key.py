"""What an encoded set depends on, and whether a set on disk is the one that a stage would make."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longtake.condition import VideoShape
from longtake.config.groups import DataConfig, ModelConfig
from longtake.config.objective import ObjectiveConfig, TeacherSampling
from longtake.config.stage import StageConfig
from longtake.data.encoded import EncodedRows, differences
from longtake.encoders.fingerprint import digest, encoder_files, stamps
from longtake.errors import CheckpointError, DataError
from longtake.parallel.mesh import Mesh
from longtake.plan import StreamPlan
from longtake.weights.fingerprint import weights_identity
from longtake.weights.locate import find_weights

logger = logging.getLogger(__name__)

# The encoder that makes each part; text is always there.
_ENCODER_OF = {"clip": "image", "y": "vae", "first": "vae", "latents": "vae"}
# Values of `model` that change what an encoder gives, as far as this version has them.
_OPTIONS = ("clip_preprocess", "text_precision")


def contents_of(model: ModelConfig, *, with_tokens: bool, with_latents: bool, with_path: bool = False) -> list[str]:
    """What a stage reads of each row beside the text."""
    given = []
    if model.image_condition == "i2v":
        given = (["clip"] if with_tokens else []) + ["y"] if model.with_y else ["first"]
    return given + (["latents"] if with_latents else []) + (["path"] if with_path else [])


def needed_contents(model: ModelConfig, objective: ObjectiveConfig, *, with_tokens: bool) -> list[str]:
    """What a stage reads of each row beside the first prompt: `contents_of` for its objective."""
    with_latents, with_path = objective.learns_from_videos, objective.paths is not None
    return contents_of(model, with_tokens=with_tokens, with_latents=with_latents, with_path=with_path)


def teacher_key(sampling: TeacherSampling, plan: StreamPlan, shift: float) -> dict[str, Any]:
    """The part of the key that says how a teacher made data, as far as the configuration alone decides it."""
    key: dict[str, Any] = {"num_steps": sampling.num_steps, "guidance": sampling.guidance, "shift": shift}
    if sampling.keeps_path:
        key["levels"] = plan.all_levels
    # Which frames a block saw, and how noisy
    return key | {"causal": sampling.causal, "plan": plan.model_dump(mode="json") if sampling.causal else None}


def sizes_key(model: ModelConfig, data: DataConfig, clip: VideoShape, contents: list[str]) -> dict[str, Any]:
    """The part of the key that the configuration alone decides."""
    options = {name: value for name, value in model.model_dump().items() if name in _OPTIONS}
    key: dict[str, Any] = {"options": options}
    if contents:
        key["sizes"] = data.buckets or [[clip.height, clip.width]]
        key["strides"] = {"temporal": clip.temporal_stride, "spatial": clip.spatial_stride}
    if "latents" in contents:
        key["clips"] = {"num_latent_frames": clip.num_latent_frames, "fps": clip.fps}
    return key


def encoders_key(folder: Path, contents: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Digests of the encoders that make `contents`, and the stamps of their files. Reads all their weights once."""
    files = encoder_files(folder)
    parts = ["text", *dict.fromkeys(_ENCODER_OF[name] for name in contents if name in _ENCODER_OF)]
    digests = {part: digest(folder, files[part]) for part in parts}
    return digests, {part: stamps(folder, files[part]) for part in parts}


def check_encoded(config: StageConfig, dataset: EncodedRows, mesh: Mesh, needed: list[str]) -> None:
    """Raises DataError, naming each difference, unless the set is what this stage's encoders (and its teacher) would
    make of the `needed` contents.

    Its clips may be longer than those of the stage. Where the encoders are not on this machine they cannot be compared,
    which is said once.
    """
    objective = config.objective
    problems = [f"it lacks {name}" for name in needed if name not in dataset.key["contents"]]
    wanted = sizes_key(config.model, config.data, config.clip_shape, needed)
    stored = dataset.key.get("clips", {}).get("num_latent_frames", 0)
    if "clips" in wanted and stored > wanted["clips"]["num_latent_frames"]:
        del wanted["clips"]["num_latent_frames"]  # of longer clips the first latents are taken: the VAE is causal
    if (sampling := objective.paths) is not None and "path" in needed:
        wanted["teacher"] = teacher_key(sampling, config.stream_plan, config.flow.shift)
        problems += mesh.on_main(
            lambda: _changed_teacher(sampling, config.source(sampling.source), config.logdir, dataset)
        )
    problems += differences(wanted, dataset.key)
    if (negative := dataset.key.get("negative_prompt", "")) != objective.empty_prompt:
        problems.append(f"negative_prompt={negative!r}, wanted {objective.empty_prompt!r}")
    stated: Mapping[str, str] = dataset.key["encoders"]
    parts = {"text", *(_ENCODER_OF[name] for name in needed if name in _ENCODER_OF)} & set(stated)
    problems += mesh.on_main(lambda: _changed_encoders(config.encoders_folder, dataset, sorted(parts)))
    if problems:
        command = "teacher-data" if "path" in needed else "encode"
        raise DataError(
            f"the encoded set {dataset.path} does not fit stage {config.name}: {'; '.join(problems)}. Encode the data "
            f"again with this stage's configuration (`longtake {command}`), or set the values back"
        )


def _changed_teacher(sampling: TeacherSampling, source: Path, logdir: str, dataset: EncodedRows) -> list[str]:
    made_by = dataset.key.get("teacher", {}).get("weights")
    try:
        same = weights_identity(find_weights(source, logdir).path) == made_by
    except CheckpointError:
        logger.warning("There are no weights at %s to compare with the encoded set %s", source, dataset.path)
        return []
    return [] if same else [f"its paths were not made by {sampling.key}={sampling.source} as it is now"]


def _changed_encoders(folder: Path, dataset: EncodedRows, parts: list[str]) -> list[str]:
    files = encoder_files(folder) if folder.is_dir() else {}
    problems = []
    for part in parts:
        if part not in files:
            logger.warning(
                "There is no %s encoder in %s to compare with the encoded set %s", part, folder, dataset.path
            )
            continue
        same = stamps(folder, files[part]) == dataset.files[part]
        if not same and digest(folder, files[part]) != dataset.key["encoders"][part]:
            problems.append(f"the files of the {part} encoder in {folder} are not those it was made with")
    return problems
