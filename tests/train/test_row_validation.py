"""Validation of rows: never learnt from, made beside the teacher's, kept samples, errors that end nothing, its time."""

import io
import json

import numpy as np
import pytest
import torch
from encoded_files import from_cache, weights_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_stage import stage_config

from longtake.data.loader import Loader
from longtake.errors import CheckpointError
from longtake.evaluation.instruments import METRICS
from longtake.inference.video_io import read_video
from longtake.parallel.mesh import Mesh
from longtake.run_folder import latest_checkpoint
from longtake.train import row_validation
from longtake.train.metrics import read_rows
from longtake.train.row_validation import Budget
from longtake.train.stage import run_stage

ROWS = {"num_rows": 2, "times_longer": 2, "teacher_steps": 2}
SHORT = ROWS | {"times_longer": 1, "max_share": 1.0}  # no longer videos, where they would show the same once more


def config_of(workshop, logdir, whole, stage="distill", **changes):
    """A stage from the encoded set of six rows, of which the last one is kept (a quarter, at least one)."""
    changes = {"validate_every": 2, "max_steps": 4, "validation": ROWS | {"max_share": 1.0}} | changes
    return from_cache(workshop, logdir, whole, stage, **changes)


def rows_of(config):
    """Iterations and validations, without what depends on the clock."""
    rows = read_rows(config.folder / "metrics.jsonl")
    rows = [{k: v for k, v in row.items() if "seconds" not in k and not k.startswith("speed")} for row in rows]
    return [r for r in rows if "exit_step" in r or "generator_loss" in r], [r for r in rows if "validation/errors" in r]


@pytest.mark.whole
def test_it_leaves_numbers_videos_sheet_and_curves(workshop, whole, tmp_path):
    config = config_of(workshop, tmp_path / "run", whole)
    run_stage(config, Mesh())
    iterations, validations = rows_of(config)
    assert [row["step"] for row in iterations] == [0, 1, 2, 3] and [row["step"] for row in validations] == [0, 2, 4]
    for row in validations:
        assert {f"validation/{start}{name}" for start in ("", "teacher_", "long_") for name in METRICS} <= row.keys()
        assert row["validation/errors"] == 0 and row["validation/distance_to_teacher"] > 0
        ratio = row["validation/motion_px_s"] / row["validation/teacher_motion_px_s"]
        assert row["validation/motion_vs_teacher"] == pytest.approx(ratio)
        assert row["validation/long_motion_vs_teacher"] > 0 and "validation/motion_ratio" not in row
    assert validations[0]["validation/motion_vs_teacher"] != validations[-1]["validation/motion_vs_teacher"]
    samples = {path.name for path in (config.folder / "samples").iterdir()}
    assert {"teacher_row5.mp4", "step_000004_row5.mp4", "step_000002_row5_long.mp4"} <= samples
    assert len(read_video(config.folder / "samples/step_000004_row5.mp4")[0]) == 17
    assert len(read_video(config.folder / "samples/step_000004_row5_long.mp4")[0]) == 33
    sheet = np.asarray(Image.open(config.folder / "contact_sheet.png"))
    assert sheet.shape[0] > 3 * 128 and sheet.std() > 10 and (config.folder / "validation.png").stat().st_size > 10_000
    board = EventAccumulator(str(config.folder), size_guidance={"images": 0})
    board.Reload()
    for name in ("contact_sheet", "validation"):
        shown = board.Images(name)
        assert [image.step for image in shown] == [0, 2, 4] and shown[-1].width <= 1600
        picture = np.asarray(Image.open(io.BytesIO(shown[-1].encoded_image_string)))
        assert np.array_equal(picture, np.asarray(Image.open(config.folder / f"{name}.png")))


@pytest.mark.whole
def test_rows_that_are_validated_are_never_learnt_from(workshop, whole, tmp_path, monkeypatch):
    read, exact = [], Loader.read

    def noted(self, row, check=None):
        found = exact(self, row, check)
        read.append(found[0])
        return found

    monkeypatch.setattr(Loader, "read", noted)
    config = config_of(workshop, tmp_path / "run", whole, validation=SHORT)
    run_stage(config, Mesh())
    assert set(read) == {0, 1, 2, 3, 4}
    manifest = json.loads((latest_checkpoint(config.folder / "checkpoints") / "manifest.json").read_text())
    assert manifest["rows"].endswith(", the first 5")
    with pytest.raises(CheckpointError, match="the first 5.*validation.num_rows its value"):
        run_stage(
            config_of(workshop, tmp_path / "run", whole, max_steps=5, validate_every=0, validation={"num_rows": 0}),
            Mesh(),
        )


@pytest.mark.whole
@pytest.mark.parametrize("rows", ["kept", pytest.param("other", marks=pytest.mark.slow)])
def test_validating_changes_no_number_of_the_training(workshop, whole, tmp_path, rows):
    """Nor do rows of another set, which leave all rows to the training, as before there was validation."""
    changes = {"max_steps": 2, "validation": SHORT}
    off = {"validate_every": 0}
    if rows == "other":
        changes["validation"] = SHORT | {"data": str(workshop / "data/images")}
        off["validation"] = {"num_rows": 0}
    with_it = config_of(workshop, tmp_path / "with", whole, **changes)
    without = config_of(workshop, tmp_path / "without", whole, **changes | off)
    for config in (with_it, without):
        run_stage(config, Mesh())
    assert rows_of(with_it)[0] == rows_of(without)[0] and rows_of(with_it)[1] and not rows_of(without)[1]
    a, b = weights_of(with_it), weights_of(without)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.whole
def test_resumed_equals_uninterrupted(workshop, whole, tmp_path):
    changes = {"max_steps": 3, "validate_every": 2, "save_every": 1, "validation": SHORT}
    uninterrupted = config_of(workshop, tmp_path / "a", whole, **changes)
    run_stage(uninterrupted, Mesh())
    resumed = config_of(workshop, tmp_path / "b", whole, **changes)
    run_stage(resumed.model_copy(update={"max_steps": 2}), Mesh())
    run_stage(resumed, Mesh())
    assert rows_of(uninterrupted) == rows_of(resumed)


@pytest.mark.whole
def test_the_teachers_samples_are_made_once_for_all_runs(workshop, whole, tmp_path, monkeypatch):
    first = config_of(workshop, tmp_path / "a", whole, max_steps=1, validation=SHORT)
    run_stage(first, Mesh())
    assert len(list((tmp_path / "teacher_samples").iterdir())) == 1

    def sampled_again(*_, **__):
        raise AssertionError("the teacher is sampled again")

    with monkeypatch.context() as patch:
        patch.setattr("longtake.evaluation.row_videos.teacher_latents", sampled_again)
        second = config_of(workshop, tmp_path / "b", whole, max_steps=1, validation=SHORT)
        run_stage(second, Mesh())
    assert rows_of(second) == rows_of(first) and rows_of(first)[1][0]["validation/errors"] == 0
    for name, changes in (("x", {"seed": 5}), ("y", {"teacher_steps": 3})):  # other noise, other sampling: other files
        config = config_of(workshop, tmp_path / "c", whole, name=name, max_steps=1, validation=SHORT | changes)
        run_stage(config, Mesh())
    assert len(list((tmp_path / "teacher_samples").iterdir())) == 3


@pytest.mark.whole
def test_an_error_is_counted_and_ends_nothing(workshop, whole, tmp_path, monkeypatch, caplog):
    config = config_of(workshop, tmp_path / "sound", whole, max_steps=4, validate_every=0, validation=SHORT)
    run_stage(config, Mesh())
    exact, calls = row_validation.look, []

    def out_of_memory(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:  # the student's video at the second validation; the teacher's comes first
            raise torch.OutOfMemoryError("CUDA out of memory (a test)")
        return exact(*arguments, **options)

    monkeypatch.setattr(row_validation, "look", out_of_memory)
    failing = config_of(workshop, tmp_path / "failing", whole, max_steps=4, validation=SHORT)
    run_stage(failing, Mesh())
    iterations, validations = rows_of(failing)
    assert iterations == rows_of(config)[0]
    assert [row["validation/errors"] for row in validations] == [0, 1, 1]
    assert ["validation/motion_px_s" in row for row in validations] == [True, False, True]
    assert "VALIDATION FAILED (step 2, error 1 of this run): OutOfMemoryError" in caplog.text


@pytest.mark.whole
def test_a_set_of_one_row_trains_without_validation(workshop, tmp_path, caplog):
    folder = tmp_path / "one"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "a.png")
    (folder / "a.txt").write_text("a red circle drifts to the right")
    config = stage_config(workshop, tmp_path / "run", "distill", data={"path": str(folder), "num_workers": 0},
                          max_steps=1, validate_every=1, validation=ROWS)  # fmt: skip
    run_stage(config, Mesh())
    assert "NO VALIDATION" in caplog.text and not rows_of(config)[1]


@pytest.mark.whole
@pytest.mark.parametrize(("times_longer", "expected"), [(2, [None, 3]), pytest.param(3, [5], marks=pytest.mark.slow)])
def test_pictures_with_second_prompts_switch_in_mid_stream(workshop, tmp_path, monkeypatch, times_longer, expected):
    """From the encoders themselves, which may go once the rows are encoded. The clip of 5 latent frames is the beginning
    of the longer video, unless that switches earlier.
    """
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(5):
        pixels = np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text("a red circle drifts to the right\na red circle drifts to the left")
    switches, exact = [], row_validation.student_maker

    def noted(*arguments, switch_frame=None, **options):
        switches.append(switch_frame)
        return exact(*arguments, switch_frame=switch_frame, **options)

    monkeypatch.setattr(row_validation, "student_maker", noted)
    data = {"path": str(folder), "num_workers": 0}
    config = stage_config(
        workshop,
        tmp_path / "run",
        "distill",
        data=data,
        max_steps=4,
        validate_every=4,
        validation=ROWS | {"times_longer": times_longer},
    )
    run_stage(config, Mesh())
    assert switches == 2 * expected and len(rows_of(config)[1]) == 2


def test_there_is_time_for_a_share_of_the_training_alone():
    now = [0.0]
    budget = Budget(0.1, Mesh(), lambda: now[0])
    with budget.counted():
        now[0] += 8  # the first, with the teacher's samples
    made = []
    for step in range(1, 1000):
        now[0] += 1
        if budget.allows():
            made.append(step)
            with budget.counted():
                now[0] += 2
    with budget.counted():
        now[0] += 2
    spent = 8 + 2 * len(made) + 2
    assert len(made) > 30 and spent <= 0.1 * now[0]
