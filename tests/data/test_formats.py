"""The single formats: several prompts, each kind of bad row, tar members, and folders that are none."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from format_files import encode, image_and_prompt_folders, mp4, paired_images, pixels, tar_images, write_lmdb, write_tar

from longtake.data.formats import detect_kind, open_dataset
from longtake.errors import ConfigError, DataError


def test_several_prompts_are_kept_in_order(tmp_path):
    """From a caption of several lines, a JSON list, and a tar field."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/cat.png").write_bytes(encode(pixels(0)))
    (tmp_path / "a/cat.txt").write_text("a cat sits\n\n  the cat jumps \n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.png").write_bytes(encode(pixels(0)))
    (tmp_path / "b/metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "prompts": ["one", "two"]}))
    (tmp_path / "c.jsonl").write_text('{"prompts": ["one", "two", "three"]}\n')
    write_tar(tmp_path / "d.tar", [("1.png", encode(pixels(0))), ("1.json", b'{"prompts": ["p", "q"]}')])
    wanted = {"a": ("a cat sits", "the cat jumps"), "b": ("one", "two"), "c.jsonl": ("one", "two", "three")}
    for name, prompts in (wanted | {"d.tar": ("p", "q")}).items():
        sample = open_dataset(tmp_path / name)[0]
        assert sample.prompts == prompts and sample.prompt == prompts[0]


def test_pairs_are_found_below_and_in_the_order_of_names(tmp_path):
    for name in ("b/cat.png", "a.b.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(pixels(0)))
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/x.png").write_bytes(b"")
    dataset = open_dataset(tmp_path)
    assert [dataset[row].prompt for row in range(len(dataset))] == ["a.b.png", "b.png", "b/cat.png"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "02.txt").unlink(), r"row 2 \(02.jpg\): caption .*02.txt is missing"),
        (lambda folder: (folder / "02.jpg").unlink(), r"row 2 \(02.txt\): caption .*02.txt has no file of its name"),
        (lambda folder: (folder / "02.jpg").write_bytes(b"no"), r"row 2 \(02.jpg\): image .*cannot be decoded"),
        (lambda folder: (folder / "02.png").write_bytes(b""), r"row 2 .*02.jpg, 02.png share one name"),
        (lambda folder: (folder / "02.txt").write_bytes(b"\xff\xff"), r"row 2 .*02.txt is not UTF-8"),
        (lambda folder: (folder / "02.txt").write_text("\n"), r"row 2 .*02.txt is empty"),
    ],
)
def test_a_bad_pair_is_named(tmp_path, damage, message):
    paired_images(tmp_path, 4)
    damage(tmp_path)
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 4 and dataset[3].prompt == "prompt 3"
    with pytest.raises(DataError, match=message):
        dataset[2]


PNG = encode(pixels(0))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.png", PNG)], r"row 1 \(1\): has no caption; it needs one of the fields txt, caption, json"),
        ([("1.txt", b"x")], "row 1 .*has the fields txt; it needs exactly one picture or video"),
        ([("1.png", PNG), ("1.jpg", PNG), ("1.txt", b"x")], "row 1 .*fields png, jpg, txt; it needs exactly one"),
        ([("1.png", b"no"), ("1.txt", b"x")], r"row 1 \(1\): png: .*cannot be decoded"),
        ([("1.mp4", b"no"), ("1.txt", b"x")], r"row 1 \(1\): mp4 cannot be decoded"),
        ([("1.png", PNG), ("1.json", b"{")], "row 1 .*json is not valid JSON"),
        ([("1.png", PNG), ("1.json", b"[]")], "row 1 .*json: must be a JSON object"),
        ([("1.png", PNG), ("1.json", b'{"size": 3}')], "row 1 .*json: text is missing or empty"),
    ],
)
def test_a_bad_row_of_a_tar_is_named(tmp_path, members, message):
    good = [("0.png", PNG), ("0.txt", b"x")]
    write_tar(tmp_path / "a.tar", good + members + [("2.png", PNG), ("2.txt", b"y")])
    dataset = open_dataset(tmp_path, num_frames=5)
    assert len(dataset) == 3 and dataset[2].prompt == "y"
    with pytest.raises(DataError, match=message) as error:
        dataset[1]
    assert "a.tar" in str(error.value)


def test_tar_members_are_read_at_their_offsets(tmp_path):
    """Long names, folders and fields of no use lie between; suffixes begin at the first dot, as WebDataset has it."""
    long = "a" * 150 + "/x"
    members = [("x/readme", b"?"), ("x/1.png", encode(pixels(1))), ("x/1.cls", b"7"), ("x/1.txt", b"one")]
    members += [(f"{long}.png", encode(pixels(2))), (f"{long}.txt", b"two")]
    write_tar(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.add(tmp_path, "folder", recursive=False)
    dataset = open_dataset(tmp_path)
    assert [dataset[row].prompt for row in range(len(dataset))] == ["one", "two"]
    for row in (0, 1):
        np.testing.assert_array_equal(dataset[row].image, pixels(row + 1))


def test_damaged_tars_are_refused(tmp_path):
    tar_images(tmp_path, 4)
    whole = (tmp_path / "train-000.tar").read_bytes()
    dataset = open_dataset(tmp_path)
    (tmp_path / "train-000.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match="train-000.tar row 0 .* cut off"):
        dataset[0]
    with pytest.raises(DataError, match="train-000.tar cannot be read as an uncompressed tar"):
        open_dataset(tmp_path)
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "empty/e.tar", [])
    with pytest.raises(DataError, match="has no rows"):
        open_dataset(tmp_path / "empty")


def test_clips_of_a_tar_need_a_length(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.mp4", mp4()), ("1.txt", b"x")])
    with pytest.raises(ConfigError, match="num_frames"):
        open_dataset(tmp_path)[0]
    with pytest.raises(DataError, match="has 5 frames and 9 are needed"):
        open_dataset(tmp_path, num_frames=9)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompts": []}', "prompts is missing or empty"),
        ('{"prompts": ["a", ""]}', "prompts is missing or empty"),
        ('{"prompts": "a"}', None),
        ('{"prompt": 3}', "prompt is missing or empty"),
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_lines_of_prompts_are_named(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n' + text + "\n")
    dataset = open_dataset(tmp_path / "rows.jsonl")
    assert len(dataset) == 2
    if message is None:
        assert dataset[1].prompts == ("a",)
        return
    with pytest.raises(DataError, match=rf"rows.jsonl row 1 \(line 2\): .*{message}"):
        dataset[1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("img_1_data", None, "key img_1_data is missing"),
        ("img_1_data", b"123", r"img_1_data has 3 bytes; shape \(480, 832, 3\) of uint8 needs 1198080"),
        ("prompts_1_data", b" ", "prompts_1_data is empty"),
        ("prompts_1_data", b"\xff", "prompts_1_data is not UTF-8"),
        ("latents_1_data", b"1234", r"latents_1_data has 4 bytes; shape \(2, 1, 1, 1\) of float16 needs 4"),
        ("latents_1_data", b"12", r"latents_1_data has 2 bytes"),
        ("img_0_data", None, "key img_0_data is missing"),
    ],
)
def test_a_bad_row_of_the_published_lmdb_is_named(tmp_path, key, value, message):
    """As it lies in the wild: no version, raw pixels of one size, float16 latents, shapes in one key."""
    pixel_bytes = np.zeros((480, 832, 3), np.uint8).tobytes()
    entries = {"latents_shape": "3 2 1 1 1"}
    for i in range(3):
        entries |= {f"img_{i}_data": pixel_bytes, f"prompts_{i}_data": f"p {i}", f"latents_{i}_data": b"1234"}
    entries[key] = value
    write_lmdb(tmp_path / "shard_0", {k: v for k, v in entries.items() if v is not None})
    dataset = open_dataset(tmp_path, height=16, width=16)
    row = int(key.split("_")[1])
    if value == b"1234":  # the right size
        assert dataset[row].extras["latents"].shape == (2, 1, 1, 1)
        return
    with pytest.raises(DataError, match=f"shard_0 row {row}: .*{message}"):
        dataset[row]
    assert len(dataset) == 3 and dataset[2].prompt == "p 2"


def test_a_missing_picture_does_not_shorten_a_published_set(tmp_path):
    """Without `latents_shape` the rows must be counted, and one without its picture is still a row."""
    pixel_bytes = np.zeros((480, 832, 3), np.uint8).tobytes()
    entries = {f"prompts_{i}_data": f"p {i}" for i in range(12)} | {f"img_{i}_data": pixel_bytes for i in (0, 11)}
    write_lmdb(tmp_path / "shard_0", entries)
    dataset = open_dataset(tmp_path, height=16, width=16)
    assert len(dataset) == 12 and dataset[11].prompt == "p 11"
    with pytest.raises(DataError, match="row 5: key img_5_data is missing"):
        dataset[5]


def test_a_wrong_folder_is_told_what_it_holds_and_what_is_known(tmp_path):
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "videos_old").mkdir()
    with pytest.raises(DataError) as error:
        open_dataset(tmp_path)
    message = str(error.value)
    assert "2 x .csv" in message and "videos_old/" in message
    assert all(kind in message for kind in ("images", "clips", "texts", "webdataset", "lmdb", "encoded"))
    with pytest.raises(DataError, match="a.csv is a file of no known data format"):
        open_dataset(tmp_path / "a.csv")
    with pytest.raises(DataError, match="has no rows of kind clips"):
        open_dataset(tmp_path, kind="clips", num_frames=5)
    with pytest.raises(DataError, match="is a file, and data.kind=images needs a folder"):
        open_dataset(tmp_path / "a.csv", kind="images")
    with pytest.raises(ConfigError, match="'csv' is no data format; give auto or one of encoded, lmdb, .*images"):
        open_dataset(tmp_path, kind="csv")


def test_pictures_and_clips_in_one_folder_need_a_kind(tmp_path):
    paired_images(tmp_path, 2)
    shutil.copy(tmp_path / "00.jpg", tmp_path / "x.mp4")
    with pytest.raises(DataError, match="both pictures and clips .*1 x .mp4.* set data.kind"):
        detect_kind(tmp_path)


def test_sub_folders_pair_by_name(tmp_path):
    image_and_prompt_folders(tmp_path, 3)
    (tmp_path / "prompt/000001.txt").unlink()
    dataset = open_dataset(tmp_path)
    assert dataset[2].prompt == "prompt 2"
    with pytest.raises(DataError, match=r"row 1 \(000001.webp\): caption .*prompt/000001.txt is missing"):
        dataset[1]


def test_a_pipe_is_no_data_set(tmp_path):
    """Nobody writes into it: opening it would wait for ever."""
    os.mkfifo(tmp_path / "rows.tar")
    with pytest.raises(DataError, match="rows.tar is a pipe or a device"):
        open_dataset(tmp_path / "rows.tar")


def test_an_encoded_set_and_other_data_are_told_apart(tmp_path):
    """Who encodes data of a recipe that reads clips names the new folder, and the recipe still says clips."""
    for name in ("photos", "encoded"):
        (tmp_path / name).mkdir()
    paired_images(tmp_path / "photos", 1)
    for name in ("index.json", "shard_00000.safetensors"):
        (tmp_path / "encoded" / name).write_text("{}")
    for kind in ("clips", "images", "lmdb"):
        with pytest.raises(DataError, match=f"is an encoded set, and data.kind={kind}; set data.kind=encoded"):
            open_dataset(tmp_path / "encoded", kind=kind, num_frames=5)
    with pytest.raises(
        DataError, match="photos is no encoded set, it has no index.json; write one with `longtake encode`"
    ):
        open_dataset(tmp_path / "photos", kind="encoded")
