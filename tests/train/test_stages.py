"""Whole stages on the smallest real parts: files -> readers -> encoders -> objective -> checkpoints -> generator."""

import json
import logging
import math
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_stage import TEACHER, make_model, save_student, stage_config, stage_tree

from longtake import Generator
from longtake.config.job import JobConfig, load_config
from longtake.config.stage import StageConfig
from longtake.encoders.bundle import ImageEncoder
from longtake.errors import CheckpointError, ConfigError
from longtake.evaluation.run import evaluate
from longtake.parallel.mesh import Mesh
from longtake.run_folder import exported_weights, latest_checkpoint, read_manifest, student_stages, trained_config
from longtake.toy.world import sample_world
from longtake.train.job import run, run_job
from longtake.train.metrics import read_rows
from longtake.train.networks import Builder
from longtake.train.stage import run_stage
from longtake.weights.load import config_to_json, save_dit


def rows_of(config):
    """Rows of metrics.jsonl: of the iterations and of the validations."""
    rows = read_rows(config.folder / "metrics.jsonl")
    return [row for row in rows if "seconds" in row], [row for row in rows if "seconds" not in row]


def without_seconds(rows):
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "speed"))} for row in rows]


def weights_of(config):
    """Every tensor of the newest checkpoint: networks, optimizers, averages."""
    path = latest_checkpoint(config.folder / "checkpoints")
    tensors = {}
    for file in sorted(path.rglob("*.safetensors")):
        tensors |= {f"{file.parent.name}/{key}": value for key, value in load_file(file).items()}
    return tensors


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def log(workshop, tmp_path_factory):
    """A log folder with a causal and a distill stage of 3 iterations each; the second starts from the first."""
    logdir = tmp_path_factory.mktemp("log")
    for stage in ("causal", "distill"):
        run_stage(config_of(workshop, logdir, stage), Mesh())
    return logdir


def config_of(workshop, logdir, stage, **changes):
    source = {"init_from": "causal"} if stage == "distill" else {}
    return stage_config(workshop, logdir, stage, **source | {"validate_every": 2} | changes)


def test_causal_stage_leaves_what_it_should(workshop, log):
    config = config_of(workshop, log, "causal")
    iterations, validations = rows_of(config)
    assert [row["step"] for row in iterations] == [0, 1, 2] and [row["step"] for row in validations] == [0, 2, 3]
    names = {"generator_loss", "generator_grad_norm", "generator_learning_rate", "seconds/data", "seconds_of/generator"}
    assert all(names <= row.keys() and row["generator_loss"] > 0 for row in iterations)
    names = {"validation/motion_ratio", "validation/teacher_motion_ratio", "validation/position_error_px"}
    assert all(names <= row.keys() for row in validations)
    assert yaml.safe_load((config.folder / "config.yaml").read_text()) == config.model_dump()
    assert (config.folder / "contact_sheet.png").stat().st_size > 0
    assert {path.name for path in (config.folder / "samples").iterdir()} >= {"step_000000_0.mp4", "step_000003_0.mp4"}
    manifest = read_manifest(latest_checkpoint(config.folder / "checkpoints"))
    invariants = {"step": 3, "data_position": 12, "rope": "relative", "fps": 16, "shift": 3.0, "steps": [1.0, 0.5]}
    assert {key: manifest[key] for key in invariants} == invariants and manifest["plan"] == config.plan.model_dump()


def test_distill_stage_logs_the_published_names(workshop, log):
    iterations, validations = rows_of(config_of(workshop, log, "distill"))
    always = {"critic_loss", "critic_grad_norm", "exit_step", "seconds", "seconds/rollout", "seconds/scores"}
    generator = {"generator_loss", "generator_grad_norm", "dmdtrain_gradient_norm"}
    for row in iterations:  # the generator is updated in every second iteration
        assert always <= row.keys() and (generator <= row.keys()) == (row["step"] % 2 == 0)
        assert row["exit_step"] in (0, 1) and math.isfinite(row["critic_loss"])
        assert row["seconds/rollout"] + row["seconds/scores"] < row["seconds"]
    assert [row["step"] for row in validations] == [0, 2, 3]
    for row in validations:
        assert {"validation/motion_ratio", "validation/teacher_motion_ratio", "validation/stop_rate"} <= row.keys()
        assert row["validation/teacher_motion_ratio"] == validations[0]["validation/teacher_motion_ratio"]


def test_distill_starts_from_the_average_of_causal_and_leaves_it(workshop, log, tmp_path):
    """Initialising takes the exported average and nothing else; step 0 of distill validates these very weights."""
    causal = load_file(exported_weights(latest_checkpoint(log / "causal/checkpoints")) / "model.safetensors")
    _, before = rows_of(config_of(workshop, log, "causal"))
    _, after = rows_of(config_of(workshop, log, "distill"))
    assert after[0]["validation/position_error_px"] == before[-1]["validation/position_error_px"]
    trained = load_file(exported_weights(latest_checkpoint(log / "distill/checkpoints")) / "model.safetensors")
    assert not equal(causal, trained)


def test_the_trained_student_streams(workshop, log):
    generator = Generator.from_run(log, "cpu")
    assert generator.config == config_of(workshop, log, "distill")
    world = sample_world(9, 0)
    chunks = list(generator.stream(world.render(1)[0], world.caption, num_frames=25))
    assert [chunk.shape for chunk in chunks] == [(n, 64, 64, 3) for n in (1, 8, 8, 8)]
    exported = load_file(log / "distill/checkpoints/step_000003/generator_ema/model.safetensors")
    assert equal(dict(generator.model.state_dict()), exported)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("causal", {}),
        # Stopped after the first of three updates that learn from one roll-out
        ("distill", {"critic": {"lr": 1e-3, "updates_per_generator": 4, "updates_per_rollout": 3}}),
        pytest.param("distill", {}, marks=pytest.mark.slow),
        pytest.param("distill", {"context_gradient": "replay"}, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(workshop, log, tmp_path, stage, more):
    """Stopped after two of five iterations: the rest of the first epoch and the second one in another process' memory."""
    changes = {"max_steps": 5, "save_every": 2, "validate_every": 0, "init_from": str(workshop / "teacher")} | more
    whole = config_of(workshop, tmp_path / "whole", stage, **changes)
    run_stage(whole, Mesh())
    resumed = config_of(workshop, tmp_path / "resumed", stage, **changes)
    # What a run leaves that is killed after its save at step 2 (it had gone on to step 3).
    run_stage(resumed.model_copy(update={"max_steps": 3, "save_every": 2}), Mesh())
    shutil.rmtree(resumed.folder / "checkpoints" / "step_000003")
    assert latest_checkpoint(resumed.folder / "checkpoints").name == "step_000002"
    run_stage(resumed, Mesh())
    assert equal(weights_of(whole), weights_of(resumed))
    assert without_seconds(rows_of(whole)[0]) == without_seconds(rows_of(resumed)[0])


@pytest.mark.whole
def test_micro_batches_change_the_arithmetic_only(workshop, tmp_path):
    rows = []
    for micro in (1, 4):
        config = config_of(workshop, tmp_path / str(micro), "distill", micro_batch_size=micro, validate_every=0,
                           init_from=str(workshop / "teacher"), max_steps=2)  # fmt: skip
        run_stage(config, Mesh())
        rows.append(rows_of(config)[0])
    for a, b in zip(*rows, strict=True):
        for name in ("critic_loss", "exit_step", "generator_loss", "dmdtrain_gradient_norm"):
            assert (name in a) == (name in b) and a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-4)


@pytest.mark.whole
def test_the_learning_rate_falls_at_the_end_of_a_stage(workshop, tmp_path):
    changes = {"optim": {"lr": 1e-3, "decay_steps": 2}, "max_steps": 3, "log_every": 1}
    config = config_of(workshop, tmp_path, "causal", **changes)
    run_stage(config, Mesh())
    assert [row["generator_learning_rate"] for row in rows_of(config)[0]] == pytest.approx([1e-3, 1e-3, 5e-4])


@pytest.mark.whole
def test_a_teacher_starts_from_random_weights(workshop, tmp_path):
    (tmp_path / "sizes").mkdir()
    shutil.copy(workshop / "teacher/config.json", tmp_path / "sizes")
    config = stage_config(
        workshop,
        tmp_path,
        "teacher",
        init_from=None,
        model={"preset": str(tmp_path / "sizes")},
        max_steps=2,
        caption_dropout=0.5,
        validate_every=2,
        validation={"num_worlds": 1, "teacher_steps": 2},
    )
    run_stage(config, Mesh())
    iterations, validations = rows_of(config)
    # The head starts at zero: the first loss is the mean square of noise - clean.
    assert iterations[0]["generator_loss"] > 1 and "validation/motion_ratio" in validations[-1]
    assert (
        read_manifest(latest_checkpoint(config.folder / "checkpoints"))["config"]["objective"]["kind"]
        == "flow_matching"
    )


def test_validation_off_means_off(workshop, log, tmp_path):
    for changes in ({"validate_every": 0}, {"validation": {"num_worlds": 0}}):
        config = config_of(workshop, tmp_path / str(len(changes["validation"])) if "validation" in changes else tmp_path,
                           "causal", max_steps=1, **changes)  # fmt: skip
        run_stage(config, Mesh())
        assert rows_of(config)[1] == [] and not (config.folder / "contact_sheet.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"video": {"height": 64, "width": 64, "num_latent_frames": 5, "spatial_stride": 16}},
            "video.spatial_stride=16 is not that of the VAE in .*, 8; set it to 8",
        ),
        (
            {"video": {"height": 64, "width": 64, "num_latent_frames": 5, "temporal_stride": 2}},
            "video.temporal_stride=2 is not that of the VAE in .*, 4; set it to 4",
        ),
        ({"model": {"image_condition": "t2v"}}, "image_condition=t2v does not fit the weights .*in_channels=12.* i2v"),
    ],
)
def test_wrong_sizes_are_refused_before_training(workshop, tmp_path, changes, message):
    config = stage_config(workshop, tmp_path, "causal", **changes)
    with pytest.raises(ConfigError, match=message):
        run_stage(config, Mesh())
    assert not config.folder.exists()


def test_text_to_video_weights_do_not_pass_for_image_to_video(workshop, tmp_path):
    config = TEACHER.__class__(**TEACHER.to_dict() | {"in_channels": 4, "image_dim": None, "model_type": "t2v"})
    save_dit(config, make_model(config).state_dict(), tmp_path / "t2v")
    stage = stage_config(workshop, tmp_path, "causal", init_from=str(tmp_path / "t2v"))
    with pytest.raises(
        ConfigError, match="image_condition=i2v does not fit the weights .*in_channels=4; set it to t2v"
    ):
        run_stage(stage, Mesh())


@pytest.mark.whole
def test_text_to_video_weights_widen_on_request(workshop, tmp_path):
    sizes = TEACHER.__class__(**TEACHER.to_dict() | {"in_channels": 4, "image_dim": None, "model_type": "t2v"})
    model = make_model(sizes)
    torch.save({"generator": {f"model.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "student.pt")
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(sizes)))
    widened = {"model": {"widen": True, "preset": str(workshop / "teacher")}}
    changes = widened | {"init_from": str(tmp_path / "student.pt"), "max_steps": 1}
    causal = stage_config(workshop, tmp_path, "causal", **changes)
    start = Builder(causal, Mesh()).open(tmp_path / "student.pt")
    assert start.model.config == TEACHER
    first = dict(start.read(None))
    assert all(torch.equal(first[k], v) for k, v in model.state_dict().items() if "patch" not in k)
    run_stage(causal, Mesh())
    trained = dict(Builder(causal, Mesh()).open(causal.folder).read(None))
    assert trained["patch_embedding.weight"][:, 4:].abs().max() > 0
    # The table's rows of the weights it started from are widened too.
    table = evaluate(tmp_path, overrides={"num_worlds": 1, "ablations": False}, device="cpu")
    assert table is not None and "teacher, causal" in (tmp_path / "evaluation.md").read_text()
    # A teacher that has the picture's channels is left as it is, one that lacks them widens; both in one stage.
    run_stage(stage_config(workshop, tmp_path, "distill", **widened | {"max_steps": 1}), Mesh())
    wrong = stage_config(workshop, tmp_path / "b", "causal", **changes | {"model": {"widen": True, "preset": "toy"}})
    with pytest.raises(ConfigError, match=r"cannot be widened: they have dim=24 \(not 128\), "):
        run_stage(wrong, Mesh())


def test_a_stage_starts_from_a_name_of_the_hub_with_encoders_from_there(workshop, tmp_path, hub):
    shutil.copytree(workshop / "teacher", hub("Owner/Tiny-I2V"))
    shutil.copytree(workshop / "encoders", hub("Owner/Encoders"))
    changes = {"init_from": "Owner/Tiny-I2V", "encoders": "Owner/Encoders", "max_steps": 1}
    run_stage(stage_config(workshop, tmp_path, "causal", **changes), Mesh())
    assert set(hub.asked) == {"Owner/Tiny-I2V", "Owner/Encoders"}


@pytest.mark.parametrize("source", ["earlier", "./missing", "./missing/too"])
def test_missing_sources_are_named(workshop, tmp_path, source):
    with pytest.raises(CheckpointError, match=f"no weights at .*{source.removeprefix('./')}.* does not exist"):
        run_stage(stage_config(workshop, tmp_path, "causal", init_from=source), Mesh())


def test_a_text_to_video_stage_trains_without_pictures(workshop, tmp_path):
    sizes = TEACHER.__class__(**TEACHER.to_dict() | {"in_channels": 4, "image_dim": None, "model_type": "t2v"})
    save_dit(sizes, make_model(sizes).state_dict(), tmp_path / "t2v")
    changes = {
        "model": {"image_condition": "t2v"},
        "init_from": str(tmp_path / "t2v"),
        "plan": {"block_frames": 2, "first_frames": 2, "window_frames": 4, "sink_frames": 2},
        "video": {"height": 64, "width": 64, "num_latent_frames": 4},
        "max_steps": 1,
        "validate_every": 1,
    }
    run_stage(stage_config(workshop, tmp_path, "causal", **changes), Mesh())
    config = stage_config(workshop, tmp_path, "distill", **changes | {"teacher": str(tmp_path / "t2v")})
    run_stage(config, Mesh())
    iterations, validations = rows_of(config)
    assert iterations[0]["critic_loss"] > 0 and validations == []  # pictures of the toy world cannot be given to it


@pytest.mark.whole
def test_image_to_video_weights_without_clip_tokens(workshop, tmp_path):
    """Wan2.2's kind: y alone. The folder of the encoders needs no image encoder then."""
    sizes = TEACHER.__class__(**TEACHER.to_dict() | {"image_dim": None, "model_type": "i2v"})
    model = make_model(sizes)
    folder = tmp_path / "weights"
    save_dit(sizes, model.state_dict(), folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["image_dim"] is None
    shutil.copytree(workshop / "encoders", tmp_path / "encoders")
    shutil.rmtree(tmp_path / "encoders/image_encoder")
    changes = {"init_from": str(folder), "encoders": str(tmp_path / "encoders"), "max_steps": 1, "validate_every": 1}
    stage = stage_config(workshop, tmp_path, "causal", **changes)
    run_stage(stage, Mesh())
    frames = list(Generator.from_run(tmp_path, "cpu").stream(np.zeros((64, 64, 3), np.uint8), "a red circle drifts",
                                                             num_frames=9))  # fmt: skip
    assert sum(map(len, frames)) == 9


@pytest.mark.whole
def test_preprocessing_for_clip_is_kept_with_the_weights(workshop, tmp_path):
    losses = {}
    for name, preprocess in (("wan", "original"), ("cut", "diffusers")):
        model = {"clip_preprocess": preprocess, "text_precision": "bf16"}
        config = stage_config(workshop, tmp_path, "causal", name=name, model=model, max_steps=1)
        run_stage(config, Mesh())
        assert read_manifest(latest_checkpoint(config.folder / "checkpoints"))["clip_preprocess"] == preprocess
        losses[name] = rows_of(config)[0][0]["generator_loss"]
    assert losses["wan"] != losses["cut"]  # training sees it
    picture = torch.from_numpy(sample_world(0, 0).render(1)).permute(0, 3, 1, 2).float() / 127.5 - 1
    generator = Generator.from_run(tmp_path / "cut", "cpu")  # and so does inference
    cut = ImageEncoder(generator.encoders.image.model, "diffusers").encode(picture)
    assert torch.equal(generator.encoders.image.encode(picture), cut)
    assert not torch.equal(Generator.from_run(tmp_path / "wan", "cpu").encoders.image.encode(picture), cut)
    assert generator.encoders.text.model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="clip_preprocess='original' is not that of init_from=cut, 'diffusers'"):
        run_stage(stage_config(workshop, tmp_path, "distill", init_from="cut"), Mesh())
    with pytest.raises(
        CheckpointError, match="was trained with clip_preprocess='diffusers' and this run has 'original'"
    ):
        run_stage(stage_config(workshop, tmp_path, "causal", name="cut", max_steps=2), Mesh())


def test_configurations_from_before_keys_left_are_read_where_these_did_nothing(tmp_path):
    config = load_config(Path(__file__).parents[2] / "configs/toy/distill.yaml")
    for share in (0.0, 0.5):
        before = config.model_dump(mode="json")
        before["objective"]["data_forcing"] = {"share": share}
        manifest = {"format_version": 1, "step": 1, "data_position": 0, "config": before, "files": {}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        if not share:
            assert trained_config(tmp_path) == config
    with pytest.raises(CheckpointError, match="written by another version.*data_forcing"):
        trained_config(tmp_path)


def test_manifests_from_before_the_option_count_as_original(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 1}))
    assert read_manifest(tmp_path)["clip_preprocess"] == "original"


# ---- a job -----------------------------------------------------------------------------------------------------------
def job_of(workshop, logdir):
    changes = {"max_steps": 2, "validate_every": 0}
    stages = {
        "start": stage_tree(workshop, logdir, "causal", name="start", **changes),
        "student": stage_tree(workshop, logdir, "distill", name="student", init_from="start", **changes),
    }
    for name, kind in (("start", "clips"), ("student", "images")):
        stages[name]["data"]["path"] = f"{{logdir}}/data/{kind}"
    return JobConfig.from_tree(
        {
            "logdir": str(logdir),
            "data": {"num_worlds": 6, "num_frames": 17, "seed": 0, "formats": ["images", "clips"]},
            "stages": stages,
            "evaluation": {"num_worlds": 1, "teacher_steps": 2},
        }
    )


@pytest.mark.whole
def test_a_job_runs_its_stages_evaluates_and_trains_nothing_twice(workshop, tmp_path, capsys, caplog, monkeypatch):
    """The stages' names are the user's own."""
    job = job_of(workshop, tmp_path)
    run_job(job, Mesh())
    out = capsys.readouterr().out
    for row in ("truth", "teacher", "teacher, causal", "start", "student", "student, zeroed y"):
        assert f"| {row} " in out, row
    assert [path.name for path in student_stages(tmp_path)] == ["start", "student"]
    written = {"evaluation.md", "evaluation.json", "evaluation.png", "contact_sheet.png", "job.yaml"}
    assert written <= {path.name for path in tmp_path.iterdir()}
    before = {name: (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns for name in job.stages}
    assert f"{tmp_path} is complete.\nNext:\n  longtake generate --run {tmp_path} --image photo.jpg" in out
    again: list[object] = []
    monkeypatch.setattr("longtake.train.job.evaluate", lambda *_, **given: again.append(given["settings"]))
    with caplog.at_level(logging.INFO, logger="longtake"):
        run_job(job, Mesh())
    assert "Stage start is complete" in caplog.text and "Stage student is complete" in caplog.text
    assert before == {name: (tmp_path / name / "metrics.jsonl").stat().st_mtime_ns for name in job.stages}
    out = capsys.readouterr().out
    assert again == [] and "| student, zeroed y " in out  # the table that is there
    assert f"{tmp_path} was complete, and nothing was done anew.\nNext:\n  longtake generate" in out
    assert f"longtake export {tmp_path} FOLDER" in out and f"longtake evaluate --run {tmp_path}" in out
    tree = job.model_dump()
    other = JobConfig.from_tree({**tree, "evaluation": {**tree["evaluation"], "seed": 9}})
    run_job(other, Mesh())
    assert again == [other.evaluation]  # another one than that which is there
    again.clear()
    for missing in ("contact_sheet.png", "evaluation.json"):  # of one that was interrupted
        (tmp_path / missing).unlink()
        run_job(job, Mesh())
        assert again == [job.evaluation]
        again.clear()


def finished(workshop, tmp_path):
    """A stage that was trained to its end by the command, and the folder of its weights, teacher and data."""
    for name in ("teacher", "data"):
        shutil.copytree(workshop / name, tmp_path / f"my_{name}")
    changes = {"max_steps": 1, "validate_every": 0, "init_from": str(tmp_path / "my_teacher")}
    tree = stage_tree(workshop, tmp_path / "log", "distill", **changes)
    tree["objective"]["teacher"] = str(tmp_path / "my_teacher")
    return tree


@pytest.mark.parametrize("key", ["init_from", "objective.teacher", "objective.critic.init_from", "data.path"])
def test_a_finished_run_asked_for_from_other_sources_is_an_error(workshop, tmp_path, capsys, monkeypatch, key):
    tree = finished(workshop, tmp_path)
    config = StageConfig.from_tree(tree)
    save_student(config, step=1)
    monkeypatch.setattr("longtake.train.job.run_stage", lambda *_: pytest.fail("it was trained"))
    run(config)  # complete, from what it was trained with
    assert "is complete: 1 iterations.\nNext:\n  longtake generate --run" in capsys.readouterr().out
    other = str(workshop / ("data" if key == "data.path" else "teacher"))
    changed = deepcopy(tree)
    *path, last = key.split(".")
    place = changed
    for part in path:
        place = place.setdefault(part, {})
    place[last] = other
    opened: list[object] = []
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: opened.append(1))
    with pytest.raises(ConfigError, match=rf"distill was completed with {key}=.*, and {other} is asked .*logdir=OTHER"):
        run(StageConfig.from_tree(changed))
    job = JobConfig.from_tree(
        {"logdir": tree["logdir"], "data": None, "stages": {"distill": changed}, "evaluation": None}
    )
    with pytest.raises(ConfigError, match=f"was completed with {key}="):
        run(job)
    assert opened == [] and not (tmp_path / "log" / "job.yaml").exists()


def test_a_log_folder_that_was_moved_is_still_complete(workshop, tmp_path, capsys, monkeypatch):
    tree = stage_tree(workshop, tmp_path / "log", "causal", max_steps=1)
    tree["data"]["path"] = "{logdir}/data"
    save_student(StageConfig.from_tree(tree), step=1)
    (tmp_path / "log").rename(tmp_path / "moved")
    monkeypatch.setattr("longtake.train.job.run_stage", lambda *_: pytest.fail("it was trained"))
    moved = StageConfig.from_tree({**tree, "logdir": str(tmp_path / "moved")})
    run(moved)
    assert "other values" not in capsys.readouterr().err
    run(StageConfig.from_tree({**moved.model_dump(), "batch_size": 8 * moved.batch_size}))
    said = capsys.readouterr().err
    assert "completed with other values of batch_size and is not trained again; to do so, name another folder" in said


def test_stages_are_found_in_training_order_whatever_their_names(workshop, tmp_path):
    for name, kind, source in (
        ("a", "distill", "z"),
        ("z", "causal", "toy"),
        ("b", "distill", "c"),
        ("c", "distill", "a"),
    ):
        save_student(stage_config(workshop, tmp_path, kind, name=name, init_from=source), ema=False)
    save_student(stage_config(workshop, tmp_path, "teacher", name="x"), ema=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "job.yaml").write_text("")
    assert [path.name for path in student_stages(tmp_path)] == ["z", "a", "c", "b"]
    assert Generator.from_run(tmp_path, "cpu").config.name == "b"
    # an unreadable newest manifest is passed over
    broken = tmp_path / "b/checkpoints/step_000002"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    assert Generator.from_run(tmp_path, "cpu").config.name == "b"


def test_a_stage_starts_from_whatever_generation_takes(workshop, tmp_path):
    """A pipeline folder and a checkpoint's own weights; the latter bring the rules that they were trained with."""
    pipeline = shutil.copytree(workshop / "teacher", tmp_path / "pipeline" / "transformer").parent
    run_stage(stage_config(workshop, tmp_path, "causal", init_from=str(pipeline), max_steps=1), Mesh())
    weights = tmp_path / "causal" / "checkpoints" / "step_000001" / "generator"
    with pytest.raises(ConfigError, match=r"shift=4.0 is not that of init_from=.*generator, 3.0; set it to that"):
        flow = {"steps": [1.0, 0.5], "shift": 4.0}
        run_stage(stage_config(workshop, tmp_path, "distill", init_from=str(weights), flow=flow), Mesh())
