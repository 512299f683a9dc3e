"""Resuming with other options or other rows: exactly right, or refused with the reason before anything is built."""

import json
import shutil

import pytest
import tiny_run
import torch
from tiny_stage import stage_config

from longtake import run_folder
from longtake.checkpoint.async_save import Saver
from longtake.checkpoint.invariants import compare_facts, invariants, resume_invariants, rows_invariant
from longtake.data.formats import open_dataset
from longtake.errors import CheckpointError
from longtake.parallel.mesh import Mesh
from longtake.train.metrics import read_rows
from longtake.train.stage import run_stage

LONG = {"num_chunks": [3], "new_frames": 2, "switch_frames": [3]}
BUCKETS = {"data": {"path": "d", "buckets": [[64, 64], [64, 96]]}}


def all_facts(workshop, tmp_path, stage, changes, rows="8 (ab)"):
    config = stage_config(workshop, tmp_path, stage, **{"data": {"path": "d"}} | changes)
    return {"config": config.model_dump(), **invariants(config), **resume_invariants(config, rows)}


@pytest.mark.parametrize(
    ("stage", "base", "change", "named"),
    [
        ("long", LONG, {"batch_size": 2}, "batch_size=4 and this run has 2; set it back .with data.buckets and in"),
        ("long", LONG, {"num_chunks": [2]}, "objective.num_chunks=.3. and this run has .2."),
        ("long", LONG, {"switch_frames": []}, "objective.switch_frames"),
        ("long", LONG, {"new_frames": None}, "objective.new_frames"),
        ("causal", BUCKETS, {"batch_size": 2}, "batch_size=4"),
        ("causal", BUCKETS, {"data": {"path": "d"}}, "data.buckets=.* and this run has None"),
        ("causal", BUCKETS, {"data": {"path": "d", "buckets": [[64, 64], [96, 64]]}}, "data.buckets"),
        ("causal", {}, {"kind": "flow_matching"}, "objective.kind='teacher_forcing' and this run has 'flow_matching'"),
        ("causal", {}, {"ema": {"enabled": False}}, "ema.enabled=True"),
        ("causal", {}, {"seed": 2}, "seed=1 and this run has 2"),
        ("teacher", {"init_from": None}, {"model": {"preset": "wan2.1-fun-1.3b-inp"}}, "model.preset"),
    ],
)
def test_what_would_change_its_meaning_in_silence_is_refused(workshop, tmp_path, stage, base, change, named):
    before = json.loads(json.dumps(all_facts(workshop, tmp_path, stage, base)))
    now = all_facts(workshop, tmp_path, stage, base | change)
    now.pop("config")
    for manifest in (before, {"config": before["config"]}):  # of this version, and of one without these invariants
        with pytest.raises(CheckpointError, match=named):
            compare_facts(manifest, now, tmp_path)


def test_a_stage_is_refused_other_rows_and_goes_on_with_its_own(workshop, tmp_path, caplog, monkeypatch):
    data = tmp_path / "clips"
    shutil.copytree(workshop / "data" / "clips", data)
    changes = {"data": {"path": str(data), "kind": "clips", "num_workers": 0}, "save_every": 1}
    run_stage(stage_config(workshop, tmp_path, "causal", max_steps=1, **changes), Mesh())
    config = stage_config(workshop, tmp_path, "causal", max_steps=2, **changes, batch_size=2)
    lines = (data / "metadata.jsonl").read_text().splitlines(keepends=True)
    for wrong, number in ((lines[:-1], 5), (lines[::-1], 6), ([*lines, lines[0].replace("red", "blue")], 7)):
        (data / "metadata.jsonl").write_text("".join(wrong))
        with monkeypatch.context() as patch:
            patch.setattr("longtake.train.stage.Builder.build", None)  # nothing is built before it
            with pytest.raises(CheckpointError, match=rf"rows='6 \(.*this run has '{number} .*give data.path the rows"):
                run_stage(config, Mesh())
    (data / "metadata.jsonl").write_text("".join(lines))
    data.rename(tmp_path / "moved")
    moved = config.data.model_copy(update={"path": str(tmp_path / "moved")})
    run_stage(config.model_copy(update={"data": moved}), Mesh())  # elsewhere, and with another batch size
    newest = run_folder.latest_checkpoint(config.folder / "checkpoints")
    assert run_folder.read_manifest(newest)["data_position"] == 6 and "earlier version" not in caplog.text


def test_a_checkpoint_without_these_facts_is_resumed_with_one_warning(tmp_path, caplog):
    tiny_run.run(tmp_path, Mesh(), steps=3, invariants={})
    tiny_run.run(tmp_path, Mesh(), invariants={"rows": "8 (ab)", "data.buckets": None})
    assert caplog.text.count("is of an earlier version and does not say, so not compared: rows, data.buckets") == 1


@pytest.mark.parametrize("name", ["metadata_images", "paired_clips", "text_file", "tar_images", "own_lmdb", "encoded"])
def test_rows_are_known_by_their_number_order_and_text(tmp_path, name):
    pytest.importorskip("lmdb")
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
    import format_files

    def fact(folder, number):
        return rows_invariant(open_dataset(format_files.write(name, tmp_path / folder, number), num_frames=5))

    first = fact("a", 6)
    assert first.startswith("6 (") and fact("b", 6) == first and fact("c", 4) != first


def test_an_encoded_set_has_the_rows_that_it_was_made_from(workshop, whole):
    assert rows_invariant(open_dataset(whole)) == rows_invariant(
        open_dataset(workshop / "data" / "clips", num_frames=17)
    )


def test_warm_up_counts_the_steps_of_each_optimizer(tmp_path):
    """The generator is updated every second iteration: its third step, at iteration 4, is the first at full rate."""
    tiny_run.run(tmp_path, Mesh(), steps=3)
    tiny_run.run(tmp_path, Mesh(), steps=8)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "critic_loss" in row]
    generator = [row["generator_learning_rate"] for row in rows if "generator_learning_rate" in row]
    assert generator == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])
    critic = [row["critic_learning_rate"] for row in rows]
    assert critic == pytest.approx([1e-2 / 3, 2e-2 / 3, *[1e-2] * 6])


@pytest.mark.parametrize("stage", ["causal", "distill"])
def test_a_student_of_one_step_is_trained(workshop, tmp_path, stage):
    more = {"guidance": 1.0} if stage == "distill" else {}
    config = stage_config(
        workshop, tmp_path, stage, flow={"steps": [1.0], "shift": 3.0}, **more, max_steps=1, save_every=1
    )
    run_stage(config, Mesh())
    assert run_folder.latest_checkpoint(config.folder / "checkpoints").name == "step_000001"


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    save = Saver.save

    def broken(self, **options):
        with torch.no_grad():
            self._state.networks["generator"].head.bias[0] = torch.nan
        save(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", broken)
        tiny_run.run(tmp_path, Mesh(), steps=3)
    with pytest.raises(CheckpointError, match="not finite in 1 tensors, e.g. networks.generator.head.bias"):
        tiny_run.run(tmp_path, Mesh())
