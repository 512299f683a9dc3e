"""Ctrl-C in the commands that write: exit code 130, one line that says what is kept, nothing half made under its name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from encoded_files import config_of
from local_hub import local_hub
from tiny_run import read_tensors
from tiny_stage import TEACHER, make_model, save_student, stage_config
from tiny_wan import write_model, write_photos
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.generation import GenerationConfig, write_rules
from longtake.config.stage import TOY_ASSETS, dump
from longtake.data.encoded import EncodedRows
from longtake.errors import LongtakeError
from longtake.plan import PlanConfig

AS_IT_WAS = "Interrupted; nothing was written; what was there before is as it was"


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(place, number)` has Ctrl-C come after so many calls of a function, by its dotted name."""

    def at(place, number):
        from importlib import import_module

        module, _, name = place.rpartition(".")
        whole, calls = getattr(import_module(module), name), []

        def counted(*words, **named):
            found = whole(*words, **named)
            calls.append(name)
            if len(calls) == number:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(import_module(module), name, counted)

    return at


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(result, line):
    lines = [line for line in result.output.splitlines() if line.startswith("Interrupted")]
    assert result.exit_code == 130 and lines == [line], result.output
    assert "Traceback" not in result.output


def test_while_the_command_line_is_loaded():
    program = "import runpy, sys\nclass Pressed:\n    def find_spec(self, name, *_):\n"
    program += "        if name == 'longtake.cli.app': raise KeyboardInterrupt\n"
    program += "sys.meta_path.insert(0, Pressed())\nrunpy.run_module('longtake', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("there", [False, True])
def test_export(workshop, tmp_path, interrupt, monkeypatch, there):
    save_student(stage_config(workshop, tmp_path / "run", "causal"), step=2)
    target, more = tmp_path / "student", ["--overwrite"] if there else []
    if there:
        assert invoke("export", tmp_path / "run", target).exit_code == 0
    before = bytes_of(target)
    interrupt("longtake.inference.export.save_dit", 1)
    check(invoke("export", tmp_path / "run", target, *more), AS_IT_WAS)
    assert bytes_of(target) == before and target.exists() == there
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")]
    monkeypatch.undo()
    assert invoke("export", tmp_path / "run", target, *more).exit_code == 0 and read_tensors(target)


def test_convert(tmp_path, interrupt, monkeypatch):
    words = ["convert", TOY_ASSETS / "student", tmp_path / "out", "--to", "longtake", "--shard-bytes", 3_000_000]
    interrupt("longtake.weights.convert.save_tensors", 2)
    check(invoke(*words), AS_IT_WAS)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert invoke(*words).exit_code == 0 and len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_encode(workshop, tmp_path, interrupt, monkeypatch):
    recipe, out = tmp_path / "stage.yaml", tmp_path / "set"
    recipe.write_text(dump(config_of(workshop, tmp_path)))
    words = ["encode", recipe, "-o", out, "--rows-per-shard", 2]
    interrupt("longtake.encodings.write.write_shard", 2)
    check(invoke(*words), "Interrupted; started again, it goes on where it was")
    with pytest.raises(LongtakeError, match="not complete"):
        EncodedRows(out)
    kept = {name: data for name, data in bytes_of(out).items() if name.endswith(".safetensors")}
    monkeypatch.undo()
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert kept and kept.items() <= bytes_of(out).items() and len(EncodedRows(out))


@pytest.mark.whole
def test_evaluate(tmp_path, workshop, interrupt, monkeypatch):
    write_photos(tmp_path / "photos", 2)
    rules = GenerationConfig(
        height=64, width=64, num_latent_frames=3, steps=[1.0, 0.5], plan=PlanConfig(block_frames=2, window_frames=5)
    )
    from tiny_stage import make_encoders

    write_model(tmp_path / "one", TEACHER, make_encoders())
    write_rules(tmp_path / "one", rules)
    out = tmp_path / "out"
    words = ["evaluate", "--model", tmp_path / "one", "--data", tmp_path / "photos", "-o", out, "--device", "cpu"]
    assert invoke(*words, "--rows", 1).exit_code == 0
    before = bytes_of(out)
    interrupt("longtake.evaluation.on_data._write_videos", 2)
    check(
        invoke(*words, "--overwrite"),
        "Interrupted; what was reported before is as it was; started again, it makes its videos anew",
    )
    assert before.items() <= bytes_of(out).items() and not list(out.glob("videos/*/.*"))
    monkeypatch.undo()
    assert invoke(*words, "--overwrite").exit_code == 0 and not (out / "videos.part").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_download(tmp_path):
    """At once, though a large file is on its way; what came whole is not fetched again."""
    from tiny_wan import T2V

    from longtake.weights.load import save_dit

    save_dit(T2V, make_model(T2V).state_dict(), tmp_path / "published")
    files = bytes_of(tmp_path / "published") | {"Wan2.1_VAE.pth": os.urandom(40 << 20)}
    words = [sys.executable, "-m", "longtake", "download", "a/b", "-o", str(tmp_path / "here")]
    with local_hub("a/b", files) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
        }
        hub.pause, hub.piece = 0.05, 1 << 18
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            folder, until = tmp_path / "here", time.monotonic() + 120
            while not any(path.stat().st_size > 1 << 20 for path in folder.rglob("*.incomplete")):
                assert process.poll() is None and time.monotonic() < until, process.communicate()
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130 and time.monotonic() - started < 15 and "Traceback" not in err, err
        assert err.splitlines()[-1] == (
            "Interrupted; files that came whole are kept; started again, it fetches the others"
        )
        assert bytes_of(folder).keys() >= {"config.json"} and not (folder / "Wan2.1_VAE.pth").exists()
        assert not list(folder.rglob("*.incomplete"))
        before = list(hub.sent)
        hub.pause = 0.0
        again = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert again.returncode == 0 and "Ready" in again.stdout, again.stderr
        assert (folder / "Wan2.1_VAE.pth").read_bytes() == files["Wan2.1_VAE.pth"]
        assert "config.json" in before and "Wan2.1_VAE.pth" in hub.sent[len(before) :]
        assert "config.json" not in hub.sent[len(before) :]
