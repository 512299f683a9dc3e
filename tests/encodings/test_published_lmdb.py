"""The published I2V layout, written by a program that knows nothing of ours, trains; its bad rows are caught in a run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_stage import stage_config

from longtake.data.encoded import EncodedRows
from longtake.encoders.bundle import Encoders
from longtake.encodings.write import encode
from longtake.errors import DataError
from longtake.objectives.teacher_forcing import TeacherForcing
from longtake.parallel.mesh import Mesh
from longtake.toy.world import sample_world
from longtake.train.metrics import read_rows
from longtake.train.stage import run_stage

lmdb = pytest.importorskip("lmdb")
WRITER = Path(__file__).parent / "published_lmdb.py"
ROWS = 5


def write(folder, *latents):
    prompts = "\n".join(sample_world(0, row).caption for row in range(ROWS))
    command = [sys.executable, str(WRITER), str(folder), str(ROWS), *map(str, latents)]
    subprocess.run(command, input=prompts, text=True, check=True, timeout=60)
    return folder


def damage(folder, key, value):
    with lmdb.open(str(folder), map_size=1 << 30) as database, database.begin(write=True) as transaction:
        transaction.delete(key) if value is None else transaction.put(key, value)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write(tmp_path_factory.mktemp("published") / "pictures")


def config_of(workshop, logdir, stage, path, **data):
    return stage_config(workshop, logdir, stage, data={"path": str(path)} | data, max_steps=2)


@pytest.mark.whole
def test_pictures_and_prompts_train_a_student(workshop, published, tmp_path):
    """Directly and from an encoded set, with the same losses up to the rounding of text."""
    direct = config_of(workshop, tmp_path / "direct", "distill", published)
    run_stage(direct, Mesh())
    encode(direct, tmp_path / "e", Mesh())
    assert len(EncodedRows(tmp_path / "e")) == ROWS
    cached = config_of(workshop, tmp_path / "cached", "distill", tmp_path / "e")
    run_stage(cached, Mesh())
    a, b = ([row["critic_loss"] for row in read_rows(c.folder / "metrics.jsonl")] for c in (direct, cached))
    assert len(a) == 2 and a == pytest.approx(b, rel=1e-2)


@pytest.mark.parametrize("trajectory", [(), (3,)])
def test_stored_latents_train_a_causal_model(workshop, tmp_path, monkeypatch, trajectory):
    """[F, C, H, W], not permuted; of a stored trajectory [K, F, C, H, W] the last, clean state."""
    path = write(tmp_path / "lmdb", *trajectory, 5, 4, 8, 8)
    seen, loss = [], TeacherForcing.loss

    def spy(self, turn, batch, step):
        seen.append(batch.latents)
        return loss(self, turn, batch, step)

    monkeypatch.setattr(TeacherForcing, "loss", spy)
    run_stage(config_of(workshop, tmp_path, "causal", path), Mesh())
    stored = []
    for row in range(ROWS):
        rng = np.random.default_rng(row)
        rng.integers(0, 256, (480, 832, 3), dtype=np.uint8)
        numbers = rng.normal(size=(*trajectory, 5, 4, 8, 8)).astype(np.float16)
        stored.append(torch.from_numpy(numbers[-1] if trajectory else numbers).float())
    for latents in torch.cat(seen):
        assert any(torch.equal(latents, wanted) for wanted in stored)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        ("distill", b"img_1_data", None, "shard_0 row 1: key img_1_data is missing"),
        ("distill", b"img_1_data", b"1" * 99, "shard_0 row 1: img_1_data has 99 bytes; shape .480, 832, 3."),
        ("distill", b"prompts_1_data", b"", "shard_0 row 1: prompts_1_data is empty"),
        ("causal", b"latents_1_data", None, "shard_0 row 1: has neither video nor latents"),
        ("causal", b"latents_1_data", b"1" * 10, "shard_0 row 1: latents_1_data has 10 bytes; shape .5, 4, 8, 8."),
    ],
)
def test_bad_rows_stop_a_run_or_are_replaced(workshop, tmp_path, caplog, stage, key, value, message):
    path = write(tmp_path / "lmdb", 5, 4, 8, 8)
    damage(path / "shard_0", key, value)
    with pytest.raises(DataError, match=message):
        run_stage(config_of(workshop, tmp_path / "fail", stage, path), Mesh())
    if value is not None:  # a run goes on alike whatever is wrong
        return
    run_stage(config_of(workshop, tmp_path / "skip", stage, path, on_bad_row="skip", max_bad_share=0.2), Mesh())
    assert "row 1 is skipped (1 bad rows so far)" in caplog.text
    with pytest.raises(DataError, match="1 of 5 rows are bad, more than data.max_bad_share=0.1"):
        run_stage(config_of(workshop, tmp_path / "few", stage, path, on_bad_row="skip", max_bad_share=0.1), Mesh())


def test_latents_of_another_size_are_named(workshop, tmp_path):
    path = write(tmp_path / "lmdb", 5, 4, 6, 6)
    with pytest.raises(
        DataError, match=r"shard_. row .: stored latents are \(5, 4, 6, 6\); they must be \(5, 4, 8, 8\)"
    ):
        run_stage(config_of(workshop, tmp_path, "causal", path), Mesh())


def test_an_encoder_that_reads_the_set_is_needed_once(workshop, published, tmp_path, monkeypatch):
    """Training from the encoded set does not even look for the LMDB."""
    config = config_of(workshop, tmp_path, "distill", published)
    encode(config, tmp_path / "e", Mesh())
    monkeypatch.setattr(Encoders, "load", None)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    run_stage(config_of(workshop, tmp_path, "distill", tmp_path / "e"), Mesh())
