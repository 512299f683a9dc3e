"""`longtake teacher-data`: what a teacher makes and stores, that it can be killed and shared, and training from it."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from encoded_files import ROWS, files, from_cache, rounding, text_to_video, weights_of
from tiny_stage import stage_config, stage_tree
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.data.encoded import EncodedRows
from longtake.data.samples import Sample
from longtake.encodings.encode import StoredEncoder, make_batch
from longtake.encodings.teacher_data import TeacherEncoder, path_sigmas, teacher_data
from longtake.encodings.write import SetWriter, encode
from longtake.errors import ConfigError, DataError, OutputError
from longtake.inference.sampling import teacher_latents
from longtake.parallel.mesh import Mesh
from longtake.train.stage import run_stage
from longtake.weights.load import load_dit

TWO = {"rows_per_shard": 2}


@pytest.fixture(scope="module", autouse=True)
def text_is_rounded_before_the_teacher_reads_it():
    """As it is where the rows come from an encoded set: then both ways give the same numbers."""
    with pytest.MonkeyPatch.context() as patch:
        rounding(patch)
        yield


@pytest.fixture(scope="module")
def paths(workshop, tmp_path_factory):
    """Paths of the random teacher, taken as a causal one, over the six clips."""
    folder = tmp_path_factory.mktemp("paths")
    teacher_data(stage_config(workshop, folder, "ode"), folder / "paths", Mesh(), **TWO)
    return folder / "paths"


def images(workshop, logdir, stage, **changes):
    data = {"path": str(workshop / "data/images"), "num_workers": 0}
    return stage_config(workshop, logdir, stage, data=data, **changes)


def extras(folder, row):
    return {name: torch.from_numpy(value) for name, value in EncodedRows(folder)[row].extras.items()}


def test_a_causal_path_holds_the_states_at_the_levels_of_the_student_and_the_real_clip(workshop, paths):
    config, stored = stage_config(workshop, paths, "ode"), extras(paths, 3)
    assert EncodedRows(paths).key["contents"] == ["clip", "y", "latents", "path"]
    path, clip = stored["path"], stored["latents"]
    assert path.shape == (3, *clip.shape) and clip.shape == (5, 4, 8, 8)
    assert (path[:, 0] == clip[0]).all()  # the given picture
    # By hand: one step of the grid 1, .9, .75, .5, 0 after the other, every block after the real frames before it
    teacher, plan = load_dit(workshop / "teacher"), config.stream_plan.with_given(1)
    layout, dataset = plan.teacher_forcing_layout(5), EncodedRows(paths)
    reader = StoredEncoder(dataset, config.video, ["clip", "y", "latents"], device=torch.device("cpu"))
    rows = reader.rows(SimpleNamespace(extras={k: v[None] for k, v in stored.items()}))
    batch = make_batch(reader, rows, [3])
    x = path[None, 0].clone()
    grid = [1.0, 0.9, 0.75, 0.5, 0.0]
    for sigma, following in zip(grid, grid[1:]):
        x[:, 0] = clip[0]
        levels = torch.full((1, 10), sigma)
        levels[:, :6] = 0
        both = torch.cat([clip[None], x], 1)
        with torch.no_grad():
            v, u = (teacher(both, levels, c, layout)[:, 5:] for c in (batch.condition, batch.unconditional))
        x = x + (following - sigma) * (u + 2 * (v - u))
        if following == 0.75:
            torch.testing.assert_close(path[1, 1:], x[0, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(path[2, 1:], x[0, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.whole
def test_without_videos_the_teacher_makes_whole_clips(workshop, tmp_path):
    """They serve teacher forcing; and an ode_regression of a bidirectional teacher stores its paths with them."""
    clips = images(workshop, tmp_path, "causal", validation={"teacher_steps": 3, "teacher_guidance": 2.0})
    teacher_data(clips, tmp_path / "clips", Mesh(), **TWO)
    both = images(workshop, tmp_path, "ode", teacher_kind="bidirectional", teacher_steps=3)
    teacher_data(both, tmp_path / "both", Mesh(), **TWO)
    dataset = EncodedRows(tmp_path / "clips")
    assert dataset.key["contents"] == ["clip", "y", "latents"] and dataset.key["teacher"]["causal"] is False
    config = from_cache(workshop, tmp_path, tmp_path / "clips")
    reader = StoredEncoder(dataset, config.video, ["clip", "y", "latents"], device=torch.device("cpu"))
    stored = extras(tmp_path / "clips", 4)
    batch = make_batch(reader, reader.rows(SimpleNamespace(extras={k: v[None] for k, v in stored.items()})), [4])
    teacher = load_dit(workshop / "teacher").eval()
    wanted = teacher_latents(
        teacher, batch.condition, batch.empty_text, 5, (8, 8), seed=1, videos=[4], num_steps=3, shift=3.0, guidance=2.0
    )
    torch.testing.assert_close(stored["latents"][1:], wanted[0, 1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(stored["latents"][:1], batch.first_latent[0])
    path = extras(tmp_path / "both", 4)
    assert path["path"].shape[0] == 3 and torch.equal(path["path"][-1], path["latents"])
    assert (path["path"][:, 0] == path["latents"][0]).all()
    run_stage(config, Mesh())
    run_stage(
        from_cache(workshop, tmp_path / "ode", tmp_path / "both", "ode", teacher_kind="bidirectional", teacher_steps=3),
        Mesh(),
    )
    run_stage(from_cache(workshop, tmp_path / "tf", tmp_path / "both"), Mesh())


def test_text_to_video_has_no_picture(workshop, tmp_path):
    (tmp_path / "prompts").mkdir()
    for k in range(3):
        (tmp_path / "prompts" / f"{k}.txt").write_text(f"a red square {k}")
    changes = text_to_video(tmp_path, tmp_path / "prompts")
    config = stage_config(workshop, tmp_path, "ode", teacher_kind="bidirectional", **changes)
    teacher_data(config, tmp_path / "e", Mesh(), **TWO)
    stored = extras(tmp_path / "e", 1)
    assert sorted(stored) == ["latents", "path", "text"] and stored["path"].shape == (3, 4, 4, 8, 8)
    assert not torch.equal(stored["path"][0, 0], stored["path"][-1, 0])
    data = {"path": str(tmp_path / "e"), "num_workers": 0}
    run_stage(stage_config(workshop, tmp_path, "ode", teacher_kind="bidirectional", **changes | {"data": data}), Mesh())


def test_a_bidirectional_teacher_refuses_captions_that_change_inside_the_clip_it_makes_alone():
    inner = SimpleNamespace(contents=[], empty_text=None, later_texts=False, shape=SimpleNamespace(num_pixel_frames=33))
    inner.check = lambda sample: None
    maker = SimpleNamespace(shapes=lambda size: {}, sampling=SimpleNamespace(causal=False))
    encoder = TeacherEncoder(inner, maker)
    encoder.check(Sample("a", "one", None, prompts=("one", "two"), switch_frames=(33,)))
    with pytest.raises(DataError, match="b: its caption changes on the way"):
        encoder.check(Sample("b", "one", None, prompts=("one", "two"), switch_frames=(32,)))


def test_from_an_encoded_set_the_paths_are_the_same_and_no_encoder_is_loaded(workshop, paths, tmp_path, monkeypatch):
    encode(stage_config(workshop, tmp_path, "causal"), tmp_path / "clips", Mesh(), rows_per_shard=2)
    monkeypatch.setattr(SetWriter, "encoder", None)
    teacher_data(from_cache(workshop, tmp_path, tmp_path / "clips", "ode"), tmp_path / "e", Mesh(), **TWO)
    ours, theirs = EncodedRows(tmp_path / "e"), EncodedRows(paths)
    assert ours.key == theirs.key and ours.files == theirs.files
    one, two = files(tmp_path / "e"), files(paths)
    assert one.keys() == two.keys() and all(one[name] == two[name] for name in one if name != "index.json")


def test_stopped_and_started_again_gives_the_same_bytes(workshop, paths, tmp_path):
    shutil.copytree(paths, tmp_path / "e")
    (tmp_path / "e" / "shard_00001.safetensors").unlink()
    with pytest.raises(DataError, match="is missing"):
        EncodedRows(tmp_path / "e")
    report = teacher_data(stage_config(workshop, paths.parent, "ode"), tmp_path / "e", Mesh(), **TWO)
    assert report.rows_now == 2 and report.num_rows == ROWS and files(tmp_path / "e") == files(paths)


def test_resumed_training_from_paths_equals_uninterrupted_bit_for_bit(workshop, paths, tmp_path):
    whole, resumed = (
        from_cache(workshop, tmp_path / name, paths, "ode", max_steps=2, batch_size=2) for name in ("one", "two")
    )
    run_stage(whole, Mesh())
    run_stage(resumed.model_copy(update={"max_steps": 1}), Mesh())
    run_stage(resumed, Mesh())
    one, two = weights_of(whole), weights_of(resumed)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any("optimizers" in name for name in one) and any("ema" in name for name in one)


def test_how_much_disk_it_takes_is_said_before_and_too_little_is_refused(
    workshop, paths, tmp_path, monkeypatch, caplog
):
    config, said = stage_config(workshop, tmp_path, "ode"), []
    monkeypatch.setattr("longtake.encodings.write.check_space", lambda path, needed: said.append(needed))
    with caplog.at_level("INFO"):
        teacher_data(config, tmp_path / "e", Mesh(), **TWO)
    assert f"{tmp_path / 'e'}: 6 rows of about 0.0" in caplog.text
    written = sum(path.stat().st_size for path in paths.glob("shard_*"))
    assert 0.9 < said[0] / written <= 1.0  # heads are not counted
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="its disk has 0.0 GB"):
        teacher_data(config, tmp_path / "other", Mesh(), **TWO)
    assert not list((tmp_path / "other").glob("shard_*"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher_steps": 5}, "teacher.num_steps=4, wanted 5"),
        ({"flow": {"steps": [1.0, 0.4], "shift": 3.0}}, "teacher.levels"),
        ({"plan": {"block_frames": 2, "window_frames": 3, "sink_frames": 1}}, "teacher.plan.window_frames=5, wanted 3"),
        ({"teacher_kind": "bidirectional"}, "teacher.causal=True, wanted False"),
    ],
)
def test_a_stage_refuses_paths_that_are_not_its_own(workshop, paths, tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        run_stage(from_cache(workshop, tmp_path, paths, "ode", **changes), Mesh())


def test_paths_of_other_weights_and_data_without_paths_are_refused(workshop, paths, tmp_path):
    shutil.copytree(workshop / "teacher", tmp_path / "other")
    shutil.copytree(paths, tmp_path / "e")
    index = json.loads((tmp_path / "e" / "index.json").read_text())
    index["key"]["teacher"]["weights"] = "0" * 64
    del index["checksum"]
    (tmp_path / "e" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="its paths were not made by objective.teacher="):
        run_stage(from_cache(workshop, tmp_path, tmp_path / "e", "ode"), Mesh())
    with pytest.raises(ConfigError, match="holds no paths of a teacher, .* `longtake teacher-data`"):
        run_stage(stage_config(workshop, tmp_path, "ode"), Mesh())


def test_levels_between_those_of_the_sampler_are_put_among_them():
    assert path_sigmas(4, 1.0, [1.0, 0.5]) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert path_sigmas(4, 1.0, [1.0, 0.4]) == [1.0, 0.75, 0.5, 0.4, 0.25, 0.0]
    assert path_sigmas(2, 5.0, []) == [1.0, 5 / 6, 0.0]


@pytest.mark.whole
def test_the_command(workshop, tmp_path):
    tree = stage_tree(workshop, tmp_path, "ode")
    (tmp_path / "ode.yaml").write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(
        app, ["teacher-data", str(tmp_path / "ode.yaml"), "-o", str(tmp_path / "e"), "--dtype", "float16"]
    )
    assert done.exit_code == 0 and "6 rows, 0 bad rows left out" in done.output, done.output
    done = CliRunner().invoke(
        app, ["train", str(tmp_path / "ode.yaml"), f"data.path={tmp_path / 'e'}", "data.kind=auto"]
    )
    assert done.exit_code == 0, done.output
