"""Weights that are no streaming student are refused before they are read, with the command that samples them."""

import shlex

import pytest
from PIL import Image
from tiny_sessions import PICTURE, A
from tiny_stage import TEACHER, make_model, save_student, stage_config
from tiny_wan import T2V, TI2V
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.stage import TOY_ASSETS
from longtake.errors import CheckpointError, ConfigError
from longtake.inference.generator import Generator, Source
from longtake.inference.source import NotAStudentError
from longtake.inference.video_io import read_video
from longtake.weights.load import save_dit


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def bare(workshop, tmp_path, monkeypatch):
    """Weights without rules, their encoders and a picture, in the current folder."""
    monkeypatch.chdir(tmp_path)
    save_dit(TEACHER, make_model().state_dict(), tmp_path / "weights")
    (tmp_path / "weights" / "encoders").symlink_to(workshop / "encoders")
    Image.fromarray(PICTURE).save("a b.png")
    return tmp_path / "weights"


@pytest.fixture
def opened(monkeypatch):
    """Weight files that were opened: of a transformer, or of encoders."""
    found: list[object] = []

    def watch(name, real):
        def call(*arguments, **options):
            found.append(arguments[0])
            return real(*arguments, **options)

        monkeypatch.setattr(name, call)

    import safetensors
    import torch

    watch("safetensors.safe_open", safetensors.safe_open)
    watch("torch.load", torch.load)
    return found


def command_in(output: str) -> list[str]:
    return shlex.split(output.split("the whole command: ")[1])


@pytest.mark.parametrize("command", ["generate", "play"])
def test_the_command_that_is_told_samples_them_as_a_teacher(bare, opened, command):
    size = ["height=64", "width=64"]
    asked = ["--model", "weights", "--image", "a b.png", "--prompt", A, "--seconds", "0.5", "-o", "o.mp4", *size]
    result = invoke(command, *asked, "--device", "cpu")
    assert result.exit_code == 2 and opened == []
    assert "nothing says that weights is a streaming student" in result.output
    assert "--sampler whole --steps 40 --shift 3 --guidance 5 --frames 81" in result.output
    told = command_in(result.output)
    assert told[:2] == ["longtake", "generate"] and "a b.png" in told and A in told and "--frames" not in told
    told[told.index("--steps") + 1] = "2"  # else minutes
    result = invoke(*told[1:])
    assert result.exit_code == 0, result.output
    assert read_video("o.mp4")[0].shape == (8, 64, 64, 3)


def test_a_named_sampler_is_taken_and_rules_are_enough(bare, workshop, tmp_path):
    for sampler in ("stream", "whole"):
        assert Source.of_model(bare, changes={"sampler": sampler}).settings.sampler == sampler
    student = stage_config(workshop, tmp_path, "distill", init_from="toy")
    assert Source.of_model(bare, stage=student).settings.sampler == "stream"
    teacher = stage_config(workshop, tmp_path, "teacher")
    with pytest.raises(NotAStudentError):
        Source.of_model(bare, stage=teacher)
    (bare / "generation.yaml").write_text("{height: 64, width: 64}")
    assert Source.of_model(bare).settings.height == 64
    assert Source.of_model(TOY_ASSETS / "teacher").settings.sampler == "whole"  # says so beside its weights


@pytest.mark.whole
def test_python_and_evaluation_refuse_them_too_and_comparing_or_timing_does_not(bare, opened):
    with pytest.raises(ConfigError, match=r"--config RECIPE, or by --sampler stream .* sampled with --sampler whole"):
        Generator.from_model(bare, "cpu")
    result = invoke("evaluate", "--model", "weights", "-o", "report")
    assert result.exit_code == 2 and "is a streaming student" in result.output and opened == []
    assert Source.of_model(bare, must_stream=False).weights == bare
    result = invoke("bench", "--model", "weights", "--size", "64x64", "--blocks", "1", "--device", "cpu")
    assert "is a streaming student" not in result.output


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("Wan2.1-T2V-1.3B", T2V, {"steps": 50, "shift": 8, "guidance": 6, "frames": 81}),
        ("Wan2.1-I2V-14B-720P", TEACHER, {"steps": 40, "shift": 5, "height": 720, "width": 1280}),
        ("Wan2.2-TI2V-5B", TI2V, {"steps": 50, "fps": 24, "frames": 121, "height": 704, "width": 1280}),
    ],
)
def test_each_kind_of_weights_has_the_settings_of_its_own_sampler(tmp_path, name, sizes, options):
    save_dit(sizes, make_model(sizes).state_dict(), tmp_path / name)
    with pytest.raises(NotAStudentError) as error:
        Source.of_model(tmp_path / name, "toy")
    assert options.items() <= error.value.options.items() and error.value.options["sampler"] == "whole"


def test_a_run_of_a_teacher_is_sampled_as_one_where_a_sampler_is_named(workshop, tmp_path, caplog, opened):
    config = stage_config(workshop, tmp_path / "run", "teacher")
    save_student(config)
    folder = tmp_path / "run" / "teacher"
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    pair = ("--image", tmp_path / "a.png", "--prompt", A, "--frames", "5")
    opened.clear()
    result = invoke("generate", "--run", folder, *pair, "-o", tmp_path / "o.mp4", "--device", "cpu")
    assert result.exit_code == 2 and "holds a bidirectional teacher, which cannot stream" in result.output
    assert opened == []
    told = command_in(result.output)
    told[told.index("--steps") + 1] = "2"
    caplog.clear()
    result = invoke(*told[1:])
    assert result.exit_code == 0, result.output
    assert len(read_video(tmp_path / "o.mp4")[0]) == 5 and "Not as in training" not in caplog.text


def test_a_student_that_is_sampled_whole_is_warned_of(workshop, tmp_path, caplog):
    save_student(stage_config(workshop, tmp_path, "causal"))
    Source.of_run(tmp_path, {"sampler": "whole"})
    assert "sampler is whole and was stream" in caplog.text


def test_missing_encoders_are_told_before_weights_are_read(bare, tmp_path, opened):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "vae").mkdir()
    with pytest.raises(ConfigError, match="nothing says"):
        Source.of_model(bare, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="empty lacks the VAE .*; the text encoder .*; the image encoder"):
        Generator.from_model(bare, "cpu", encoders=tmp_path / "empty", changes={"sampler": "stream"})
    assert opened == []


def test_toy_weights_warn_once_of_words_and_of_sizes(tmp_path, caplog):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"text": "a dog runs", "image": "a.png"}\n' * 2)
    words = ("generate", "--model", "toy", "--frames", "5", "--device", "cpu", "--width", "96", "-o", tmp_path / "out")
    result = invoke(*words, "--inputs", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.output
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [
        "Pictures of 64x96 from weights that were trained with 64x64: expect worse ones",
        "These weights do not know what is meant by: dog, runs; it says nothing to them",
    ]


def test_a_file_that_is_no_weights_is_named_for_what_it_is(tmp_path):
    for suffix in (".gguf", ".safetensors", ".pt"):
        (tmp_path / f"a{suffix}").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(CheckpointError, match="is GGUF, whose quantised weights are not read"):
            Source.of_model(tmp_path / f"a{suffix}", "toy")
