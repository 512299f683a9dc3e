"""An exported folder by itself: its encoders are found again, its card says what it is, one command plays it."""

import json
import shutil

import pytest
import yaml
from PIL import Image
from tiny_sessions import PICTURE, A
from tiny_stage import TEACHER, make_model, save_student, stage_config
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.generation import read_rules
from longtake.config.stage import TOY_ASSETS
from longtake.errors import CheckpointError
from longtake.inference.export import export
from longtake.inference.generator import Source
from longtake.weights.load import save_dit


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def run(workshop, tmp_path):
    """A log folder with two stages and their numbers."""
    save_student(stage_config(workshop, tmp_path / "run", "causal"), step=2)
    config = stage_config(workshop, tmp_path / "run", "distill", init_from="causal")
    save_student(config, step=20)
    rows = [{"step": step, "generator_loss": float(step), "critic_loss": None} for step in range(20)]
    rows.insert(10, {"step": 10, "validation/motion_ratio": 0.5, "validation/teacher_motion_ratio": 1.0})
    rows.append({"step": 20, "validation/motion_ratio": 0.97, "validation/teacher_motion_ratio": 1.0})
    rows.append({"step": 25, "generator_loss": 1e9})  # of a run that went on
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "distill" / "metrics.jsonl").write_text(text + '{"step": 26, "gen')
    return tmp_path / "run"


def test_the_command_of_the_card_plays_the_folder(run, tmp_path, monkeypatch):
    result = invoke("export", run, tmp_path / "shared" / "student")
    assert result.exit_code == 1  # its folder does not exist
    (tmp_path / "shared").mkdir()
    assert invoke("export", run, tmp_path / "shared" / "student").exit_code == 0
    monkeypatch.chdir(tmp_path / "shared")
    Image.fromarray(PICTURE).save("photo.jpg")
    card = (tmp_path / "shared" / "student" / "README.md").read_text()
    (command,) = [line for line in card.splitlines() if line.startswith("longtake generate")]
    words = command.replace('"what happens"', "WHAT").replace("--seconds 10", "--frames 9").split()[1:]
    result = invoke(*(A if word == "WHAT" else word for word in words), "--device", "cpu")
    assert result.exit_code == 0 and (tmp_path / "shared" / "out.mp4").is_file(), result.output


def test_the_card_says_rules_data_losses(run, workshop, tmp_path):
    folder = export(run, tmp_path / "student")
    card = (folder / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "image-to-video"
    rules = read_rules(folder)
    for said in (
        f"Pictures of {rules.height}x{rules.width}, {rules.fps} frames a second; blocks of {rules.plan.block_frames}, "
        f"window {rules.plan.window_frames}",
        "### causal",
        "- 2 iterations of",
        "### distill",
        "- objective: dmd; begins with causal; teacher: ",
        f"in `{workshop}/data",
        "- 20 iterations of",
        "- validation/motion_ratio: 0.97",
        "- generator_loss, mean of the last 10 % of iterations: 18.5",
        "- validation/motion_ratio: 0.97",
        "the licence",
    ):
        assert said in text, said
    assert text.index("### causal") < text.index("### distill") and "teacher_motion" not in text


def test_the_place_of_the_encoders_stays_what_it_means(run, workshop, tmp_path):
    toy = stage_config(workshop, tmp_path / "toy", "causal", encoders="toy")
    save_student(toy)
    folder = export(tmp_path / "toy", tmp_path / "of_toy")
    assert read_rules(folder).encoders == "toy" and Source.of_model(folder).encoders == TOY_ASSETS
    save_student(stage_config(workshop, tmp_path / "hub", "causal", encoders="Wan-AI/Wan2.1-T2V-1.3B"))
    folder = export(tmp_path / "hub", tmp_path / "of_hub")
    assert str(Source.of_model(folder).encoders) == "Wan-AI/Wan2.1-T2V-1.3B"


def test_a_folder_that_moved_finds_encoders_in_it_or_says_which_are_gone(run, workshop, tmp_path):
    folder = export(run, tmp_path / "student", changes={"encoders": str(tmp_path / "own")})
    (tmp_path / "own").mkdir()
    assert Source.of_model(folder).encoders == tmp_path / "own"
    (tmp_path / "own").rmdir()
    said = f"encoders={tmp_path}/own, as the generation.yaml of .*student says, do not exist here, and no encoders were"
    with pytest.raises(CheckpointError, match=said):
        Source.of_model(folder)
    assert Source.of_model(folder, "toy").encoders == TOY_ASSETS
    shutil.copytree(workshop / "encoders", folder, dirs_exist_ok=True)
    assert Source.of_model(folder).encoders == folder


def test_the_encoders_of_a_stage_stand_in_where_none_lie_with_the_weights(workshop, tmp_path):
    save_dit(TEACHER, make_model().state_dict(), tmp_path / "bare")
    stage = stage_config(workshop, tmp_path, "causal")
    assert Source.of_model(tmp_path / "bare", stage=stage).encoders == workshop / "encoders"
