"""Seeded random commands, recipes and damaged files (`fuzz.py`): no traceback, no hang, no input lost. And what it found."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from longtake.cli.app import main
from longtake.data.file_rows import list_files, read_table
from longtake.data.formats import open_dataset
from longtake.encoders.strict import reading
from longtake.errors import CheckpointError, ConfigError, DataError
from longtake.json_text import parse_json
from longtake.outputs import check_own
from longtake.parallel.mesh import launched
from longtake.train.metrics import read_rows
from longtake.weights.config_json import read_json
from longtake.weights.lora_scale import number
from longtake.weights.read import open_published

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def fuzz(*words):
    command = [sys.executable, str(Path(__file__).parent / "fuzz.py"), *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_a_few_cases_find_nothing():
    fuzz("--seed", 17, "--cases", 8)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_minutes_find_nothing():
    fuzz("--seed", int.from_bytes(os.urandom(3)), "--seconds", 300)


# ---- what it found ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "message"), [("[" * 10**5, "too deep"), ('{"a": 1, "a": 2}', "'a' is there twice"), ("{", "Expecting")]
)
def test_json_of_others_is_read_or_a_value_error(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"not valid JSON: .*{message}"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "config.json") == {}


def test_tables_that_say_two_things_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "a.png", "text": "x", "text": "y"}\n{"file_name": "a.png", "text": "z"}\n')
    rows = list_files(tmp_path, "images")
    assert "'text' is there twice" in rows[0].problem and rows[1].problem is None
    table.unlink()
    for text, message in {
        "file_name,text,text\na.png,x,y\n": "twice",
        'file_name,text\na.png,"x\nb.png,y\n': "no CSV",
    }.items():
        (tmp_path / "metadata.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            list_files(tmp_path, "images")


def test_pointers_are_no_captions_and_no_tables(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("a.txt", "list.csv", "list.jsonl", "a.tar"):
        (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(DataError, match="no caption: it is a Git LFS pointer"):
        list_files(tmp_path, "images")[0].read_prompts()
    for name in ("list.csv", "list.jsonl"):
        with pytest.raises(DataError, match="no table: it is a Git LFS pointer"):
            list(read_table(tmp_path / name))
    for name in ("a.txt", "a.tar"):
        with pytest.raises(DataError, match="it is a Git LFS pointer"):
            open_dataset(tmp_path / name)


def test_suffixes_are_known_in_any_case(tmp_path):
    (tmp_path / "ROWS.JSONL").write_text('{"text": "x"}\n')
    (tmp_path / "LIST.CSV").write_text("image,text\na.png,x\n")
    assert open_dataset(tmp_path / "ROWS.JSONL")[0].prompt == "x"
    assert len(open_dataset(tmp_path / "LIST.CSV")) == 1


def test_a_folder_is_only_replaced_when_all_in_it_is_ours(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("images/000001.png", "images/thesis.png"):
        (tmp_path / name).write_text("x")
    check_own(tmp_path, ["images/*.png"])
    for own in (["images"], ["*"], ["images/0*.png"]):
        with pytest.raises(ConfigError, match=r"also holds images/"):
            check_own(tmp_path, own)


def test_a_file_that_holds_itself_and_numbers_without_end(tmp_path):
    held: dict = {"w": torch.ones(2)}
    held["model"] = held
    torch.save({"model": held}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds itself"):
        open_published(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="finite number"):
        number(10**400, "alpha")


def test_what_libraries_raise_about_their_files_is_told_and_ctrl_c_is_not():
    for error in (KeyError("x"), type("PanicException", (BaseException,), {})("no entry")):
        with (
            pytest.raises(CheckpointError, match="the tokenizer cannot be loaded: "),
            reading("the tokenizer cannot be loaded"),
        ):
            raise error
    with pytest.raises(KeyboardInterrupt), reading("x"):
        raise KeyboardInterrupt


def test_damaged_metrics_are_named(tmp_path):
    for data in (b"\xff\xfe{\n", b"[1]\n", b'{"step": "x"}\n', b"{\n"):
        (tmp_path / "metrics.jsonl").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl .*move it away"):
            read_rows(tmp_path / "metrics.jsonl")


def test_the_end_of_a_job_or_terminal_is_told_as_ctrl_c_is(monkeypatch):
    monkeypatch.setattr("longtake.cli.app.app", lambda **_: os.kill(os.getpid(), signal.SIGTERM))
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(KeyboardInterrupt):
            main()
        assert signal.getsignal(signal.SIGHUP) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_no_peer_can_come_to_port_0(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="MASTER_PORT='0' must be a port number"):
        launched()


@pytest.mark.parametrize("change", ["video.width=9223372036854775808", "video.height=100000", f"batch_size={10**30}"])
def test_sizes_beyond_all_machines_are_refused(change):
    from longtake.config.job import load_config

    with pytest.raises(ConfigError, match="too large|less than or equal to 8192"):
        load_config(Path(__file__).parent.parent / "configs" / "toy" / "causal.yaml", [change])


def test_an_event_has_a_time_that_can_be():
    from longtake.inference.script import Event

    with pytest.raises(ConfigError, match="seconds: got 1e\\+308"):
        Event(seconds=1e308, prompt="x")
