"""`longtake evaluate`: every row of a run over the same held-out worlds and seeds; table, JSON, curves, sheet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longtake.config import EvaluationConfig, StageConfig, resolve_source
from longtake.distributed.mesh import Mesh, init_mesh
from longtake.errors import CheckpointError, ConfigError
from longtake.evaluation import report
from longtake.evaluation.rows import (
    Row,
    Videos,
    broken_row,
    frozen,
    held_out,
    iterate,
    scorer_processes,
    student_row,
    teacher_row,
    truth,
    vae_round_trip,
)
from longtake.evaluation.window_metrics import WindowRule
from longtake.evaluation.world_metrics import summarise
from longtake.inference.generator import load_encoders, rules_of
from longtake.models.dit import VideoDiT
from longtake.models.folders import find_weights
from longtake.models.presets import model_config
from longtake.models.weights import load_dit
from longtake.models.widen import widened_as_asked
from longtake.runs import checkpoints_folder, exported_weights, find_checkpoint, read_manifest, student_stages

# Shown on the contact sheet: the story of a run, from truth to student.
_SHEET_STAGES = ("truth", "teacher", "teacher, causal")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationReport:
    """Summaries by row name, and the folder they were written to; prints as the tables."""

    summaries: dict[str, dict[str, Any]]
    folder: Path

    def __str__(self) -> str:
        table = report.table(self.summaries)
        return f"{table}\n\n{report.window_table(self.summaries)}" if self.has_windows else table

    @property
    def has_windows(self) -> bool:
        """Whether the videos were also scored window by window."""
        return all("windows" in summary for summary in self.summaries.values())


def evaluate(
    run: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    device: str | None = None,
    mesh: Mesh | None = None,
    settings: EvaluationConfig | None = None,
) -> EvaluationReport:
    """Measures a log folder (all its stages) or one stage folder, and writes the report.

    Rows: truth, VAE round trip, frozen first frame, teacher, the teacher's weights streamed causally in the student's
    steps, each trained stage, and the last stage with one condition taken away. Videos longer than the training clips,
    and those with switches, are also scored window by window; with switches each stage has a row without the rebuild
    of the cache, and none of a bidirectional teacher. All ranks call it.
    Raises: CheckpointError when nothing there was trained; ConfigError for switches that are no block boundary of every
    stage.
    """
    run = Path(run)
    mesh = mesh or init_mesh(device)
    stages = trained_stages(run)
    last = stages[-1][1]
    if settings is None:
        settings = _stored_settings(run)
    settings = EvaluationConfig.from_tree({**settings.model_dump(), **(overrides or {})})
    with_tokens = model_config(str(exported_weights(stages[-1][0]))).image_dim is not None
    encoders = load_encoders(last, mesh.device, with_image=with_tokens)
    frames = settings.num_latent_frames or last.video.num_latent_frames
    _check_switches(settings.switch_frames, frames, stages)
    batches = held_out(
        encoders,
        mesh,
        seed=settings.seed,
        num_worlds=settings.num_worlds,
        num_latent_frames=frames,
        batch_size=settings.batch_size,
        with_y=last.model.with_y,
        switch_frames=settings.switch_frames,
    )
    summaries: dict[str, dict[str, Any]] = {}
    shown: dict[str, Videos] = {}
    rows = _rows(stages, settings, frames, mesh, with_tokens=with_tokens)
    windows = frames > last.video.num_latent_frames or bool(settings.switch_frames)
    rule = _window_rule(last) if windows else None
    total = len(rows) * len(batches) * settings.batch_size * batches[0].num_frames
    with scorer_processes(total, mesh) as scorers:
        for name, scores, videos in iterate(rows, batches, mesh, rule=rule, scorers=scorers):
            summaries[name] = summarise(scores)
            shown[name] = videos
    folder = Path(output) if output is not None else run
    sheet_rows = [name for name in (*_SHEET_STAGES, *(config.name for _, config in stages)) if name in shown]
    result = EvaluationReport(summaries, folder)
    mesh.on_main(lambda: _write(result, {name: shown[name] for name in sheet_rows}, settings, last, frames))
    return result


def trained_stages(run: Path) -> list[tuple[Path, StageConfig]]:
    """(checkpoint, configuration) of each student in a log folder, or of one stage folder, in training order."""
    if checkpoints_folder(run).is_dir() or (run / "manifest.json").is_file():
        folders = [run]
    else:
        folders = student_stages(run) if run.is_dir() else []
    if not folders:
        raise CheckpointError(f"{run} holds no trained stage; give a log folder or a stage folder of `longtake train`")
    found = [find_checkpoint(folder) for folder in folders]
    stages = [(path, StageConfig.from_tree(read_manifest(path)["config"])) for path in found]
    if any(config.model.image_condition != "i2v" for _, config in stages):
        raise ConfigError(f"{run} holds a text-to-video model; the evaluation gives a picture and needs an i2v model")
    return stages


def _window_rule(config: StageConfig) -> WindowRule:
    """Windows of the training clips' length; a new caption must be followed from two blocks after the switch on."""
    settle = 2 * config.plan.block_frames * config.video.temporal_stride
    return WindowRule(config.video.shape.num_pixel_frames, settle)


def _check_switches(switch_frames: list[int], frames: int, stages: list[tuple[Path, StageConfig]]) -> None:
    for config in (config for _, config in stages):
        if switch_frames and config.stage == "teacher":
            raise ConfigError(
                f"stage {config.name} is a bidirectional teacher, which cannot change its caption half-way"
            )
        for frame in switch_frames:
            if frame < 1 or not config.plan.blocks.is_boundary(frame):
                start, end = config.plan.blocks.block_of(max(frame, 1))
                raise ConfigError(
                    f"switch_frames={switch_frames}: {frame} is no latent frame after the first at which a block of "
                    f"stage {config.name} begins; the nearest are {start} and {end}"
                )
    if any(frame >= frames for frame in switch_frames):
        raise ConfigError(
            f"switch_frames={switch_frames} must lie inside the video; num_latent_frames is {frames}, set it higher"
        )


def _rows(
    stages: list[tuple[Path, StageConfig]], settings: EvaluationConfig, frames: int, mesh: Mesh, *, with_tokens: bool
) -> dict[str, Row]:
    checkpoint, last = stages[-1]
    seed = settings.seed
    rows: dict[str, Row] = {"truth": truth, "vae round trip": vae_round_trip, "frozen": frozen}

    def load(weights: Path) -> VideoDiT:
        return load_dit(weights, mesh.device).eval().requires_grad_(False)

    def bidirectional(model: VideoDiT) -> Row:
        return teacher_row(
            model,
            seed=seed,
            num_steps=settings.teacher_steps,
            shift=last.flow.shift,
            guidance=settings.teacher_guidance,
            first_frame_clean=last.model.first_frame_sigma == "zero",
        )

    source = last.teacher or last.init_from
    if last.stage != "teacher" and source is not None:
        # By name within the log folder where it lies now: it may have been moved since.
        weights = find_weights(resolve_source(source, checkpoint.parents[2]), checkpoint.parents[2]).path
        teacher = widened_as_asked(load(weights), last.model, last.seed).requires_grad_(False)
        if settings.switch_frames:
            logger.info("No row of the bidirectional teacher: it cannot change its caption half-way")
        elif frames == last.video.num_latent_frames:
            rows["teacher"] = bidirectional(teacher)
            rows["teacher, shuffled captions"] = broken_row(rows["teacher"], "text")
        else:
            logger.warning("No row of the bidirectional teacher: %d frames are not its training length", frames)
        rows["teacher, causal"] = student_row(teacher, rules_of(last), seed=seed)
    for path, config in stages:
        model = load(exported_weights(path))
        is_teacher = config.stage == "teacher"
        rows[config.name] = bidirectional(model) if is_teacher else student_row(model, rules_of(config), seed=seed)
        if settings.switch_frames:
            rows[f"{config.name}, no rebuild"] = student_row(model, rules_of(config), seed=seed, rebuild=False)
    if settings.ablations and last.stage != "teacher" and not settings.switch_frames:
        labels = {"y": "zeroed y", "clip": "zeroed CLIP", "text": "shuffled captions"}
        for broken, label in labels.items():
            if {"y": last.model.with_y, "clip": with_tokens, "text": True}[broken]:
                rows[f"{last.name}, {label}"] = broken_row(rows[last.name], broken)
    return rows


def _stored_settings(run: Path) -> EvaluationConfig:
    """The evaluation settings of the job that made the run, or the defaults."""
    for folder in (run, run.parent):
        job = folder / "job.yaml"
        if job.is_file():
            return EvaluationConfig.from_tree(yaml.safe_load(job.read_text()).get("evaluation") or {})
    return EvaluationConfig()


def _write(
    result: EvaluationReport, shown: Mapping[str, Videos], settings: EvaluationConfig, config: StageConfig, frames: int
) -> None:
    folder = result.folder
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{settings.num_worlds} held-out worlds, seed {settings.seed}, {frames} latent frames"
    if settings.switch_frames:
        head += f", other captions from latent frame {', '.join(map(str, settings.switch_frames))} on"
    (folder / "evaluation.md").write_text(f"{head}\n\n{result}\n")
    report.write_json(folder / "evaluation.json", {"settings": settings.model_dump(), "rows": result.summaries})
    report.write_curves(folder / "evaluation.png", result.summaries)
    if result.has_windows:
        report.write_window_curves(folder / "windows.png", result.summaries)
    report.write_png(folder / "contact_sheet.png", report.contact_sheet(shown))
    for name, videos in shown.items():
        samples = {f"{name.replace(', ', '_')}_{k}": video for k, video in enumerate(videos[:3])}
        report.write_samples(folder / "samples", samples, config.video.fps)
