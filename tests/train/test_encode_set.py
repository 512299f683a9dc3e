"""`longtake encode`: what it stores, that it can be killed and shared, what it refuses, and training from it."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fake_ranks import on_ranks
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_stage import TEACHER, make_model, stage_config, stage_tree
from typer.testing import CliRunner

from longtake import cli
from longtake.data.encoded import EncodedRows
from longtake.data.formats import open_dataset
from longtake.data.world import sample_world
from longtake.distributed.mesh import Mesh
from longtake.errors import ConfigError, DataError
from longtake.models.conditioning import encode_condition
from longtake.models.encoders import Encoders, TextEncoder
from longtake.models.weights import save_dit
from longtake.runs import latest_checkpoint
from longtake.train import encode_set as module
from longtake.train.encode_set import encode_set
from longtake.train.metrics_log import read_rows
from longtake.train.stages import run_stage

ROWS = 6


def config_of(workshop, logdir, stage="causal", **changes):
    return stage_config(workshop, logdir, stage, **changes)


def from_cache(workshop, logdir, path, stage="causal", **changes):
    return config_of(workshop, logdir, stage, **{"data": {"path": str(path), "num_workers": 0}} | changes)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def weights_of(config):
    path = latest_checkpoint(config.folder / "checkpoints")
    return {f.parent.name + k: v for f in sorted(path.rglob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.fixture(autouse=True)
def one_load_at_a_time(monkeypatch):
    """Ranks are threads here, and transformers' loading is not made for threads."""
    load, lock = Encoders.load.__func__, threading.Lock()

    def locked(cls, *arguments, **options):
        with lock:
            return load(cls, *arguments, **options)

    monkeypatch.setattr(Encoders, "load", classmethod(locked))


@pytest.fixture(scope="module")
def whole(workshop, tmp_path_factory):
    """The clips of the workshop, encoded for a causal stage in three shards of two rows."""
    folder = tmp_path_factory.mktemp("encoded") / "whole"
    encode_set(config_of(workshop, folder), folder, Mesh(), rows_per_shard=2)
    return folder


# ---- what is stored --------------------------------------------------------------------------------------------------
def test_stored_numbers_are_those_of_the_encoders(workshop, whole):
    encoders = Encoders.load(workshop / "encoders")
    clips, dataset = open_dataset(workshop / "data/clips", num_frames=17, fps=16), EncodedRows(whole)
    assert len(dataset) == ROWS and dataset.key["contents"] == ["clip", "y", "latents"]
    for row in range(ROWS):
        sample, stored = clips[row], dataset[row]
        signed = torch.from_numpy(sample.video).permute(0, 3, 1, 2).float()[None] / 127.5 - 1
        wanted = encode_condition(encoders, signed[:, 0], [sample.prompt])
        assert (stored.name, stored.prompt) == (sample.name, sample.prompt)
        text = torch.from_numpy(stored.extras["text"])
        assert torch.equal(text, text.bfloat16().float())
        torch.testing.assert_close(text, wanted.text[0], rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(stored.extras["clip"]), wanted.image[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(stored.extras["y"]), wanted.frames[0, :, 4:], rtol=0, atol=1e-5)
        assert len(stored.extras["y"]) == encoders.vae.steady_index + 1
        latents = encoders.vae.encode(signed)[0]
        torch.testing.assert_close(torch.from_numpy(stored.extras["latents"]), latents, rtol=0, atol=1e-5)
    empty = torch.from_numpy(dataset.empty_text)
    torch.testing.assert_close(empty, encoders.text.encode([""])[0], rtol=2**-8, atol=1e-6)


def test_only_real_tokens_are_on_disk(workshop, whole):
    encoders, clips = Encoders.load(workshop / "encoders"), open_dataset(workshop / "data/clips", num_frames=17)
    with safe_open(whole / "shard_00001.safetensors", "pt") as shard:
        text = shard.get_tensor("000001.text")
    words = encoders.text.tokenizer(clips[3].prompt).input_ids
    assert text.dtype == torch.bfloat16 and text.shape == (len(words), encoders.text.width)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_types_round_and_nothing_else(workshop, whole, tmp_path, dtype):
    encode_set(config_of(workshop, tmp_path), tmp_path / "e", Mesh(), dtype=dtype)
    exact, rounded = EncodedRows(whole), EncodedRows(tmp_path / "e")
    for name in ("clip", "y", "latents"):
        wanted = torch.from_numpy(exact[4].extras[name]).to(getattr(torch, dtype)).float()
        assert torch.equal(torch.from_numpy(rounded[4].extras[name]), wanted)


def test_every_prompt_of_a_row_is_encoded(workshop, tmp_path):
    prompts = [sample_world(0, k).caption for k in range(3)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompts": prompts}) + "\n" + json.dumps({"prompts": prompts[:1]}))
    config = config_of(workshop, tmp_path, "distill", **text_to_video(tmp_path, tmp_path / "rows.jsonl"))
    encode_set(config, tmp_path / "e", Mesh())
    sample = EncodedRows(tmp_path / "e")[0]
    assert sample.prompts == tuple(prompts) and sorted(sample.extras) == ["text", "text_1", "text_2"]
    wanted = Encoders.load(workshop / "encoders").text.encode(prompts).bfloat16().float()
    for k, name in enumerate(("text", "text_1", "text_2")):
        torch.testing.assert_close(torch.from_numpy(sample.extras[name]), wanted[k], rtol=2**-7, atol=1e-6)
    assert sorted(EncodedRows(tmp_path / "e")[1].extras) == ["text"]


# ---- killed, shared --------------------------------------------------------------------------------------------------
def _killed_in_a_write(config, folder, shard):
    """Runs in a process of its own, which dies with half a shard written."""
    publish = module.write_shard

    def write(file, *arguments):
        if file.name == f"shard_{shard:05d}.safetensors":
            file.with_name(f".{file.name}.partial").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        publish(file, *arguments)

    module.write_shard = write
    encode_set(config, folder, Mesh(), rows_per_shard=2)


@pytest.mark.parametrize("shard", [0, 1])
def test_killed_and_started_again_gives_the_same_bytes(workshop, whole, tmp_path, shard):
    config = config_of(workshop, whole)
    killed = multiprocessing.get_context("fork").Process(target=_killed_in_a_write, args=(config, tmp_path / "e", shard))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "e").glob("shard_*"))) == shard and files(tmp_path / "e") != files(whole)
    with pytest.raises(DataError, match="is not complete; the same `longtake encode` command goes on"):
        open_dataset(tmp_path / "e")
    report = encode_set(config, tmp_path / "e", Mesh(), rows_per_shard=2)
    assert report.rows_now == ROWS - 2 * shard and report.num_rows == ROWS
    assert files(tmp_path / "e") == files(whole)


def test_two_and_three_ranks_give_the_set_of_one(workshop, whole, tmp_path):
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        reports = on_ranks(lambda mesh, f=folder: encode_set(config_of(workshop, f), f, mesh, rows_per_shard=2), ranks)
        assert files(folder) == files(whole)
        assert len({str(report.num_rows) for report in reports}) == 1


def test_a_lost_shard_is_written_again_and_a_complete_set_is_left_alone(workshop, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "e")
    (tmp_path / "e/shard_00001.safetensors").unlink()
    with pytest.raises(DataError, match="shard_00001.safetensors is missing or not of"):
        open_dataset(tmp_path / "e")
    config = config_of(workshop, whole)
    assert encode_set(config, tmp_path / "e", Mesh(), rows_per_shard=2).rows_now == 2
    assert encode_set(config, tmp_path / "e", Mesh(), rows_per_shard=2).rows_now == 0
    assert files(tmp_path / "e") == files(whole)


# ---- refused ---------------------------------------------------------------------------------------------------------
def test_a_folder_with_something_else_is_refused(workshop, whole, tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(DataError, match="exists and is no encoded set"):
        encode_set(config_of(workshop, tmp_path), tmp_path, Mesh())
    with pytest.raises(DataError, match="holds another encoded set: request.rows_per_shard=2, wanted 3. Remove it"):
        encode_set(config_of(workshop, whole), whole, Mesh(), rows_per_shard=3)
    small = config_of(workshop, whole, video={"height": 64, "width": 64, "num_latent_frames": 3})
    with pytest.raises(DataError, match="key.clips.num_latent_frames=5, wanted 3"):
        encode_set(small, whole, Mesh(), rows_per_shard=2)
    with pytest.raises(ConfigError, match="is an encoded set already"):
        encode_set(from_cache(workshop, tmp_path, whole), tmp_path / "e", Mesh())
    with pytest.raises(ConfigError, match="dtype=float8 must be one of float32, float16, bfloat16"):
        encode_set(config_of(workshop, tmp_path), tmp_path / "e", Mesh(), dtype="float8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": {"height": 64, "width": 64, "num_latent_frames": 3}}, "clips.num_latent_frames=5, wanted 3"),
        ({"video": {"height": 64, "width": 64, "num_latent_frames": 5, "fps": 8}}, "clips.fps=16, wanted 8"),
        (
            {"video": {"height": 32, "width": 64, "num_latent_frames": 5}},
            r"sizes=\[\[64, 64\]\], wanted \[\[32, 64\]\]",
        ),
        (
            {"video": {"height": 64, "width": 64, "num_latent_frames": 5, "spatial_stride": 16}},
            "strides.spatial=8, wanted 16",
        ),
    ],
)
def test_a_stale_set_is_refused_with_what_differs(workshop, whole, tmp_path, changes, message):
    with pytest.raises(DataError, match=f"{whole} does not fit stage causal: .*{message}.*longtake encode"):
        run_stage(from_cache(workshop, tmp_path, whole, **changes), Mesh())
    assert not (tmp_path / "causal").exists()


def test_other_encoders_are_noticed_and_missing_ones_are_said(workshop, whole, tmp_path, caplog):
    other = tmp_path / "encoders"
    shutil.copytree(workshop / "encoders", other)
    for file in other.rglob("*"):
        os.utime(file, (1, 1))  # other times, equal contents: compared byte by byte, and accepted
    changes = {"encoders": str(other), "max_steps": 1}
    run_stage(from_cache(workshop, tmp_path / "same", whole, **changes), Mesh())
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"latents_mean": [0.2] * 4}))
    with pytest.raises(DataError, match="the files of the vae encoder in .* are not those it was made with"):
        run_stage(from_cache(workshop, tmp_path / "other", whole, **changes), Mesh())
    changes["encoders"] = str(tmp_path / "gone")
    run_stage(from_cache(workshop, tmp_path / "gone_log", whole, **changes), Mesh())
    assert "There is no vae encoder in" in caplog.text


def test_a_set_of_pictures_does_not_pass_for_one_of_videos(workshop, tmp_path):
    encode_set(config_of(workshop, tmp_path, "distill"), tmp_path / "e", Mesh())
    assert EncodedRows(tmp_path / "e").key["contents"] == ["clip", "y"]
    with pytest.raises(DataError, match="does not fit stage causal: it lacks latents"):
        run_stage(from_cache(workshop, tmp_path, tmp_path / "e"), Mesh())
    (tmp_path / "e/index.json").write_text((tmp_path / "e/index.json").read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(DataError, match="version 9; this version of Longtake reads 'longtake_encoded' version 1"):
        run_stage(from_cache(workshop, tmp_path, tmp_path / "e", "distill"), Mesh())


def test_validation_says_that_it_needs_the_encoders(workshop, whole, tmp_path):
    with pytest.raises(ConfigError, match="validate_every=2 needs the encoders, .*; set validate_every=0"):
        run_stage(from_cache(workshop, tmp_path, whole, validate_every=2), Mesh())


# ---- bad rows --------------------------------------------------------------------------------------------------------
@pytest.fixture
def photos(tmp_path):
    """Eight pictures of two aspects with captions of the toy world; number 2 is broken, 5 has no caption."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(8):
        shape = (64, 96, 3) if k % 2 else (80, 40, 3)
        pixels = np.random.default_rng(k).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(sample_world(0, k).caption)
    (folder / "2.png").write_bytes(b"broken")
    (folder / "5.txt").write_text("")
    return folder


def test_bad_rows_stop_or_are_left_out_and_listed(workshop, photos, tmp_path):
    data = {"path": str(photos), "num_workers": 2}
    with pytest.raises(DataError, match=r"row 2 \(2.png\).* set data.on_bad_row=skip"):
        encode_set(config_of(workshop, tmp_path, "distill", data=data), tmp_path / "fail", Mesh())
    skipping = data | {"on_bad_row": "skip", "max_bad_share": 0.25}
    config = config_of(workshop, tmp_path, "distill", data=skipping)
    report = encode_set(config, tmp_path / "e", Mesh(), rows_per_shard=3)
    assert (report.num_rows, report.num_bad) == (6, 2) and "2 bad rows left out" in str(report)
    index = json.loads((tmp_path / "e/index.json").read_text())
    assert [entry["row"] for entry in index["bad_rows"]] == [2, 5]
    assert "2.png" in index["bad_rows"][0]["problem"] and "5.txt is empty" in index["bad_rows"][1]["problem"]
    assert [EncodedRows(tmp_path / "e")[row].name for row in range(6)] == ["0", "1", "3", "4", "6", "7"]
    strict = config_of(workshop, tmp_path, "distill", data=skipping | {"max_bad_share": 0.2})
    with pytest.raises(DataError, match="2 of 8 rows are bad, more than data.max_bad_share=0.2"):
        encode_set(strict, tmp_path / "strict", Mesh())
    # each of two ranks meets one of them; together they are too many
    with pytest.raises(DataError, match="2 of 8 rows are bad, more than data.max_bad_share=0.2"):
        on_ranks(lambda mesh: encode_set(strict, tmp_path / "ranks", mesh, rows_per_shard=4))


# ---- training --------------------------------------------------------------------------------------------------------
def text_to_video(folder, path):
    """Changes of a stage for a text-to-video model, whose weights are written to `folder`."""
    sizes = TEACHER.__class__(**TEACHER.to_dict() | {"in_channels": 4, "image_dim": None, "model_type": "t2v"})
    save_dit(sizes, make_model(sizes).state_dict(), folder / "t2v")
    return {
        "model": {"image_condition": "t2v"},
        "init_from": str(folder / "t2v"),
        "teacher": str(folder / "t2v"),
        "plan": {"block_frames": 2, "first_frames": 2, "window_frames": 4, "sink_frames": 2},
        "video": {"height": 64, "width": 64, "num_latent_frames": 4},
        "data": {"path": str(path), "num_workers": 0},
        "max_steps": 2,
    }


def rounding(monkeypatch):
    """Makes the text encoder round as the set on disk does."""
    exact = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompts: exact(self, prompts).bfloat16().float())


@pytest.mark.parametrize("stage", ["causal", "distill"])
def test_training_from_the_set_is_training_with_encoders(workshop, whole, tmp_path, monkeypatch, stage):
    """Bit for bit where texts are rounded alike; without that up to the rounding of text to bfloat16."""
    losses = {}
    clips = {"data": {"path": str(workshop / "data/clips"), "num_workers": 0}}
    for name, changes in (("exact", clips), ("cached", {}), ("rounded", clips)):
        if name == "rounded":
            rounding(monkeypatch)
        config = from_cache(workshop, tmp_path / name, whole, stage, **{"max_steps": 3} | changes)
        run_stage(config, Mesh())
        losses[name] = [row["generator_loss"] for row in read_rows(config.folder / "metrics.jsonl") if "generator_loss" in row]
        if name != "exact":
            weights = weights_of(config)
            losses[name, "weights"] = weights
    assert losses["cached"] == losses["rounded"]
    cached, rounded = losses["cached", "weights"], losses["rounded", "weights"]
    assert cached.keys() == rounded.keys() and all(torch.equal(cached[key], rounded[key]) for key in cached)
    assert losses["cached"][0] == pytest.approx(losses["exact"][0], rel=5e-3) and losses["cached"] != losses["exact"]


def test_no_encoder_and_no_library_is_needed(workshop, whole, tmp_path):
    """In a process that cannot import what encoders and readers need, and whose encoders are gone."""
    script = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("av", "diffusers", "transformers", "tokenizers", "ftfy", "lmdb"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from longtake.config import StageConfig
from longtake.distributed.mesh import Mesh
from longtake.train.stages import run_stage
import json
for tree in json.loads(sys.argv[1]):
    run_stage(StageConfig.from_tree(tree), Mesh())
"""
    data = {"path": str(whole), "kind": "encoded", "num_workers": 0}
    trees = [
        stage_tree(workshop, tmp_path, stage, data=data, max_steps=1, encoders=str(tmp_path / "none"))
        for stage in ("teacher", "causal", "distill")
    ]
    trees[2]["init_from"] = "causal"
    done = subprocess.run([sys.executable, "-c", script, json.dumps(trees)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in tmp_path.glob("*/checkpoints")} == {"teacher", "causal", "distill"}


def test_buckets_train_the_same_with_and_without_the_set(workshop, photos, tmp_path, monkeypatch):
    rounding(monkeypatch)
    (photos / "2.png").unlink()
    (photos / "2.txt").unlink()
    (photos / "5.txt").write_text(sample_world(0, 5).caption)
    buckets = {"buckets": [[64, 64], [32, 48], [64, 32]], "num_workers": 0}
    changes = {"max_steps": 6, "batch_size": 2, "micro_batch_size": 2}
    direct = config_of(workshop, tmp_path / "direct", "distill", data={"path": str(photos)} | buckets, **changes)
    encode_set(direct, tmp_path / "e", Mesh(), rows_per_shard=5)
    assert {tuple(EncodedRows(tmp_path / "e").pixel_size(row)) for row in range(7)} == {(32, 48), (64, 32)}
    cached = config_of(workshop, tmp_path / "cached", "distill", data={"path": str(tmp_path / "e")} | buckets, **changes)
    for config in (direct, cached):
        run_stage(config, Mesh())
    a, b = weights_of(direct), weights_of(cached)
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], rtol=0, atol=1e-6) for key in a)
    with pytest.raises(DataError, match=r"sizes=\[\[64, 64\], \[32, 48\], \[64, 32\]\], wanted \[\[64, 64\]\]"):
        run_stage(from_cache(workshop, tmp_path / "x", tmp_path / "e", "distill"), Mesh())


def test_prompts_alone_train_a_text_to_video_student(workshop, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(sample_world(0, k).caption for k in range(5)))
    changes = text_to_video(tmp_path, prompts)
    encode_set(config_of(workshop, tmp_path, "distill", **changes), tmp_path / "e", Mesh())
    losses = []
    for name, path in (("direct", prompts), ("cached", tmp_path / "e")):
        config = config_of(workshop, tmp_path / name, "distill", **changes | {"data": {"path": str(path)}})
        run_stage(config, Mesh())
        losses.append([row["critic_loss"] for row in read_rows(config.folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


# ---- the command and the documents -----------------------------------------------------------------------------------
def test_the_command(workshop, tmp_path):
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(stage_tree(workshop, tmp_path, "distill")))
    arguments = ["encode", str(file), "-o", str(tmp_path / "e"), "--rows-per-shard", "4", "--dtype", "float16"]
    shown = CliRunner().invoke(cli.app, [*arguments, "data.num_workers=1"])
    assert shown.exit_code == 0, shown.output
    assert "6 rows, 0 bad rows left out" in shown.output and "rows/s on 1 ranks" in shown.output
    assert len(EncodedRows(tmp_path / "e")) == ROWS
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"logdir": "x", "stages": {"distill": str(file)}}))
    shown = CliRunner().invoke(cli.app, ["encode", str(tmp_path / "job.yaml"), "-o", str(tmp_path / "f")])
    assert shown.exit_code == 2 and "is a job" in shown.output
