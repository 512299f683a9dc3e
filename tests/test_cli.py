"""The command line: quick and torch-free help, clean errors, and options that undo nothing."""

import subprocess
import sys
import time
import types
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
import typer
import yaml
from click.core import ParameterSource
from typer.testing import CliRunner

from longtake.cli import app as cli
from longtake.cli.common import given
from longtake.config.base import describe
from longtake.config.generation import GenerationConfig
from longtake.config.job import JobConfig, load_config
from longtake.config.stage import StageConfig
from longtake.errors import DataError

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs" / "toy" / "i2v.yaml"
runner = CliRunner()

# Options that say what the command does, and no value of a configuration: false until given is their meaning.
FLAGS = {
    "quiet",
    "debug",
    "check",
    "help",
    "as_json",
    "unmerge",
    "best",
    "overwrite",
    "small_text",
    "warm_up",
    "version",
}
PICTURE = ["--image", "i.png", "--prompt", "p"]


@pytest.fixture
def called(monkeypatch):
    """Stands in for the functions behind the commands, and records their arguments."""
    calls = {}

    def stub(module, name):
        def record(*args, **kwargs):
            calls[name] = (args, kwargs)
            return "report"

        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: record}))

    stub("longtake.train.job", "run")
    stub("longtake.inference.generator", "generate_file")
    sources = types.SimpleNamespace(of_run=lambda run, changes: (run, changes))
    monkeypatch.setitem(sys.modules, "longtake.inference.source", types.SimpleNamespace(Source=sources))
    stub("longtake.evaluation.run", "evaluate")
    stub("longtake.toy.files", "write_world")
    return calls


def invoke(*arguments):
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


# Every key of a distill stage with a value that is not the default.
NOT_DEFAULT = {
    "objective": {
        "kind": "dmd",
        "teacher": "./teacher",
        "critic": {
            "lora": {"rank": 16, "alpha": 2.0, "targets": ["ffn.2"]},
            "lr": 0.4, "beta1": 0.5, "beta2": 0.6, "eps": 0.5, "weight_decay": 0.25, "max_grad_norm": 4.0,
            "warmup_steps": 8, "decay_steps": 5,
            "updates_per_generator": 3, "updates_per_rollout": 2, "critic_warmup_steps": 2, "init_from": "./critic",
        },
        "guidance": 2.5, "guidance_interval": [0.2, 0.8], "negative_prompt": "blurred", "sigma_min": 0.1, "sigma_max": 0.9,
        "data_loss": {"weight": 0.5, "num_latent_frames": 12},
        "anchor": {"weight": 0.25},
        "context_gradient": "replay",
        "shared_base": True,
    },
    "name": "mine",
    "logdir": "elsewhere",
    "seed": 5,
    "init_from": "./weights",
    "encoders": "/encoders",
    "model": {
        "preset": "/model", "image_condition": "t2v", "first_frame_sigma": "zero", "clip_preprocess": "diffusers",
        "text_precision": "bf16",
    },
    "video": {
        "height": 128, "width": 192, "num_latent_frames": 8, "fps": 24, "temporal_stride": 8, "spatial_stride": 16,
    },
    "plan": {
        "block_frames": 2, "first_frames": 2, "window_frames": 8, "sink_frames": 2, "keep_sink": True, "context": "last_step",
        "context_from": 2, "context_sigma": 0.1, "recache": "last_window",
    },
    "rope": "absolute",
    "flow": {"steps": [1.0, 0.5], "later_steps": [1.0, 0.25], "shift": 3.0, "warp_steps": False},
    "data": {
        "path": "/data", "kind": "lmdb", "buckets": [[128, 192], [192, 128]], "on_bad_row": "skip", "max_bad_share": 0.5,
        "num_workers": 7,
    },
    "batch_size": 12,
    "micro_batch_size": 3,
    "max_steps": 77,
    "optim": {
        "lr": 0.5, "beta1": 0.6, "beta2": 0.7, "eps": 0.25, "weight_decay": 0.125, "max_grad_norm": 3.0, "warmup_steps": 9,
        "decay_steps": 6,
    },
    "lora": {"rank": 8, "alpha": 4.0, "targets": ["ffn.0"]},
    "ema": {"enabled": False, "decay": 0.5, "start_step": 3},
    "precision": "bf16",
    "activation_checkpointing": True,
    "recompute_from": "bf16",
    "parallel": {
        "compile": True, "data_parallel": "hsdp", "replicate": 2, "sequence": 4, "graphs": False,
    },
    "save_every": 11,
    "keep_checkpoints": 13,
    "checkpoint": {"mode": "sync", "export": "last"},
    "on_nonfinite": "skip",
    "max_skipped": 37,
    "watchdog": {"seconds": 41.0, "slow_seconds": 43.0},
    "validate_every": 17,
    "log_every": 19,
    "validation": {
        "num_worlds": 23, "num_latent_frames": 10, "seed": 29, "teacher_steps": 31, "teacher_guidance": 1.5,
        "num_rows": 3, "data": "rows", "times_longer": 7, "max_share": 0.5, "teacher_samples": "samples",
    },
    "alarms": {
        "motion": 0.3, "saturation": 0.4, "drift": 0.3, "seam": 1.5, "uniform": 0.2, "history": 9.0, "stop": ["seam", "history"],
    },
    "keep_best": "stop_rate",
    "wandb": {"enabled": True, "project": "p"},
    "profile": {"num_steps": 3, "start_step": 5, "every_rank": True, "shapes": True, "memory": True},
}  # fmt: skip


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_e_yaml_switch_survives_cli_defaults(tmp_path, called):
    # 1. No option of any command has a default of its own that could reach a configuration.
    commands = typer.main.get_command(cli.app)
    options = [p for command in [commands, *commands.commands.values()] for p in command.params if not p.required]
    assert {p.name for p in options} > {"logdir", "ablations", "num_worlds", "seed", "check"}
    for option in options:
        if option.name not in {*FLAGS, "kind", "install_completion", "show_completion"}:
            assert option.default is None, f"--{option.name} has the default {option.default!r}"
        if option.name in FLAGS:
            assert option.default is False

    # 2. Every key of a stage, set in YAML to something else than its default, reaches the run as it was written.
    written = dict(leaves(NOT_DEFAULT))
    # Of no effect with t2v, or not with a shared base; of other kinds of objective: see below.
    others = {
        "objective.teacher_precision",
        "model.widen",
        "objective.context_writer",  # not with context: last_step
        "parallel.fused_shards",  # not with compile
        *(f"objective.{key}" for key in ("num_chunks", "new_frames", "switch_frames")),
        *(f"objective.context_scores.{key}" for key in ("history_frames", "sigma")),
    }
    others |= {
        f"objective.{key}"
        for key in (
            "teacher_kind",
            "teacher_steps",
            "caption_dropout",
            "error_recycling.share",
            "error_recycling.from_step",
        )
    }
    defaults = {key: default for key, _, default, _ in describe(StageConfig)}
    assert set(written) == set(defaults) - others
    assert all(written[key] != default for key, default in defaults.items() if key in written)
    path = tmp_path / "stage.yaml"
    path.write_text(yaml.safe_dump(NOT_DEFAULT))
    assert (result := invoke("train", path)).exit_code == 0, result.output
    assert {key: value for key, value in leaves(called["run"][0][0].model_dump()) if key in written} == written
    changed = {"plan": {}, "flow": {}, "video": {}, "validation": {}, "data": {"path": "/data"}, "lora": None}
    chunks = {"num_chunks": [2, 5], "new_frames": 4, "switch_frames": [5]}
    chunks |= {"context_scores": {"history_frames": 4, "sigma": 0.25}}
    for objective, model in (
        ({"kind": "flow_matching", "caption_dropout": 0.3}, {"widen": True}),
        ({"kind": "teacher_forcing", "error_recycling": {"share": 0.25, "from_step": 0}, "caption_dropout": 0.2}, {}),
        ({"kind": "long_tuning", "teacher": "toy", **chunks}, {}),
        ({"kind": "dmd", "teacher": "toy", "teacher_precision": "fp8"}, {}),
    ):
        path.write_text(yaml.safe_dump(NOT_DEFAULT | changed | {"objective": objective, "model": model}))
        assert (result := invoke("train", path)).exit_code == 0, result.output
        found = called["run"][0][0]
        assert found.objective.model_dump().items() >= objective.items() and found.model.widen == bool(model)

    # 3. The same for a job, whose evaluation and data have options of other commands.
    values = {
        "evaluation.num_worlds": 3,
        "evaluation.num_latent_frames": 13,
        "evaluation.seed": 4,
        "evaluation.batch_size": 2,
        "evaluation.open_worlds": 6,
    }
    values |= {"evaluation.ablations": False, "data.num_worlds": 9, "data.num_frames": 73, "data.seed": 8}
    values |= {"evaluation.teacher_steps": 31, "evaluation.teacher_guidance": 1.5}
    values |= {"data.formats": ["clips", "images"], "logdir": "/tmp/z"}
    values |= {"evaluation.switch_frames": [5, 9], "data.switch_frames": [73], "data.stops": True}
    values |= {"data.one_switch": True}
    defaults = {k: d for k, _, d, _ in describe(JobConfig) if not k.startswith("stages.")}
    assert set(values) == set(defaults)
    tree = yaml.safe_load(RECIPE.read_text())
    tree |= {"logdir": "/tmp/z", "stages": {k: str(RECIPE.parent / v) for k, v in tree["stages"].items()}}
    for key, value in values.items():
        *group, leaf = key.split(".")
        (tree.setdefault(group[0], {}) if group else tree)[leaf] = value
    path.write_text(yaml.safe_dump(tree))
    assert invoke("train", path).exit_code == 0
    assert values.items() <= dict(leaves(called["run"][0][0].model_dump())).items()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["generate", "--run", "r", *PICTURE, "--device", "cpu", "-o", "o.mp4"], "generate_file"),
        (["evaluate", "--run", "r"], "evaluate"),
    ],
)
def test_e_only_given_options_reach_the_function(called, command, name):
    assert invoke(*command).exit_code == 0
    _, kwargs = called[name]
    ranks = {"device": torch.device("cpu")} if name == "generate_file" else {}  # of the ranks, here one
    writing, mesh = kwargs.pop("writing", None), kwargs.pop("mesh", None)
    assert mesh is None or mesh.world_size == 1
    assert writing is None or (writing.crf, writing.scale) == (15, 1.0)
    assert {key: value for key, value in kwargs.items() if value not in (None, {}, False)} == ranks


def test_repeated_options_are_lists_also_where_typer_keeps_them_as_tuples():
    said = {"formats": ParameterSource.COMMANDLINE, "seed": ParameterSource.COMMANDLINE}
    params = {"formats": ("clips",), "switch_frames": (), "seed": 0, "stops": None, "quiet": False}
    source = lambda name: said.get(name, ParameterSource.DEFAULT)  # noqa: E731
    context = types.SimpleNamespace(params=params, get_parameter_source=source)
    assert given(context, *params) == {"formats": ["clips"], "seed": 0}


def test_given_options_reach_the_function(called, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/longtake", "generate", "--prompt", "two words"])
    invoke("evaluate", "--run", "r", "--no-ablations", "--num-worlds", "4", "--device", "cpu", "-o", "out")
    args, kwargs = called["evaluate"]
    assert args == (Path("r"),) and kwargs["overrides"] == {"ablations": False, "num_worlds": 4}
    assert kwargs["mesh"].device.type == "cpu" and kwargs["output"] == Path("out")
    command = ["generate", "--run", "r", *PICTURE, "-o", "o.mp4", "--device", "cpu"]
    fixed = {"device": torch.device("cpu"), "split": None, "writing": ANY}
    result = invoke(*command, "--frames", "40", "--seed", "0")
    assert result.exit_code == 0 and "report" in result.output
    expected = ((Path("r"), {}), Path("i.png"), "p", Path("o.mp4"))
    assert called["generate_file"] == (expected, {"num_frames": 40, "seed": 0, **fixed})
    invoke(*command, "--seconds", "2.5", "--overwrite")
    assert called["generate_file"][1] == {"seconds": 2.5, **fixed, "overwrite": True}
    assert invoke(*command, "--decode-device", "cuda:1").exit_code == 0
    assert called["generate_file"][1] == {"decode_device": "cuda:1", **fixed}
    assert invoke(*command, "--crf", "20", "--scale", "2").exit_code == 0
    writing = called["generate_file"][1]["writing"]
    assert (writing.crf, writing.scale) == (20, 2.0) and writing.command == "longtake generate --prompt 'two words'"
    many = invoke(*command, "--samples", "2", "--decode-device", "cuda:1")
    assert many.exit_code == 2 and "--decode-device is for one video" in many.output
    for wrong in (["--seconds", "2", "--frames", "3"], ["--frames", "0"], ["--seconds", "-1"]):
        assert invoke(*command, *wrong).exit_code == 2
    invoke("world", "w", "--num-worlds", "3", "--format", "lmdb", "--format", "images")
    (folder, asked), kwargs = called["write_world"]
    assert folder == Path("w") and (asked.num_worlds, asked.formats, asked.seed) == (3, ["lmdb", "images"], 0)
    assert asked.switch_frames == [] and not asked.stops and not kwargs["overwrite"]
    assert invoke("world", "w", "--format", "gif").exit_code == 2
    invoke("world", "w", "--switch", "65", "--switch", "129", "--stops")
    assert called["write_world"][0][1].switch_frames == [65, 129] and called["write_world"][0][1].stops
    invoke("evaluate", "--run", "r", "--switch", "17")
    assert called["evaluate"][1]["overrides"] == {"switch_frames": [17]}


def test_overrides_and_short_options_are_changes_of_the_rules(called):
    command = ["generate", "--run", "r", *PICTURE, "-o", "o.mp4", "--device", "cpu"]
    words = ["plan.sink_frames=1", "plan.block_frames=2", "text_precision=bf16", "--block", "3", "--window", "all"]
    assert invoke(*command, *words, "--steps", "2").exit_code == 0
    plan = {"sink_frames": 1, "block_frames": 3, "window_frames": None}  # an option wins over an override
    changes = {"plan": plan, "text_precision": "bf16", "steps": [1.0, 0.5]}
    assert called["generate_file"][0][0] == (Path("r"), changes)
    for word, message in (
        ("guidance", "override 'guidance' must have the form key=value"),
        ("plan.block_frames.n=2", "plan.block_frames is a plain value"),
    ):
        result = invoke(*command, "plan.block_frames=1", word)
        assert result.exit_code == 2 and message in result.output, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either --run or --model"),
        (["--run", "r", "--model", "toy"], "either --run or --model"),
        (["--run", "r", "--teacher", "toy"], "goes with --model"),
        (["--model", "toy"], "needs --output"),
    ],
)
def test_evaluate_wants_one_subject(called, options, message):
    result = invoke("evaluate", *options)
    assert result.exit_code == 2 and message in result.output and "evaluate" not in called


def test_train_merges_overrides_and_logdir(called):
    assert invoke("train", RECIPE, "distill.max_steps=3", "--logdir", "2024").exit_code == 0
    job = called["run"][0][0]
    assert job.stages["distill"].max_steps == 3 and job.logdir == "2024" and job.stages["causal"].logdir == "2024"


def test_check_prints_the_resolved_config_and_runs_nothing(called, tmp_path):
    result = invoke("train", RECIPE, "--check", "causal.optim.lr=1e-7")
    assert result.exit_code == 0 and "run" not in called
    (tmp_path / "resolved.yaml").write_text(result.output)
    assert load_config(tmp_path / "resolved.yaml") == load_config(RECIPE, ["causal.optim.lr=1e-7"])


def test_errors_are_one_message_and_an_exit_code(monkeypatch):
    result = invoke("train", RECIPE, "distill.max_step=3")
    assert result.exit_code == 2 and result.output.startswith("ConfigError: unknown key stages.distill.max_step")
    assert "Traceback" not in result.output

    def fail(config):
        raise DataError("row 3 is broken")

    monkeypatch.setitem(sys.modules, "longtake.train.job", types.SimpleNamespace(run=fail))
    result = invoke("train", RECIPE)
    assert result.exit_code == 1 and result.output == "DataError: row 3 is broken\n"
    assert isinstance(invoke("--debug", "train", RECIPE).exception, DataError)


def test_config_command_lists_every_key():
    for kind, model in (("stage", StageConfig), ("job", JobConfig), ("generation", GenerationConfig)):
        output = invoke("config", kind).output
        for key, *_ in describe(model):
            assert f"{key}  (" in output


def timed(*arguments):
    started = time.perf_counter()
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    return time.perf_counter() - started, result


@pytest.mark.whole
def test_help_imports_no_torch_and_is_quick():
    program = "import sys; sys.argv=['longtake', '--help']\nfrom longtake.cli.app import main\n"
    program += "try: main()\nexcept SystemExit: pass\n"
    program += "heavy = {'torch', 'diffusers', 'transformers', 'av', 'lmdb', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    assert "generate" in timed("-c", program)[1].stdout
    torch_time = timed("-c", "import torch")[0]
    assert any(timed("-m", "longtake", "--help")[0] < torch_time / 2 for _ in range(3))


def test_check_imports_no_torch():
    program = "import sys\nfrom longtake.config.job import load_config\nload_config('configs/toy/i2v.yaml')\n"
    timed("-c", program + "assert 'torch' not in sys.modules")
