"""Many videos: which pairs are read, what a restart keeps, what bad pairs do, and that ranks change nothing."""

import json
from pathlib import Path

import pytest
from forked_ranks import torchrun
from typer.testing import CliRunner

from longtake.cli.app import app
from longtake.errors import ConfigError, DataError
from longtake.inference.batch import Pair, generate_many, read_pairs
from longtake.inference.generator import Generator, Source, generate_file
from longtake.parallel.mesh import Mesh
from longtake.toy.world import sample_world

WORLDS = [sample_world(3, k) for k in range(3)]


def make(run, pairs, folder, mesh=None, **given):
    length = {} if "seconds" in given else {"num_frames": 5}
    return generate_many(Source.of_run(run), pairs, folder, mesh=mesh or Mesh(), **length, **given)


def test_pairs_of_a_folder_a_table_and_a_file(inputs):
    by_caption = read_pairs(inputs)
    assert [pair.name for pair in by_caption] == ["w0", "w1", "w2"]
    assert [pair.prompt for pair in by_caption] == [world.caption for world in WORLDS]
    lines = [{"image": "w0.png", "prompt": "one"}, {"image": str(inputs / "w0.png"), "prompt": "two"}]
    (inputs / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    by_line = read_pairs(inputs / "list.jsonl")
    assert [pair.name for pair in by_line] == ["00000-w0", "00001-w0"]
    assert {pair.image for pair in by_line} == {inputs / "w0.png"}
    (inputs / "metadata.jsonl").write_text(json.dumps({"file_name": "w2.png", "text": "three"}))
    assert [(pair.name, pair.prompt) for pair in read_pairs(inputs)] == [("00000-w2", "three")]


def test_each_bad_pair_says_what_is_wrong(tmp_path):
    lines = [
        b"{",
        b"[1]",
        b'{"prompt": "p"}',
        b'{"image": "a.png", "prompt": " "}',
        b'{"image": "a.png", "prompt": "p"}',
    ]
    (tmp_path / "list.jsonl").write_bytes(b"\n".join(lines))
    problems = [pair.problem for pair in read_pairs(tmp_path / "list.jsonl")]
    assert "not valid JSON" in problems[0] and "must be a JSON object" in problems[1]
    assert "file_name is missing" in problems[2] and "prompt is missing" in problems[3] and problems[4] is None
    (tmp_path / "list.jsonl").unlink()
    with pytest.raises(DataError, match="empty.jsonl is empty; it needs one line a file"):
        (tmp_path / "empty.jsonl").write_text("")
        read_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        read_pairs(tmp_path / "nothing")
    for name in ("b.png", "a.png"):
        (tmp_path / name).touch()
    (tmp_path / "b.txt").touch()
    (tmp_path / "c.txt").write_text("a prompt")
    assert [(p.name, p.problem.split()[-1]) for p in read_pairs(tmp_path)] == [
        ("a", "one"),  # its caption is missing; every file needs one
        ("b", "prompt"),  # its caption is empty; every row needs a prompt
        ("c", "caption"),  # it has no file of its name; add the file or remove the caption
    ]
    (tmp_path / "a.jpg").touch()
    assert "share one name" in read_pairs(tmp_path)[0].problem


@pytest.mark.whole
def test_seeds_are_those_of_single_videos_and_ranks_change_nothing(run, inputs, tmp_path):
    pairs = read_pairs(inputs)
    said = []
    reports = make(run, pairs, tmp_path / "one", samples=2, seed=4, report=said.append)
    names = {f"w{k}-seed{s}.mp4" for k in range(3) for s in (4, 5)}
    assert {report.output.name for report in reports} == names and len(said) == 6
    assert all("5 frames in" in line and "frames/s, first generated frame after" in line for line in said)

    class Rank(Mesh):
        """A rank whose partner ends with nothing to say."""

        def on_main(self, work):
            return list(range(6))  # before any rank wrote

        def every(self, work):
            return [work()]

    (tmp_path / "two").mkdir()
    shares = [make(run, pairs, tmp_path / "two", Rank(rank, 2), samples=2, seed=4) for rank in (0, 1)]
    assert [len(share) for share in shares] == [3, 3]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    alone = tmp_path / "alone.mp4"
    generate_file(run, inputs / "w1.png", WORLDS[1].caption, alone, num_frames=5, seed=5, device="cpu")
    assert alone.read_bytes() == (tmp_path / "one" / "w1-seed5.mp4").read_bytes()
    assert alone.read_bytes() != (tmp_path / "one" / "w1-seed4.mp4").read_bytes()


def test_a_restart_makes_only_what_is_missing(run, inputs, tmp_path, monkeypatch):
    pairs = read_pairs(inputs)
    make(run, pairs, tmp_path / "out")
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.mp4")}
    (tmp_path / "out" / "w1-seed0.mp4").unlink()
    assert [report.output.name for report in make(run, pairs, tmp_path / "out")] == ["w1-seed0.mp4"]
    kept = {file: file.stat().st_mtime_ns for file in stamps if file.name != "w1-seed0.mp4"}
    assert len(kept) == 2 and all(stamps[file] == stamp for file, stamp in kept.items())
    monkeypatch.setattr(Generator, "build", lambda *_: pytest.fail("nothing is left to do"))
    assert make(run, pairs, tmp_path / "out") == []


def test_what_is_stopped_while_it_says_what_was_asked_is_made_by_the_next_start(run, inputs, tmp_path, monkeypatch):
    whole, pairs = Path.write_text, read_pairs(inputs)[:1]

    def stopped(path, text, *args, **kwargs):
        whole(path, text[:20], *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", stopped)
        make(run, pairs, tmp_path / "out")
    assert [report.output.name for report in make(run, pairs, tmp_path / "out")] == ["w0-seed0.mp4"]


def test_videos_of_another_request_are_not_taken_for_finished(run, inputs, tmp_path):
    pairs = read_pairs(inputs)[:1]
    make(run, pairs, tmp_path / "out")
    with pytest.raises(DataError, match="w0-seed0.mp4 was made with other values of length"):
        make(run, pairs, tmp_path / "out", seconds=1.0)
    (tmp_path / "out" / "w0-seed0.json").unlink()
    with pytest.raises(DataError, match="does not say how it was made"):
        make(run, pairs, tmp_path / "out")


def test_wrong_requests_are_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Generator, "build", lambda *_: pytest.fail("work was done"))
    for wrong, message in (({"samples": 0}, "samples=0"), ({"negative": "blurred"}, "guidance=1")):
        with pytest.raises(ConfigError, match=message):
            make(run, [Pair("a", "a", Path("a"), "p")], tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["jsonl", "csv", "prompts"])
def test_rows_may_say_seed_seconds_negative_and_guidance(run, inputs, tmp_path, kind):
    """Each video is the one that a command with these options makes."""
    if kind == "csv":
        text = "image,text,seed,seconds,negative,guidance\nw0.png,one,7,0.5,,\nw1.png,two,,,blurred,2.5\n"
    else:
        rows = [{"text": "one", "seed": 7, "seconds": 0.5}, {"text": "two", "negative": "blurred", "guidance": 2.5}]
        rows = [row if kind == "prompts" else {**row, "image": f"w{k}.png"} for k, row in enumerate(rows)]
        text = "\n".join(map(json.dumps, rows))
    table = inputs / f"list.{'csv' if kind == 'csv' else 'jsonl'}"
    table.write_text(text)
    pairs = read_pairs(table)
    first, second = (pair.values.model_dump(exclude_none=True) for pair in pairs)
    assert (first, second) == ({"seed": 7, "seconds": 0.5}, {"negative": "blurred", "guidance": 2.5})
    if kind != "jsonl":
        return
    made = make(run, pairs, tmp_path / "out", seed=3, samples=2)
    names = ["00000-w0-seed7", "00000-w0-seed8", "00001-w1-seed3", "00001-w1-seed4"]
    assert [report.output.stem for report in made] == names and [report.num_frames for report in made] == [8, 8, 5, 5]
    alone = tmp_path / "alone.mp4"
    generate_file(run, inputs / "w0.png", "one", alone, seconds=0.5, seed=8, device="cpu")
    assert alone.read_bytes() == (tmp_path / "out" / "00000-w0-seed8.mp4").read_bytes()
    guided, rest = Source.of_run(run, {"guidance": 2.5}), {"num_frames": 5, "overwrite": True}
    generate_file(guided, inputs / "w1.png", "two", alone, seed=3, negative="blurred", device="cpu", **rest)
    assert alone.read_bytes() == (tmp_path / "out" / "00001-w1-seed3.mp4").read_bytes()
    said = json.loads((tmp_path / "out" / "00001-w1-seed3.json").read_text())
    assert said["settings"]["guidance"] == 2.5 and said["negative"] == "blurred"
    assert make(run, pairs, tmp_path / "out", seed=3, samples=2) == []  # finished


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sed": 3}, r"list.jsonl row 0 \(line 1\): unknown key sed; did you mean seed\? The keys are .*guidance"),
        ({"frames": 3}, "unknown key frames; "),
        ({"seed": -1}, r"row 0 \(line 1\): seed: got -1"),
        ({"seed": "many"}, "seed: got 'many'"),
        ({"seconds": 0}, "seconds: got 0"),
        ({"guidance": "2.5x"}, "guidance: got '2.5x'"),
        ({"negative": "blurred"}, r"row 0 \(line 1\): a negative prompt .* has no effect with guidance=1"),
        ({"negative": "blurred", "guidance": 1.0}, "has no effect with guidance=1"),
        ({"seconds": 1e9}, "seconds: got 1000000000.0"),
    ],
)
def test_wrong_rows_are_refused_before_any_work(run, inputs, tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(Generator, "build", lambda *_, **__: pytest.fail("work was done"))
    for given in ({"image": "w0.png"}, {}):
        (inputs / "list.jsonl").write_text(json.dumps({**given, "text": "one", **row}))
        with pytest.raises((ConfigError, DataError), match=message):
            make(run, read_pairs(inputs / "list.jsonl"), tmp_path / "out")
        command = ["generate", "--run", run, "--inputs", inputs / "list.jsonl", "-o", tmp_path / "out"]
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code in (1, 2) and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_bad_pairs_are_named_after_the_others(run, inputs, tmp_path):
    (inputs / "w0.png").write_bytes(b"no picture")
    (inputs / "w1.txt").unlink()
    command = ["generate", "--run", run, "--inputs", inputs, "-o", tmp_path / "out", "--frames", 5, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 1 and "bad pairs (2; all others" in result.output
    assert "w0.png" in result.output and "w1.txt" in result.output and "5 frames in" in result.output
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        f"w2-seed0.{end}" for end in ("json", "mp4", "txt")
    ]


@pytest.mark.whole
def test_two_real_ranks_share_and_both_fail_after_the_others(run, inputs, tmp_path):
    """The bad pair is on rank 0, whose share is done first; rank 1 finishes all the same."""
    (inputs / "w0.png").write_bytes(b"no picture")
    command = ["generate", "--run", run, "--inputs", inputs, "-o", tmp_path / "out", "--frames", 5, "--device", "cpu"]
    done = torchrun(2, "-m", "longtake", *command, "--samples", "2")
    assert done.returncode != 0 and "bad pairs (1; all others are done)" in done.stderr, done.stderr
    names = sorted(file.name for file in (tmp_path / "out").glob("*.mp4"))
    assert names == [f"w{k}-seed{s}.mp4" for k in (1, 2) for s in (0, 1)]
