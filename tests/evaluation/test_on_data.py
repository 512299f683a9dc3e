"""`longtake evaluate --data`: any rows, students at several lengths beside a teacher, the numbers of `measure`."""

import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_ranks import on_ranks
from PIL import Image
from safetensors.torch import save_file
from tiny_stage import TEACHER, make_encoders, make_model, save_student, stage_config
from tiny_wan import T2V, write_model, write_photos
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.config.generation import GenerationConfig, write_rules
from longtake.config.groups import WorldConfig
from longtake.config.stage import TOY_ASSETS
from longtake.data.clips import open_video
from longtake.encoders.bundle import ImageEncoder, TextEncoder
from longtake.encoders.decoders import TinyDecoder
from longtake.encoders.tiny import TinySizes
from longtake.encodings.write import encode
from longtake.errors import ConfigError
from longtake.evaluation import contenders as makers
from longtake.evaluation import row_reader
from longtake.evaluation.contenders import Asked, contenders, parse_multiples
from longtake.evaluation.instruments import METRICS
from longtake.evaluation.latents import LATENT_METRICS
from longtake.evaluation.likeness import LIKENESS_METRICS
from longtake.evaluation.on_data import evaluate_on_data
from longtake.evaluation.row_reader import RowReader
from longtake.evaluation.target import of_models
from longtake.parallel.mesh import Mesh
from longtake.plan import PlanConfig
from longtake.toy.files import write_world
from longtake.weights.load import save_dit

RULES = GenerationConfig(
    height=64,
    width=64,
    num_latent_frames=3,
    steps=[1.0, 0.5],
    plan=PlanConfig(block_frames=2, window_frames=5, sink_frames=1),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`photos/`, two students `one` and `two` with rules of their own, and `teacher` weights."""
    root, encoders = tmp_path_factory.mktemp("on data"), make_encoders()
    write_photos(root / "photos", 3)
    for seed, name in enumerate(("one", "two", "bidirectional")):
        write_model(root / name, TEACHER, encoders)
        save_dit(TEACHER, make_model(TEACHER, seed).state_dict(), root / name)
        write_rules(root / name, RULES)
    return root


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])


def evaluate(place, *arguments):
    return run("evaluate", "--model", place / "one", "--data", place / "photos", *arguments)


def num_frames(path):
    with open_video(Path(path), str(path)) as video:
        return sum(1 for _ in video.frames())


def page_of(out):
    return (out / "evaluation.html").read_text()


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The folder of one evaluation with everything."""
    out = tmp_path_factory.mktemp("out") / "report"
    options = ["--multiples", "3,1", "--rows", "2", "--teacher-steps", "2", "--vbench"]
    teacher = ["--model", place / "two", "--teacher", place / "bidirectional"]
    result = evaluate(place, *teacher, *options, "-o", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_every_row_and_length_is_in_table_json_and_page(whole):
    out, text = whole
    found = json.loads((out / "evaluation.json").read_text())
    names = ["teacher", "one 1x", "one 3x", "two 1x", "two 3x"]
    assert list(found["rows"]) == names and len(found["videos"]) == 2 * len(names)
    metrics = [*METRICS, *LATENT_METRICS, *LIKENESS_METRICS]
    assert all(list(row) == metrics for row in found["rows"].values())
    assert (out / "evaluation.md").read_text() == text[text.index("|") :]
    for video in found["videos"]:
        frames = {"3x": 33}.get(video["name"][-2:], 9)  # 9 latent frames, 3 latent frames
        assert video["frames"] == frames == num_frames(video["path"])
        assert {len(curve) for curve in video["curves"].values()} == {frames}
        assert (video["metrics"]["seam_score"] is None) != video["name"].endswith("3x")  # a clip is two blocks
        assert video["curves"]["latent_mean_shift"][0] == 0 and video["curves"]["clip_frame_likeness"][0] is None
    assert list(found["against_teacher"]) == names[1:] and "motion vs teacher" in text
    means = {name: row["motion_px_s"]["mean"] for name, row in found["rows"].items()}
    ratio = found["against_teacher"]["one 3x"]["motion_vs_teacher"]
    assert ratio == pytest.approx(means["one 3x"] / means["teacher"]) and f"<td>{ratio:.2f}</td>" in page_of(out)
    page = page_of(out)
    links = re.findall(r'<video src="([^"]+)"', page)
    assert len(links) == 6 and not any("1x" in link for link in links)  # the longest of each alone are played
    assert all((out / link.replace("%20", " ")).is_file() for link in links)
    assert "photo0" in page and (Path(out).parent.name not in page)


def test_a_shorter_video_is_the_beginning_of_the_longer_one(whole):
    out, _ = whole
    found = json.loads((out / "evaluation.json").read_text())["videos"]
    curves = {(video["name"], Path(video["path"]).stem): video["curves"] for video in found}
    for (name, stem), short in curves.items():
        if name.endswith("1x"):
            for curve in (*LATENT_METRICS, *LIKENESS_METRICS):
                assert short[curve] == curves[name.replace("1x", "3x"), stem][curve][:9]
    one, two = (curves[name, "00000-photo0"]["change"] for name in ("one 3x", "two 3x"))
    assert one != two


def test_measure_finds_the_same_numbers_in_the_files(whole, tmp_path):
    out, _ = whole
    folders = [f"{name}={out / 'videos' / name}" for name in ("one 1x", "one 3x")]
    assert run_measure(*folders, "--block", "9+8", "--json", tmp_path / "again.json").exit_code == 0
    again = json.loads((tmp_path / "again.json").read_text())
    found = {video["path"]: video for video in json.loads((out / "evaluation.json").read_text())["videos"]}
    assert len(again["videos"]) == 4
    for video in again["videos"]:
        one = found[video["path"]]
        assert {name: one["metrics"][name] for name in METRICS} == video["metrics"]
        assert one["defects"] == video["defects"] and one["curves"]["light"] == video["curves"]["light"]


def run_measure(*arguments):
    return CliRunner().invoke(app, ["measure", *map(str, arguments)])


def test_videos_are_laid_out_for_vbench_with_the_pictures_they_were_made_of(whole, place):
    out, _ = whole
    for name in ("teacher", "one 1x", "two 3x"):
        laid = out / "vbench" / name
        videos, images = os.listdir(laid / "i2v/videos"), os.listdir(laid / "i2v/images")
        assert len(videos) == len(images) == 2 and sorted(videos) == sorted(os.listdir(laid / "long"))
        assert {video.removesuffix("-0.mp4") for video in videos} == {image.removesuffix(".png") for image in images}
        prompts = {(place / "photos" / f"photo{k}.txt").read_text() for k in range(2)}
        assert {image.removesuffix(".png") for image in images} == prompts
        assert Image.open(laid / "i2v/images" / images[0]).size == (64, 64)


def test_a_folder_with_videos_is_kept_unless_it_is_to_be_overwritten(whole, place):
    out, _ = whole
    before = (out / "evaluation.json").read_bytes()
    result = evaluate(place, "-o", out)
    assert result.exit_code == 2 and "exists already" in result.output
    (json_file := out / "evaluation.json").rename(out / "kept.json")
    result = evaluate(place, "--multiples", "1,3", "-o", out)  # one that was ended half-way
    assert result.exit_code == 2 and "00000-photo0.mp4 exists already" in result.output
    (out / "kept.json").rename(json_file)
    assert json_file.read_bytes() == before


@pytest.mark.whole
def test_what_is_overwritten_leaves_nothing_behind(place, tmp_path):
    options = ["--rows", "3", "--vbench", "-o", tmp_path / "out"]
    assert evaluate(place, *options).exit_code == 0
    (mine := tmp_path / "out" / "videos" / "mine.mp4").write_bytes(b"of another")
    options[1] = "1"
    assert evaluate(place, *options, "--overwrite").exit_code == 0
    assert len(json.loads((tmp_path / "out/evaluation.json").read_text())["videos"]) == 1
    assert sorted((tmp_path / "out").rglob("*.mp4")) == [
        tmp_path / "out/vbench/one/i2v/videos" / (name := f"{(place / 'photos/photo0.txt').read_text()}-0.mp4"),
        tmp_path / "out/vbench/one/long" / name,
        mine,
        tmp_path / "out/videos/one/00000-photo0.mp4",
    ]


@pytest.mark.whole
def test_all_stages_of_a_run_beside_their_teacher(workshop, place, tmp_path):
    for stage in ("causal", "distill"):
        save_student(stage_config(workshop, tmp_path / "run", stage))
    options = ["--rows", "1", "--multiples", "1,2", "--teacher-steps", "1", "plan.window_frames=3"]
    result = run("evaluate", "--run", tmp_path / "run", "--data", place / "photos", *options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert list(found["rows"]) == ["teacher", "causal 1x", "causal 2x", "distill 1x", "distill 2x"]
    assert [video["frames"] for video in found["videos"]] == [17, 17, 37, 17, 37]
    assert found["rows"]["causal 1x"]["motion_px_s"]["low"] is None  # one video


@pytest.mark.whole
def test_an_encoded_set_needs_its_decoder_alone(workshop, tmp_path, monkeypatch):
    encode(stage_config(workshop, tmp_path / "run", "distill"), tmp_path / "set")
    write_model(tmp_path / "one", TEACHER, make_encoders())
    write_rules(tmp_path / "one", RULES)
    for encoder in (TextEncoder, ImageEncoder):
        monkeypatch.setattr(encoder, "load", lambda *_, **__: pytest.fail("an encoder was loaded"))
    result = run(
        "evaluate",
        "--model",
        tmp_path / "one",
        "--data",
        tmp_path / "set",
        "--rows",
        2,
        "--vbench",
        "-o",
        tmp_path / "out",
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert list(found["rows"]) == ["one"] and list(found["rows"]["one"]) == [*METRICS, *LATENT_METRICS]
    # Without a picture the first frame stands in for it.
    assert len(list((tmp_path / "out/vbench/one/i2v/images").iterdir())) == 2

    wrong = GenerationConfig.from_tree(RULES.model_dump() | {"height": 32})
    write_rules(tmp_path / "one", wrong)
    result = run("evaluate", "--model", tmp_path / "one", "--data", tmp_path / "set", "-o", tmp_path / "again")
    assert result.exit_code == 1 and "its pictures are 64x64, wanted 32x64" in result.output


@pytest.mark.parametrize("form", ["images", "clips", "lmdb"])
def test_rows_of_any_format_are_read(place, tmp_path, form):
    write_world(tmp_path / "world", WorldConfig(num_worlds=3, num_frames=9, formats=[form]))
    source = of_models([place / "one"]).result
    reader = RowReader(tmp_path / "world" / form, 2, Mesh())
    reading = reader.read(source)
    assert [row.number for row in reading.rows] == [0, 1] and reading.rows[0].size == (8, 8)
    assert reading.samples[0].image.shape == (64, 64, 3) and reading.image is not None
    assert reader.read(replace(source)) is reading  # of another model that takes rows alike


def test_a_table_may_name_pictures_anywhere(place, tmp_path):
    rows = [{"image": str(place / "photos" / f"photo{k}.jpg"), "prompt": f"prompt {k}"} for k in (2, 0)]
    (tmp_path / "suite.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reading = RowReader(tmp_path / "suite.jsonl", 9, Mesh()).read(of_models([place / "one"]).result)
    assert [sample.prompt for sample in reading.samples] == ["prompt 2", "prompt 0"]


@pytest.mark.whole
def test_ranks_share_the_rows_and_all_get_them(place, tmp_path, monkeypatch):
    target = of_models([place / "one"])
    rows = [{"image": str(place / "photos" / f"photo{k}.jpg"), "prompt": f"prompt {k // 2}"} for k in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = Asked(tmp_path / "rows.jsonl", samples=2, layout=True)
    lock, load = threading.Lock(), row_reader.load_encoders

    def load_alone(*arguments, **options):  # the library loads weights in one thread of a process
        with lock:
            return load(*arguments, **options)

    monkeypatch.setattr(row_reader, "load_encoders", load_alone)
    parts = on_ranks(lambda mesh: evaluate_on_data(target, asked, tmp_path / "two", mesh))
    alone = evaluate_on_data(target, asked, tmp_path / "one", Mesh())
    stems = [f"0000{row}-photo{row}-{index}" for row in range(3) for index in range(2)]
    for videos in (*parts, alone):
        assert [video.path.stem for video in videos] == stems
    numbers = [{video.path.stem: video.measured.metrics for video in videos} for videos in (*parts, alone)]
    assert numbers[0] == numbers[1] == numbers[2]
    assert numbers[0][stems[0]] != numbers[0][stems[1]]  # another seed
    # Rows 0 and 1, on different ranks, have one prompt.
    laid = {
        name: (tmp_path / "two/vbench/one/long" / name).read_bytes()
        for name in os.listdir(tmp_path / "two/vbench/one/long")
    }
    assert sorted(laid) == sorted(f"{row}-{k}.mp4" for row in ("prompt 0", "prompt 0 (2)", "prompt 1") for k in (0, 1))
    assert laid["prompt 0 (2)-1.mp4"] == (tmp_path / "two/videos/one" / f"{stems[3]}.mp4").read_bytes()


def test_bidirectional_weights_and_guided_students(place, tmp_path):
    whole = RULES.model_dump() | {"sampler": "whole", "guidance": 2.0, "num_latent_frames": 5}
    write_rules(place / "bidirectional", GenerationConfig.from_tree(whole))
    try:
        found = contenders(of_models([place / "bidirectional", place / "one"]), Asked(Path("x"), multiples=(1, 4)))
        assert [(one.streams, one.multiples, one.clip_frames) for one in found] == [
            (False, (1,), 5),
            (True, (1, 4), 3),
        ]
        assert found[0].sampling == (2, 2.0)
    finally:
        write_rules(place / "bidirectional", RULES)
    with pytest.raises(ConfigError, match="guidance=3"):
        contenders(of_models([place / "one"], changes={"guidance": 3.0}), Asked(Path("x")))


def test_rows_without_pictures_are_refused_where_the_model_starts_from_one(place, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle rises\n")
    with pytest.raises(ConfigError, match="there is no picture"):
        RowReader(tmp_path / "prompts.txt", 1, Mesh()).read(of_models([place / "one"]).result)


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    """A text-to-video student whose first block has two latent frames."""
    folder = write_model(tmp_path_factory.mktemp("t2v") / "text", T2V, make_encoders())
    plan = PlanConfig(block_frames=2, first_frames=2, window_frames=6, sink_frames=2)
    write_rules(folder, GenerationConfig.from_tree(RULES.model_dump() | {"plan": plan.model_dump()}))
    return folder


def test_text_to_video_students_are_judged_on_prompts(text_only, place, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle rises\na blue cross falls\n")
    out = tmp_path / "out"
    result = run("evaluate", "--model", text_only, "--data", tmp_path / "prompts.txt", "--vbench", "-o", out)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "evaluation.json").read_text())
    assert [video["frames"] for video in found["videos"]] == [9, 9]
    assert sorted(os.listdir(out / "vbench/text/long")) == ["a blue cross falls-0.mp4", "a red circle rises-0.mp4"]
    result = run("evaluate", "--model", text_only, "--data", place / "photos", "-o", tmp_path / "photos")
    assert result.exit_code == 2 and "text-to-video weights, which take no picture" in result.output


@pytest.mark.parametrize(("picture", "frames"), [("frame", 1), ("still", 2)])
def test_pictures_are_taken_zero_shot_where_the_rules_say_so(text_only, place, tmp_path, picture, frames):
    # Alone the picture is a block of its own, and then other windows are whole blocks: none is.
    plan = {} if picture == "still" else {"plan": {"window_frames": None, "sink_frames": 0}}
    target = of_models([text_only], changes={"picture": picture, **plan})
    asked = Asked(place / "photos", num_rows=1)
    reading, (one,) = RowReader(asked.data, 1, Mesh()).read(target.result), contenders(target, asked)
    (row,), plan = reading.rows, reading.beginning.plan_of(given=True)
    latents = one.maker(one.load(torch.device("cpu")), plan, first_frame_clean=True, seed=0)(row)
    assert row.first_latent.shape[1] == frames < latents.shape[1] == 3
    assert torch.equal(latents[:, :frames], row.first_latent)
    (video,) = evaluate_on_data(target, asked, tmp_path / "out", Mesh())
    assert video.measured.frames == 9


@pytest.mark.whole
def test_pixels_are_made_by_the_decoder_of_the_rules(place, tmp_path):
    for part in ("vae", "text_encoder", "image_encoder"):
        (tmp_path / part).symlink_to(TOY_ASSETS / part)
    tensors = {name: torch.full(shape, 0.01) for name, shape in TinySizes(16, 1).shapes().items()}
    save_file(tensors, tmp_path / "taew2_1.safetensors")
    changes = {"height": 32, "width": 32, "num_latent_frames": 2, "decoder": "tiny"}
    target = of_models(["toy"], encoders=tmp_path, changes=changes)
    asked = Asked(place / "photos", num_rows=1, teacher_steps=1)
    assert isinstance(RowReader(asked.data, 1, Mesh()).read(target.result).decoder, TinyDecoder)
    for video in evaluate_on_data(target, asked, tmp_path / "out", Mesh()):
        assert video.measured.frames == 5
        assert video.measured.curves["contrast"][-1] < 0.01  # of these weights: next to no picture


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16(place, tmp_path):
    out = tmp_path / "out"
    options = ["--multiples", "1,3", "--rows", "1", "--teacher-steps", "2", "precision=bf16", "-o", out]
    models = ["--model", place / "one", "--teacher", place / "bidirectional", "--data", place / "photos"]
    result = CliRunner().invoke(app, [str(part) for part in ("evaluate", *models, *options, "--device", "cuda")])
    assert result.exit_code == 0, result.output
    found = json.loads((out / "evaluation.json").read_text())
    assert [video["frames"] for video in found["videos"]] == [9, 9, 33]
    assert all(video["metrics"]["clip_picture_likeness"] <= 1.001 for video in found["videos"])


def test_a_bad_row_is_named_and_nothing_is_measured(place, tmp_path):
    write_photos(tmp_path / "photos", 2)
    (tmp_path / "photos" / "photo1.jpg").write_bytes(b"no picture")
    result = run("evaluate", "--model", place / "one", "--data", tmp_path / "photos", "-o", tmp_path / "out")
    assert result.exit_code == 1 and "photo1.jpg" in result.output
    assert not (tmp_path / "out" / "videos").exists()


def test_rows_that_cannot_be_read_cost_no_earlier_video(place, tmp_path):
    (earlier := tmp_path / "out" / "videos" / "one" / "00000-photo0.mp4").parent.mkdir(parents=True)
    earlier.write_bytes(b"made before")
    (tmp_path / "empty").mkdir()
    options = ["--data", tmp_path / "empty", "-o", tmp_path / "out", "--overwrite"]
    result = run("evaluate", "--model", place / "one", *options)
    assert result.exit_code == 1 and "is no data set" in result.output
    assert earlier.read_bytes() == b"made before"


@pytest.mark.whole
def test_a_refusal_after_videos_were_made_costs_no_earlier_one(place, tmp_path, monkeypatch):
    """The second model does not load once the first has made its videos; what it made lies apart until next time."""
    out, options = tmp_path / "out", ["--rows", "1", "--vbench"]
    assert evaluate(place, *options, "-o", out).exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    options += ["--model", place / "two", "-o", out, "--overwrite"]
    whole = makers.load_denoiser
    weights = place / "two"

    def refused(source, *more, **rules):
        if source.weights == weights:
            raise ConfigError("cannot be loaded")
        return whole(source, *more, **rules)

    monkeypatch.setattr(makers, "load_denoiser", refused)
    result = evaluate(place, *options)
    assert result.exit_code == 2 and "cannot be loaded" in result.output
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (made,) = after.keys() - before.keys()
    assert made == out / "videos.part/one/00000-photo0.mp4" and before.items() <= after.items()
    monkeypatch.undo()
    assert evaluate(place, *options).exit_code == 0
    assert not (out / "videos.part").exists() and len(list((out / "videos").rglob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "x", "--num-worlds", "3"], "--num-worlds is of toy worlds"),
        (["--data", "x", "--no-ablations"], "--ablations is of toy worlds"),
        (["--rows", "3"], "--rows needs --data"),
        (["plan.sink_frames=1"], "needs --data"),
        (["--data", "x", "--multiples", "1,x"], "--multiples 1,x must be whole numbers"),
        (["--data", "x", "--multiples", "0,1"], "--multiples 0,1 must be whole numbers from 1 on"),
        (["--data", "x", "--multiples", "2,2"], "each once"),
        (
            ["--data", "x", "--multiples", "1,9999999"],
            "--multiples 9999999 of clips of 3 latent frames must be at most",
        ),
        (["--data", "x", "--rows", "0"], "must be at least 1"),
        (["--data", "x", "--teacher-guidance", "nan"], "--teacher-guidance nan must be a finite number"),
        (["--data", "x", "--teacher-guidance", "-1"], "--teacher-guidance -1 must be a finite number"),
        (["--data", "nowhere"], "does not exist"),
    ],
)
def test_wrong_options_are_refused(place, tmp_path, options, words):
    result = run("evaluate", "--model", place / "one", "-o", tmp_path / "out", *options)
    assert result.exit_code in (1, 2) and words in result.output, result.output
    assert result.output.count("\n") == 1


def test_multiples_are_read():
    assert parse_multiples("1, 4,10") == (1, 4, 10) and Asked(Path("x"), multiples=(4, 1)).multiples == (1, 4)
