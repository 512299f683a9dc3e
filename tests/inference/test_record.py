"""A video says how it was made, and is made again from that, bit for bit."""

import json
import shutil
import sys
from hashlib import sha256

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.errors import ConfigError, DataError
from longtake.inference.batch import Pair, generate_many
from longtake.inference.generator import Generator, generate_file
from longtake.inference.like import generate_like
from longtake.inference.play import play
from longtake.inference.record import Writing, check_output, read_record, sidecar
from longtake.inference.script import generate_story
from longtake.inference.source import Source
from longtake.inference.video import Video
from longtake.inference.video_io import VideoWriter, read_video
from longtake.parallel.mesh import Mesh

FRAMES = 17
PROMPT = "a red circle drifts to the right"


@pytest.fixture(scope="module")
def toy() -> Source:
    return Source.of_model("toy")


@pytest.fixture
def photo(tmp_path):
    for name, colour in (("photo", (200, 60, 30)), ("other", (20, 160, 30))):
        Image.new("RGB", (80, 64), colour).save(tmp_path / f"{name}.png")
    return tmp_path / "photo.png"


def frames(path) -> np.ndarray:
    if path.suffix == ".webp":
        with Image.open(path) as picture:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])
    if not path.suffix:
        return np.stack([np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))])
    return read_video(path)[0]


@pytest.mark.whole
@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.webp", "a"])
def test_every_container_carries_its_record_and_is_made_again(tmp_path, toy, photo, name):
    file = tmp_path / name
    how = Writing(crf=12, scale=2.0, command="longtake generate")
    generate_file(toy, photo, PROMPT, file, num_frames=FRAMES, seed=3, device="cpu", writing=how)
    record = read_record(file)
    beside = json.loads(sidecar(file).read_bytes())
    assert beside == {"record": record.model_dump(mode="json")}
    assert (record.prompt, record.seed, record.image, record.num_frames) == (PROMPT, 3, str(photo), FRAMES)
    assert (record.device, record.command, record.crf, record.scale) == ("cpu", "longtake generate", 12, 2.0)
    assert record.settings == toy.settings and record.digests.keys() == {
        "model",
        "vae",
        "text encoder",
        "image encoder",
    }
    sidecar(file).unlink()  # what is in the file is enough
    again = tmp_path / f"b{file.suffix}"
    generate_like(file, again, device="cpu", command="longtake generate")
    made, before = frames(again), frames(file)
    assert made.shape == (FRAMES, 128, 128, 3) and np.array_equal(made, before)
    if name == "a.gif":
        shutil.copy(file, tmp_path / "c.gif")
        data = (tmp_path / "c.gif").read_bytes()
        (tmp_path / "c.gif").write_bytes(data[: data.rfind(b"\x21\xfe")] + b"\x3b")
        with pytest.raises(DataError, match=r"c\.gif carries no record, and .*c\.gif\.json holds none"):
            read_record(tmp_path / "c.gif")


def test_the_file_beside_a_video_stands_in_for_what_was_lost(tmp_path, toy, photo):
    file = tmp_path / "a.mp4"
    generate_file(toy, photo, PROMPT, file, num_frames=5, device="cpu")
    record = read_record(file)
    with av.open(str(file)) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with pytest.raises(DataError, match=r"b\.mp4 carries no record, and .*b\.json holds none: .*give the options"):
        read_record(tmp_path / "b.mp4")
    shutil.copy(sidecar(file), tmp_path / "b.json")
    assert read_record(tmp_path / "b.mp4") == record
    beside = json.loads((tmp_path / "b.json").read_bytes())
    del beside["record"]["seed"]
    (tmp_path / "b.json").write_text(json.dumps(beside))
    with pytest.raises(DataError, match=r"b\.mp4 cannot be read by this version.*seed"):
        read_record(tmp_path / "b.mp4")
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(DataError, match="carries no record"):
        generate_like(tmp_path / "b.mp4", tmp_path / "c.mp4")
    with pytest.raises(DataError, match="does not exist"):
        generate_like(tmp_path / "no.mp4", tmp_path / "c.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DataError, match="cannot be read as mp4"):
        read_record(tmp_path / "text.mp4")
    (tmp_path / "photo.jpg").write_text("no video")
    with pytest.raises(DataError, match=r"photo\.jpg is no video: \.mp4"):
        read_record(tmp_path / "photo.jpg")


def test_a_folder_is_made_again_whatever_its_files_are_called(tmp_path, toy, photo):
    generate_file(toy, photo, PROMPT, tmp_path / "a" / "%03d.png", num_frames=5, device="cpu")
    assert read_record(tmp_path / "a") == read_record(tmp_path / "a" / "%03d.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="b carries no record"):
        read_record(tmp_path / "b")


@pytest.mark.whole
def test_a_script_is_made_again(tmp_path, toy, photo):
    (tmp_path / "story.yaml").write_text(
        f"image: photo.png\nprompt: {PROMPT}\nframes: 65\nseed: 5\nevents:\n"
        "- {frame: 17, prompt: a blue square climbs}\n- {frame: 40, image: other.png}\n"
    )
    file = tmp_path / "a.mp4"
    generate_story(toy, tmp_path / "story.yaml", file, device="cpu")
    record = read_record(file)
    assert [(c.frame, c.prompt, c.image) for c in record.changes] == [
        (17, "a blue square climbs", None),
        (40, None, str(tmp_path / "other.png")),
    ]
    assert set(record.files) == {str(photo), str(tmp_path / "other.png")}
    (tmp_path / "story.yaml").unlink()
    generate_like(file, tmp_path / "b.mp4", device="cpu")
    assert np.array_equal(frames(tmp_path / "b.mp4"), frames(file))


class Typed:
    """Lines that come after so many blocks each."""

    draft, ended = "", False

    def __init__(self, *lines: list[str]) -> None:
        self._lines = list(lines)

    def take(self) -> list[str]:
        return self._lines.pop(0) if self._lines else ["/quit"]


@pytest.mark.whole
def test_what_was_typed_is_made_again(tmp_path, toy, photo):
    generator, file = Generator.build(toy, "cpu"), tmp_path / "a.mp4"
    other = tmp_path / "other.png"
    lines = Typed(
        [], ["a blue square climbs", "/target nothing.png", f"/target {other}"], [f"/image {other}", PROMPT], []
    )
    report = play(generator, photo, PROMPT, file, seed=2, lines=lines)
    record = read_record(file)
    assert record.num_frames == report.num_frames == 50
    assert [(c.frame, c.prompt, c.image, c.target) for c in record.changes] == [
        (17, "a blue square climbs", None, str(other)),
        (33, PROMPT, str(other), None),
    ]
    generate_like(file, tmp_path / "b.mp4", device="cpu")
    assert np.array_equal(frames(tmp_path / "b.mp4"), frames(file))


@pytest.mark.whole
def test_videos_of_a_batch_carry_theirs(tmp_path, toy, photo):
    folder, pairs = tmp_path / "out", [Pair("photo", "photo.png", photo, PROMPT)]
    generate_many(toy, pairs, folder, mesh=Mesh(), num_frames=17, seed=4, writing=Writing(crf=20))
    file = folder / "photo-seed4.mp4"
    beside, record = json.loads(sidecar(file).read_bytes()), read_record(file)
    assert beside["prompt"] == PROMPT and beside["record"] == record.model_dump(mode="json")
    generate_like(file, tmp_path / "b.mp4", device="cpu")
    assert np.array_equal(frames(tmp_path / "b.mp4"), frames(file))
    stamp = file.stat().st_mtime_ns
    generate_many(toy, pairs, folder, mesh=Mesh(), num_frames=17, seed=4, writing=Writing(crf=20))
    assert file.stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="made with other values of video"):
        generate_many(toy, pairs, folder, mesh=Mesh(), num_frames=17, seed=4)


@pytest.mark.whole
def test_what_cannot_be_the_same_is_refused(tmp_path, toy, photo):
    file = tmp_path / "a.mp4"
    weights = tmp_path / "weights"
    shutil.copytree(toy.weights, weights)
    source = Source.of_model(weights, toy.encoders)
    generate_file(source, photo, PROMPT, file, num_frames=5, device="cpu")
    with pytest.raises(ConfigError, match="began with|is not the picture"):
        generate_like(file, tmp_path / "b.mp4", image=tmp_path / "other.png", device="cpu")
    photo.rename(tmp_path / "moved.png")
    with pytest.raises(ConfigError, match=r"photo\.png, a picture of the video, is not there \(say with --image"):
        generate_like(file, tmp_path / "b.mp4", device="cpu")
    shutil.rmtree(weights)
    with pytest.raises(ConfigError, match="weights, of which the video was made, is not there; say with --model"):
        generate_like(file, tmp_path / "b.mp4", image=tmp_path / "moved.png", device="cpu")
    generate_like(file, tmp_path / "b.mp4", source=toy, image=tmp_path / "moved.png", device="cpu")
    assert np.array_equal(frames(tmp_path / "b.mp4"), frames(file))
    beside = json.loads(sidecar(file).read_bytes())
    beside["record"]["digests"]["vae"] = "0" * 64
    sidecar(file).write_text(json.dumps(beside))
    VideoWriter(file, 16, 64, 64)
    with VideoWriter(file, 16, 64, 64) as writer:  # without a record of its own
        writer.write(np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"a\.mp4 was made with other weights of: vae \(they were at .*weights"):
        generate_like(file, tmp_path / "c.mp4", source=toy, image=tmp_path / "moved.png", device="cpu")


def test_the_file_beside_is_no_one_elses(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    for overwrite in (False, True):  # nobody asked for that file to go
        with pytest.raises(ConfigError, match=r"a\.json, where the record .* is another file"):
            check_output(tmp_path / "a.mp4", overwrite=overwrite)
    (tmp_path / "a.json").write_text('{"record": {}}')
    check_output(tmp_path / "a.mp4")


@pytest.mark.whole
def test_videos_of_one_name_and_other_kinds_have_records_of_their_own(tmp_path, toy, photo):
    kinds = {"a.mp4": "a.json", "a.gif": "a.gif.json", "a.webp": "a.webp.json", "a": "a.png.json"}
    made = Generator.build(toy, "cpu").video(photo, PROMPT, num_frames=5, seed=3)
    for name, beside in kinds.items():
        made.save(tmp_path / name)
        assert sidecar(tmp_path / name) == tmp_path / beside and (tmp_path / beside).is_file()
    assert read_record(tmp_path / "a.gif") == read_record(tmp_path / "a.mp4")
    generate_like(tmp_path / "a.gif", tmp_path / "b.gif", device="cpu")
    generate_like(tmp_path / "a.mp4", tmp_path / "b.mp4", device="cpu")
    assert np.array_equal(frames(tmp_path / "b.gif"), frames(tmp_path / "a.gif"))
    Video(made.frames, made.fps).save(tmp_path / "a.gif", overwrite=True)  # without a record: that of the mp4 stays
    assert not (tmp_path / "a.gif.json").exists() and (tmp_path / "a.json").exists()
    with pytest.raises(DataError, match=r"a\.gif carries no record, and .*a\.gif\.json holds none"):
        read_record(tmp_path / "a.gif")
    (tmp_path / "a.mp4").unlink()  # as of earlier versions, which had one name for all kinds
    assert read_record(tmp_path / "a.gif").seed == 3


def test_a_picture_in_memory_is_made_again_from_a_file_that_is_named(tmp_path, toy, photo, caplog):
    generator, file = Generator.build(toy, "cpu"), tmp_path / "a.mp4"
    with Image.open(photo) as picture:
        generator.video(picture.copy(), PROMPT, num_frames=5).save(file)
    with pytest.raises(ConfigError, match="picture in memory, not a file; save it as PNG and give that with --image"):
        generate_like(file, tmp_path / "b.mp4", device="cpu")
    generate_like(file, tmp_path / "b.mp4", image=photo, device="cpu")
    assert f"{photo} stands for a picture that was no file: nobody knows if it is the same one" in caplog.messages
    assert np.array_equal(frames(tmp_path / "b.mp4"), frames(file))
    assert read_record(tmp_path / "b.mp4").files == {str(photo): sha256(photo.read_bytes()).hexdigest()}


def test_a_video_that_is_saved_says_how_it_was_made(tmp_path, toy, photo):
    """And a video without a record leaves none of an earlier one beside itself."""
    made = Generator.build(toy, "cpu").video(photo, PROMPT, num_frames=5, seed=3)
    made.save(tmp_path / "a.mp4")
    record = read_record(tmp_path / "a.mp4")
    assert (record.prompt, record.seed, record.num_frames, record.image) == (PROMPT, 3, 5, str(photo))
    assert json.loads((tmp_path / "a.json").read_text())["record"]["seed"] == 3
    Video(made.frames, made.fps).save(tmp_path / "a.mp4", overwrite=True)
    assert not (tmp_path / "a.json").exists()
    with pytest.raises(DataError, match="carries no record"):
        read_record(tmp_path / "a.mp4")


@pytest.mark.whole
def test_the_command(tmp_path, toy, photo, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/longtake", "generate", "--like", "a.mp4"])
    file = tmp_path / "a.mp4"
    generate_file(toy, photo, PROMPT, file, num_frames=5, device="cpu", writing=Writing(scale=2))

    def told(*words):
        return CliRunner().invoke(app, ["generate", *map(str, words), "-o", str(tmp_path / "b.mp4")])

    for words, message in (
        (["--seed", 3], "leave out --seed"),
        (["--steps", 2], "leave out --steps"),
        (["plan.sink_frames=1"], "leave out KEY=VALUE"),
        (["--encoders", "toy"], "give either --run (a training run) or --model"),
        (["--prompt", "a"], "give either"),
        (["--samples", 2], "--like makes one video"),
        (["--scale", 99], "scale=99.0 must be between"),
    ):
        result = told("--like", file, *words)
        assert result.exit_code == 2 and message in result.output, result.output
    result = told("--like", file, "--device", "cpu", "--scale", 1)
    assert result.exit_code == 0, result.output
    assert read_video(tmp_path / "b.mp4")[0].shape == (5, 64, 64, 3)
    assert read_record(tmp_path / "b.mp4").command == "longtake generate --like a.mp4"
