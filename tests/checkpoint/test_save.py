"""Checkpoints: bit-equal resume, atomic publication, damage, strictness, and no pickle anywhere."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_stage import save_student, stage_config

from longtake import run_folder
from longtake.checkpoint import save as checkpoint
from longtake.checkpoint.save import load_checkpoint
from longtake.config.groups import EmaConfig, OptimConfig
from longtake.errors import CheckpointError
from longtake.parallel.mesh import Mesh
from longtake.run_folder import latest_checkpoint
from longtake.train.metrics import read_rows
from longtake.train.networks import Builder
from longtake.train.stage import run_stage
from longtake.train.state import TrainState
from longtake.weights.read import open_published


def assert_same(one: TrainState, other: TrainState) -> None:
    a, b = one.tensors(), other.tensors()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert (one.step, one.data_position) == (other.step, other.data_position)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def losses(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "speed"))}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def test_resume_is_bit_equal_to_an_uninterrupted_run(tmp_path):
    whole = tiny_run.run(tmp_path / "whole", Mesh())
    tiny_run.run(tmp_path / "parts", Mesh(), steps=5)
    parts = tiny_run.run(tmp_path / "parts", Mesh())
    assert_same(whole, parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_retention_manifest_and_a_finished_run(tmp_path):
    state = tiny_run.run(tmp_path, Mesh())
    assert names(tmp_path) == ["step_000006", "step_000008"]
    manifest = run_folder.verify_checkpoint(tmp_path / "checkpoints/step_000008")
    assert (
        manifest["step"] == 8 and manifest["data_position"] == 8 * tiny_run.BATCH and manifest["config"] == {"steps": 8}
    )
    assert (manifest["rope"], manifest["block_plan"], manifest["fps"]) == ("relative", [1, 4], 16)
    assert manifest["world_size"] == 1 and manifest["torch_version"] == torch.__version__
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert_same(state, tiny_run.run(tmp_path, Mesh()))
    assert (tmp_path / "metrics.jsonl").read_text() == rows


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("fails_in", ["_write_state", "write_safetensors", "_synced_record", "_publish"])
def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, fails_in, mode):
    whole = tiny_run.run(tmp_path / "whole", Mesh())
    tiny_run.run(tmp_path / "run", Mesh(), steps=3)

    def full_disk(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, fails_in, full_disk)
        with pytest.raises(OSError, match="disk full"):
            tiny_run.run(tmp_path / "run", Mesh(), mode=mode)
    assert names(tmp_path / "run") == ["step_000003"]
    assert latest_checkpoint(tmp_path / "run/checkpoints").name == "step_000003"
    assert_same(whole, tiny_run.run(tmp_path / "run", Mesh()))
    assert names(tmp_path / "run") == ["step_000006", "step_000008"]


@pytest.mark.whole
def test_kill_9_in_a_save_resumes_bit_equal(tmp_path):
    """A real process, killed between the files of its second checkpoint."""
    command = [sys.executable, tiny_run.__file__, str(tmp_path / "run"), "--kill-in-save", "6"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names(tmp_path / "run") == [".tmp-step_000006", "step_000003"]
    assert_same(tiny_run.run(tmp_path / "whole", Mesh()), tiny_run.run(tmp_path / "run", Mesh()))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no manifest", "no step", "no list", "add"])
def test_a_damaged_newest_checkpoint_falls_back_loudly(tmp_path, caplog, damage):
    whole = tiny_run.run(tmp_path, Mesh())
    newest = tmp_path / "checkpoints/step_000008"
    victim = next((newest / "state").iterdir())
    content = victim.read_bytes()
    match damage:
        case "flip":
            victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut":
            victim.write_bytes(content[:-1])
        case "remove":
            victim.unlink()
        case "manifest":
            (newest / "manifest.json").write_text((newest / "manifest.json").read_text()[:-9])
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "no step" | "no list":
            manifest = json.loads((newest / "manifest.json").read_text())
            del manifest["step" if damage == "no step" else "files"]
            (newest / "manifest.json").write_text(json.dumps(manifest))
        case "add":
            (newest / "state/extra.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        run_folder.verify_checkpoint(newest)
    assert latest_checkpoint(newest.parent).name == "step_000006"
    assert "step_000008" in caplog.text
    assert_same(whole, tiny_run.run(tmp_path, Mesh()))
    assert names(tmp_path) == ["damaged-step_000008", "step_000006", "step_000008"]


def test_no_usable_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path):
    tiny_run.run(tmp_path, Mesh(), steps=3)
    (tmp_path / "checkpoints/step_000003/manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        tiny_run.run(tmp_path, Mesh())


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_malicious_pickle_is_refused_and_nothing_unpickles(tmp_path, monkeypatch):
    """The published folder's state is replaced by pickles, with a manifest that vouches for them."""
    monkeypatch.chdir(tmp_path)
    tiny_run.run(tmp_path / "run", Mesh(), steps=3)
    path = tmp_path / "run/checkpoints/step_000003"

    def no_pickle(*_, **__):
        raise AssertionError("a checkpoint was unpickled")

    with monkeypatch.context() as patch:
        for name in ("load", "loads", "Unpickler"):
            patch.setattr(pickle, name, no_pickle)
        patch.setattr(torch, "load", no_pickle)
        load_checkpoint(tiny_run.build(Mesh())[0], path, mesh=Mesh(), invariants={})

    for file in (path / "state").iterdir():
        file.write_bytes(pickle.dumps(Bomb()))
    for name in (".metadata", "__0_0.distcp"):
        (path / "state" / name).write_bytes(pickle.dumps(Bomb()))
    (path / "generator/model.safetensors").write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: run_folder.file_record(path / name) for name in run_folder.files_of(path)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_checkpoint(tiny_run.build(Mesh())[0], path, mesh=Mesh(), invariants={})
    with pytest.raises(CheckpointError, match="is a file of torch.save and no safetensors"):
        open_published(path / "generator")
    assert not (tmp_path / "exploded").exists()


def test_loading_is_strict(tmp_path):
    tiny_run.run(tmp_path, Mesh(), steps=3)
    path = tmp_path / "checkpoints/step_000003"
    state, _ = tiny_run.build(Mesh())
    state.networks["generator"].extra = torch.nn.Parameter(torch.zeros(1))
    state.networks["generator"].head = torch.nn.Linear(tiny_run.WIDTH, 2)
    del state.ema["generator"]
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(state, path, mesh=Mesh(), invariants={})
    for text in ("1 missing: networks.generator.extra", "surplus: ema.generator", "(3, 5) instead of (2, 5)"):
        assert text in str(error.value)


def test_first_moments_that_are_kept_no_more_are_passed_over_and_missing_ones_are_not(tmp_path):
    """As a run left them that had another beta1, or a version that kept them with beta1 0, too."""

    def state_with(beta1):
        networks = {name: tiny_run.Tiny(7) for name in ("generator", "critic")}
        optimizers = dict.fromkeys(networks, OptimConfig(beta1=beta1))
        return TrainState.build(networks, optimizers, {"generator": EmaConfig()}, max_steps=8, seed=1)

    saved = tiny_run.run(tmp_path, Mesh(), steps=3)
    path = tmp_path / "checkpoints/step_000003"
    state = state_with(0.0)
    load_checkpoint(state, path, mesh=Mesh(), invariants={})
    before, now = saved.tensors(), state.tensors()
    assert {key for key in before if not key.endswith(".exp_avg")} == now.keys() < before.keys()
    assert all(torch.equal(value, before[key]) for key, value in now.items())
    state = state_with(0.5)
    state.optimizers["critic"]._state["head.bias"]["other"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"1 missing: optimizers.critic.head.bias.other\. Use the configuration"):
        load_checkpoint(state, path, mesh=Mesh(), invariants={})


def test_another_seed_or_rope_is_not_a_resume(tmp_path):
    tiny_run.run(tmp_path, Mesh(), steps=3)
    with pytest.raises(CheckpointError, match="seed=1 and this run has 2"):
        tiny_run.run(tmp_path, Mesh(), seed=2)
    with pytest.raises(CheckpointError, match="rope='relative' and this run has 'absolute'"):
        tiny_run.run(tmp_path, Mesh(), invariants={"rope": "absolute"})


def test_the_average_is_exported_beside_the_weights(tmp_path):
    state = tiny_run.run(tmp_path, Mesh(), steps=6)
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert run_folder.exported_weights(path).name == "generator_ema"
    assert json.loads((run_folder.exported_weights(path) / "config.json").read_text()) == {"width": tiny_run.WIDTH}
    own = tiny_run.read_tensors(path / "generator")
    average = tiny_run.read_tensors(run_folder.exported_weights(path))
    wanted = state.networks["generator"].state_dict()
    assert own.keys() == average.keys() == wanted.keys()
    assert all(torch.equal(own[key], value) for key, value in wanted.items())
    trained = state.ema["generator"].tensors()
    assert all(torch.equal(average[key], trained.get(key, value)) for key, value in wanted.items())
    assert not torch.equal(average["head.weight"], own["head.weight"])
    with pytest.raises(CheckpointError, match="holds no exported network 'critic'"):
        run_folder.exported_weights(path, "critic")


def test_initialisation_takes_weights_only(workshop, tmp_path):
    """The average, or the weights where there is none; training from them starts at step 0 with an empty optimizer."""
    for ema in (True, False):
        config = stage_config(workshop, tmp_path, "causal", name=f"ema-{ema}")
        student = save_student(config, ema=ema, step=7)
        opened = Builder(config, Mesh()).open(config.folder)
        assert all(torch.equal(value, student.state_dict()[key]) for key, value in opened.read(None))
    changes = {"name": "next", "init_from": "ema-False", "max_steps": 1, "save_every": 1}
    config = stage_config(workshop, tmp_path, "causal", **changes)
    run_stage(config, Mesh())
    path = latest_checkpoint(config.folder / "checkpoints")
    manifest = run_folder.read_manifest(path)
    assert (manifest["step"], manifest["data_position"]) == (1, 4)
    moments = [value for key, value in tiny_run.read_tensors(path / "state").items() if key.endswith(".step")]
    assert moments and all(value == 1 for value in moments)
