"""The containers of a video: what is written comes back, colours too, and what is being made can be looked at."""

import io
import os
import signal
import subprocess
import sys

import av
import chromium
import numpy as np
import pytest
from PIL import Image, ImageSequence

from longtake.data.clips import read_clip
from longtake.errors import ConfigError, OutputError
from longtake.inference.containers import Target
from longtake.inference.video_io import VideoWriter, read_video

NAMES = ("a.mp4", "a.webm", "a.gif", "a.webp", "a/%05d.png")
HELD_BACK = 13  # frames that wait in x264 and in the fragment that its last packet begins


def moving_square(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    video = np.full((frames, height, width, 3), (90, 120, 100), np.uint8)
    for t in range(frames):
        video[t, 10:30, 2 * t % 40 : 2 * t % 40 + 16] = (220, 40, 60)
    return video


def write(path, video, **options):
    with VideoWriter(path, 16, *video.shape[1:3], **options) as writer:
        for k in range(0, len(video), 12):
            writer.write(video[k : k + 12])
    return path


def read(path) -> np.ndarray:
    """All frames of any container; ffmpeg does not read animated webp."""
    if path.suffix == ".webp":
        with Image.open(path) as picture:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])
    if path.suffix == ".png":
        return np.stack([np.asarray(Image.open(file)) for file in sorted(path.parent.glob("*.png"))])
    return read_video(path)[0]


def boxes(data: bytes) -> list[str]:
    found, position = [], 0
    while position < len(data):
        found.append(data[position + 4 : position + 8].decode())
        position += int.from_bytes(data[position : position + 4], "big")
    return found


def packets(source) -> list[bytes]:
    with av.open(source) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.dts is not None]


@pytest.mark.parametrize("name", NAMES)
def test_frames_come_back_and_the_same_frames_are_the_same_file(tmp_path, name):
    video = moving_square(30)
    file = write(tmp_path / name, video)
    decoded = read(file).astype(int)
    assert decoded.shape == video.shape
    exact = name.endswith(("gif", "png"))
    assert np.abs(decoded - video).mean() <= (0 if exact else 3)
    data = read_bytes(file)
    write(tmp_path / name, video) if name != NAMES[-1] else write(tmp_path / "b" / "%05d.png", video)
    assert read_bytes(file if name != NAMES[-1] else tmp_path / "b" / "%05d.png") == data
    if name.endswith(("mp4", "webm", "gif")):
        with av.open(str(file)) as container:
            assert container.duration / 1e6 == pytest.approx(30 / 16, abs=0.011)  # gif counts in hundredths
            assert [round(16 * frame.time) for frame in container.decode(video=0)] == list(range(30))
    if name.endswith("webp"):
        with Image.open(file) as picture:
            durations = [frame.convert("RGB").info["duration"] for frame in ImageSequence.Iterator(picture)]
        assert sum(durations) == 1875


def read_bytes(file) -> list[bytes]:
    return [part.read_bytes() for part in (sorted(file.parent.glob("*.png")) if file.suffix == ".png" else [file])]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_being_made_can_be_looked_at(tmp_path, name):
    video, partial = moving_square(60), tmp_path / "a.partial"
    files = partial / "00000.png" if name == NAMES[-1] else partial.with_suffix(f".partial{(tmp_path / name).suffix}")
    with VideoWriter(tmp_path / name, 16, 48, 64) as writer:
        for count in (24, 36, 48, 60):
            writer.write(video[count - 24 if count == 24 else count - 12 : count])
            seen = read(files)
            assert count - (HELD_BACK if name.endswith("mp4") else 1) <= len(seen) <= count
            assert np.abs(seen.astype(int) - video[: len(seen)]).mean() <= 3
    assert not files.exists() and len(read(tmp_path / (name % 0 if "%" in name else name))) == 60


def test_mp4_is_a_stream_of_fragments_and_then_a_file_that_begins_at_once(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16, 48, 64) as writer:
        writer.write(moving_square(40))
        fragments = (tmp_path / "a.partial.mp4").read_bytes()
    kinds = boxes(fragments)
    assert kinds[:2] == ["ftyp", "moov"] and kinds[2:] == ["moof", "mdat"] * ((len(kinds) - 2) // 2)
    whole = (tmp_path / "a.mp4").read_bytes()
    assert [kind for kind in boxes(whole) if kind != "free"] == ["ftyp", "moov", "mdat"]
    before, after = packets(io.BytesIO(fragments)), packets(str(tmp_path / "a.mp4"))
    assert len(after) == 40 and after[: len(before)] == before  # the same packets: not encoded anew
    webm = packets(str(write(tmp_path / "a.webm", moving_square(40))))
    assert len(webm) == 40
    data = (tmp_path / "a.webm").read_bytes()
    assert 0 < data.index(b"\x1c\x53\xbb\x6b") < data.index(b"\x1f\x43\xb6\x75")  # cues before the first cluster


CHILD = """
import sys
import numpy as np
from longtake.inference.video_io import VideoWriter
with VideoWriter(sys.argv[1], 16, 48, 64, keep=sys.argv[2] == "keep") as writer:
    for block in range(100):
        video = np.full((12, 48, 64, 3), 2 * block, np.uint8)
        writer.write(video)
        print(12 * (block + 1), flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.webp", "a/%05d.png"])
def test_kill_9_leaves_what_was_made(tmp_path, name):
    command = [sys.executable, "-c", CHILD, str(tmp_path / name), "keep"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(5):
            made = int(process.stdout.readline())
            process.stdin.write("\n")
            process.stdin.flush()
        made = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    assert made == 72
    (left,) = tmp_path.iterdir()
    assert left.name == ("a.partial" if name == NAMES[-1] else f"a.partial{left.suffix}")
    frames = read(left / "00000.png" if left.is_dir() else left)
    assert made - (HELD_BACK if name.endswith("mp4") else 1) <= len(frames) <= made
    shades = frames.mean((1, 2, 3))
    assert np.abs(shades - 2 * (np.arange(len(frames)) // 12)).max() <= 3
    write(tmp_path / name, moving_square(3))  # and the next one is not in its way
    assert left.exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_long_files_are_whole(tmp_path, name, keep):
    """Longer than what libavformat reads at once, 32 KiB: the packets are not written over while they are read."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8)
    file = write(tmp_path / name, noise, keep=keep)
    assert file.stat().st_size > 2**16 and len(packets(str(file))) == len(read(file)) == 40
    assert list(tmp_path.iterdir()) == [file]


def test_what_nobody_asked_to_keep_is_hidden(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.webm", 16, 48, 64, keep=False) as writer:
        writer.write(moving_square(12))
        assert [path.name for path in tmp_path.iterdir()] == [f".a.webm.{os.getpid()}.part"]
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_failed_run_keeps_its_frames(tmp_path, name):
    with pytest.raises(RuntimeError) as caught, VideoWriter(tmp_path / name, 16, 48, 64) as writer:
        writer.write(moving_square(9))
        raise RuntimeError("generator failed")
    (left,) = tmp_path.iterdir()
    assert caught.value.__notes__ == [f"what was made until then is kept in {left}"]
    assert len(read(left / "00000.png" if left.is_dir() else left)) == 9


def test_names_say_the_container(tmp_path):
    kinds = {"a.MP4": "mp4", "a.b.webm": "webm", "x/a.gif": "gif", "a.webp": "webp", "frames": "png"}
    assert {name: Target.of(name).kind for name in kinds} == kinds
    target = Target.of(tmp_path / "x" / "f-%3d.png")
    assert (target.kind, target.path, target.pattern) == ("png", tmp_path / "x", "f-%3d.png")
    for name in ("a.avi", "photo.png", "%05d.png", "", ".", "a%s.png", "x/%d%d.png"):
        with pytest.raises(ConfigError, match=r"must end in \.mp4, \.webm, \.gif, \.webp, or be .*%05d\.png"):
            Target.of(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    with pytest.raises(ConfigError, match="exists already"):
        Target.of(tmp_path / "home").check()
    with pytest.raises(ConfigError, match=r"also holds letter\.txt"):
        Target.of(tmp_path / "home").check(overwrite=True)
    with pytest.raises(OutputError, match="does not exist"):
        Target.of(tmp_path / "no" / "a.webm").check()


@pytest.mark.parametrize("name", NAMES)
def test_scale(tmp_path, name):
    file = write(tmp_path / name, moving_square(3), scale=2.5)
    decoded = read(file).astype(int)
    assert decoded.shape == (3, 120, 160, 3)
    assert np.abs(decoded[0, 40:60, 10:30] - (220, 40, 60)).mean() <= 3  # the square is where it was
    with pytest.raises(ConfigError, match="scale"):
        VideoWriter(tmp_path / name, 16, 48, 64, scale=0)


def test_crf_is_followed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    for name in ("a.mp4", "a.webm", "a.webp"):
        fine = write(tmp_path / name, noise, crf=5).stat().st_size
        assert fine > 1.5 * write(tmp_path / name, noise, crf=40).stat().st_size
    assert np.array_equal(read(write(tmp_path / "a.webp", noise, crf=0)), noise)


def test_gif_takes_the_nearest_of_256_colours(tmp_path):
    ramp = np.stack(np.broadcast_arrays(np.arange(256)[:, None], np.arange(256), 128), -1).astype(np.uint8)
    decoded = read(write(tmp_path / "a.gif", ramp[None])).astype(int)[0]
    assert len(np.unique(decoded.reshape(-1, 3), axis=0)) <= 256
    blocks = (decoded - ramp).reshape(16, 16, 16, 16, 3).mean((1, 3))
    assert np.abs(blocks).max() <= 8  # dithered: right in the mean
    exact = ramp.copy()
    exact[:, :, 1] = 0  # 256 colours
    assert np.array_equal(read(write(tmp_path / "b.gif", exact[None]))[0], exact)


# ---- colours ---------------------------------------------------------------------------------------------------------
COLOURS = np.array(
    [
        (0, 0, 0),
        (255, 255, 255),
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (17, 90, 133),
        (200, 150, 120),
        (128, 128, 128),
    ],
    np.uint8,
)
SIZES = [(64, 64), (480, 832), (720, 1280)]


def patches(height: int, width: int) -> np.ndarray:
    """The number of the colour of each pixel: patches of 16 pixels, of which each neighbours others."""
    rows, columns = np.mgrid[:height, :width]
    return (rows // 16 * 5 + columns // 16) % 8


def worst(pixels: np.ndarray, where: np.ndarray) -> float:
    """How far the mean colour of the middles of patches is from what it should be, in levels."""
    assert pixels.shape == (*where.shape, 3)
    rows, columns = np.mgrid[: where.shape[0], : where.shape[1]] % 16
    inner = (rows >= 4) & (rows < 12) & (columns >= 4) & (columns < 12)
    means = np.stack([pixels[inner & (where == k)].mean(0) for k in range(8)])
    return float(np.abs(means - COLOURS).max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_colours_come_back(tmp_path, name, size):
    where = patches(*size)
    file = write(tmp_path / name, np.stack([COLOURS[where]] * 3))
    exact = name.endswith(("gif", "png"))
    assert worst(read(file)[0], where) <= (0 if exact else 3)
    if name.endswith(("mp4", "webm")):
        with av.open(str(file)) as container:
            frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (6, 1, 1, 1)
        assert worst(read_clip(file, 1)[0], where) <= 3
        untagged = frame.reformat(format="rgb24", src_colorspace="ITU601", src_color_range="MPEG").to_ndarray()
        assert worst(untagged, where) <= 3  # a reader that takes every file for BT.601


@pytest.mark.whole
def test_colours_come_back_in_a_browser(tmp_path):
    with chromium.page(tmp_path) as page:
        for size in SIZES:
            where = patches(*size)
            for name in NAMES:
                name = f"{size[0]}-{name}"
                write(tmp_path / name, np.stack([COLOURS[where]] * 3))
                shown = chromium.picture(page, name.replace("%05d", "00000"), is_film=name.endswith(("mp4", "webm")))
                assert worst(shown, where) <= (0 if name.endswith(("gif", "png")) else 3), name


@pytest.mark.whole
def test_a_browser_plays_what_is_being_made(tmp_path):
    with chromium.page(tmp_path) as page, VideoWriter(tmp_path / "a.mp4", 16, 48, 64) as writer:
        writer.write(moving_square(40))
        shown = chromium.picture(page, "a.partial.mp4", is_film=True)
        assert np.abs(shown[40:].astype(int) - (90, 120, 100)).mean() <= 3
