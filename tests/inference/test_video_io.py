"""mp4 files: what is written comes back, and nothing half-written or damaged passes for a video."""

import resource

import numpy as np
import pytest

from longtake.errors import DataError, OutputError, ShapeError
from longtake.inference.video_io import VideoWriter, read_video


@pytest.fixture
def small_files():
    """`small_files(size)`: from then on no file grows larger, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def moving_square(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    video = np.full((frames, height, width, 3), (90, 120, 100), np.uint8)
    for t in range(frames):
        video[t, 10:30, 2 * t : 2 * t + 16] = (220, 40, 60)
    return video


def write(path, video, **options):
    with VideoWriter(path, 16, *video.shape[1:3], **options) as writer:
        writer.write(video[:1])
        writer.write(video[1:])
    return path


def test_round_trip(tmp_path):
    video = moving_square(21)
    decoded, fps = read_video(write(tmp_path / "a.mp4", video))
    assert fps == 16 and decoded.shape == video.shape and decoded.dtype == np.uint8
    mse = np.mean((decoded.astype(float) - video) ** 2)
    assert 10 * np.log10(255**2 / mse) > 30
    assert np.abs(decoded[:, 40:].astype(int) - video[:, 40:]).max() <= 6  # flat areas keep their colour
    head, _ = read_video(tmp_path / "a.mp4", num_frames=5)
    assert np.array_equal(head, decoded[:5])
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_large_files_are_whole_whatever_they_are_called_while_made(tmp_path, suffix, keep):
    """More than the buffers of who reads the file in the making to write the finished one."""
    noise = np.random.default_rng(0).integers(0, 256, (81, 32, 32, 3), np.uint8)
    with VideoWriter(tmp_path / f"a.{suffix}", 16, 32, 32, keep=keep) as writer:
        writer.write(noise)
    assert read_video(tmp_path / f"a.{suffix}")[0].shape == noise.shape
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{suffix}"]


def test_smaller_crf_is_better(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    fine, coarse = write(tmp_path / "a.mp4", video, crf=5), write(tmp_path / "b.mp4", video, crf=40)
    assert fine.stat().st_size > 2 * coarse.stat().st_size


def test_fractional_rates_and_single_frames(tmp_path):
    video = moving_square(3)
    with VideoWriter(tmp_path / "a.mp4", 29.97, 48, 64) as writer:
        for frame in video:
            writer.write(frame)
        assert writer.num_frames == 3
    decoded, fps = read_video(tmp_path / "a.mp4")
    assert len(decoded) == 3 and fps == pytest.approx(29.97, abs=1e-3)


def test_a_failed_run_keeps_the_old_file_and_its_own_frames(tmp_path):
    path = write(tmp_path / "a.mp4", moving_square(3))
    before = path.read_bytes()
    for name in ("a.partial.mp4", "a.partial-2.mp4"):
        with pytest.raises(RuntimeError, match="generator") as caught, VideoWriter(path, 16, 48, 64) as writer:
            writer.write(moving_square(9))
            raise RuntimeError("generator failed")
        assert caught.value.__notes__ == [f"what was made until then is kept in {tmp_path / name}"]
        assert path.read_bytes() == before and len(read_video(tmp_path / name)[0]) == 9
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "b.mp4", 16, 48, 64, keep=False) as writer:
        writer.write(moving_square(9))
        raise RuntimeError
    with pytest.raises(DataError, match="no frame"), VideoWriter(tmp_path / "b.mp4", 16, 48, 64):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.partial-2.mp4", "a.partial.mp4"]


def test_a_full_disk_keeps_what_plays(tmp_path, small_files):
    video = np.random.default_rng(0).integers(0, 256, (90, 48, 64, 3), dtype=np.uint8)
    small_files(150_000)
    for size, is_kept in ((150_000, True), (2000, False)):
        small_files(size)
        with pytest.raises(OutputError, match=r"a\.mp4 cannot be written: File too large") as caught:
            write(tmp_path / "a.mp4", video)
        assert [p.name for p in tmp_path.iterdir()] == ["a.partial.mp4"] * is_kept
        assert ("a.partial.mp4" in "".join(getattr(caught.value, "__notes__", []))) == is_kept
        for file in tmp_path.iterdir():
            assert 16 <= len(read_video(file)[0]) < 90
            file.unlink()


def test_the_same_frames_are_the_same_file(tmp_path):
    big = np.random.default_rng(0).integers(0, 255, (35, 56, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.stack([big[k : k + 240, k : k + 416] for k in range(33)])
    files, kept = set(), []
    for turn in range(4):
        kept.append(np.random.bytes(300_000 * (turn + 1)))  # other places in memory
        files.add(write(tmp_path / "a.mp4", frames).read_bytes())
    assert len(files) == 1


def test_the_file_appears_when_it_is_complete(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16, 48, 64) as writer:
        writer.write(moving_square(9))
        assert not (tmp_path / "a.mp4").exists()
    assert read_video(tmp_path / "a.mp4")[0].shape[0] == 9


def test_writer_refuses(tmp_path):
    with pytest.raises(ShapeError, match="even"):
        VideoWriter(tmp_path / "a.mp4", 16, 47, 64)
    with pytest.raises(DataError, match="fps"):
        VideoWriter(tmp_path / "a.mp4", 0, 48, 64)
    with pytest.raises(DataError, match="crf"):
        VideoWriter(tmp_path / "a.mp4", 16, 48, 64, crf=60)
    with pytest.raises(DataError, match="folder"), VideoWriter(tmp_path / "no" / "a.mp4", 16, 48, 64):
        pass
    with pytest.raises(DataError, match="not open"):
        VideoWriter(tmp_path / "a.mp4", 16, 48, 64).write(moving_square(1))
    for wrong in (moving_square(1).astype(np.float32), moving_square(1, 64, 48), moving_square(1)[..., :2]):
        with pytest.raises(ShapeError, match="uint8"), VideoWriter(tmp_path / "a.mp4", 16, 48, 64) as writer:
            writer.write(wrong)


def test_reader_names_bad_files(tmp_path):
    write(tmp_path / "good.mp4", moving_square(9))
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:700])
    for name in ("bad.mp4", "cut.mp4", "absent.mp4"):
        with pytest.raises(DataError, match=name):
            read_video(tmp_path / name)


def test_a_hidden_file_in_the_making_is_not_the_one_that_it_becomes(tmp_path):
    """Longer than what a reader takes at once: written over itself it would be lost from there on."""
    frames = np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), dtype=np.uint8)
    for keep in (True, False):
        with VideoWriter(tmp_path / f"{keep}.mp4", 16, 64, 64, keep=keep) as writer:
            writer.write(frames)
    assert (tmp_path / "True.mp4").read_bytes() == (tmp_path / "False.mp4").read_bytes()
    assert len(read_video(tmp_path / "False.mp4")[0]) == 64 and len(list(tmp_path.iterdir())) == 2
