"""Stages that train low-rank updates: what is saved, resumed, refused, loaded and passed on."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_stage import make_model, newest, stage_config, state_of

from longtake import Generator
from longtake.errors import CheckpointError, ConfigError
from longtake.evaluation.run import evaluate
from longtake.models.lora import factors
from longtake.parallel.mesh import Mesh
from longtake.run_folder import exported_weights, read_manifest
from longtake.train.metrics import read_rows
from longtake.train.networks import Builder
from longtake.train.stage import run_stage
from longtake.weights.fingerprint import weights_identity
from longtake.weights.load import load_dit, save_dit
from longtake.weights.lora import BASE, CONFIG, WEIGHTS

LORA = {"rank": 2, "alpha": 4}
SLOTS = 2 * 12 * 2  # layers, linear layers of an i2v block, factors


def config_of(workshop, logdir, stage, **changes):
    tree = {"lora": LORA, "max_steps": 2} | changes
    if stage in ("distill", "long"):
        critic = {"lr": 1e-3, "updates_per_generator": 2, "lora": {"rank": 3, "targets": ["ffn.0", "self_attn.q"]}}
        tree = {"critic": critic} | tree
    return stage_config(workshop, logdir, stage, **tree)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def log(workshop, tmp_path_factory):
    """A log folder: `causal` with updates on the teacher, `distill` with updates on that."""
    logdir = tmp_path_factory.mktemp("lora")
    run_stage(config_of(workshop, logdir, "causal"), Mesh())
    run_stage(config_of(workshop, logdir, "distill", init_from="causal"), Mesh())
    return logdir


def test_a_checkpoint_holds_updates_and_their_optimizer_alone(workshop, log):
    state = state_of(config_of(workshop, log, "distill", init_from="causal"))
    sizes = {"generator": SLOTS, "critic": 2 * 2 * 2}
    for name, count in sizes.items():
        networks = [key for key in state if key.startswith(f"networks.{name}.")]
        assert len(networks) == count == len(factors(dict.fromkeys(networks)))
        assert len([key for key in state if key.startswith(f"optimizers.{name}.")]) == 2 * count  # beta1 is 0
    assert len([key for key in state if key.startswith("ema.generator.")]) == SLOTS
    assert len(state) == 4 * SLOTS + 3 * sizes["critic"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    config = config_of(workshop, log, "causal")
    held = {path.name for path in newest(config).iterdir()}
    assert held == {"state", "manifest.json", "generator_lora", "generator_ema_lora"}
    whole = sum(p.numel() for p in make_model().parameters())
    assert (newest(config) / "generator_lora" / WEIGHTS).stat().st_size < whole * 4 / 2


def test_exports_have_published_names_and_name_their_base(workshop, log):
    causal, distill = config_of(workshop, log, "causal"), config_of(workshop, log, "distill", init_from="causal")
    folder = exported_weights(newest(distill))
    assert folder.name == "generator_ema_lora"
    keys = load_file(folder / WEIGHTS).keys()
    assert len(keys) == SLOTS and "base_model.model.blocks.1.cross_attn.k_img.lora_B.weight" in keys
    fields = json.loads((folder / CONFIG).read_text())
    assert (fields["r"], fields["lora_alpha"]) == (2, 4)
    base = exported_weights(newest(causal))
    named = json.loads((folder / BASE).read_text())
    assert named["identity"] == weights_identity(base) and (folder / named["source"]).resolve() == base.resolve()
    manifest = read_manifest(newest(distill))
    teacher = weights_identity(workshop / "teacher")
    assert manifest["base"] == {"generator": named["identity"], "critic": teacher}
    assert manifest["lora"]["critic"] == {"rank": 3, "alpha": 3.0, "targets": ["self_attn.q", "ffn.0"]}
    assert json.loads((base / BASE).read_text()) == {"source": str(workshop / "teacher"), "identity": teacher}


def test_training_moves_the_updates_and_never_the_base(workshop, log, tmp_path):
    """Both factors move in both networks, the average lies between; the base in memory is that of the files."""
    config = config_of(workshop, tmp_path, "distill", critic={"lora": {"rank": 3}, "updates_per_generator": 1})
    base = {}
    networks, *_ = Builder(config, Mesh()).build()
    start = {name: factors(network.state_dict()) for name, network in networks.items()}
    build = Builder.build

    def watched(self):
        made = build(self)
        base.update(made.trained)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "build", watched)
        run_stage(config, Mesh())
    teacher = load_dit(workshop / "teacher").state_dict()
    for name, network in base.items():
        state = network.state_dict()
        frozen = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
        assert equal(frozen, dict(teacher))
        assert all(not torch.equal(state[key], value) for key, value in start[name].items())
    state = state_of(config)
    for key, first in start["generator"].items():
        own, average = state[f"networks.generator.{key}"], state[f"ema.generator.{key}"]
        assert not torch.equal(own, average) and not torch.equal(first, average)
        low, high = torch.minimum(torch.minimum(first, own), average), torch.maximum(torch.maximum(first, own), average)
        assert ((average >= low) & (average <= high)).all()


@pytest.mark.whole
def test_the_first_loss_is_that_of_full_training(workshop, tmp_path):
    """B = 0: iteration 0 sees the base, in both networks."""
    rows = []
    for name, changes in (("lora", {}), ("full", {"lora": None, "critic": {"lr": 1e-3, "updates_per_generator": 2}})):
        config = config_of(workshop, tmp_path / name, "distill", max_steps=1, **changes)
        run_stage(config, Mesh())
        rows.append(read_rows(config.folder / "metrics.jsonl")[0])
    for key in ("generator_loss", "dmdtrain_gradient_norm"):
        assert rows[0][key] == rows[1][key] > 0
    assert rows[0]["generator_grad_norm"] != rows[1]["generator_grad_norm"]


@pytest.mark.whole
def test_resumed_equals_uninterrupted_bit_for_bit(workshop, tmp_path):
    """With everything on; plain float32 on two ranks is resumed in `tests/dist/test_lora_ranks.py`."""
    changes = {"precision": "bf16", "activation_checkpointing": True, "max_steps": 4, "save_every": 2}
    whole = config_of(workshop, tmp_path / "whole", "distill", **changes)
    run_stage(whole, Mesh())
    resumed = config_of(workshop, tmp_path / "resumed", "distill", **changes)
    run_stage(resumed.model_copy(update={"max_steps": 3}), Mesh())
    shutil.rmtree(newest(resumed))
    assert newest(resumed).name == "step_000002"
    run_stage(resumed, Mesh())
    assert equal(state_of(whole), state_of(resumed))
    for folder in ("generator_lora", "generator_ema_lora"):
        one, two = (load_file(newest(config) / folder / WEIGHTS) for config in (whole, resumed))
        assert equal(one, two)


@pytest.mark.parametrize("name", ["rank", "alpha", "targets", "none", "base", "seed"])
def test_resuming_with_something_else_is_refused(workshop, log, tmp_path, name):
    shutil.copytree(log / "causal", tmp_path / "causal")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    other = {"rank": {"lora": {"rank": 3, "alpha": 4}}, "alpha": {"lora": {"rank": 2}}, "none": {"lora": None}}
    other |= {"targets": {"lora": LORA | {"targets": ["ffn.0"]}}, "seed": {"seed": 9}}
    if name == "base":
        save_dit(make_model().config, make_model(seed=8).state_dict(), tmp_path / "teacher")
        other["base"] = {"init_from": str(tmp_path / "teacher")}
    config = config_of(workshop, tmp_path, "causal", max_steps=5, **other[name])
    messages = {
        "base": r"was trained with base={'generator': '\w{64}'} and this run has .*; name the weights that it was trai",
        "none": r"was trained with lora={'generator': .* and this run has None; set rank, alpha",
        "seed": "was trained with seed=1 and this run has 9; set it back",
    }
    default = "was trained with lora={'generator': .*'rank': 2.*; set rank, alpha and targets back"
    with pytest.raises(CheckpointError, match=messages.get(name, default)):
        run_stage(config, Mesh())
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "causal").rglob("*.safetensors")}


def test_full_training_is_not_resumed_with_updates(workshop, tmp_path):
    run_stage(config_of(workshop, tmp_path, "causal", lora=None, max_steps=1), Mesh())
    with pytest.raises(CheckpointError, match="was trained with lora=None and this run has {'generator'"):
        run_stage(config_of(workshop, tmp_path, "causal"), Mesh())


@pytest.mark.whole
def test_everything_else_loads_base_and_updates_merged(workshop, log, tmp_path, caplog):
    """The generator, the evaluation, another stage and a moved log folder."""
    folder = tmp_path / "moved"
    shutil.copytree(log, folder)
    merged = load_dit(exported_weights(newest(config_of(workshop, folder, "distill"))))
    by_hand = load_dit(workshop / "teacher").state_dict()
    for stage in ("causal", "distill"):
        low = load_file(log / stage / "checkpoints/step_000002/generator_ema_lora" / WEIGHTS)
        for name in by_hand:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in low:
                update = torch.einsum("or,ri->oi", low[f"{stem}.lora_B.weight"], low[f"{stem}.lora_A.weight"])
                by_hand[name] = by_hand[name] + 2 * update
    assert (
        sum(not torch.equal(value, load_dit(workshop / "teacher").state_dict()[n]) for n, value in by_hand.items())
        == 24
    )
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, by_hand[name], rtol=1e-6, atol=1e-6)
    generator = Generator.from_run(folder, "cpu")
    assert equal(dict(generator.model.state_dict()), dict(merged.state_dict()))
    config = config_of(workshop, folder, "distill", name="again", init_from="distill")
    opened = Builder(config, Mesh()).open(config.source("distill"))
    assert equal(dict(opened.read(None)), dict(merged.state_dict()))
    settings = {"num_worlds": 1, "teacher_steps": 2, "ablations": False, "batch_size": 1}
    report = evaluate(folder, overrides=settings, output=tmp_path / "out", device="cpu")
    assert {"causal", "distill"} <= report.summaries.keys()


@pytest.mark.whole
def test_validation_measures_the_averaged_updates(workshop, log, tmp_path):
    """With bfloat16 weights, where nothing runs under autocast, too."""
    changes = {"validate_every": 2, "precision": "bf16", "validation": {"num_worlds": 1, "teacher_steps": 1}}
    config = config_of(workshop, tmp_path, "causal", **changes)
    run_stage(config, Mesh())
    rows = [row for row in read_rows(config.folder / "metrics.jsonl") if "validation/motion_ratio" in row]
    assert [row["step"] for row in rows] == [0, 2]


def test_weights_that_never_saw_y_are_refused(workshop, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.patch_embedding.weight[:, model.config.out_channels :] = 0
    save_dit(model.config, model.state_dict(), tmp_path / "widened")
    config = config_of(workshop, tmp_path, "causal", init_from=str(tmp_path / "widened"))
    with pytest.raises(ConfigError, match="have never seen the condition y .* train a stage with lora=null first"):
        run_stage(config, Mesh())


def test_the_number_of_trained_parameters_is_said(workshop, tmp_path, caplog):
    config = config_of(workshop, tmp_path, "causal", max_steps=1, lora={"rank": 2, "targets": ["ffn.0"]})
    with caplog.at_level(logging.INFO):
        run_stage(config, Mesh())
    sizes = make_model().config
    trained = sizes.num_layers * 2 * (sizes.dim + sizes.ffn_dim)
    assert f"generator: low-rank updates of {workshop / 'teacher'}, {trained} parameters are trained" in caplog.text


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("teacher", {"init_from": None}, "lora needs trained weights to update and init_from=null; name them"),
        ("causal", {"lora": {"rank": 0}}, "lora.rank: got 0; must be greater than 0"),
        ("causal", {"lora": {"r": 4}}, "unknown key lora.r"),
        ("causal", {"lora": {"targets": ["q"]}}, "lora.targets names q; the linear layers of a block are self_attn.q"),
    ],
)
def test_wrong_values_are_refused(workshop, tmp_path, stage, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_stage(config_of(workshop, tmp_path, stage, **changes), Mesh())


@pytest.mark.whole
def test_long_tuning_trains_updates(workshop, tmp_path):
    """State kept over iterations, chunks that begin in mid-stream, resumed bit for bit."""
    data = {"path": str(workshop / "data" / "images"), "kind": "images", "num_workers": 0}
    changes = {"max_steps": 4, "save_every": 2, "num_chunks": [2], "data": data}
    changes |= {"teacher": str(workshop / "teacher")}
    whole = config_of(workshop, tmp_path / "whole", "long", **changes)
    run_stage(whole, Mesh())
    resumed = config_of(workshop, tmp_path / "resumed", "long", **changes)
    run_stage(resumed.model_copy(update={"max_steps": 3}), Mesh())
    shutil.rmtree(newest(resumed))
    run_stage(resumed, Mesh())
    assert equal(state_of(whole), state_of(resumed))
    assert read_manifest(newest(whole))["lora"].keys() == {"generator", "critic"}
