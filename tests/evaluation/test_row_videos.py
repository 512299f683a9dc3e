"""Videos of rows without a truth: made from encodings as streams and samplers make them, decoded and measured."""

import math

import numpy as np
import pytest
import torch
from tiny_stage import make_encoders, make_model, stage_config

from longtake.condition import pixel_frames
from longtake.data.encoded import EncodedRows
from longtake.encodings.encode import StoredEncoder
from longtake.errors import DataError
from longtake.evaluation import row_videos as rv
from longtake.evaluation.instruments import Blocks, measure
from longtake.inference.sampling import student_latents
from longtake.inference.video_io import read_video
from longtake.rollout.denoise import Denoiser


@pytest.fixture
def rows(workshop, whole, tmp_path):
    config = stage_config(workshop, tmp_path, "causal")
    encoder = StoredEncoder(EncodedRows(whole), config.clip_shape, ["clip", "y", "latents"], device=torch.device("cpu"))
    return rv.read_rows(EncodedRows(whole), encoder, [1, 5]), config


def moving(pixels, count=24, fade=1.0, seed=0):
    """Frames of a picture that moves `pixels` a frame and whose colours fade to a share of themselves."""
    wide = np.random.default_rng(seed).normal(size=(64 + 8, 64 + 8 * count, 3))
    for axis in (0, 1):
        wide = sum(np.roll(wide, k, axis) for k in range(-3, 4))
    wide = np.clip(128 + 60 * wide / wide.std(), 0, 255)
    frames = []
    for k in range(count):
        start = round(k * pixels)
        share = 1 - (1 - fade) * k / (count - 1)
        picture = wide[:64, start : start + 64]
        grey = picture.mean(-1, keepdims=True)
        frames.append((grey + share * (picture - grey)).astype(np.uint8))
    return np.stack(frames)


@pytest.mark.whole
def test_rows_of_an_encoded_set_make_the_videos_of_its_pictures(rows, tmp_path):
    """A student's video is that of `student_latents`, whatever the other rows are; its file has all its frames."""
    (one, other), config = rows
    denoiser, plan, vae = Denoiser(make_model()), config.stream_plan, make_encoders().vae
    make = rv.student_maker(denoiser, plan, 9, seed=3)
    latents = make(other)
    expected = student_latents(
        denoiser, other.condition, other.first_latent, plan, 9, other.size, seed=3, videos=[other.number]
    )
    assert torch.equal(latents, expected) and not torch.equal(make(one), latents)
    assert one.title.startswith("000001: a small yellow cross drifts")
    assert one.number == 1 and other.number == 5 and one.size == (8, 8) and one.later is None
    frames = np.concatenate(list(rv.decoded(vae, latents)))
    whole = ((vae.decode(latents)[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    assert (frames == whole).mean() > 0.999 and len(frames) == pixel_frames(9, vae.temporal_stride)
    blocks = rv.blocks_of(plan, 9, vae.temporal_stride)
    cuts = [rv.Cut(17, file=tmp_path / "new/b.mp4"), rv.Cut(len(frames), blocks, tmp_path / "new/a.mp4")]
    short, seen = rv.look("a", [frames[:7], frames[7:]], 16, cuts)
    assert seen.measured == measure(frames, 16, blocks) and seen.measured.metrics["seam_score"] is not None
    assert short.measured == measure(frames[:17], 16) and len(read_video(tmp_path / "new/b.mp4")[0]) == 17
    assert short.shown.numbers == (0, 2, 4, 6, 8, 10, 12, 14, 16)
    assert seen.shown.numbers == (0, 4, 8, 12, 16, 20, 24, 28, 32)
    assert (
        np.array_equal(seen.shown.frames, frames[::4]) and read_video(tmp_path / "new/a.mp4")[0].shape == frames.shape
    )
    with pytest.raises(DataError, match="the video of b has no frame"):
        rv.look("b", [], 16, cuts)
    with pytest.raises(DataError, match="the video has no 33 frames"):
        rv.look("b", [frames[:17]], 16, cuts)


def test_the_blocks_of_a_stream_begin_where_its_latents_do(rows):
    _, config = rows
    assert rv.blocks_of(config.stream_plan, 9, 4) == Blocks(8, 9)  # [1, 2, 2, ...]: frames 1..8 are the first block's
    assert rv.blocks_of(config.stream_plan, 3, 4) is None


def test_kept_latents_are_those_of_the_same_weights_and_row(rows, tmp_path):
    (one, other), _ = rows
    made_by = {"weights": "abc", "seed": 1}
    kept = rv.KeptLatents(tmp_path / "kept", made_by)
    assert kept.get(one) is None
    value = torch.randn(1, 5, 4, 8, 8)
    kept.put(one, value)
    assert torch.equal(rv.KeptLatents(tmp_path / "kept", dict(made_by)).get(one), value)
    assert kept.get(other) is None and rv.KeptLatents(tmp_path / "kept", made_by | {"seed": 2}).get(one) is None
    kept.file(one).write_bytes(b"half a file")
    assert kept.get(one) is None


@pytest.mark.whole
def test_ratios_to_the_teacher_tell_a_frozen_and_a_faded_video():
    teacher = [measure(moving(2, seed=seed), 16) for seed in range(2)]
    same = rv.against(teacher, teacher)
    assert all(same[f"{name}_vs_teacher"] == 1 for name in ("motion", "saturation", "contrast", "sharpness"))
    assert same["distance_to_teacher"] == 0
    slow = rv.against([measure(moving(1, seed=seed), 16) for seed in range(2)], teacher)
    assert slow["motion_vs_teacher"] == pytest.approx(0.5, abs=0.05)
    faded = rv.against([measure(moving(2, fade=0.5, seed=seed), 16) for seed in range(2)], teacher)
    assert faded["saturation_vs_teacher"] == pytest.approx(0.55, abs=0.08) and faded["motion_vs_teacher"] > 0.9
    still = [measure(np.repeat(moving(2)[:1], 24, 0), 16)]
    assert rv.against(still, teacher)["motion_vs_teacher"] < 0.05
    assert math.isnan(rv.against(teacher, still)["motion_vs_teacher"])


def test_means_and_curves_are_over_the_videos():
    videos = [measure(moving(pixels), 16) for pixels in (1, 3)]
    found = rv.means(videos)
    assert found["motion_px_s"] == pytest.approx(sum(v.metrics["motion_px_s"] for v in videos) / 2)
    assert math.isnan(found["seam_score"]) and found["defect_uniform"] == 0
    curves = rv.mean_curves(videos)
    assert curves["motion_px_s"][0] is None and len(curves["saturation"]) == 24
    assert curves["saturation"][3] == pytest.approx(sum(v.curves["saturation"][3] for v in videos) / 2)
