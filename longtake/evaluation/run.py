"""`longtake evaluate`: every row of a run over the same held-out worlds and seeds; table, JSON, curves, sheet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from longtake.condition import pixel_frames
from longtake.config.base import read_yaml
from longtake.config.groups import EvaluationConfig
from longtake.encoders.bundle import Encoders
from longtake.errors import ConfigError
from longtake.evaluation import paired, pictures, report, rows
from longtake.evaluation.target import EvalTarget, load_denoiser, of_run
from longtake.inference.source import Source
from longtake.outputs import check_output_folder, write_whole
from longtake.parallel.mesh import Mesh, init_mesh
from longtake.progress import track
from longtake.rollout.denoise import Denoiser
from longtake.toy.metrics import WorldScores, summarise
from longtake.toy.windows import WindowRule
from longtake.toy.world import sample_world

# Drawn before the students: the story of a run.
_DRAWN_ROWS = ("truth", "teacher", "teacher, causal")
_SHEET_VIDEOS = 3
_ON_A_GPU = 32  # worlds at once, at least: it waits for Python as long for one as for so many
# What a row is called whose condition lacks a part
_BROKEN = {"y": "zeroed y", "clip": "zeroed CLIP", "text": "shuffled captions"}
# What a row is called whose cache is made anew by another law than the student's own
_LAWS = {"rebuild": "rebuild", "last_window": "last window", "none": "no rebuild"}

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationReport:
    """Summaries by row name, and the folder they were written to; prints as the tables."""

    summaries: dict[str, dict[str, Any]]
    folder: Path

    def __str__(self) -> str:
        tables = [report.table(self.summaries)]
        if any("open_worlds" in summary for summary in self.summaries.values()):
            tables.append(report.open_table(self.summaries))
        if self.has_windows:
            tables += [report.window_table(self.summaries), paired.last_table(self.summaries)]
        if all("follow" in summary["intervals"] for summary in self.summaries.values()):
            tables.append(paired.switch_table(self.summaries))
        return "\n\n".join(filter(None, [*tables, paired.pairs_table(self.summaries)]))

    @property
    def has_windows(self) -> bool:
        """Whether the videos were also scored window by window."""
        return all("windows" in summary for summary in self.summaries.values())


def evaluate(
    target: str | Path | EvalTarget,
    *,
    overrides: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    device: str | None = None,
    mesh: Mesh | None = None,
    settings: EvaluationConfig | None = None,
) -> EvaluationReport:
    """Measures a log folder (all its stages), one stage folder or exported students (`of_models`).

    The report is written to `output`, by default to the run. `settings` are those of the job that made the run, by
    default; `overrides` win over them.
    Rows: truth, VAE round trip, frozen first frame, teacher, the teacher's weights streamed causally in the student's
    steps, each trained stage, and the last stage with one condition taken away. Videos longer than the training clips,
    and those with switches, are also scored window by window; with switches each stage has a row for each other law by
    which its cache can be made anew, and there is none of a bidirectional teacher. Rows are compared in the same
    worlds: later stages with the first, other laws with the stage's own, all windows with those of the VAE round trip.
    With `open_worlds` all rows but the broken ones also make that many further worlds of which the captions leave a
    motion open. All ranks call it.
    Raises: CheckpointError when nothing there was trained; ConfigError for text-to-video models, and for switches that
    are no block boundary of every stage.
    """
    run = None if isinstance(target, EvalTarget) else Path(target)
    settings = settings or _stored_settings(run)
    settings = EvaluationConfig.from_tree({**settings.model_dump(), **(overrides or {})})
    folder = output or run
    if folder is None:
        raise ConfigError("exported students have no folder of their own; give `output`, the folder of the report")
    measured = target if isinstance(target, EvalTarget) else of_run(Path(target))
    measured.check_worlds()
    for name, config in ((name, source.config) for name, source in measured.students.items()):
        if config is not None and config.keep_best and config.validation.seed == settings.seed:
            logger.warning("seed %d chose the best checkpoint of %s; report another one", settings.seed, name)
    return _measure(measured, settings, Path(folder), mesh or init_mesh(device))


def _measure(target: EvalTarget, settings: EvaluationConfig, folder: Path, mesh: Mesh) -> EvaluationReport:
    """Makes and scores the videos of every row, and writes the report to `folder`."""
    mesh.on_main(lambda: check_output_folder(folder))
    trained = target.result.settings.num_latent_frames
    frames = settings.num_latent_frames or trained
    _check_switches(settings.switch_frames, frames, target.students)
    encoders = target.load_encoders(mesh.device)
    table = _rows(target, settings, frames, mesh)
    at_once = max(settings.batch_size, _ON_A_GPU if mesh.device.type == "cuda" else 1)
    shared: dict[str, Any] = {"seed": settings.seed, "num_latent_frames": frames, "batch_size": at_once}
    worlds = partial(rows.held_out, encoders, mesh, with_y=target.with_y, **shared)
    batches = worlds(num_worlds=settings.num_worlds, switch_frames=settings.switch_frames)
    rule = _window_rule(target, encoders) if frames > trained or settings.switch_frames else None
    summaries: dict[str, dict[str, Any]] = {}
    numbers: dict[str, dict[str, paired.Share]] = {}
    shown: dict[str, rows.Videos] = {}
    total = len(table) * len(batches) * at_once * batches[0].num_frames
    with rows.scorer_processes(total, mesh) as scorers:
        told = track(table.items(), "rows of the table", "rows", len(table)) if mesh.is_main else table.items()
        for name, scores, shown[name] in _scored(told, batches, mesh, rule, scorers):
            summaries[name], numbers[name] = summarise(scores), paired.shares(scores)
        if settings.open_worlds:
            further = worlds(num_worlds=settings.open_worlds, only=_open_worlds(settings))
            whole = ((name, row) for name, row in table.items() if not _is_broken(name))
            for name, scores, _ in _scored(whole, further, mesh, None, scorers):
                found = summarise(scores)
                summaries[name]["open_worlds"] = {key: value for key, value in found.items() if key != "curves"}
    for name, summary in summaries.items():
        others = _compared_with(name, list(target.students), with_windows=rule is not None)
        summary["intervals"] = paired.intervals(numbers[name])
        summary["compared"] = {other: paired.compared(numbers[name], numbers[other]) for other in others}
    result = EvaluationReport(summaries, folder)
    drawn = {name: shown[name] for name in (*_DRAWN_ROWS, *target.students) if name in shown}
    captions = [rows.caption(world) for world in batches[0].worlds]
    mesh.on_main(lambda: _write(result, drawn, captions, settings, target.result.settings.fps, frames))
    return result


def _scored(
    table: Iterable[tuple[str, rows.Row]],
    batches: Sequence[rows.WorldBatch],
    mesh: Mesh,
    rule: WindowRule | None,
    scorers: Executor | None,
) -> Iterator[tuple[str, list[WorldScores], rows.Videos]]:
    """The rows with their scores and first videos; each is measured while the next one is made."""
    before: tuple[str, rows.Scoring, rows.Videos] | None = None
    for name, row in table:
        made = (name, *_on_each(mesh, partial(rows.begin_row, row, batches, rule=rule, scorers=scorers)))
        if before is not None:
            yield before[0], rows.row_scores(before[1], mesh), before[2]
        before = made
    if before is not None:
        yield before[0], rows.row_scores(before[1], mesh), before[2]


def _on_each(mesh: Mesh, work: Callable[[], T]) -> T:
    """What `work` returned on this rank. Raises: on every rank, where it failed on one, for which they would wait."""
    mine: list[T] = []
    mesh.every(lambda: mine.append(work()))
    return mine[0]


def _open_worlds(settings: EvaluationConfig) -> list[int]:
    """The first worlds after the held-out ones whose captions leave a motion open."""
    further = count(settings.num_worlds)
    is_open = (k for k in further if any(sprite.is_open for sprite in sample_world(settings.seed, k).sprites))
    return list(islice(is_open, settings.open_worlds))


def _is_broken(row: str) -> bool:
    return row.endswith((*_BROKEN.values(), *(f", {law}" for law in _LAWS.values())))


def _compared_with(row: str, students: list[str], *, with_windows: bool) -> list[str]:
    """The rows beside which a row is seen in the same worlds."""
    others = [paired.ROUND_TRIP] if with_windows and row != paired.ROUND_TRIP else []
    if row in students[1:]:
        return [*others, students[0]]
    return [*others, *(name for name in students for law in _LAWS.values() if row == f"{name}, {law}")]


def _window_rule(target: EvalTarget, encoders: Encoders) -> WindowRule:
    """Windows of the training clips' length; a new caption must be followed from two blocks after the switch on."""
    stride, plan = encoders.vae.temporal_stride, target.result.plan
    settle = 2 * plan.block_frames * stride if plan else 0
    return WindowRule(pixel_frames(target.result.settings.num_latent_frames, stride), settle)


def _check_switches(switch_frames: list[int], frames: int, students: Mapping[str, Source]) -> None:
    for name, student in students.items() if switch_frames else ():
        if (plan := student.plan) is None:
            raise ConfigError(f"stage {name} is a bidirectional teacher, which cannot change its caption half-way")
        for frame in switch_frames:
            if frame < 1 or not plan.is_boundary(frame):
                start, end = plan.block_of(max(frame, 1))
                raise ConfigError(
                    f"switch_frames={switch_frames}: {frame} is no latent frame after the first at which a block of "
                    f"stage {name} begins; the nearest are {start} and {end}"
                )
    if any(frame >= frames for frame in switch_frames):
        raise ConfigError(
            f"switch_frames={switch_frames} must lie inside the video; num_latent_frames is {frames}, set it higher"
        )


def _rows(target: EvalTarget, settings: EvaluationConfig, frames: int, mesh: Mesh) -> dict[str, rows.Row]:
    result, seed, switched = target.result, settings.seed, bool(settings.switch_frames)
    table: dict[str, rows.Row] = {"truth": rows.truth, "vae round trip": rows.vae_round_trip, "frozen": rows.frozen}
    bidirectional = partial(
        rows.teacher_row,
        seed=seed,
        num_steps=settings.teacher_steps,
        shift=result.settings.shift,
        guidance=settings.teacher_guidance,
        first_frame_clean=not target.with_y,
    )
    if target.teacher is not None:
        teacher = target.teacher(mesh.device)
        if switched:
            logger.info("No row of the bidirectional teacher: it cannot change its caption half-way")
        elif frames == result.settings.num_latent_frames:
            table["teacher"] = bidirectional(teacher)
            table[f"teacher, {_BROKEN['text']}"] = rows.broken_row(table["teacher"], "text")
        else:
            logger.warning("No row of the bidirectional teacher: %d frames are not its training length", frames)
        if result.plan is not None:
            table["teacher, causal"] = rows.student_row(Denoiser(teacher), result.plan, seed=seed)
    for name, student in target.students.items():
        denoiser = load_denoiser(student, mesh.device)
        if student.plan is None:
            table[name] = bidirectional(denoiser.model)
            continue
        table[name] = rows.student_row(denoiser, student.plan, seed=seed)
        for law in (law for law in _LAWS if switched and law != student.plan.recache):
            # LongLive's law leaves the sink as it was.
            sink = student.plan.keep_sink or (law == "last_window" and student.plan.sink_frames > 0)
            other = student.plan.but(recache=law, keep_sink=sink)
            table[f"{name}, {_LAWS[law]}"] = rows.student_row(denoiser, other, seed=seed)
    if settings.ablations and result.plan is not None and not switched:
        present = {"y": target.with_y, "clip": target.sizes.image_dim is not None, "text": True}
        for broken in (part for part in _BROKEN if present[part]):
            table[f"{target.name}, {_BROKEN[broken]}"] = rows.broken_row(table[target.name], broken)
    return table


def _stored_settings(run: Path | None) -> EvaluationConfig:
    """The evaluation settings of the job that made the run, or the defaults."""
    for folder in () if run is None else (run, run.parent):
        job = folder / "job.yaml"
        if job.is_file():
            return EvaluationConfig.from_tree(read_yaml(job).get("evaluation") or {})
    return EvaluationConfig()


def _write(
    result: EvaluationReport,
    drawn: Mapping[str, rows.Videos],
    captions: Sequence[str],
    settings: EvaluationConfig,
    fps: int,
    frames: int,
) -> None:
    """The report in its folder; sheet, curves and videos are of the rows `drawn`."""
    folder = result.folder
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{settings.num_worlds} held-out worlds, seed {settings.seed}, {frames} latent frames"
    if settings.switch_frames:
        head += f", other captions from latent frame {', '.join(map(str, settings.switch_frames))} on"
    write_whole(folder / "evaluation.md", f"{head}\n\n{result}\n")
    report.write_json(folder / "evaluation.json", {"settings": settings.model_dump(), "rows": result.summaries})
    summaries = {name: result.summaries[name] for name in drawn}
    pictures.write_png(folder / "evaluation.png", pictures.curves(summaries))
    if result.has_windows:
        pictures.write_png(folder / "windows.png", pictures.curves(summaries, "windows"))
    sheet = pictures.contact_sheet(pictures.scenes(drawn, captions[:_SHEET_VIDEOS]))
    pictures.write_png(folder / "contact_sheet.png", sheet)
    for name, videos in drawn.items():
        samples = {f"{name.replace(', ', '_')}_{k}": video for k, video in enumerate(videos[:_SHEET_VIDEOS])}
        report.write_samples(folder / "samples", samples, fps)
