"""Stages whose student is compared with the rows' own clips (anchor), from files to files."""

import math

import pytest
import torch
from encoded_files import weights_of
from tiny_stage import stage_config

from longtake.encodings.write import encode
from longtake.errors import DataError
from longtake.parallel.mesh import Mesh
from longtake.train.metrics import read_rows
from longtake.train.stage import run_stage

ANCHOR = {"anchor": {"weight": 0.5}}
MORE = {
    "distill": {"shared_base": True, "lora": {"rank": 2}},
    "long": {"num_chunks": [2], "new_frames": 2},
    "long in context": {
        "num_chunks": [2],
        "new_frames": 2,
        "context_scores": {"history_frames": 2, "sigma": 0.25},
    },
}


def rows_of(config):
    rows = read_rows(config.folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "speed"))} for row in rows]


def trained(workshop, logdir, stage, data, steps, stops=()):
    """A stage of so many iterations, stopped after some of them and started again."""
    for step in (*stops, steps):
        more = MORE[stage]
        critic = {"lr": 1e-3, "updates_per_generator": 1}
        data = {"path": str(data["path"]), "num_workers": 0}
        config = stage_config(
            workshop, logdir, stage.split()[0], **ANCHOR | more, critic=critic, data=data, max_steps=step, save_every=2
        )
        run_stage(config, Mesh())
    return config


@pytest.mark.slow
@pytest.mark.parametrize("stage", MORE)
def test_a_stopped_run_equals_an_uninterrupted_one_bit_for_bit_also_from_an_encoded_set(workshop, tmp_path, stage):
    clips = {"path": workshop / "data/clips"}
    whole = trained(workshop, tmp_path / "whole", stage, clips, 4)
    again = trained(workshop, tmp_path / "again", stage, clips, 4, stops=[2])
    rows = rows_of(whole)
    assert rows_of(again) == rows and len(rows) == 4
    assert all(math.isfinite(row["anchor_loss"]) and row["deviation_ratio"] > 0 for row in rows)
    one, two = weights_of(whole), weights_of(again)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    encode(whole, tmp_path / "set", Mesh())
    stored = trained(workshop, tmp_path / "stored", stage, {"path": tmp_path / "set"}, 4)
    for mine, truth in zip(rows_of(stored), rows, strict=True):
        assert mine["anchor_loss"] == pytest.approx(truth["anchor_loss"], rel=2e-2)


def test_a_set_without_latents_is_refused_before_anything_is_built(workshop, tmp_path):
    plain = stage_config(workshop, tmp_path, "distill", data={"path": str(workshop / "data/images"), "num_workers": 0})
    encode(plain, tmp_path / "pictures", Mesh())
    data = {"path": str(tmp_path / "pictures"), "num_workers": 0}
    with pytest.raises(DataError, match="latents") as error:
        run_stage(stage_config(workshop, tmp_path / "run", "distill", anchor={"weight": 1.0}, data=data), Mesh())
    assert len(str(error.value).splitlines()) == 1
