"""The three data formats: what is read, that bad rows are named, and that LMDB survives threads and forks."""

import io
import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from longtake.data.clips import read_clip
from longtake.data.formats import detect_kind, open_dataset
from longtake.data.images import decode_image, fit_image
from longtake.data.lmdb import LmdbShards
from longtake.errors import ConfigError, DataError

lmdb = pytest.importorskip("lmdb")
av = pytest.importorskip("av")


def pixels(seed, height=24, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write_metadata(folder, entries):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_mp4(file, num_frames, size=32, fps=16):
    """A clip whose frame t is a grey of 6 t."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "0", "preset": "ultrafast"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv444p"
        for t in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 6 * t, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_lmdb(folder, entries):
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 26) as database, database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value if isinstance(value, bytes) else str(value).encode())


def own_rows(number, start=0):
    entries = {"longtake_format": "1", "num_rows": number}
    for i in range(number):
        kind = ("PNG", "JPEG", "WEBP")[i % 3]
        entries |= {f"img_{i}_data": encode(pixels(start + i), kind), f"prompts_{i}_data": f"prompt {start + i}"}
    return entries


@pytest.fixture
def image_folder(tmp_path):
    names = ["a.png", "b.webp", "sub/c.jpg"]
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(names):
        Image.fromarray(pixels(i)).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    write_metadata(tmp_path, [{"file_name": name, "text": f" prompt {i} "} for i, name in enumerate(names)])
    return tmp_path


def test_images_are_read_losslessly_with_their_prompts(image_folder):
    dataset = open_dataset(image_folder)
    assert len(dataset) == 3
    for i, name in enumerate("ab"):
        sample = dataset[i]
        assert (sample.name, sample.prompt, sample.video) == (name, f"prompt {i}", None)
        np.testing.assert_array_equal(sample.image, pixels(i))
    assert dataset[2].image.shape == (24, 32, 3)


def test_images_are_cropped_to_the_aspect_never_stretched(image_folder):
    assert open_dataset(image_folder, height=16, width=16)[0].image.shape == (16, 16, 3)
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255  # the middle square, all that a square crop may keep
    assert fit_image(Image.fromarray(wide), 20, 20).min() > 200
    tall = wide.swapaxes(0, 1)
    assert fit_image(Image.fromarray(np.ascontiguousarray(tall)), 20, 20).min() > 200


def test_exif_rotation_is_applied():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(pixels(0, 10, 20)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue(), "x").shape == (20, 10, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file_name": "gone.png", "text": "x"}, "gone.png cannot be read"),
        ({"file_name": "bad.png", "text": "x"}, "bad.png.* cannot be decoded"),
        ({"file_name": "cut.png", "text": "x"}, "cut.png.* cannot be decoded"),
        ({"file_name": "a.png", "text": "  "}, "text is missing or empty"),
        ({"text": "x"}, "file_name is missing"),
        ("{not json", "not valid JSON"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_a_bad_image_row_names_file_and_row(tmp_path, line, message):
    Image.fromarray(pixels(0)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes(encode(pixels(0))[:500])
    text = json.dumps(line) if isinstance(line, dict) else line
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n\n' + text + "\n")
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 2
    assert dataset[0].prompt == "x"
    with pytest.raises(DataError, match=message) as error:
        dataset[1]
    assert "metadata.jsonl row 1 (line 3)" in str(error.value)


def test_clips_give_the_first_frames(tmp_path):
    write_mp4(tmp_path / "v.mp4", 12)
    write_metadata(tmp_path, [{"file_name": "v.mp4", "text": "grey"}])
    sample = open_dataset(tmp_path, num_frames=9, height=16, width=16)[0]
    assert sample.video.shape == (9, 16, 16, 3)
    assert sample.video.dtype == np.uint8
    np.testing.assert_allclose(sample.video[:, 0, 0, 0], 6 * np.arange(9), atol=2)
    np.testing.assert_array_equal(sample.image, sample.video[0])


@pytest.mark.parametrize(("stored", "expected"), [(16, [0, 1, 2, 3]), (32, [0, 2, 4, 6]), (8, [0, 1, 1, 2])])
def test_clips_are_sampled_by_time(tmp_path, stored, expected):
    write_mp4(tmp_path / "v.mp4", 12, fps=stored)
    video = read_clip(tmp_path / "v.mp4", 4, fps=16)
    shown = np.rint(video[:, 0, 0, 0] / 6).astype(int).tolist()
    if stored == 8:  # a tick in the middle between two frames may take either
        assert shown[0] == 0 and shown[-2:] in ([1, 1], [1, 2])
    else:
        assert shown == expected


def test_bad_clips_name_file_and_row(tmp_path):
    write_mp4(tmp_path / "short.mp4", 5)
    (tmp_path / "bad.mp4").write_bytes(b"x" * 100)
    names = ["short.mp4", "bad.mp4", "gone.mp4"]
    write_metadata(tmp_path, [{"file_name": name, "text": "x"} for name in names])
    dataset = open_dataset(tmp_path, num_frames=9)
    for row, message in enumerate(["has 5 frames", "cannot be decoded", "does not exist"]):
        with pytest.raises(DataError, match=message) as error:
            dataset[row]
        assert f"row {row}" in str(error.value) and names[row] in str(error.value)
    with pytest.raises(ConfigError, match="num_frames"):
        open_dataset(tmp_path)


def test_own_lmdb_shards_in_numeric_order(tmp_path):
    write_lmdb(tmp_path / "shard_2", own_rows(2))
    write_lmdb(tmp_path / "shard_10", own_rows(3, start=2))
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 5
    assert [dataset[i].prompt for i in range(5)] == [f"prompt {i}" for i in range(5)]
    np.testing.assert_array_equal(dataset[0].image, pixels(0))
    np.testing.assert_array_equal(dataset[4].image, pixels(4))
    assert dataset[0].extras == {}
    with pytest.raises(IndexError):
        dataset[5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_1_data": b"no picture"}, "img_1_data.*cannot be decoded"),
        ({"img_1_data": None}, "img_1_data is missing"),
        ({"prompts_1_data": None}, "prompts_1_data is missing"),
        ({"prompts_1_data": " "}, "prompts_1_data is empty"),
        ({"prompts_1_data": b"\xff"}, "prompts_1_data is not UTF-8"),
    ],
)
def test_a_bad_lmdb_row_names_folder_and_row(tmp_path, change, message):
    entries = {k: v for k, v in (own_rows(3) | change).items() if v is not None}
    write_lmdb(tmp_path / "shard_0", entries)
    dataset = open_dataset(tmp_path, kind="lmdb")
    assert dataset[0].prompt == "prompt 0" and dataset[2].prompt == "prompt 2"
    with pytest.raises(DataError, match=message) as error:
        dataset[1]
    assert "shard_0 row 1" in str(error.value)


def published_rows(number, shape=(24, 32, 3), latents=None, prefix=True):
    entries = {}
    for i in range(number):
        entries |= {f"img_{i}_data": pixels(i, *shape[:2]).tobytes(), f"prompts_{i}_data": f"p {i}"}
        if latents is not None:
            entries[f"latents_{i}_data"] = (latents + i).tobytes()
    if latents is not None:
        entries["latents_shape"] = " ".join(map(str, (number, *latents.shape)))
    return entries


def test_published_layout_with_latents_and_counted_by_images(tmp_path):
    latents = np.arange(16, dtype=np.float16).reshape(2, 2, 2, 2)
    write_lmdb(tmp_path / "a" / "shard_0", published_rows(2, latents=latents))
    write_lmdb(tmp_path / "b", published_rows(3))
    dataset = LmdbShards(tmp_path / "a", published_image_shape=(24, 32, 3))
    assert len(dataset) == 2
    np.testing.assert_array_equal(dataset[1].image, pixels(1))
    np.testing.assert_array_equal(dataset[1].extras["latents"], latents + 1)  # [F, C, H, W], not permuted
    counted = LmdbShards(tmp_path / "b", published_image_shape=(24, 32, 3))
    assert len(counted) == 3 and counted[2].prompt == "p 2"


def test_published_layout_has_480x832_pictures(tmp_path):
    write_lmdb(tmp_path / "shard_0", published_rows(1, shape=(480, 832, 3)))
    assert open_dataset(tmp_path)[0].image.shape == (480, 832, 3)
    assert open_dataset(tmp_path, height=64, width=64)[0].image.shape == (64, 64, 3)
    write_lmdb(tmp_path / "x" / "shard_0", published_rows(1))
    with pytest.raises(DataError, match="480, 832, 3"):
        open_dataset(tmp_path / "x")[0]


def test_published_ode_rows_without_pictures(tmp_path):
    latents = np.zeros((5, 2, 2, 2, 2), np.float16)
    entries = {"latents_shape": "1 5 2 2 2 2", "latents_0_data": latents.tobytes(), "prompts_0_data": "p"}
    write_lmdb(tmp_path / "ode", entries)
    sample = open_dataset(tmp_path / "ode")[0]
    assert sample.image is None and sample.extras["latents"].shape == (5, 2, 2, 2, 2)


def _prompt_in_child(dataset, queue):
    queue.put(dataset[1].prompt)


def test_lmdb_is_shared_by_readers_threads_and_forked_workers(tmp_path):
    write_lmdb(tmp_path / "shard_0", own_rows(6))
    one, two = open_dataset(tmp_path), open_dataset(tmp_path)
    assert one[0].prompt == two[0].prompt
    with ThreadPoolExecutor(4) as pool:
        prompts = list(pool.map(lambda i: (one, two)[i % 2][i % 6].prompt, range(60)))
    assert prompts == [f"prompt {i % 6}" for i in range(60)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_prompt_in_child, args=(one, queue))
    child.start()
    assert queue.get(timeout=30) == "prompt 1"
    child.join(30)


def test_unknown_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; .*`longtake encode`"):
        open_dataset(tmp_path / "gone")
    with pytest.raises(DataError, match="no data set"):
        open_dataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        open_dataset(tmp_path, kind="images")
    (tmp_path / "shard_0").mkdir()
    (tmp_path / "shard_0" / "data.mdb").write_bytes(b"x" * 5000)
    assert detect_kind(tmp_path) == "lmdb"
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(tmp_path)
    write_lmdb(tmp_path / "future" / "shard_0", {"longtake_format": "2", "num_rows": "1"})
    with pytest.raises(DataError, match="longtake_format"):
        open_dataset(tmp_path / "future")
