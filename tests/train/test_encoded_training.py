"""Training from an encoded set: equal to training with encoders, and without a trace of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from encoded_files import config_of, from_cache, rounding, text_to_video, weights_of
from PIL import Image
from tiny_stage import stage_tree
from typer.testing import CliRunner

from longtake.cli import app as cli
from longtake.data.encoded import EncodedRows
from longtake.encodings.write import encode
from longtake.errors import DataError
from longtake.parallel.mesh import Mesh
from longtake.toy.world import sample_world
from longtake.train.metrics import read_rows
from longtake.train.stage import run_stage

# Student's videos of 3 latents are matched, real ones of 5 are learnt beside.
REAL_VIDEOS = {
    "video": {"height": 64, "width": 64, "num_latent_frames": 3},
    "data_loss": {"weight": 0.5, "num_latent_frames": 5},
}


@pytest.mark.whole
@pytest.mark.parametrize(("stage", "more"), [("causal", {}), ("distill", {}), ("distill", REAL_VIDEOS)])
def test_training_from_the_set_is_training_with_encoders(workshop, whole, tmp_path, monkeypatch, stage, more):
    """Bit for bit where texts are rounded alike; without that up to the rounding of text to bfloat16."""
    losses = {}
    clips = {"data": {"path": str(workshop / "data/clips"), "num_workers": 0}}
    for name, changes in (("exact", clips), ("cached", {}), ("rounded", clips)):
        if name == "rounded":
            rounding(monkeypatch)
        config = from_cache(workshop, tmp_path / name, whole, stage, **{"max_steps": 2} | more | changes)
        run_stage(config, Mesh())
        rows = [row for row in read_rows(config.folder / "metrics.jsonl") if "generator_loss" in row]
        losses[name] = [row["generator_loss"] for row in rows]
        assert all(("data_loss" in row) == bool(more) for row in rows)
        if name != "exact":
            weights = weights_of(config)
            losses[name, "weights"] = weights
    assert losses["cached"] == losses["rounded"]
    cached, rounded = losses["cached", "weights"], losses["rounded", "weights"]
    assert cached.keys() == rounded.keys() and all(torch.equal(cached[key], rounded[key]) for key in cached)
    assert losses["cached"][0] == pytest.approx(losses["exact"][0], rel=5e-3) and losses["cached"] != losses["exact"]


def test_a_set_of_longer_clips_trains_as_one_of_shorter_clips(workshop, whole, tmp_path, monkeypatch):
    """The VAE is causal: its first latents are those of the clip's first frames."""
    rounding(monkeypatch)
    shorter = {"video": {"height": 64, "width": 64, "num_latent_frames": 3}, "max_steps": 2}
    clips = {"data": {"path": str(workshop / "data/clips"), "num_workers": 0}}
    losses = []
    for name, changes in (("direct", clips), ("cached", {})):
        config = from_cache(workshop, tmp_path / name, whole, **shorter | changes)
        run_stage(config, Mesh())
        losses.append([row["generator_loss"] for row in read_rows(config.folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    longer = {"video": {"height": 64, "width": 64, "num_latent_frames": 7}}
    with pytest.raises(DataError, match="clips.num_latent_frames=5, wanted 7"):
        run_stage(from_cache(workshop, tmp_path / "x", whole, **longer), Mesh())


@pytest.mark.whole
def test_no_encoder_and_no_library_is_needed(workshop, whole, tmp_path):
    """In a process that cannot import what encoders and readers need, and whose encoders are gone."""
    script = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("av", "diffusers", "transformers", "tokenizers", "ftfy", "lmdb"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from longtake.config.stage import StageConfig
from longtake.parallel.mesh import Mesh
from longtake.train.stage import run_stage
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
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(trees)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in tmp_path.glob("*/checkpoints")} == {"teacher", "causal", "distill"}


@pytest.mark.whole
def test_buckets_train_the_same_with_and_without_the_set(workshop, photos, tmp_path, monkeypatch):
    rounding(monkeypatch)
    (photos / "2.png").unlink()
    (photos / "2.txt").unlink()
    (photos / "5.txt").write_text(sample_world(0, 5).caption)
    buckets = {"buckets": [[64, 64], [32, 48], [64, 32]], "num_workers": 0}
    changes = {"max_steps": 6, "batch_size": 2, "micro_batch_size": 2}
    direct = config_of(workshop, tmp_path / "direct", "distill", data={"path": str(photos)} | buckets, **changes)
    encode(direct, tmp_path / "e", Mesh(), rows_per_shard=5)
    assert {tuple(EncodedRows(tmp_path / "e").pixel_size(row)) for row in range(7)} == {(32, 48), (64, 32)}
    cached = config_of(
        workshop, tmp_path / "cached", "distill", data={"path": str(tmp_path / "e")} | buckets, **changes
    )
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
    encode(config_of(workshop, tmp_path, "distill", **changes), tmp_path / "e", Mesh())
    losses = []
    for name, path in (("direct", prompts), ("cached", tmp_path / "e")):
        config = config_of(workshop, tmp_path / name, "distill", **changes | {"data": {"path": str(path)}})
        run_stage(config, Mesh())
        losses.append([row["critic_loss"] for row in read_rows(config.folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.whole
def test_the_commands_of_the_recipes_run(tmp_path, monkeypatch):
    """Those of docs/recipes.md about one's own data, in its order, at a size that takes seconds."""
    text = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    text = text[text.index("## Your own data") : text.index("## Values and their order")]
    commands = re.findall(r"^(?:    |`)longtake ([^`\n]+)", text, re.M)
    assert [command.split()[0] for command in commands] == ["train", "encode", "train"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    (tmp_path / "photos").mkdir()
    for k, name in enumerate(("cat", "boat")):
        Image.fromarray(sample_world(0, k).render(1)[0]).save(tmp_path / f"photos/{name}.png")
        (tmp_path / f"photos/{name}.txt").write_text(sample_world(0, k).caption)
    small = ["max_steps=1", "batch_size=2", "micro_batch_size=2", "validate_every=0", "video.num_latent_frames=5"]
    for number, command in enumerate(commands):
        logdir = [f"logdir=log{number}", "init_from=toy"]
        shown = CliRunner().invoke(cli.app, [*command.split(), *small, *logdir])
        assert shown.exit_code == 0, shown.output
    assert len(list(tmp_path.glob("log*/distill/checkpoints/step_000001"))) == 2
