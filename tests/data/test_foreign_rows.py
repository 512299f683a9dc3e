"""Folders, tables, tars and texts that other people's programs wrote: read where it is clear what is meant, else named."""

import json
import logging
import os
import unicodedata

import numpy as np
import pytest
from format_files import encode, mp4, pixels, write_lmdb, write_tar

from longtake.data.formats import detect_kind, open_dataset
from longtake.data.samples import Sample
from longtake.errors import DataError

PNG = encode(pixels(0))
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def prompts(path, **more):
    dataset = open_dataset(path, **more)
    return [dataset[row].prompts for row in range(len(dataset))]


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        file = folder / name.replace("__", ".")
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def test_prompts_end_where_people_see_a_line_end(tmp_path):
    inside = f"a{'b'.join(SEPARATORS)}c"
    text = f"{inside}\r\nsecond\rthird\n\nfourth\n"
    wanted = (inside, "second", "third", "fourth")
    write(tmp_path / "pairs", a__png=PNG, a__txt=text)
    write(tmp_path, prompts__txt=text)
    write_tar(tmp_path / "a.tar", [("1.png", PNG), ("1.txt", text.encode())])
    write_lmdb(tmp_path / "lmdb", {"longtake_format": "1", "num_rows": 1, "img_0_data": PNG, "prompts_0_data": text})
    for name in ("pairs", "a.tar", "lmdb"):
        assert prompts(tmp_path / name) == [wanted]
    assert prompts(tmp_path / "prompts.txt") == [(line,) for line in wanted]


def test_half_a_character_is_named_by_row(tmp_path):
    lines = '{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n'
    write(tmp_path, rows__jsonl=lines)
    dataset = open_dataset(tmp_path / "rows.jsonl")
    assert dataset[0].prompt == "whole \U0001f600"
    with pytest.raises(DataError, match=r"rows.jsonl row 1 \(line 2\): text holds half a character"):
        dataset[1]


def test_names_that_are_no_utf8_can_be_written_down(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    for suffix, data in ((b".png", PNG), (b".txt", b"a prompt")):
        with open(name + suffix, "wb") as file:
            file.write(data)
    sample = open_dataset(tmp_path)[0]
    json.dumps([sample.name, sample.where], ensure_ascii=False).encode()
    os.remove(name + b".txt")
    with pytest.raises(DataError, match=r"caf.udce9") as error:
        open_dataset(tmp_path)[0]
    str(error.value).encode()
    assert Sample("caf\udce9", "x").name == "caf\\udce9"


def test_linked_folders_and_files_are_read_and_loops_end(tmp_path):
    write(tmp_path / "else", a__png=PNG, a__txt="there")
    write(tmp_path / "set", b__png=PNG, b__txt="here")
    (tmp_path / "set/linked").symlink_to(tmp_path / "else")
    (tmp_path / "set/back").symlink_to(tmp_path / "set")
    (tmp_path / "set/c.png").symlink_to(tmp_path / "else/a.png")
    (tmp_path / "set/c.txt").write_text("linked file")
    assert prompts(tmp_path / "set") == [("here",), ("linked file",), ("there",)]
    (tmp_path / "set/c.png").unlink()
    (tmp_path / "set/c.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match="c.png cannot be read"):
        open_dataset(tmp_path / "set")[1]


def test_two_unicode_forms_are_one_name(tmp_path):
    write(tmp_path / "a", **{f"{NFD}__png": PNG, f"{NFC}__txt": "p"})
    assert prompts(tmp_path / "a") == [("p",)]
    write(tmp_path / "a", **{f"{NFC}__png": PNG})
    with pytest.raises(DataError, match="share one name; keep one"):
        open_dataset(tmp_path / "a")[0]
    write(
        tmp_path / "b", **{f"{NFD}__png": PNG, "metadata__jsonl": json.dumps({"file_name": f"{NFC}.png", "text": "p"})}
    )
    assert open_dataset(tmp_path / "b")[0].image.shape == (24, 32, 3)
    write_tar(tmp_path / "c.tar", [(f"{NFD}.png", PNG), (f"{NFC}.txt", b"p")])
    assert prompts(tmp_path / "c.tar") == [("p",)]


def test_files_of_macos_are_no_data(tmp_path):
    junk = b"\x00\x05\x16\x07" + bytes(100)
    members = [("._1.png", junk), ("1.png", PNG), ("__MACOSX/._1.txt", junk), ("1.txt", b"p")]
    write(tmp_path / "t", **{"._a__tar": junk})
    write_tar(tmp_path / "t/a.tar", members)
    write(tmp_path / "pairs", **{"._a__png": junk, "._a__txt": junk, "a__png": PNG, "a__txt": "p"})
    write(tmp_path / "pairs/__MACOSX", **{"._a__png": junk})
    write(tmp_path / "texts", **{"._a__txt": junk, "a__txt": "p"})
    for name in ("t", "pairs", "texts"):
        assert prompts(tmp_path / name) == [("p",)]


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_members_of_a_tar_come_in_any_order_and_case(tmp_path, order):
    members = [("0.PNG", encode(pixels(0))), ("0.Txt", b"p0"), ("1.png", encode(pixels(1))), ("1.TXT", b"p1")]
    write_tar(tmp_path / "a.tar", [members[k] for k in order])
    dataset = open_dataset(tmp_path / "a.tar")
    assert len(dataset) == 2
    for row in range(2):
        number = int(dataset[row].prompt[1])
        np.testing.assert_array_equal(dataset[row].image, pixels(number))


def test_a_member_that_is_there_twice_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", PNG), ("0.txt", b"p"), ("1.png", PNG), ("0.TXT", b"q"), ("1.txt", b"r")])
    dataset = open_dataset(tmp_path / "a.tar")
    assert dataset[1].prompt == "r"
    with pytest.raises(DataError, match=r"a.tar row 0 \(0\): has txt twice"):
        dataset[0]


def test_metadata_csv(tmp_path):
    write(tmp_path, a__png=PNG, metadata__csv='\ufefffile_name,text\na.png,"one, two"\na.png,\nb.png,x,y\n')
    assert detect_kind(tmp_path) == "images"
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 3 and dataset[0].prompts == ("one, two",)
    for row, message in ((1, "text is missing"), (2, "more values than there are columns")):
        with pytest.raises(DataError, match=rf"metadata.csv row {row} \(line {row + 2}\): .*{message}"):
            dataset[row]
    write(tmp_path, metadata__jsonl="{}")
    with pytest.raises(DataError, match="metadata.jsonl and metadata.csv; keep one"):
        open_dataset(tmp_path)


def test_tables_of_musubi_tuner_are_read_where_they_are_named(tmp_path, monkeypatch):
    write(tmp_path / "clips", a__mp4=mp4())
    write(tmp_path / "pictures", a__png=PNG)
    lines = [
        {"video_path": str(tmp_path / "clips/a.mp4"), "caption": "p"},
        {"video_path": "clips/a.mp4", "caption": "q"},
    ]
    write(
        tmp_path / "tables", v__jsonl="\n".join(map(json.dumps, lines)), i__csv="image,prompt\n..\\pictures\\a.png,p\n"
    )
    monkeypatch.chdir(tmp_path)
    assert detect_kind(tmp_path / "tables/v.jsonl") == "clips" and detect_kind(tmp_path / "tables/i.csv") == "images"
    assert prompts(tmp_path / "tables/v.jsonl", num_frames=5) == [("p",), ("q",)]
    assert prompts(tmp_path / "tables/i.csv") == [("p",)]
    write(tmp_path / "pictures", metadata__jsonl='{"image_path": "a.png", "caption": "p"}')
    with pytest.raises(DataError, match="file_name is missing; to read image_path instead, name the table itself"):
        open_dataset(tmp_path / "pictures", kind="images")[0]
    write(tmp_path / "tables", two__jsonl='{"image_path": "a.png", "video_path": "a.mp4", "caption": "p"}')
    with pytest.raises(DataError, match="image_path and video_path both name a file"):
        open_dataset(tmp_path / "tables/two.jsonl", kind="clips", num_frames=5)[0]


def test_values_that_are_not_read_are_named_once(tmp_path, caplog):
    line = {"file_name": "a.png", "text": "p", "caption": "other", "fps": 8, "switch_frames": [3]}
    write(tmp_path, a__png=PNG, metadata__jsonl="\n".join([json.dumps(line)] * 3))
    with caplog.at_level(logging.WARNING):
        open_dataset(tmp_path)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "the values of caption, fps are not read"
    ]


@pytest.mark.parametrize("name", ["b.jxl", "b.bmp", "b.avi"])
def test_files_of_other_kinds_beside_a_caption_are_named(tmp_path, name):
    write(tmp_path, a__png=PNG, a__txt="p", b__txt="q", **{name.replace(".", "__"): b"x"})
    with pytest.raises(
        DataError, match=rf"row 1 .*{name} beside caption .*b.txt is of no kind that images are read from"
    ):
        open_dataset(tmp_path)[1]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.9])
def test_a_cut_lmdb_is_named_before_and_while_it_is_used(tmp_path, share):
    entries = {"longtake_format": "1", "num_rows": 20}
    for row in range(20):
        entries |= {f"img_{row}_data": PNG + os.urandom(20000), f"prompts_{row}_data": "p"}
    write_lmdb(tmp_path, entries)
    file = tmp_path / "data.mdb"
    dataset = open_dataset(tmp_path)
    assert dataset[19].prompt == "p"
    os.truncate(file, int(file.stat().st_size * share))
    for use in (lambda: dataset[19], lambda: dataset.pixel_size(19), lambda: open_dataset(tmp_path)):
        with pytest.raises(DataError, match=f"{tmp_path}.*(is cut off: it has|cannot be read)"):
            use()


@pytest.mark.parametrize("name", ["a\0.png", "x" * 5000 + ".png", "\ud83d.png", "."])
def test_names_that_no_file_can_have_are_named_by_row(tmp_path, name):
    lines = [{"file_name": name, "text": "p"}, {"file_name": "a.png", "text": "p"}]
    write(tmp_path, a__png=PNG, metadata__jsonl="\n".join(map(json.dumps, lines)))
    for kind in ("images", "clips"):
        with pytest.raises(DataError, match=r"metadata.jsonl row 0 \(line 1\)"):
            open_dataset(tmp_path, kind=kind, num_frames=2)[0]
    assert open_dataset(tmp_path)[1].prompt == "p"
