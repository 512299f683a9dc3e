"""Video files as they are: each picture is what a player shows at that time, or file and time are named."""

import io
import os
import random
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import longtake
from longtake.data.clips import clip_size, read_clip
from longtake.errors import DataError
from longtake.inference.video_io import read_video

av = pytest.importorskip("av")

QUARTERS = np.array([[[200, 30, 60], [20, 160, 40]], [[40, 60, 190], [230, 220, 90]]], np.uint8)
PICTURE = QUARTERS.repeat(16, 0).repeat(24, 1)  # every corner has its own colour: 32 x 48


def film(pictures, times_ms=None, *, fps=16, codec="libx264", pix="yuv444p", kind="mp4", cover=False, **tags):
    """Bytes of a video. `tags` are attributes of the codec context; `matrix` is the display matrix."""
    buffer, base = io.BytesIO(), Fraction(1, 1000)
    times_ms = times_ms or [round(1000 * k / fps) for k in range(len(pictures))]
    matrix = tags.pop("matrix", None)
    with av.open(buffer, "w", format=kind) as container:
        still = container.add_stream("png", rate=1) if cover else None
        options = {"crf": "2", "preset": "ultrafast"} if codec == "libx264" else {"qscale": "2"}
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pix
        context = stream.codec_context
        stream.time_base = context.time_base = base
        for name, value in tags.items():
            setattr(context, name, value)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        if still is not None:
            still.height, still.width, still.pix_fmt = 24, 24, "rgb24"
            still.disposition = av.stream.Disposition.attached_pic
            packets = still.encode(av.VideoFrame.from_ndarray(np.full((24, 24, 3), 250, np.uint8), format="rgb24"))
        for k, (picture, time) in enumerate(zip(pictures, times_ms)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format=pix)
            frame.pts, frame.time_base = time, base
            for name in {"colorspace", "color_range", "color_trc", "color_primaries"} & set(tags):
                setattr(frame, name, tags[name])
            container.mux(stream.encode(frame))
            if still is not None and k == 0:
                container.mux(packets)
        container.mux(stream.encode())
    return buffer.getvalue()


def greys(*values):
    return [np.full((32, 32, 3), value, np.uint8) for value in values]


def shown(data, number, fps):
    return np.rint(read_clip(data, number, fps=fps)[:, 8, 8, 0] / 10).astype(int).tolist()


def test_a_gap_shows_the_picture_before_it():
    """Three pictures, then 400 ms of stillness, then four more."""
    data = film(greys(10, 20, 30, 40, 50, 60, 70), [0, 50, 100, 500, 550, 600, 650])
    assert shown(data, 14, 20) == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 5, 6, 7]
    with pytest.raises(DataError, match="has 15 frames at 20 frames a second and 16 are needed"):
        read_clip(data, 16, fps=20)  # the last one lasts 62.5 ms


def test_times_in_whole_milliseconds_lose_no_picture():
    """62.5 ms are stored as 62 or 63; the first picture need not be at time 0."""
    for start in (0, 1400):
        data = film(greys(*range(10, 100, 10)), [start + round(62.5 * k) for k in range(9)], kind="matroska")
        assert shown(data, 9, 16) == list(range(1, 10))
        assert shown(data, 5, 8) == [1, 3, 5, 7, 9]


def test_few_pictures_a_second_are_refused_and_a_still_is_not():
    slow = film(greys(*range(10, 100, 10)), fps=2)
    with pytest.raises(
        DataError, match=r"a picture every 0.5 s, and at 16 frames a second .* 8 times .*lower video.fps"
    ):
        read_clip(slow, 17, fps=16)
    assert len(read_clip(slow, 9)) == 9 and shown(slow, 5, 2) == [1, 2, 3, 4, 5]
    assert shown(film(greys(10, 20, 30), fps=8), 6, 24) == [1, 1, 1, 2, 2, 2]
    with pytest.raises(DataError, match="32 times"):
        read_clip(film(greys(10, 20), [0, 2000]), 17, fps=16)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damage_is_named_with_its_time(tmp_path, codec):
    rng = np.random.default_rng(0)
    big = rng.integers(0, 255, (30, 30, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    pictures = [big[2 * k : 2 * k + 96, 3 * k : 3 * k + 128] for k in range(24)]
    data = film(pictures, codec=codec, pix="yuv420p")
    assert len(read_clip(data, 24)) == 24
    start = data.index(b"mdat") + 400
    end = data.index(b"moov") if data.index(b"moov") > start else len(data)
    named = 0
    for seed in range(4):
        pick, broken = random.Random(seed), bytearray(data)
        for _ in range(10):
            broken[pick.randrange(start, end)] ^= 0xFF
        (tmp_path / "b.mp4").write_bytes(broken)
        for read in (lambda file: read_clip(file, 24), read_video):
            with pytest.raises(DataError, match=r"b.mp4 .* at \d+\.\d\d s") as error:
                read(tmp_path / "b.mp4")
            named += "damaged" in str(error.value) or "decoded" in str(error.value)
    assert named == 8


def test_a_cut_file_gives_its_whole_part_and_names_the_time(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    data = film(noise, kind="matroska")
    cut = data[: len(data) // 2]
    assert len(read_clip(cut, 4)) == 4
    with pytest.raises(DataError, match=r"(cut off at 0\.\d\d s|has \d+ frames and 20 are needed)"):
        read_clip(cut, 20, where="b.mp4")


@pytest.mark.parametrize(("shape", "size"), [("2", (32, 96)), ("1/2", (64, 48)), ("16/15", (32, 51))])
def test_pixels_that_are_not_square_are_made_square(shape, size):
    data = film([PICTURE] * 3, sample_aspect_ratio=Fraction(shape))
    assert clip_size(data, "x") == size and read_clip(data, 2).shape == (2, *size, 3)


def test_display_matrices_turn_and_mirror():
    """All eight, against what the matrix says of each pixel: x' = a x + c y, y' = b x + d y."""
    plain = read_clip(film([PICTURE] * 2), 1)[0]
    height, width = plain.shape[:2]
    for a, b, c, d in (
        (1, 0, 0, 1),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (-1, 0, 0, -1),
        (0, 1, -1, 0),
        (0, -1, 1, 0),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ):
        matrix = [value << 16 for value in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]
        seen = read_clip(film([PICTURE] * 2, matrix=matrix), 1)[0]
        rows, columns = np.mgrid[:height, :width]
        x, y = a * columns + c * rows, b * columns + d * rows
        wanted = np.empty((np.ptp(y) + 1, np.ptp(x) + 1, 3), np.uint8)
        wanted[y - y.min(), x - x.min()] = plain
        np.testing.assert_array_equal(seen, wanted)
    slanted = [int(value * 65536) for value in (0.7071, 0.7071, 0, -0.7071, 0.7071, 0, 0, 0)] + [1 << 30]
    with pytest.raises(DataError, match="no right angle"):
        read_clip(film([PICTURE] * 2, matrix=slanted), 1)


def test_covers_are_not_the_film():
    data = film([PICTURE] * 3, cover=True)
    moov = data.index(b"moov") - 4  # the last box; its part `udta` holds the cover: in front, the cover is stream 0
    parts, place = [], moov + 8
    while place < len(data):
        size = struct.unpack(">I", data[place : place + 4])[0]
        parts.append(data[place : place + size])
        place += size
    parts.sort(key=lambda part: [b"mvhd", b"udta", b"trak"].index(part[4:8]))
    data = data[: moov + 8] + b"".join(parts)
    with av.open(io.BytesIO(data)) as container:
        assert [stream.width for stream in container.streams.video] == [24, 48]
    assert clip_size(data, "x") == (32, 48) and len(read_clip(data, 3)) == 3


FORKING = """
import gc, multiprocessing, pathlib, sys
from longtake.data.clips import read_clip

def read():
    read_clip(pathlib.Path(sys.argv[1]), 9, fps=16)
    gc.collect()

read()
worker = multiprocessing.get_context("fork").Process(target=read)
worker.start()
worker.join(60)
sys.exit(worker.exitcode != 0)
"""


def test_reading_goes_on_after_a_fork(tmp_path):
    """What a forked worker frees must wait for no thread, which it does not have; in a process of its own, where no
    other test has left decoders with threads to be freed.
    """
    (tmp_path / "a.mp4").write_bytes(film([PICTURE] * 9))
    command = [sys.executable, "-c", FORKING, str(tmp_path / "a.mp4")]
    environment = {**os.environ, "PYTHONPATH": str(Path(longtake.__file__).parents[1])}
    assert subprocess.run(command, env=environment, timeout=100).returncode == 0


def test_sound_alone_is_named():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="a.mp4 has no video stream"):
        read_clip(buffer.getvalue(), 1, where="a.mp4")


@pytest.mark.parametrize("size", [(32, 48), (736, 1280)])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", ["601", "709", "untagged"])
def test_colours_follow_the_tags(size, full, matrix):
    """From YUV by the formulas of BT.601 and BT.709; without a tag HD counts as BT.709, as in players."""
    if full and matrix == "untagged":
        pytest.skip("no tag says so")
    colour = np.array([200, 30, 60])
    red, blue = (0.2126, 0.0722) if matrix == "709" or (matrix == "untagged" and size[0] > 576) else (0.299, 0.114)
    luma = np.dot(colour / 255, [red, 1 - red - blue, blue])
    chroma = [(colour[2] / 255 - luma) / (2 - 2 * blue), (colour[0] / 255 - luma) / (2 - 2 * red)]
    yuv = (
        [255 * luma, *(128 + 255 * c for c in chroma)] if full else [16 + 219 * luma, *(128 + 224 * c for c in chroma)]
    )
    planes = np.stack([np.full(size, round(value), np.uint8) for value in yuv])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv444p"
        frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
        if matrix != "untagged":
            stream.codec_context.colorspace = frame.colorspace = {"601": 6, "709": 1}[matrix]
            stream.codec_context.color_range = frame.color_range = 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    np.testing.assert_allclose(read_clip(buffer.getvalue(), 1)[0, 5, 5], colour, atol=2)


@pytest.mark.parametrize(("transfer", "primaries"), [(16, 9), (18, 9), (1, 9), (8, 1), (1, 12)])
def test_hdr_and_wide_gamuts_are_refused(transfer, primaries):
    data = film([PICTURE] * 2, pix="yuv420p10le", color_trc=transfer, color_primaries=primaries)
    with pytest.raises(DataError, match=rf"a.mp4 is HDR or of a wide gamut \(transfer {transfer}.*SDR"):
        read_clip(data, 1, where="a.mp4")


def test_ten_bits_are_read():
    np.testing.assert_allclose(read_clip(film([PICTURE] * 2, pix="yuv444p10le"), 1)[0].astype(int), PICTURE, atol=5)


def test_interlaced_video_is_refused():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "tff=1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for value in (20, 90):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), format="rgb24"))
            )
        container.mux(stream.encode())
    with pytest.raises(DataError, match="a.mp4 is interlaced; deinterlace it first"):
        read_clip(buffer.getvalue(), 1, where="a.mp4")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\x00\x05\x16\x07" + bytes(80), "AppleDouble"),
        (b"", "cannot be decoded"),
        (struct.pack(">I", 24) + b"ftypisom" + bytes(12), "cannot be decoded|no video stream"),
    ],
)
def test_what_is_no_video_is_said(tmp_path, data, words):
    (tmp_path / "a.mp4").write_bytes(data)
    for source in (data, tmp_path / "a.mp4"):
        with pytest.raises(DataError, match=f"a.mp4 .*({words})"):
            read_clip(source, 1, where="a.mp4")
