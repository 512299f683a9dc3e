"""What the command line says of itself: help, version, defaults, panels, the nearest name, shell completion."""

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import longtake
from longtake.bench.run import bench_source
from longtake.bench.training import bench_training
from longtake.cli.app import app
from longtake.cli.help import DEFAULTS, PANELS
from longtake.config.groups import EvaluationConfig, WorldConfig
from longtake.encodings.write import encode
from longtake.evaluation.contenders import Asked
from longtake.evaluation.verify import verify
from longtake.inference.batch import generate_many
from longtake.inference.export import export
from longtake.inference.generator import generate_file
from longtake.inference.play import play
from longtake.inference.record import Writing
from longtake.serve.settings import ServeSettings
from longtake.weights.convert import convert

ROOT = Path(__file__).parent.parent
COMMANDS = typer.main.get_command(app).commands
# What a command's options reach, and so where their defaults stand; the later one where two have an option
BEHIND = {
    "generate": [generate_many, generate_file, Writing],
    "play": [play, Writing],
    "serve": [ServeSettings],
    "encode": [encode],
    "export": [export],
    "convert": [convert],
    "verify": [verify],
    "bench": [bench_source, bench_training],
    "evaluate": [EvaluationConfig, Asked],
    "world": [WorldConfig],
}


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def options(command):
    return {p.name: p for p in COMMANDS[command].params if p.param_type_name == "option"}


def defaults_of(behind):
    """The defaults of a function's keywords, a dataclass or a configuration, as far as they say something."""
    if dataclasses.is_dataclass(behind):
        found = {f.name: f.default for f in dataclasses.fields(behind) if f.default is not dataclasses.MISSING}
    elif hasattr(behind, "model_fields"):
        found = {name: field.get_default(call_default_factory=True) for name, field in behind.model_fields.items()}
    else:
        found = {p.name: p.default for p in inspect.signature(behind).parameters.values() if p.default is not p.empty}
    return {name: value for name, value in found.items() if value not in (None, [])}


def in_words(name, value):
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@pytest.mark.parametrize("command", BEHIND)
def test_the_help_tells_the_defaults_of_the_functions(command):
    real = {}
    for behind in BEHIND[command]:
        real |= defaults_of(behind)
    shown = {name: p for name, p in options(command).items() if name in real and not p.is_flag or name == "ablations"}
    if command == "evaluate":
        shown.pop("seed")  # another one for worlds and for rows
    told = dict(DEFAULTS[command])
    if command == "generate":
        assert told.pop("seconds") and "length of the training" in " ".join(generate_file.__doc__.split())
    if command == "world":
        shown["stops"] = options("world")["stops"]
    assert told == {name: in_words(name, real[name]) for name in shown}
    text = " ".join(invoke(command, "--help").output.replace("│", " ").split())
    for default in told.values():
        assert f"[default: ({default})]" in text


def test_every_command_has_its_panel_and_every_name_in_them_an_option():
    assert all(command.rich_help_panel for command in COMMANDS.values())
    named = [name for names in PANELS.values() for name in names]
    there = {name for command in COMMANDS for name in options(command)}
    assert len(named) == len(set(named)) and set(named) <= there
    assert all(set(told) <= options(command).keys() for command, told in DEFAULTS.items())
    shown = invoke("generate", "--help").output
    places = [shown.index(f"─ {panel} ─") for panel in PANELS if f"─ {panel} ─" in shown]
    assert len(places) >= 5 and places == sorted(places)
    assert shown.index("Whose weights") < shown.index("--model ") < shown.index("How it streams")


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["recipes", "copy"]], ids=" ".join)
def test_h_is_help(words):
    short, long = invoke(*words, "-h"), invoke(*words, "--help")
    assert short.exit_code == long.exit_code == 0 and short.output == long.output and "Usage: " in short.output


def test_version():
    for option in ("--version", "-V"):
        told = invoke(option)
        assert told.exit_code == 0 and told.output == f"longtake {longtake.__version__}\n"
    import tomllib

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == longtake.__version__


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["generat"], "Did you mean 'generate'?"),
        (["recipes", "cpoy", "toy/i2v"], "Did you mean 'copy'?"),
        (["generate", "--promt", "x"], "--prompt"),
        (["train", "toy/i2v", "--log-dir", "x"], "--logdir"),
        (["config", "genertion"], "generation"),
        (["train", "toy/distill", "--check", "optim.lrr=1"], "did you mean optim.lr"),
        (["train", "toy/distill", "--check", "keep_best=motion_ratoi"], "did you mean motion_ratio"),
        (["train", "toy/distill", "--check", "rope=relativ"], "did you mean relative?"),
        (["doctor", "toy/distill", "model.preset=toi"], "did you mean toy?"),
        (["students", "--hlep"], "--help"),
        (["bench", "--random", "wan2.1-t2v-1.3"], "did you mean wan2.1-t2v-1.3b"),
    ],
)
def test_a_wrong_name_brings_the_nearest(words, near):
    refused = invoke(*words)
    assert refused.exit_code == 2 and near in refused.output, refused.output


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("Self-Forcng", "did you mean Self-Forcing"),
        ("long-live", "did you mean LongLive"),
        ("causal_rcm", "did you mean Causal-rCM"),
        ("toi", "did you mean toy?"),
    ],
)
def test_a_wrong_name_of_a_student_brings_the_nearest(model, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["generate", "--model", model, "--prompt", "x", "-o", "x.mp4"], ["verify", model]):
        refused = invoke(*words)
        assert refused.exit_code == 2 and near in refused.output, refused.output
    assert (
        "did you mean" not in invoke("generate", "--model", "mine.safetensors", "--prompt", "x", "-o", "x.mp4").output
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [("longtake tra", ["train"]), ("longtake train toy/i", ["toy/i2v"]), ("longtake generate --promp", ["--prompt"])],
)
def test_a_shell_completes(line, found):
    words = line.split()
    asked = {"_LONGTAKE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    program = "from longtake.cli.app import main; main()"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, env=os.environ | asked
    )
    assert told.stdout.split() == found, told.stderr
