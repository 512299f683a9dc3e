"""The evaluation of long videos and of captions that change: rows, tables, files, and processes that measure."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_stage import make_encoders, make_model, save_student, stage_config

from longtake.errors import ConfigError
from longtake.evaluation import report
from longtake.evaluation import rows as rows_module
from longtake.evaluation.rows import frozen, held_out, score_row, scorer_processes, student_row, truth
from longtake.evaluation.run import evaluate
from longtake.parallel.mesh import Mesh
from longtake.rollout.denoise import Denoiser
from longtake.toy.metrics import summarise
from longtake.toy.story import sample_story
from longtake.toy.windows import WindowRule

SEED = 11
RULE = WindowRule(17, 16)


@pytest.fixture(scope="module")
def encoders():
    return make_encoders()


@pytest.fixture(scope="module")
def run(workshop, tmp_path_factory):
    logdir = tmp_path_factory.mktemp("log")
    save_student(stage_config(workshop, logdir, "causal"), seed=5)
    return logdir


def stories(encoders, frames=11, switch=(5,)):
    return held_out(
        encoders, Mesh(), seed=SEED, num_worlds=3, num_latent_frames=frames, batch_size=2, switch_frames=switch
    )


def test_held_out_stories_change_with_the_first_frame_of_the_block(encoders):
    first, last = stories(encoders)
    assert [len(batch.later) for batch in (first, last)] == [1, 1] and first.switch_frames == (5,)
    expected = [sample_story(SEED, index, [17]) for index in (0, 1)]
    assert [w.switches for w in first.worlds] == [w.switches for w in expected]
    captions = [w.switches[0].caption for w in expected]
    assert torch.equal(first.later[0].text, encoders.text.encode(captions))
    assert first.later[0].frames is first.condition.frames and first.later[0].image is first.condition.image
    assert not torch.equal(first.later[0].text, first.condition.text)
    assert np.array_equal(first.truth[1], expected[1].render(41))


def test_truth_follows_and_a_frozen_picture_does_not(encoders):
    batches = stories(encoders, frames=15)
    for row, share in ((truth, 1), (frozen, 0)):
        found = summarise(score_row(row, batches, Mesh(), rule=RULE)[0])["windows"]
        assert found["follow_share"] == share and found["num_followers"] > 2
        assert found["motion_ratio"] == pytest.approx([share] * 3, abs=0.05)


def test_the_student_changes_its_mind_at_the_switch(workshop, encoders):
    batch = stories(encoders)[0]
    rules = stage_config(workshop, Path("unused"), "causal").stream_plan
    model = make_model().eval()
    rebuilt, swapped = (
        student_row(Denoiser(model), rules.but(recache=law), seed=SEED)(batch) for law in ("rebuild", "none")
    )
    plain = student_row(Denoiser(model), rules, seed=SEED)(stories(encoders, switch=())[0])
    for video, other in ((rebuilt, plain), (swapped, plain), (rebuilt, swapped)):
        assert np.array_equal(video[0][:17], other[0][:17]) and not np.array_equal(video[0][17:], other[0][17:])


def test_scorers_give_the_same_scores(encoders):
    batches = stories(encoders)
    alone = score_row(truth, batches, Mesh(), rule=RULE)[0]
    with ThreadPoolExecutor(2) as scorers:
        shared = score_row(truth, batches, Mesh(), rule=RULE, scorers=scorers)[0]
    assert summarise(shared) == summarise(alone)


def test_processes_measure_where_it_pays(encoders, monkeypatch):
    with scorer_processes(1000, Mesh()) as scorers:
        assert scorers is None
    with scorer_processes(10**9, Mesh(0, 1024)) as scorers:
        assert scorers is None, "other ranks use the processors"
    monkeypatch.setattr(rows_module, "num_cores", lambda: 2)
    batches = stories(encoders)
    with scorer_processes(10**9, Mesh()) as scorers:
        shared = score_row(truth, batches, Mesh(), rule=RULE, scorers=scorers)[0]
    assert summarise(shared) == summarise(score_row(truth, batches, Mesh(), rule=RULE)[0])


@pytest.mark.whole
def test_a_run_with_switches_has_rows_with_and_without_the_rebuild(run, tmp_path, caplog):
    overrides = {"num_worlds": 2, "num_latent_frames": 15, "switch_frames": [5]}
    with caplog.at_level(logging.INFO, logger="longtake"):
        result = evaluate(run, device="cpu", output=tmp_path, overrides=overrides)
    assert list(result.summaries) == [
        "truth", "vae round trip", "frozen", "teacher, causal", "causal", "causal, last window", "causal, no rebuild",
    ]  # fmt: skip
    assert "cannot change its caption" in caplog.text
    first, second, last, after, pairs = str(result).split("\n\n")
    assert last.startswith("| last 4 windows ") and after.startswith("| after a switch ")
    cells = next(line for line in after.splitlines() if line.startswith("| truth ")).split("|")[2:-1]
    assert [cell.strip() for cell in cells[1:]] == ["100.0% (100.0% to 100.0%)"] * 4 and int(cells[0]) > 1
    assert [line.split("|")[1].strip() for line in pairs.splitlines()[2:]] == [
        "causal, last window against causal", "causal, no rebuild against causal",
    ]  # fmt: skip
    assert first.startswith("| row ") and second.startswith("| row ") and " follow " in second.splitlines()[0]
    truth_line = next(line for line in second.splitlines() if line.startswith("| truth "))
    assert truth_line.split("|")[2].strip() == "3" and "100.0%" in truth_line.split("|")[-3]
    text = (tmp_path / "evaluation.md").read_text()
    assert "other captions from latent frame 5 on" in text.splitlines()[0] and second in text
    data = json.loads((tmp_path / "evaluation.json").read_text())
    assert data["rows"]["causal, no rebuild"]["windows"].keys() == data["rows"]["truth"]["windows"].keys()
    assert data["rows"]["causal, no rebuild"] != data["rows"]["causal"] and data["settings"]["switch_frames"] == [5]
    assert Image.open(tmp_path / "windows.png").size[0] > 500


@pytest.mark.whole
def test_windows_without_switches_only_where_videos_are_longer_than_training(run, tmp_path):
    overrides = {"num_worlds": 1, "num_latent_frames": 9, "ablations": False}
    result = evaluate(run, device="cpu", output=tmp_path / "long", overrides=overrides)
    assert len(result.summaries["truth"]["windows"]["count_kept"]) == 2
    assert " follow " not in str(result) and (tmp_path / "long/windows.png").is_file()
    overrides["num_latent_frames"] = 5
    tables = str(result).split("\n\n")
    assert len(tables) == 3 and " saturation " in tables[2] and "to " in tables[2].splitlines()[-1]
    result = evaluate(run, device="cpu", output=tmp_path / "short", overrides=overrides | {"teacher_steps": 1})
    assert not result.has_windows and not (tmp_path / "short/windows.png").exists()


@pytest.mark.parametrize(
    ("frames", "message"), [([4], "nearest are 3 and 5"), ([0], "nearest are 1 and 3"), ([15], "set it higher")]
)
def test_switches_elsewhere_are_refused(run, frames, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(run, device="cpu", overrides={"num_latent_frames": 15, "switch_frames": frames})


def test_a_teacher_stage_cannot_switch(workshop, tmp_path):
    save_student(stage_config(workshop, tmp_path, "teacher"))
    with pytest.raises(ConfigError, match="half-way"):
        evaluate(tmp_path / "teacher", device="cpu", overrides={"num_latent_frames": 15, "switch_frames": [5]})


def test_the_window_table_shows_the_worst_window():
    values = {"motion_ratio": [1.0, None, 0.5], "saturation": [1.0, 1.1, 0.8], "contrast": [None], "shape_kept": [1.0]}
    windows = {**values, "colour_kept": [], "count_kept": [1.0] * 3, "follow_shares": [], "follow_share": None}
    cells = report.window_table({"row": {"windows": windows}}).splitlines()[2].split("|")[1:-1]
    assert [cell.strip() for cell in cells] == [
        "row", "3", "1.00", "0.50", "0.50", "1.00", "100.0%", "-", "100.0%", "0.800", "-",
    ]  # fmt: skip
