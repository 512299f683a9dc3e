"""mp4 files: what is written comes back, and nothing half-written or damaged passes for a video."""

import numpy as np
import pytest

from longtake.errors import DataError, ShapeError
from longtake.inference.video_io import VideoWriter, read_video


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


def test_a_failed_run_leaves_no_file_and_keeps_the_old_one(tmp_path):
    path = write(tmp_path / "a.mp4", moving_square(3))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="generator"), VideoWriter(path, 16, 48, 64) as writer:
        writer.write(moving_square(9))
        raise RuntimeError("generator failed")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match="no frame"), VideoWriter(tmp_path / "b.mp4", 16, 48, 64):
        pass
    assert list(tmp_path.iterdir()) == [path]


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
