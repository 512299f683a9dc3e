"""Meshes of gloo ranks: replicas, shards and sequence groups give the numbers of one process, and resume each other."""

import json
import shutil

import mesh_run
import numpy as np
import pytest
import torch
from forked_ranks import torchrun
from PIL import Image
from safetensors.torch import load_file

from longtake.parallel.mesh import Mesh
from longtake.run_folder import exported_weights, latest_checkpoint
from longtake.train.metrics import read_rows

MESHES = {
    "2 shard": {},
    "2 replicate": {"data_parallel": "hsdp", "replicate": 2},
    "2 sequence": {"sequence": 2},
    "2 whole": {"data_parallel": "ddp"},
    "2 whole, sequence": {"data_parallel": "ddp", "sequence": 2},
    "4 shard": {},
    "4 replicate x shard": {"data_parallel": "hsdp", "replicate": 2},
    "4 shard x sequence": {"sequence": 2},
    "4 replicate x sequence": {"data_parallel": "hsdp", "replicate": 2, "sequence": 2},
    "4 whole, sequence": {"data_parallel": "ddp", "sequence": 2},
}
STAGES = tuple(mesh_run.STAGES)
REPLAYED = ("2 shard", "2 whole", "4 replicate x sequence")
LORA = {"lora": {"rank": 2, "alpha": 4}, "critic": {"lr": 1e-3, "updates_per_generator": 2, "lora": {"rank": 3}}}


def train(workshop, runs, folder, ranks):
    """Each run of `runs`, one after the other in the same processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"runs{ranks}.json").write_text(json.dumps(runs, default=str))
    done = torchrun(ranks, mesh_run.__file__, workshop, folder / f"runs{ranks}.json")
    assert done.returncode == 0, done.stderr[-6000:]


def rows_of(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "speed"))} for row in rows]


def weights_of(folder):
    return load_file(next(exported_weights(latest_checkpoint(folder / "checkpoints")).glob("*.safetensors")))


def sheet_of(folder):
    return np.asarray(Image.open(folder / "contact_sheet.png").convert("RGB"), np.int16)


def assert_same(folder, wanted, tolerance=1e-5):
    mine, theirs = rows_of(folder), rows_of(wanted)
    assert len(mine) == len(theirs) >= 2
    for a, b in zip(mine, theirs, strict=True):
        nothing = {key for key, value in b.items() if value is None}  # scores of videos without a sprite
        assert a.keys() == b.keys() and all(a[key] is None for key in nothing)
        for key in b.keys() - nothing:
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=1e-7), key
    a, b = (load_file(one / "latents.safetensors")["latents"] for one in (folder, wanted))
    assert b.shape[1] == mesh_run.FRAMES and b.std() > 0.1 and (a - b).abs().max() <= tolerance * b.abs().max()
    a, b = weights_of(folder), weights_of(wanted)
    assert a.keys() == b.keys() and all((a[key] - b[key]).abs().max() < tolerance for key in b)


def assert_equal(folder, wanted):
    """Bit for bit."""
    assert rows_of(folder) == rows_of(wanted)
    a, b = weights_of(folder), weights_of(wanted)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)
    assert torch.equal(*(load_file(one / "latents.safetensors")["latents"] for one in (folder, wanted)))


@pytest.mark.whole
def test_two_ranks_of_a_sequence_group_train_and_stream_as_one(workshop, tmp_path):
    """The fast part: two iterations of `distill`, then of `causal` with low-rank updates, and what they validate."""
    runs = [("distill", {"validate_every": 2}), ("causal", {"lora": LORA["lora"], "validate_every": 2})]
    entries = [{"stage": s, "logdir": tmp_path / "two", "max_steps": 2, **c} for s, c in runs]
    train(workshop, [entry | {"parallel": {"sequence": 2}} for entry in entries], tmp_path, 2)
    for stage, changes in runs:
        one = mesh_run.run(workshop, tmp_path / "one", Mesh(), stage, max_steps=2, **changes)
        assert_same(tmp_path / "two" / stage, one)
        assert sum("validation/teacher_position_error_px" in row for row in rows_of(one)) == 2
        mine, theirs = (sheet_of(folder) for folder in (tmp_path / "two" / stage, one))
        assert theirs.std() > 5 and np.abs(mine - theirs).max() <= 1  # videos of student, teacher and truth


@pytest.fixture(scope="module")
def one(workshop, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for stage in STAGES:
        mesh_run.run(workshop, folder, Mesh(), stage)
    mesh_run.run(workshop, folder / "lora", Mesh(), "distill", **LORA)
    mesh_run.run(workshop, folder / "replay", Mesh(), "long", context_gradient="replay")
    return folder


@pytest.fixture(scope="module")
def many(workshop, tmp_path_factory):
    """Every stage on every mesh, and low-rank updates on one of each size."""
    folder = tmp_path_factory.mktemp("many")
    for ranks in (2, 4):
        runs = [
            {"stage": stage, "logdir": folder / name, "parallel": parallel}
            for name, parallel in MESHES.items()
            for stage in STAGES
            if name.startswith(str(ranks))
        ]
        lora = {"stage": "distill", "logdir": folder / f"{ranks} lora", "parallel": {"sequence": 2}, **LORA}
        replayed = [
            {"stage": "long", "logdir": folder / f"{name} replay", "parallel": MESHES[name], "context_gradient": "replay"}
            for name in REPLAYED
            if name.startswith(str(ranks))
        ]
        train(workshop, [*runs, lora, *replayed], folder, ranks)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_trains_and_streams_as_one_process(one, many, mesh, stage):
    assert_same(many / mesh / stage, one / stage)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_with_whole_weights_share_the_writing(many):
    state = latest_checkpoint(many / "4 whole, sequence" / "distill" / "checkpoints") / "state"
    sizes = [sum(file.stat().st_size for file in state.glob(f"rank{rank:05d}-*")) for rank in range(4)]
    once = latest_checkpoint(many / "4 shard" / "distill" / "checkpoints") / "state"
    assert min(sizes) > 0.5 * max(sizes)
    assert sum(sizes) < 1.1 * sum(file.stat().st_size for file in once.glob("rank*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 4])
def test_low_rank_updates_on_a_sequence_group(one, many, ranks):
    assert_same(many / f"{ranks} lora" / "distill", one / "lora" / "distill")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mesh", REPLAYED)
def test_gradient_into_the_context_on_meshes(one, many, mesh):
    assert_same(many / f"{mesh} replay" / "long", one / "replay" / "long")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_writer_of_its_own_on_meshes(workshop, tmp_path):
    """Sharded, whole, and tokens shared out: the updates that read, those that write, and what both stream."""
    keys = {"lora": LORA["lora"], "context_gradient": "replay", "context_writer": "own", "max_steps": 3}
    wanted = mesh_run.run(workshop, tmp_path / "one", Mesh(), "long", **keys)
    meshes = ("2 shard", "2 whole", "2 sequence")
    runs = [{"stage": "long", "logdir": tmp_path / name, "parallel": MESHES[name], **keys} for name in meshes]
    train(workshop, runs, tmp_path, 2)
    stored = "writer_ema_lora/adapter_model.safetensors"
    for name in meshes:
        assert_same(tmp_path / name / "long", wanted)
        mine, theirs = (
            load_file(latest_checkpoint(one / "checkpoints") / stored) for one in (tmp_path / name / "long", wanted)
        )
        assert mine.keys() == theirs.keys()
        assert all((mine[key] - theirs[key]).abs().max() < 1e-5 for key in theirs)
    assert any(value.any() for key, value in theirs.items() if ".lora_B." in key)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_on_another_mesh_and_on_the_same_bit_for_bit(workshop, many, tmp_path):
    four, two = ({"parallel": parallel} for parallel in ({"sequence": 2}, {"sequence": 2}))
    replicas, wholes = {"parallel": {"data_parallel": "hsdp", "replicate": 2}}, {"parallel": {"data_parallel": "ddp"}}
    started = [("four", "distill", four), ("same", "long", four), ("replicas", "distill", replicas)]
    started += [("whole", "distill", wholes)]
    entries = [{"stage": s, "logdir": tmp_path / name, "max_steps": 3, **mesh} for name, s, mesh in started]
    train(workshop, entries, tmp_path, 4)
    shutil.copytree(tmp_path / "four", tmp_path / "back")
    shutil.copytree(tmp_path / "four", tmp_path / "four again")

    # Down from four ranks to two; one of the runs only for an iteration, then up again.
    down = [
        {"stage": "distill", "logdir": tmp_path / "four", **two},
        {"stage": "distill", "logdir": tmp_path / "replicas"},
        {"stage": "distill", "logdir": tmp_path / "whole", "max_steps": 4},
        {"stage": "distill", "logdir": tmp_path / "back", "max_steps": 4, **two},
    ]
    train(workshop, down, tmp_path, 2)
    up = [
        {"stage": "distill", "logdir": tmp_path / "back", **four},
        {"stage": "distill", "logdir": tmp_path / "whole", **wholes},
        {"stage": "distill", "logdir": tmp_path / "four again", **four},
        {"stage": "long", "logdir": tmp_path / "same", **four},
    ]
    train(workshop, up, tmp_path, 4)

    whole = many / "4 shard x sequence"
    for name in ("four", "replicas", "back", "whole"):
        assert_same(tmp_path / name / "distill", whole / "distill")
    assert_equal(tmp_path / "four again" / "distill", whole / "distill")
    assert_equal(tmp_path / "same" / "long", whole / "long")
