"""Stages with shared roles: what is refused, what resumes what, what is exported; frozen networks in bfloat16."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_stage import make_model, newest, stage_config

from longtake.condition import Condition
from longtake.errors import ConfigError
from longtake.parallel.mesh import Mesh
from longtake.run_folder import exported_weights
from longtake.train import networks as train_networks
from longtake.train.metrics import read_rows
from longtake.train.networks import Builder
from longtake.train.stage import run_stage
from longtake.weights.fingerprint import weights_identity
from longtake.weights.load import load_dit, save_dit
from longtake.weights.lora import WEIGHTS, read_base

LORA = {"rank": 2, "alpha": 4}


def config_of(workshop, logdir, **changes):
    critic = {"lr": 1e-3, "updates_per_generator": 2, "lora": {"rank": 3}}
    return stage_config(
        workshop, logdir, "distill", **({"lora": LORA, "critic": critic, "shared_base": True, "max_steps": 2} | changes)
    )


@pytest.mark.whole
@pytest.mark.parametrize("order", [(False, True), (True, False)], ids=["then shared", "then apart"])
def test_a_checkpoint_of_one_kind_resumes_in_the_other(workshop, tmp_path, order):
    first, then = order
    whole = config_of(workshop, tmp_path / "whole", shared_base=first, max_steps=4)
    run_stage(whole, Mesh())
    half = config_of(workshop, tmp_path / "half", shared_base=first, max_steps=2)
    run_stage(half, Mesh())
    rest = config_of(workshop, tmp_path / "half", shared_base=then, max_steps=4)
    run_stage(rest, Mesh())
    for name in ("generator_lora", "generator_ema_lora"):
        one, two = (load_file(newest(config) / name / WEIGHTS) for config in (whole, rest))
        assert one.keys() == two.keys() and all((one[key] - two[key]).abs().max() <= 1e-6 for key in one)
    assert exported_weights(newest(rest)).name == "generator_ema_lora"


def test_other_weights_than_the_teachers_are_refused(workshop, tmp_path):
    save_dit(make_model().config, make_model(seed=8).state_dict(), tmp_path / "other")
    with pytest.raises(
        ConfigError, match=r"shared_base=true holds one base for all, and init_from=.*other \(SHA-256 .*"
    ):
        Builder(config_of(workshop, tmp_path, init_from=str(tmp_path / "other")), Mesh()).build()
    critic = {"lora": {"rank": 3}, "init_from": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match="and objective.critic.init_from=.* train the critic whole"):
        Builder(config_of(workshop, tmp_path, critic=critic), Mesh()).build()
    shutil.copytree(workshop / "teacher", tmp_path / "copy")  # the same weights elsewhere are the same
    networks, frozen, *_ = Builder(config_of(workshop, tmp_path, init_from=str(tmp_path / "copy")), Mesh()).build()
    assert networks["generator"].base is networks["critic"].base is frozen["teacher"].base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None, "critic": {"lr": 1e-3}}, "objective.shared_base=true needs low-rank updates of the student"),
        (
            {"parallel": {"data_parallel": "ddp", "replicate": 2}},
            "data_parallel=ddp and replicate=2: .* set data_parallel=hsdp",
        ),
        ({"parallel": {"replicate": 2}}, "data_parallel=fsdp and replicate=2: .* set data_parallel=hsdp, or leave"),
        ({"parallel": {"data_parallel": "hsdp"}}, "data_parallel=hsdp and replicate=1: .* set replicate to 2 or more"),
        ({"activation_checkpointing": "some"}, "activation_checkpointing"),
    ],
)
def test_wrong_values_are_refused(workshop, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(workshop, tmp_path, **changes)
    with pytest.raises(
        ConfigError, match="unknown key objective.shared_base; it belongs to objective.kind=dmd and long_tuning"
    ):
        stage_config(workshop, tmp_path, "causal", lora=LORA, shared_base=True)


def test_checkpointing_by_its_old_and_new_names(workshop, tmp_path):
    wanted = {"none": False, "full": True, True: True, False: False, "selective": "selective"}
    for given, value in wanted.items():
        assert config_of(workshop, tmp_path, activation_checkpointing=given).activation_checkpointing == value


@pytest.mark.whole
def test_a_frozen_teacher_in_bfloat16_scores_as_in_float32(workshop, tmp_path, monkeypatch):
    """Under autocast the numbers are equal bit for bit, for two updates of each network."""
    found = []
    for kept in (torch.bfloat16, torch.float32):
        config = config_of(workshop, tmp_path / str(kept), precision="bf16", shared_base=False)
        _, frozen, *_ = Builder(config, Mesh()).build()
        assert frozen["teacher"].blocks[0].ffn[0].weight.dtype == kept
        run_stage(config, Mesh())
        rows = read_rows(config.folder / "metrics.jsonl")
        found.append([{k: v for k, v in row.items() if not k.startswith(("seconds", "speed"))} for row in rows])
        monkeypatch.setattr(train_networks.Builder, "_freeze", lambda self, model: model.requires_grad_(False))
    assert found[0] == found[1] and len(found[0]) == 2


@pytest.mark.whole
def test_encoders_are_let_go_when_every_row_is_encoded(workshop, tmp_path, monkeypatch):
    from longtake.encodings.encode import BatchEncoder

    released = []
    monkeypatch.setattr(BatchEncoder, "release", lambda self: released.append(self.__dict__.pop("encoders")))
    run_stage(config_of(workshop, tmp_path, max_steps=6), Mesh())  # 24 samples of 6 rows: all are encoded ahead
    assert len(released) == 1


# ---- a student that begins with updates of the base --------------------------------------------------------------------
@pytest.fixture(scope="module")
def begun(workshop, tmp_path_factory):
    """A log folder with a causal initialisation that trained updates of the teacher's weights."""
    logdir = tmp_path_factory.mktemp("begun")
    run_stage(stage_config(workshop, logdir, "causal", lora=LORA, max_steps=2), Mesh())
    return logdir


def test_a_student_begins_with_the_updates_of_an_earlier_stage(workshop, begun):
    config = config_of(workshop, begun, init_from="causal")
    updates = exported_weights(newest(stage_config(workshop, begun, "causal", lora=LORA)))
    networks, frozen, adapters, _ = Builder(config, Mesh()).build()
    real = frozen["teacher"]
    stored = load_file(updates / WEIGHTS)
    own = {k: v for k, v in networks["generator"].state_dict().items() if ".lora_" in k}
    assert len(own) == len(stored) > 0
    for key, value in own.items():
        assert torch.equal(value, stored["base_model.model." + key.replace(".default.", ".")])
    assert any(value.any() for key, value in own.items() if ".lora_B." in key)
    whole, teacher = load_dit(updates), make_model()
    condition = Condition(torch.randn(1, 4, 64), torch.randn(1, 17, 64), torch.randn(1, 1, 8, 4, 4))
    x, sigma = torch.randn(1, 3, 4, 4, 4), torch.full((1,), 0.7)
    with torch.no_grad():
        student = networks["generator"](x, sigma, condition)
        assert (student - whole(x, sigma, condition)).abs().max() < 1e-5
        for other in (real, networks["critic"]):
            assert torch.equal(other(x, sigma, condition), real(x, sigma, condition))
            assert (other(x, sigma, condition) - teacher(x, sigma, condition)).abs().max() < 1e-6
        assert (student - real(x, sigma, condition)).abs().max() > 1e-4
    assert (
        adapters["generator"].base.identity
        == adapters["critic"].base.identity
        == weights_identity(workshop / "teacher")
    )


def test_it_trains_and_its_export_is_of_the_teacher(workshop, begun, tmp_path):
    shutil.copytree(begun / "causal", tmp_path / "causal")
    config = config_of(workshop, tmp_path, init_from="causal", max_steps=3)
    run_stage(config, Mesh())
    assert len(read_rows(config.folder / "metrics.jsonl")) == 3
    assert read_base(exported_weights(newest(config))).identity == weights_identity(workshop / "teacher")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 3, "alpha": 6}, r"init_from=.*rank 2 and alpha 4, and this stage asks for rank 3 and alpha 6"),
        ({"rank": 2, "alpha": 2}, "rank 2 and alpha 4, and this stage asks for rank 2 and alpha 2; ask for the same"),
        (LORA | {"targets": ["ffn.0"]}, r"of other layers: 0 of .* and 22 are not this stage's .* lora.targets"),
    ],
)
def test_updates_of_another_kind_are_refused(workshop, begun, lora, message):
    with pytest.raises(ConfigError, match=message):
        Builder(config_of(workshop, begun, init_from="causal", lora=lora), Mesh()).build()


def test_updates_of_other_weights_are_refused(workshop, begun, tmp_path):
    save_dit(make_model().config, make_model(seed=8).state_dict(), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"init_from=.*are updates of other weights than objective.teacher=.*other"):
        Builder(config_of(workshop, begun, init_from="causal", teacher=str(tmp_path / "other")), Mesh()).build()


def test_exit_steps_are_joined_as_the_configuration_says(workshop, tmp_path):
    full = {"activation_checkpointing": True}
    for changes, joined in (
        (full, True),
        ({}, False),
        ({"activation_checkpointing": "selective"}, False),
    ):
        built = Builder(stage_config(workshop, tmp_path, "distill", **changes), Mesh()).build()
        assert built.student.batched_exit_backward == joined, changes
    assert not Builder(config_of(workshop, tmp_path, **full), Mesh()).build().student.batched_exit_backward
