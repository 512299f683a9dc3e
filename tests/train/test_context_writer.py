"""Stages whose context is written by updates of their own: what is saved, resumed, passed on, played and refused."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_stage import make_model, newest, stage_config, state_of
from typer.testing import CliRunner

from longtake import Generator
from longtake.cli.app import app
from longtake.errors import CheckpointError, ConfigError
from longtake.evaluation.run import evaluate
from longtake.inference.export import export
from longtake.inference.source import Source
from longtake.models.lora import WRITER, factors
from longtake.parallel.mesh import Mesh
from longtake.run_folder import exported_weights
from longtake.toy.world import sample_world
from longtake.train.metrics import read_rows
from longtake.train.networks import Builder
from longtake.train.stage import run_stage
from longtake.weights.convert import convert
from longtake.weights.load import load_opened
from longtake.weights.lora import WEIGHTS, is_adapter
from longtake.weights.two_networks import PREFIX

LORA = {"rank": 2, "alpha": 4}
SLOTS = 2 * 12 * 2  # layers, linear layers of an i2v block, factors
KEYS = {"lora": LORA, "context_gradient": "replay", "context_writer": "own"}
PICTURE = sample_world(3, 0).render(1)[0]


def config_of(workshop, logdir, stage="distill", **changes):
    critic = {"lr": 1e-3, "updates_per_generator": 1}
    more = {"num_chunks": [2], "new_frames": 2} if stage == "long" else {}
    return stage_config(workshop, logdir, stage, **(KEYS | {"critic": critic, "max_steps": 2} | more | changes))


@pytest.fixture(scope="module")
def log(workshop, tmp_path_factory):
    """A log folder with such a student."""
    logdir = tmp_path_factory.mktemp("apart")
    run_stage(config_of(workshop, logdir), Mesh())
    return logdir


def test_both_learn_are_averaged_and_lie_side_by_side(workshop, log):
    config, state = config_of(workshop, log), state_of(config_of(workshop, log))
    own = {key for key in state if key.startswith("networks.generator.")}
    assert len(own) == 2 * SLOTS and len([key for key in own if f".{WRITER}." in key]) == SLOTS
    moved = [bool(state[key].any()) for key in own if ".lora_B." in key]
    last = "blocks.1."  # nobody reads what the writer's last block makes, but for keys and values
    still = [key for key in own if ".lora_B." in key and not state[key].any()]
    assert len(still) == 10 and all(f".{last}" in key and f".{WRITER}." in key for key in still) and any(moved)
    assert {key.replace("networks.", "ema.") for key in own} < state.keys()
    assert any(not torch.equal(state[key], state[key.replace("networks.", "ema.")]) for key in own)
    found = {path.name for path in newest(config).iterdir()}
    assert found > {"generator_lora", "generator_ema_lora", "writer_lora", "writer_ema_lora"}
    for folder, role in (("generator_lora", "default"), ("writer_lora", WRITER)):
        assert is_adapter(newest(config) / folder)
        stored = load_file(newest(config) / folder / WEIGHTS)
        assert len(stored) == SLOTS
        for key, value in stored.items():
            name = key.removeprefix("base_model.model.").replace(".weight", f".{role}.weight")
            assert torch.equal(value, state[f"networks.generator.{name}"])


@pytest.mark.parametrize("stage", ["distill", "long"])
@pytest.mark.slow
def test_resumed_equals_uninterrupted_bit_for_bit(workshop, tmp_path, stage):
    whole = config_of(workshop, tmp_path / "whole", stage, max_steps=4)
    run_stage(whole, Mesh())
    run_stage(config_of(workshop, tmp_path / "half", stage, max_steps=2), Mesh())
    rest = config_of(workshop, tmp_path / "half", stage, max_steps=4)
    run_stage(rest, Mesh())
    one, two = state_of(whole), state_of(rest)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["distill", "long"])
def test_it_trains_in_bfloat16_with_recomputation_and_beside_real_clips(workshop, tmp_path, stage):
    """Both ways of a packed call: a roll-out's, and teacher forcing's."""
    clips = {"path": str(workshop / "data" / "clips"), "kind": "clips", "num_workers": 0}
    more = {"precision": "bf16", "activation_checkpointing": "selective", "data_loss": {"weight": 1.0}, "data": clips}
    config = config_of(workshop, tmp_path, stage, **more)
    run_stage(config, Mesh())
    state = state_of(config)
    assert len(read_rows(config.folder / "metrics.jsonl")) == 2
    for role in ("default", WRITER):
        assert any(value.any() for key, value in state.items() if f".lora_B.{role}." in key and "networks" in key)


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_begins_as_the_student_of_one_network(workshop, tmp_path, shared):
    """On the same videos; and a shared base holds the teacher, the critic and both."""
    lora = {"critic": {"lora": {"rank": 3}}} if shared else {}
    for name, changes in (("one", {"context_writer": "student"}), ("two", {})):
        config = config_of(workshop, tmp_path / name, shared_base=shared, **lora, **changes)
        built = Builder(config, Mesh())
        networks = built.build()
        objective = built.objective(networks, None, nullcontext)
        names = {key for key in factors(networks.trained["generator"].state_dict()) if f".{WRITER}." in key}
        assert len(names) == (SLOTS if name == "two" else 0)
        assert objective.generator.writer is (networks.trained["generator"].writer if name == "two" else None)
        if shared:
            assert networks.frozen["teacher"].base is networks.trained["generator"].base


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_next_stage_goes_on_with_both(workshop, log, shared):
    base = {"shared_base": True, "critic": {"lora": {"rank": 3}}} if shared else {}
    config = config_of(workshop, log, "long", init_from="distill", **base)
    (networks, *_), before = Builder(config, Mesh()).build(), state_of(config_of(workshop, log))
    state = networks["generator"].state_dict()
    for key, value in factors(state).items():
        assert torch.equal(value, before[f"ema.generator.{key}"])
    teacher = make_model().state_dict()
    assert all(
        torch.equal(value, teacher[key.replace(".base_layer.", ".")])
        for key, value in state.items()
        if key.endswith("q.base_layer.weight")
    )


@pytest.mark.slow
def test_a_student_of_one_network_is_where_both_begin(workshop, tmp_path):
    """The updates of an earlier stage are part of the base; or, where the base is shared, the first values of both."""
    run_stage(stage_config(workshop, tmp_path, "causal", lora=LORA, max_steps=1), Mesh())
    networks, *_ = Builder(config_of(workshop, tmp_path, init_from="causal"), Mesh()).build()
    assert not any(v.any() for k, v in factors(networks["generator"].state_dict()).items() if ".lora_B." in k)
    more = {"shared_base": True, "critic": {"lora": {"rank": 3}}}
    networks, *_ = Builder(config_of(workshop, tmp_path, init_from="causal", **more), Mesh()).build()
    state = factors(networks["generator"].state_dict())
    for key, value in state.items():
        if f".{WRITER}." in key:
            assert torch.equal(value, state[key.replace(f".{WRITER}.", ".default.")])
    assert any(v.any() for k, v in state.items() if f".lora_B.{WRITER}." in k)


def frames_of(generator):
    return generator.video(PICTURE, "a red circle", num_frames=17, seed=3).frames


def test_it_is_played_as_two_networks_from_its_run_and_from_its_export(workshop, log, tmp_path):
    source = Source.of_run(log)
    reader, writer = (load_opened(opened).state_dict() for opened in (source.open(), source.open_writer()))
    assert any(not torch.equal(reader[key], writer[key]) for key in reader)
    folder = export(log, tmp_path / "student", dtype="float32")
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {key for key in stored if not key.startswith(PREFIX)} == reader.keys()
    own = {key.removeprefix(PREFIX) for key in stored if key.startswith(PREFIX)}
    assert own == {key for key in reader if not torch.equal(reader[key], writer[key])} and own
    assert "It is two networks" in (folder / "README.md").read_text()
    again = Source.of_model(folder)
    for opened, wanted in ((again.open(), reader), (again.open_writer(), writer)):
        assert all(torch.equal(value, wanted[key]) for key, value in load_opened(opened).state_dict().items())
    run, out = Generator.from_run(log, device="cpu"), Generator.from_model(folder, device="cpu")
    frames = frames_of(run)
    assert (frames == frames_of(out)).all()
    run.denoiser.writer = None
    assert (frames != frames_of(run)).any()
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    words = ["generate", "--model", folder, "--image", tmp_path / "picture.png", "--prompt", "a red circle"]
    words += ["--seconds", "1", "-o", tmp_path / "out.mp4", "--device", "cpu"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0 and (tmp_path / "out.mp4").is_file(), result.output


@pytest.mark.slow
def test_it_is_validated_and_evaluated_as_two_networks(workshop, tmp_path):
    config = config_of(workshop, tmp_path / "run", optim={"lr": 0.1}, validate_every=2)
    run_stage(config, Mesh())
    validated = [row for row in read_rows(config.folder / "metrics.jsonl") if "validation/motion_ratio" in row][-1]
    asked = {"num_worlds": 1, "seed": config.validation.seed, "ablations": False, "teacher_steps": 2}
    found = evaluate(tmp_path / "run", overrides=asked, mesh=Mesh()).summaries["distill"]
    assert found["position_error_px"] == pytest.approx(validated["validation/position_error_px"], rel=1e-5)


def test_one_network_of_it_is_refused_where_one_is_taken(workshop, log, tmp_path):
    folder = export(log, tmp_path / "student", dtype="float32")
    updates = exported_weights(newest(config_of(workshop, log)))
    for source in (folder, updates):
        with pytest.raises(ConfigError, match=r"is two networks, .*this takes one; .*objective.context_writer=own"):
            convert(source, tmp_path / "converted", "longtake")
    shutil.rmtree(tmp_path / "converted", ignore_errors=True)
    plain = {"context_writer": "student", "context_gradient": "none"}
    for init_from, more in (("distill", {"lora": None}), ("distill", {}), (str(folder), {})):
        config = config_of(workshop, log, "long", init_from=init_from, **plain | more)
        with pytest.raises(ConfigError, match="is two networks"):
            Builder(config, Mesh()).build()


def test_it_is_not_resumed_as_one_network(workshop, log, tmp_path):
    shutil.copytree(log / "distill", tmp_path / "distill")
    config = config_of(workshop, tmp_path, context_writer="student", max_steps=3)
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*lora_A.writer.* that it was trained with"):
        run_stage(config, Mesh())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None}, "context_writer=own is low-rank updates beside .* lora=null; give lora"),
        ({"context_gradient": "none"}, "context_writer=own learns through objective.context_gradient=replay alone"),
        (
            {"plan": {"block_frames": 2, "window_frames": 5, "sink_frames": 1, "context": "last_step"}},
            "plan.context=last_step has the student store its own blocks, .* set it to pass",
        ),
        ({"parallel": {"compile": True}}, "parallel.compile=true .* objective.context_writer=own has two in one call"),
    ],
)
def test_wrong_values_are_refused(workshop, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        config_of(workshop, tmp_path, **changes)
    assert len(str(error.value).splitlines()) == 1
