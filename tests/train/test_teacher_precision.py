"""A teacher whose large weights are 8-bit floats beside networks that are trained as they are."""

from dataclasses import replace

import pytest
import torch
from tiny_stage import make_model, stage_config

from longtake.errors import ConfigError
from longtake.models.fp8 import FP8Linear
from longtake.parallel.mesh import Mesh
from longtake.run_folder import latest_checkpoint
from longtake.train.networks import Builder
from longtake.train.stage import run_stage

CHANGES = {"teacher_precision": "fp8", "precision": "bf16", "max_steps": 1, "save_every": 1}


def quantised(network):
    return {name for name, module in network.named_modules() if isinstance(module, FP8Linear)}


def test_the_teacher_alone_is_rounded_and_what_it_is_compared_by_is_not(workshop, tmp_path):
    builder = Builder(stage_config(workshop, tmp_path, "distill", **CHANGES), Mesh())
    networks = builder.build()
    teacher = networks.frozen["teacher"]
    assert quantised(teacher) == {f"blocks.{layer}.ffn.{part}" for layer in (0, 1) for part in (0, 2)}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not quantised(networks.trained["generator"]) and not quantised(networks.trained["critic"])
    # The same numbers as those of a network that was rounded by hand
    by_hand = make_model().cast(torch.bfloat16).quantise()
    for (name, mine), (_, own) in zip(teacher.named_parameters(), by_hand.named_parameters(), strict=True):
        assert mine.dtype == own.dtype and torch.equal(mine.float(), own.float()), name
    with builder.teacher(networks).model() as samples:  # its samples of rows are kept for other runs
        assert not quantised(samples)
    assert not quantised(builder.reference(networks))


@pytest.mark.slow
def test_a_stage_trains_with_it(workshop, tmp_path):
    config = stage_config(workshop, tmp_path, "distill", **CHANGES)
    run_stage(config, Mesh())
    assert latest_checkpoint(config.folder / "checkpoints").name == "step_000001"


def test_what_cannot_be_is_refused(workshop, tmp_path):
    with pytest.raises(ConfigError, match="teacher_precision=fp8 goes with precision=bf16, and precision=fp32; set"):
        Builder(stage_config(workshop, tmp_path, "distill", **CHANGES | {"precision": "fp32"}), Mesh()).build()
    sharded = replace(Mesh(), world_size=2, parameter_mesh=object())
    assert sharded.fsdp_mesh is not None
    with pytest.raises(ConfigError, match="8-bit floats are not sharded, and 2 ranks share theirs; set parallel"):
        Builder(stage_config(workshop, tmp_path, "distill", **CHANGES), sharded).build()
    shared = {"shared_base": True, "lora": {"rank": 2}}
    with pytest.raises(ConfigError, match="teacher_precision=fp8 rounds the teacher, and objective.shared_base=true"):
        stage_config(workshop, tmp_path, "distill", **CHANGES, **shared)
