"""Shared roles equal separate networks with the same updates: losses and weights, on one rank and on two."""

import pytest
import roles_run
import torch
from forked_ranks import torchrun
from safetensors.torch import load_file

from longtake.parallel.mesh import Mesh
from longtake.run_folder import latest_checkpoint, read_manifest
from longtake.train.metrics import read_rows


def rows(folder):
    read = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "speed"))} for row in read]


def state(folder):
    tensors = {}
    for file in sorted((latest_checkpoint(folder / "checkpoints") / "state").glob("*.safetensors")):
        for key, value in load_file(file).items():
            tensors.setdefault(key, []).append(value)
    return {key: torch.cat([v.reshape(-1) for v in parts]) for key, parts in tensors.items()}


def check_equal(folder, stage):
    separate, shared = (folder / roles / stage for roles in ("separate", "shared"))
    assert len(rows(shared)) == len(rows(separate)) == 5
    for mine, theirs in zip(rows(shared), rows(separate), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9) and theirs["critic_grad_norm"] > 0
    mine, theirs = state(shared), state(separate)
    assert mine.keys() == theirs.keys() and all((mine[key] - value).abs().max() <= 1e-6 for key, value in theirs.items())
    moved = [value for key, value in theirs.items() if key.startswith("networks.generator") and ".lora_B." in key]
    assert all(value.abs().max() > 1e-4 for value in moved)
    for folder in (separate, shared):
        held = {path.name for path in latest_checkpoint(folder / "checkpoints").iterdir()}
        assert {"state", "manifest.json"} < held
    manifests = [read_manifest(latest_checkpoint(folder / "checkpoints")) for folder in (separate, shared)]
    assert manifests[0]["lora"] == manifests[1]["lora"] and manifests[0]["base"] == manifests[1]["base"]


FAST = [("distill", "recomputed"), ("long", "plain"), ("distill", "bf16")]
SLOW = [("distill", "plain"), ("long", "recomputed"), ("distill", "student_whole"), ("distill", "critic_whole")]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("stage", "variant"), [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
)
def test_one_rank(workshop, tmp_path, stage, variant):
    roles_run.run(workshop, tmp_path, Mesh(), stage, variant)
    check_equal(tmp_path, stage)


@pytest.mark.slow
def test_two_ranks(workshop, tmp_path):
    pairs = [*FAST, *SLOW]
    done = torchrun(2, roles_run.__file__, workshop, tmp_path, *map(":".join, pairs))
    assert done.returncode == 0, done.stderr
    for stage, variant in pairs:
        check_equal(tmp_path / variant, stage)
