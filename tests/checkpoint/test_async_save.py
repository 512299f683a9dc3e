"""Saving beside the training: the same checkpoints, an untouched copy, errors that stop the run, room on the disk."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors import safe_open

from longtake import run_folder
from longtake.checkpoint import async_save, save
from longtake.checkpoint.async_save import Saver
from longtake.checkpoint.save import RunInfo, Snapshot
from longtake.checkpoint.shards import Piece, StateFiles, write_safetensors
from longtake.checkpoint.staging import Staging
from longtake.config.run import CheckpointConfig
from longtake.devices import host_memory
from longtake.errors import CheckpointError
from longtake.parallel.mesh import Mesh
from longtake.train.loop import Hooks
from longtake.train.metrics import read_rows


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def records(path):
    return run_folder.read_manifest(path)["files"]


def make_saver(state, folder, *, keep=3, **config):
    where = folder / "checkpoints"
    return Saver(state, where, CheckpointConfig(**config), keep=keep, mesh=Mesh(), info=RunInfo())


def test_both_modes_leave_the_same_files(tmp_path):
    for mode in ("async", "sync"):
        tiny_run.run(tmp_path / mode, Mesh(), mode=mode)
    assert names(tmp_path / "async") == names(tmp_path / "sync") == ["step_000006", "step_000008"]
    for name in names(tmp_path / "sync"):
        one, other = (records(tmp_path / mode / "checkpoints" / name) for mode in ("async", "sync"))
        assert one == other and len(one) == 5
    saves = [read_rows(tmp_path / mode / "saves.jsonl") for mode in ("async", "sync")]
    for mode, rows in zip(("async", "sync"), saves, strict=True):
        assert [row["step"] for row in rows] == [3, 6, 8] and {row["mode"] for row in rows} == {mode}
        assert all(row["seconds/write"] > 0 and row["size_bytes"] > 1000 for row in rows)


def test_the_copy_is_not_touched_by_what_comes_after(tmp_path, monkeypatch):
    """The writer is held back until the weights have changed; the second save waits for it and has the new ones."""
    state, _ = tiny_run.build(Mesh())
    go, write = threading.Event(), save._write_state
    monkeypatch.setattr(save, "_write_state", lambda *given: go.wait(10) and write(*given))
    writer = make_saver(state, tmp_path, keep=2)
    before = {name: value.detach().clone() for name, value in state.tensors().items()}
    state.step = 1
    writer.save()
    with torch.no_grad():
        for value in state.tensors().values():
            value.add_(1)
    assert not run_folder.list_checkpoints(tmp_path / "checkpoints")
    state.step = 2
    threading.Timer(0.2, go.set).start()
    writer.save(last=True)
    writer.close()
    one, two = (tiny_run.read_tensors(tmp_path / f"checkpoints/step_{step:06d}/state") for step in (1, 2))
    assert one.keys() == two.keys() == before.keys()
    assert all(torch.equal(one[name], value) and torch.equal(two[name], value + 1) for name, value in before.items())


def test_an_error_in_the_background_stops_the_run_at_the_next_step(tmp_path, monkeypatch):
    """At step 4, not at the next save; and the training's own error is not hidden behind it."""
    seen, write = [], save._write_state

    def fail(snapshot, *rest):
        if snapshot.step == 3:
            raise OSError("the disk went away")
        return write(snapshot, *rest)

    def evaluate(step):
        seen.append(step)
        if step == 4:  # the thread has had its time
            time.sleep(0.3)
        return {}

    monkeypatch.setattr(save, "_write_state", fail)
    with pytest.raises(OSError, match="the disk went away"):
        tiny_run.run(tmp_path, Mesh(), hooks=Hooks(evaluate=evaluate))
    assert seen == [0, 4] and names(tmp_path) == []

    def broken(step):
        if step == 4:
            raise ZeroDivisionError("inside")
        return {}

    with pytest.raises(ZeroDivisionError):
        tiny_run.run(tmp_path, Mesh(), hooks=Hooks(evaluate=broken))


def test_an_error_of_the_training_leaves_the_save_complete(tmp_path, monkeypatch):
    write = save._write_state

    def slowly(*given):
        time.sleep(0.3)
        return write(*given)

    def broken(step):
        if step == 4:
            raise ZeroDivisionError("inside")
        return {}

    monkeypatch.setattr(save, "_write_state", slowly)
    with pytest.raises(ZeroDivisionError):
        tiny_run.run(tmp_path, Mesh(), hooks=Hooks(evaluate=broken))
    assert names(tmp_path) == ["step_000003"]
    run_folder.verify_checkpoint(tmp_path / "checkpoints/step_000003")


def usage(free):
    return shutil._ntuple_diskusage(10**12, 10**12 - free, free)


def test_no_room_on_the_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    state, _ = tiny_run.build(Mesh())
    size = Snapshot.of(state, ("generator",)).size_bytes
    free = [size]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free[0]))
    tiny_run.run(tmp_path, Mesh(), steps=3)
    free[0] = size - 1
    with pytest.raises(CheckpointError, match=r"step_000003 needs 0.06 GiB in .* and 0.06 GiB are free; nothing"):
        tiny_run.run(tmp_path, Mesh())  # before the first iteration of a run that could never save
    free[0] = size

    def evaluate(step):
        free[0] = size - 1 if step == 4 else size
        return {}

    with pytest.raises(CheckpointError, match="step_000006 needs .* the 1 checkpoints there are intact. Free space"):
        tiny_run.run(tmp_path, Mesh(), hooks=Hooks(evaluate=evaluate))
    assert names(tmp_path) == ["step_000003"]
    free[0] = size
    tiny_run.run(tmp_path, Mesh())
    assert names(tmp_path) == ["step_000006", "step_000008"]


def test_the_size_is_that_of_the_files(tmp_path):
    state, _ = tiny_run.build(Mesh())
    expected = Snapshot.of(state, ("generator",)).size_bytes - save.SPARE_BYTES
    state.step = 1
    writer = make_saver(state, tmp_path)
    writer.save()
    writer.close()
    path = tmp_path / "checkpoints/step_000001"
    tensors = 0
    for file in path.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118 (no mapping)
    assert tensors == expected


def test_exports_of_the_last_checkpoint_only(tmp_path):
    tiny_run.run(tmp_path, Mesh(), export="last", steps=8)
    newest, before = tmp_path / "checkpoints/step_000008", tmp_path / "checkpoints/step_000006"
    assert run_folder.exports_of(newest) == ["generator", "generator_ema"] and run_folder.exports_of(before) == []
    with pytest.raises(CheckpointError, match="with checkpoint.export=last only"):
        run_folder.exported_weights(before)
    shutil.rmtree(newest)
    assert run_folder.latest_checkpoint(tmp_path / "checkpoints") == before
    with pytest.raises(CheckpointError, match="no complete checkpoint of a student"):
        run_folder.find_checkpoint(tmp_path)
    tiny_run.run(tmp_path, Mesh())  # it goes on from one without
    assert run_folder.find_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_completely_before_the_end(tmp_path, monkeypatch, number):
    write = save._write_state

    def slowly(*given):
        time.sleep(0.3)
        return write(*given)

    def evaluate(step):
        if step == 4:
            os.kill(os.getpid(), number)
        return {}

    monkeypatch.setattr(save, "_write_state", slowly)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        tiny_run.run(tmp_path, Mesh(), hooks=Hooks(evaluate=evaluate), export="last")
    assert stopped.value.code == 128 + number
    assert names(tmp_path) == ["step_000003", "step_000004"]
    run_folder.verify_checkpoint(tmp_path / "checkpoints/step_000004")
    assert run_folder.exports_of(tmp_path / "checkpoints/step_000004")
    assert signal.getsignal(signal.SIGINT) is before and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.whole
def test_a_second_signal_ends_at_once(tmp_path):
    """A real process, whose save hangs: the first signal waits for it, the second does not."""
    script = (
        "import sys, time; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path; import tiny_run\n"
        "from longtake.checkpoint import save; from longtake.parallel.mesh import Mesh\n"
        "def hang(*_): print('saving', flush=True); time.sleep(60)\n"
        "save._write_state = hang\n"
        "tiny_run.run(Path(sys.argv[1]), Mesh(), steps=100000)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parents[1])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert names(tmp_path) == [".tmp-step_000003"]


def test_staging_keeps_its_memory_and_every_type():
    tensors = {
        "scalar": torch.tensor(3.0),
        "half": torch.randn(3, 5).bfloat16(),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "turned": torch.randn(4, 6).T,
    }
    staging = Staging(tensors)
    first = staging.copy(tensors)
    places = {name: value.data_ptr() for name, value in first.items()}
    assert all(torch.equal(first[name], value) for name, value in tensors.items())
    tensors["half"] += 1
    again = staging.copy(tensors)
    assert torch.equal(again["half"], tensors["half"]) and again["half"].dtype == torch.bfloat16
    assert {name: value.data_ptr() for name, value in again.items()} == places


def test_a_host_without_the_memory_saves_synchronously(tmp_path, monkeypatch, caplog):
    assert host_memory()[1] > 2**20
    monkeypatch.setattr(async_save, "fits_in_host_memory", lambda *_: False)
    tiny_run.run(tmp_path, Mesh(), steps=3)
    assert "host memory is too small for checkpoint.mode=async" in caplog.text
    assert [row["mode"] for row in read_rows(tmp_path / "saves.jsonl")] == ["sync"]


def test_written_files_are_safetensors_of_any_type(tmp_path):
    tensors = {
        "a.scalar": torch.tensor(2.5),
        "b": torch.randn(3, 2, dtype=torch.float64),
        "c": torch.tensor([True, False, True]),
        "d": torch.randn(5).half(),
        "e": torch.empty(0, 3),
        "f": torch.arange(3),
    }
    pieces = [Piece(key, value.dtype, tuple(value.shape), lambda value=value: value) for key, value in tensors.items()]
    record = write_safetensors(tmp_path / "x.safetensors", pieces, {"format": "pt"})
    assert record == run_folder.file_record(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for key, value in tensors.items():
            assert torch.equal(opened.get_tensor(key), value) and opened.get_tensor(key).dtype == value.dtype


def test_a_missing_part_of_a_tensor_is_no_export(tmp_path):
    """Rows 0-1 and 4-5 of six: what two of three ranks wrote."""
    for rank in (0, 2):
        rows = torch.full((2, 3), float(rank))
        offsets = '{"w": {"saved_offsets": [%d, 0]}}' % (2 * rank)  # noqa: UP031 (braces)
        pieces = [Piece("w", rows.dtype, (2, 3), lambda rows=rows: rows)]
        write_safetensors(tmp_path / f"rank{rank}.safetensors", pieces, {"DCP_SHARDING_INFO": offsets})
    with pytest.raises(CheckpointError, match="holds 12 of 18 values of w"):
        StateFiles(tmp_path).piece("w", "w", torch.empty(6, 3))
    with pytest.raises(CheckpointError, match="0 of 1 values of other"):
        StateFiles(tmp_path).piece("w", "other", torch.empty(1))
