"""`longtake encode`: what it stores, that it can be killed and shared, what it refuses, and training from it."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from encoded_files import ROWS, config_of, files, from_cache, text_to_video
from fake_ranks import on_ranks
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_stage import stage_config, stage_tree
from typer.testing import CliRunner

from longtake.cli import app as cli
from longtake.data.encoded import EncodedRows
from longtake.data.formats import open_dataset
from longtake.encoders.bundle import Encoders
from longtake.encoders.condition import encode_condition
from longtake.encodings import write as module
from longtake.encodings.encode import BatchEncoder
from longtake.encodings.write import encode
from longtake.errors import ConfigError, DataError
from longtake.parallel.mesh import Mesh
from longtake.toy.world import sample_world
from longtake.train.stage import run_stage


@pytest.fixture(autouse=True)
def one_load_at_a_time(monkeypatch):
    """Ranks are threads here, and transformers' loading is not made for threads."""
    load, lock = Encoders.load.__func__, threading.Lock()

    def locked(cls, *arguments, **options):
        with lock:
            return load(cls, *arguments, **options)

    monkeypatch.setattr(Encoders, "load", classmethod(locked))


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
    encode(config_of(workshop, tmp_path), tmp_path / "e", Mesh(), dtype=dtype)
    exact, rounded = EncodedRows(whole), EncodedRows(tmp_path / "e")
    for name in ("clip", "y", "latents"):
        wanted = torch.from_numpy(exact[4].extras[name]).to(getattr(torch, dtype)).float()
        assert torch.equal(torch.from_numpy(rounded[4].extras[name]), wanted)


def test_every_prompt_of_a_row_is_encoded(workshop, tmp_path):
    prompts = [sample_world(0, k).caption for k in range(3)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompts": prompts}) + "\n" + json.dumps({"prompts": prompts[:1]}))
    config = config_of(workshop, tmp_path, "distill", **text_to_video(tmp_path, tmp_path / "rows.jsonl"))
    encode(config, tmp_path / "e", Mesh())
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
    encode(config, folder, Mesh(), rows_per_shard=2)


@pytest.mark.whole
@pytest.mark.parametrize("shard", [0, 1])
def test_killed_and_started_again_gives_the_same_bytes(workshop, whole, tmp_path, shard):
    config = config_of(workshop, whole)
    killed = multiprocessing.get_context("fork").Process(
        target=_killed_in_a_write, args=(config, tmp_path / "e", shard)
    )
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "e").glob("shard_*"))) == shard and files(tmp_path / "e") != files(whole)
    with pytest.raises(DataError, match="is not complete; the same `longtake encode` command goes on"):
        open_dataset(tmp_path / "e")
    report = encode(config, tmp_path / "e", Mesh(), rows_per_shard=2)
    assert report.rows_now == ROWS - 2 * shard and report.num_rows == ROWS
    assert files(tmp_path / "e") == files(whole)


def test_the_encoders_always_see_one_batch_size(workshop, tmp_path, monkeypatch):
    """Which the last bits depend on: short batches are filled up, at the end of shards too."""
    sizes, rows = [], BatchEncoder.rows
    monkeypatch.setattr(BatchEncoder, "rows", lambda self, batch: sizes.append(len(batch)) or rows(self, batch))
    encode(config_of(workshop, tmp_path), tmp_path / "e", Mesh(), rows_per_shard=3)
    assert sizes == [2, 2, 2, 2] and len(EncodedRows(tmp_path / "e")) == ROWS


@pytest.mark.whole
def test_two_and_three_ranks_give_the_set_of_one(workshop, whole, tmp_path):
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        reports = on_ranks(lambda mesh, f=folder: encode(config_of(workshop, f), f, mesh, rows_per_shard=2), ranks)
        assert files(folder) == files(whole)
        assert len({str(report.num_rows) for report in reports}) == 1


def test_a_lost_shard_is_written_again_and_a_complete_set_is_left_alone(workshop, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "e")
    (tmp_path / "e/shard_00001.safetensors").unlink()
    with pytest.raises(DataError, match="shard_00001.safetensors is missing or not of"):
        open_dataset(tmp_path / "e")
    config = config_of(workshop, whole)
    assert encode(config, tmp_path / "e", Mesh(), rows_per_shard=2).rows_now == 2
    assert encode(config, tmp_path / "e", Mesh(), rows_per_shard=2).rows_now == 0
    assert files(tmp_path / "e") == files(whole)


def test_what_a_killed_writer_left_is_overwritten_with_the_rest(workshop, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "e")
    (tmp_path / "e/.shard_00001.safetensors.partial").write_bytes(b"half")
    config, unlink = config_of(workshop, whole), Path.unlink

    def killed(self, *args, **given):
        if self.name == "index.json":
            raise KeyboardInterrupt
        unlink(self, *args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            encode(config, tmp_path / "e", Mesh(), rows_per_shard=3, overwrite=True)
    encode(config, tmp_path / "e", Mesh(), rows_per_shard=3, overwrite=True)
    assert {path.name for path in (tmp_path / "e").iterdir()} >= {"index.json", "shard_00000.safetensors"}
    assert not list((tmp_path / "e").glob(".*"))


# ---- refused ---------------------------------------------------------------------------------------------------------
def test_a_folder_with_something_else_is_refused(workshop, whole, tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(DataError, match="exists and is no encoded set"):
        encode(config_of(workshop, tmp_path), tmp_path, Mesh())
    with pytest.raises(
        DataError,
        match="holds another encoded set: request.rows_per_shard=2, wanted 3. Name another folder, or give --overwrite",
    ):
        encode(config_of(workshop, whole), whole, Mesh(), rows_per_shard=3)
    small = config_of(workshop, whole, video={"height": 64, "width": 64, "num_latent_frames": 3})
    with pytest.raises(DataError, match="key.clips.num_latent_frames=5, wanted 3"):
        encode(small, whole, Mesh(), rows_per_shard=2)
    with pytest.raises(ConfigError, match="is an encoded set already"):
        encode(from_cache(workshop, tmp_path, whole), tmp_path / "e", Mesh())
    with pytest.raises(ConfigError, match="dtype=float8 must be one of float32, float16, bfloat16"):
        encode(config_of(workshop, tmp_path), tmp_path / "e", Mesh(), dtype="float8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": {"height": 64, "width": 64, "num_latent_frames": 7}}, "clips.num_latent_frames=5, wanted 7"),
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
    encode(config_of(workshop, tmp_path, "distill"), tmp_path / "e", Mesh())
    assert EncodedRows(tmp_path / "e").key["contents"] == ["clip", "y"]
    with pytest.raises(DataError, match="does not fit stage causal: it lacks latents"):
        run_stage(from_cache(workshop, tmp_path, tmp_path / "e"), Mesh())
    (tmp_path / "e/index.json").write_text(
        (tmp_path / "e/index.json").read_text().replace('"version": 1', '"version": 9')
    )
    with pytest.raises(DataError, match="version 9; this version of Longtake reads 'longtake_encoded' version 1"):
        run_stage(from_cache(workshop, tmp_path, tmp_path / "e", "distill"), Mesh())


def test_validation_says_that_it_needs_the_encoders(workshop, whole, tmp_path):
    with pytest.raises(ConfigError, match="validate_every=2 needs the encoders, .*; set validate_every=0"):
        run_stage(from_cache(workshop, tmp_path, whole, validate_every=2), Mesh())


# ---- damage ----------------------------------------------------------------------------------------------------------
def samples_of(folder):
    rows = EncodedRows(folder)
    return [
        (s.name, s.prompts, *(a.tobytes() for _, a in sorted(s.extras.items())))
        for s in map(rows.__getitem__, range(6))
    ]


@pytest.mark.parametrize("name", ["shard_00001.safetensors", "empty_text.safetensors", "index.json"])
def test_no_changed_byte_goes_unnoticed(whole, tmp_path, name):
    """A bit of each of some 60 bytes all over a file changes nothing that is read (padding), or is refused in words."""
    shutil.copytree(whole, tmp_path / "e")
    file, right = tmp_path / "e" / name, samples_of(whole)
    content, refused = file.read_bytes(), 0
    for place in range(0, len(content), max(1, len(content) // 60)):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        try:
            assert samples_of(tmp_path / "e") == right
            assert (EncodedRows(tmp_path / "e").empty_text == EncodedRows(whole).empty_text).all()
        except DataError as error:
            refused += 1
            assert name in str(error) and "`longtake encode`" in str(error)
    assert refused > 40


def test_a_set_of_an_earlier_version_is_read_without_checksums(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "e")
    for file in (tmp_path / "e").glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            head = json.loads((stored.metadata() or {}).get("rows", "{}"))
        head["rows"] = [{k: v for k, v in row.items() if k != "checksum"} for row in head.get("rows", [])]
        save_file(tensors, file, {"rows": json.dumps(head)})
    index = json.loads((whole / "index.json").read_text())
    del index["checksum"], index["request"]["rows"]
    for shard in index["shards"]:
        shard["size_bytes"] = (tmp_path / "e" / shard["file"]).stat().st_size
    (tmp_path / "e/index.json").write_text(json.dumps(index))
    assert samples_of(tmp_path / "e") == samples_of(whole)


# ---- bad rows --------------------------------------------------------------------------------------------------------
@pytest.mark.whole
def test_bad_rows_stop_or_are_left_out_and_listed(workshop, photos, tmp_path):
    data = {"path": str(photos), "num_workers": 2}
    with pytest.raises(DataError, match=r"row 2 \(2.png\).* set data.on_bad_row=skip"):
        encode(config_of(workshop, tmp_path, "distill", data=data), tmp_path / "fail", Mesh())
    skipping = data | {"on_bad_row": "skip", "max_bad_share": 0.25}
    config = config_of(workshop, tmp_path, "distill", data=skipping)
    report = encode(config, tmp_path / "e", Mesh(), rows_per_shard=3)
    assert (report.num_rows, report.num_bad) == (6, 2) and "2 bad rows left out" in str(report)
    index = json.loads((tmp_path / "e/index.json").read_text())
    assert [entry["row"] for entry in index["bad_rows"]] == [2, 5]
    assert "2.png" in index["bad_rows"][0]["problem"] and "5.txt is empty" in index["bad_rows"][1]["problem"]
    assert [EncodedRows(tmp_path / "e")[row].name for row in range(6)] == ["0", "1", "3", "4", "6", "7"]
    strict = config_of(workshop, tmp_path, "distill", data=skipping | {"max_bad_share": 0.2})
    with pytest.raises(DataError, match="2 of 8 rows are bad, more than data.max_bad_share=0.2"):
        encode(strict, tmp_path / "strict", Mesh())
    # each of two ranks meets one of them; together they are too many
    with pytest.raises(DataError, match="2 of 8 rows are bad, more than data.max_bad_share=0.2"):
        on_ranks(lambda mesh: encode(strict, tmp_path / "ranks", mesh, rows_per_shard=4))


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


FORMATS_MD = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()


def stated(words):
    """The number of bytes that docs/formats.md states in the table row that begins with `words`."""
    row = next(line for line in FORMATS_MD.splitlines() if line.startswith(f"| {words} |"))
    return int(row.split("|")[2].replace(" ", ""))


@pytest.mark.whole
def test_the_sizes_in_the_documents_are_those_of_the_files(tmp_path):
    """Wan at 480x832 from its shapes, written as zeros; the toy measured with its encoders."""
    latent = (16, 60, 104)
    arrays = {"clip": (257, 1280), "y": (30, *latent), "latents": (21, *latent)}
    for name, shape in arrays.items():
        assert stated(f"`{name}`, Wan2.1, 21 latents of 480x832") == 4 * np.prod(shape)
    assert stated("`text`, umT5-xxl, each token") == 2 * 4096
    tensors = {name: torch.zeros(shape) for name, shape in arrays.items()}
    sample = module.EncodedSample(0, "a", ("p",), [torch.zeros(100, 4096).bfloat16()], tensors)
    module.write_shard(tmp_path / "shard", [sample], [])
    size = (tmp_path / "shard").stat().st_size
    assert 0 < stated("a row with a prompt of 100 tokens, Wan2.1, causal") - size + 1000 < 2000
    toy = stage_config(tmp_path, tmp_path, "distill", encoders="toy", init_from="toy", teacher="toy",
                       data={"path": str(tmp_path / "pictures")})  # fmt: skip
    (tmp_path / "pictures").mkdir()
    for k in range(4):
        Image.fromarray(sample_world(0, k).render(1)[0]).save(tmp_path / f"pictures/{k}.png")
        (tmp_path / f"pictures/{k}.txt").write_text(sample_world(0, k).caption)
    report = encode(toy, tmp_path / "e", Mesh())
    assert report.size_bytes / 4 == pytest.approx(stated("a row of the toy world, distill"), rel=0.03)
