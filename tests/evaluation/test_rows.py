"""Rows over held-out worlds: shared by ranks without a gap, broken in one condition at a time, written for people."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_ranks import on_ranks
from PIL import Image
from tiny_stage import make_encoders, make_model, save_student, stage_config
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.errors import CheckpointError, ConfigError
from longtake.evaluation import report
from longtake.evaluation.rows import (
    break_condition,
    broken_row,
    frozen,
    held_out,
    score_row,
    student_row,
    teacher_row,
    truth,
    vae_round_trip,
)
from longtake.evaluation.run import evaluate
from longtake.evaluation.target import of_models, trained_stages
from longtake.inference.export import export
from longtake.inference.video_io import read_video
from longtake.parallel.mesh import Mesh
from longtake.rollout.denoise import Denoiser
from longtake.toy.metrics import summarise
from longtake.toy.world import sample_world

SEED = 11


@pytest.fixture(scope="module")
def encoders():
    return make_encoders()


@pytest.fixture(scope="module")
def rules(workshop):
    return stage_config(workshop, Path("unused"), "causal").stream_plan


def worlds(encoders, mesh=None, *, num_worlds=3, batch_size=2, frames=3):
    return held_out(
        encoders, mesh or Mesh(), seed=SEED, num_worlds=num_worlds, num_latent_frames=frames, batch_size=batch_size
    )


def student(rules):
    return student_row(Denoiser(make_model().eval()), rules, seed=SEED)


def teacher(**options):
    options = {"num_steps": 2, "shift": 3.0, "guidance": 2.0, "first_frame_clean": False} | options
    return teacher_row(make_model().eval(), seed=SEED, **options)


# ---- worlds and ranks ------------------------------------------------------------------------------------------------
def test_one_rank_of_several_prints_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("longtake.evaluation.run.evaluate", lambda *_, **__: "the tables")
    for rank in range(2):
        monkeypatch.setattr("longtake.parallel.mesh.init_mesh", lambda _, rank=rank: Mesh(rank, 2))
        told = CliRunner().invoke(app, ["evaluate", "--run", str(tmp_path)])
        assert told.exit_code == 0 and told.output == "the tables\n" * (rank == 0)


def test_held_out_worlds_and_their_conditions(encoders):
    first, last = worlds(encoders)
    assert first.numbers == [0, 1] and last.numbers == [2] and first.counted == [True, True]
    assert [w.caption for w in first.worlds] == [sample_world(SEED, k).caption for k in (0, 1)]
    assert torch.equal(first.condition.text, encoders.text.encode([w.caption for w in first.worlds]))
    assert torch.equal(first.picture_latent, first.condition.frames[:, :1, 4:]) and first.size == (8, 8)
    assert first.num_frames == 9 and first.truth[1].shape == (9, 64, 64, 3)
    assert torch.equal(first.empty_text[1], encoders.text.encode([""])[0])


@pytest.mark.parametrize("num_worlds", [1, 3, 4])
def test_two_ranks_share_the_worlds_and_fill_up(encoders, num_worlds):
    """Every rank has as many batches (they call collectives together); what fills up is not counted."""
    ranks = on_ranks(lambda mesh: worlds(encoders, mesh, num_worlds=num_worlds, batch_size=1))
    assert len(ranks[0]) == len(ranks[1]) == (num_worlds + 1) // 2
    counted = [n for rank in ranks for b in rank for n, c in zip(b.numbers, b.counted, strict=True) if c]
    assert sorted(counted) == list(range(num_worlds))
    for rank in ranks:
        for batch in rank:
            assert [w.index for w in batch.worlds] == [n % num_worlds for n in batch.numbers]


def test_scores_do_not_depend_on_the_ranks(encoders, rules):
    """In order, on every rank, whatever the number of ranks and the batch size."""
    row = student(rules)

    def scores(mesh, batch_size):
        found, shown = score_row(row, worlds(encoders, mesh, batch_size=batch_size), mesh)
        return [summarise([one])["position_error_px"] for one in found], shown

    alone, shown = scores(Mesh(), 2)
    assert len(alone) == 3 and len(shown) == 2
    for found, _ in on_ranks(lambda mesh: scores(mesh, 1)):
        assert found == pytest.approx(alone, rel=1e-3)


def test_truth_is_perfect_and_a_frozen_frame_has_stopped(encoders):
    batches = worlds(encoders, frames=5)
    perfect = summarise(score_row(truth, batches, Mesh())[0])
    assert perfect["position_error_px"] < 0.1 and perfect["motion_ratio"] == pytest.approx(1, abs=0.05)
    still = summarise(score_row(frozen, batches, Mesh())[0])
    assert still["stop_rate"] == 1 and still["position_error_px"] > 3
    trip, shown = score_row(vae_round_trip, batches, Mesh())
    assert len(trip) == 3 and shown[0].shape == (17, 64, 64, 3) and shown[0].dtype == np.uint8


@pytest.mark.parametrize("make", [student, lambda rules: teacher()])
def test_rows_depend_on_the_world_and_the_seed_alone(encoders, rules, make):
    row = make(rules)
    together = row(worlds(encoders, num_worlds=2)[0])
    apart = [row(batch)[0] for batch in worlds(encoders, num_worlds=2, batch_size=1)]
    for a, b in zip(together, apart, strict=True):
        assert a.shape == (9, 64, 64, 3) and np.abs(a.astype(int) - b).max() <= 1


def test_teacher_of_the_ti2v_kind_keeps_the_picture(encoders):
    batch = worlds(encoders)[0]
    decoded = batch.decode(batch.picture_latent)
    for video, picture in zip(teacher(first_frame_clean=True)(batch), decoded, strict=True):
        assert np.abs(video[0].astype(int) - picture[0]).max() <= 1
    assert any(np.abs(v[0].astype(int) - p[0]).max() > 1 for v, p in zip(teacher()(batch), decoded, strict=True))


# ---- broken conditions (bar 3) ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [student, lambda rules: teacher()])
@pytest.mark.parametrize("broken", ["y", "clip", "text"])
def test_a_broken_condition_changes_every_video(encoders, rules, make, broken):
    row = make(rules)
    for batch in worlds(encoders):  # the last batch holds a single world: it gets another caption all the same
        for right, wrong in zip(row(batch), broken_row(row, broken)(batch), strict=True):
            assert not np.array_equal(right, wrong)


def test_what_is_broken_and_what_is_left(encoders):
    batch = worlds(encoders)[1]
    own = batch.condition
    y, clip, text = (break_condition(batch, name) for name in ("y", "clip", "text"))
    assert (y.frames == 0).all() and y.image is own.image and y.text is own.text
    assert (clip.image == 0).all() and clip.frames is own.frames and clip.text is own.text
    assert text.frames is own.frames and text.image is own.image
    assert torch.equal(text.text, encoders.text.encode([sample_world(SEED, 3).caption]))
    for name in ("image", "prompt", ""):
        with pytest.raises(ConfigError, match="no part"):
            break_condition(batch, name)


def test_shuffled_captions_do_not_depend_on_the_ranks(encoders):
    """The caption of the next world of the list, whoever evaluates it and in which batch."""
    texts = {b.numbers[k]: b.other_text[k] for b in worlds(encoders) for k in range(len(b.numbers))}
    for batches in on_ranks(lambda mesh: worlds(encoders, mesh, batch_size=1)):
        for batch in batches:
            if batch.counted[0]:
                torch.testing.assert_close(batch.other_text[0], texts[batch.numbers[0]])


# ---- the report ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(workshop, tmp_path_factory):
    logdir = tmp_path_factory.mktemp("log")
    save_student(stage_config(workshop, logdir, "causal"), seed=5)
    save_student(stage_config(workshop, logdir, "distill", init_from="causal"), seed=6)
    return logdir


@pytest.fixture(scope="module")
def written(run):
    return evaluate(run, device="cpu", overrides={"num_worlds": 2, "teacher_steps": 2})


def test_the_rows_of_a_log_folder(written):
    assert list(written.summaries) == [
        "truth",
        "vae round trip",
        "frozen",
        "teacher",
        "teacher, shuffled captions",
        "teacher, causal",
        "causal",
        "distill",
        "distill, zeroed y",
        "distill, zeroed CLIP",
        "distill, shuffled captions",
    ]
    assert written.summaries["truth"]["position_error_px"] < 0.1 < written.summaries["causal"]["position_error_px"]
    # Random weights draw no sprites, but no two rows may be the same videos (the frozen ones look like the truth).
    looks = [s["contrast"] for name, s in written.summaries.items() if name != "frozen"]
    assert len(set(looks)) == len(looks)


def test_table_json_curves_sheet_and_videos_are_written(run, written):
    table = str(written)
    lines, against = (part.splitlines() for part in table.split("\n\n"))
    assert len(lines) == 2 + len(written.summaries) and against[0].startswith("| row against row")
    assert len({len(line) for line in lines}) == 1
    assert lines[0].startswith("| row ") and "| motion |" in lines[0]
    text = (run / "evaluation.md").read_text()
    assert text.startswith("2 held-out worlds, seed 1000003, 5 latent frames") and table in text
    data = json.loads((run / "evaluation.json").read_text())
    assert data["settings"]["num_worlds"] == 2 and data["rows"].keys() == written.summaries.keys()
    assert data["rows"]["truth"]["motion_ratio"] == written.summaries["truth"]["motion_ratio"]
    assert Image.open(run / "evaluation.png").size[0] > 500
    # of both worlds: truth; teacher; its weights run causally; after causal; after distill
    width, height = Image.open(run / "contact_sheet.png").size
    assert width <= 1600 and 2 * 5 * (2 * 64 + 2) < height < 2 * 5 * (2 * 64 + 2) + 150
    names = {"truth", "teacher", "teacher_causal", "causal", "distill"}
    assert {path.name for path in (run / "samples").iterdir()} == {f"{n}_{k}.mp4" for n in names for k in range(2)}
    video, fps = read_video(run / "samples/distill_0.mp4")
    assert video.shape == (17, 64, 64, 3) and fps == 16
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.whole
def test_open_worlds_have_a_table_of_their_own(run, tmp_path):
    """The further worlds are the first open ones after the others; broken rows have none."""
    overrides = {"num_worlds": 1, "num_latent_frames": 3, "open_worlds": 3, "teacher_steps": 1}
    result = evaluate(run / "causal", device="cpu", output=tmp_path, overrides=overrides)
    truth, student = (result.summaries[name]["open_worlds"] for name in ("truth", "causal"))
    found = [k for k in range(1, 100) if any(s.is_open for s in sample_world(1_000_003, k).sprites)][:3]
    chosen = [s.direction for k in found for s in sample_world(1_000_003, k).sprites if s.is_open]
    bits = sum(chosen.count(way) / 3 * np.log2(3 / chosen.count(way)) for way in set(chosen))
    assert truth["num_open_worlds"] == student["num_open_worlds"] == 3 and truth["open_stop_rate"] == 0
    assert truth["open_entropy_bits"] == pytest.approx(bits)
    low, high = truth["open_entropy_ci95_bits"]
    assert 0 <= low <= bits <= high + 1e-9
    assert not any("open_worlds" in s for name, s in result.summaries.items() if "zeroed" in name or "shuffled" in name)
    tables = str(result).split("\n\n")
    assert len(tables) == 2 and "open stopped" in tables[1] and "zeroed" not in tables[1]


@pytest.mark.whole
def test_exported_students_are_measured_as_in_their_run(run, tmp_path, workshop):
    """`longtake export` and --model: the rows and numbers of --run, where the teacher is given."""
    config = stage_config(workshop, run, "causal")
    for folder, source in (("first", run / "causal"), ("second", run)):
        export(source, tmp_path / folder, dtype="float32")
        (tmp_path / folder / "encoders").symlink_to(config.encoders_folder)
    overrides = {"num_worlds": 2, "teacher_steps": 2}
    models = [tmp_path / "first", tmp_path / "second"]
    teacher = config.source(config.init_from)
    found = evaluate(of_models(models, teacher), device="cpu", output=tmp_path / "out", overrides=overrides)
    expected = evaluate(run, device="cpu", output=tmp_path / "again", overrides=overrides)
    names = [name.replace("distill", "second") if name != "causal" else "first" for name in expected.summaries]
    assert list(found.summaries) == names
    for name, summary in zip(names, expected.summaries.values(), strict=True):
        assert found.summaries[name]["contrast"] == pytest.approx(summary["contrast"], rel=1e-5)
    assert (tmp_path / "out/evaluation.md").is_file()


def test_models_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="another name"):
        of_models(["toy", "toy"])


@pytest.mark.whole
def test_one_stage_folder_longer_than_training_without_ablations(run, tmp_path):
    overrides = {"num_worlds": 1, "num_latent_frames": 7, "ablations": False}
    result = evaluate(run / "causal", device="cpu", output=tmp_path / "new", overrides=overrides)
    # a bidirectional teacher has its own length
    assert list(result.summaries) == ["truth", "vae round trip", "frozen", "teacher, causal", "causal"]
    assert len(result.summaries["causal"]["curves"]["motion_ratio"]) == 25
    assert (tmp_path / "new/evaluation.json").is_file()


def test_a_teacher_stage_is_measured_as_a_teacher(workshop, tmp_path):
    save_student(stage_config(workshop, tmp_path, "teacher"))
    overrides = {"num_worlds": 1, "num_latent_frames": 3, "teacher_steps": 1}
    result = evaluate(tmp_path / "teacher", device="cpu", overrides=overrides)
    assert list(result.summaries) == ["truth", "vae round trip", "frozen", "teacher"]


def test_settings_come_from_the_job_and_the_command_line_wins(run, tmp_path):
    from longtake.evaluation.run import _stored_settings

    (tmp_path / "job.yaml").write_text("evaluation: {num_worlds: 5, batch_size: 2}\n")
    (tmp_path / "causal").mkdir()
    for folder in (tmp_path, tmp_path / "causal"):
        assert _stored_settings(folder).num_worlds == 5
    assert _stored_settings(run).num_worlds == 32


@pytest.mark.parametrize("text", ["", "- a list", "evaluation: {num_worlds: 5"])
def test_a_damaged_job_file_is_refused_by_its_name(tmp_path, text):
    from longtake.evaluation.run import _stored_settings

    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        _stored_settings(tmp_path)


@pytest.mark.parametrize("folder", ["nothing", "."])
def test_folders_without_a_trained_stage_are_refused(tmp_path, folder):
    with pytest.raises(CheckpointError, match="holds no trained stage"):
        trained_stages(tmp_path / folder)


def test_a_text_to_video_run_is_refused(workshop, tmp_path):
    save_student(stage_config(workshop, tmp_path, "causal", model={"image_condition": "t2v"}))
    with pytest.raises(ConfigError, match="text-to-video"):
        evaluate(tmp_path, device="cpu")


def test_table_shows_what_is_not_scored_as_a_dash():
    summary = {key: None for _, key, _ in report.COLUMNS} | {"position_error_ci95_px": (None, None), "motion_ratio": 1}
    assert report.table({"row": summary}).splitlines()[2].count("| -") == len(report.COLUMNS) - 1
