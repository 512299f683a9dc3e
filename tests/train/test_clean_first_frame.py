"""Models without y (TI2V): the picture is frame 0 at level 0, in every stage, in encoded sets, and at inference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from encoded_files import rounding
from tiny_stage import TEACHER, make_model, stage_config
from tiny_wan import TI2V, ti2v_encoders, write_model

from longtake import Generator
from longtake.config.groups import ModelConfig
from longtake.config.stage import StageConfig
from longtake.data.encoded import EncodedRows
from longtake.encoders.condition import prepare_image
from longtake.encodings.write import encode
from longtake.errors import ConfigError, DataError
from longtake.evaluation.run import evaluate
from longtake.inference.pipeline import load_encoders
from longtake.models.cache import CacheView
from longtake.models.dit import VideoDiT
from longtake.parallel.mesh import Mesh
from longtake.toy.world import sample_world
from longtake.train.metrics import read_rows
from longtake.train.stage import run_stage
from longtake.weights.load import save_dit

PICTURE = sample_world(5, 0).render(1)[0]


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "ti2v", TI2V, ti2v_encoders())


def config_of(workshop, ti2v, logdir, stage, **changes) -> StageConfig:
    sources = {"init_from": str(ti2v), "encoders": str(ti2v)} | ({"teacher": str(ti2v)} if stage == "distill" else {})
    given = {
        "model": {"first_frame_sigma": "zero"},
        "video": {"height": 64, "width": 64, "num_latent_frames": 5, "spatial_stride": 16},
        "max_steps": 2,
        **sources,
    }
    return stage_config(workshop, logdir, stage, **given | changes)


def spied(monkeypatch):
    """(latents, sigma, condition, with cache) of every call of a transformer."""
    calls, forward = [], VideoDiT.forward

    def spy(self, x, sigma, condition, context=None):
        calls.append((x.detach().clone(), sigma.detach().clone(), condition, isinstance(context, CacheView)))
        return forward(self, x, sigma, condition, context)

    monkeypatch.setattr(VideoDiT, "forward", spy)
    return calls


@pytest.mark.parametrize("stage", ["teacher", "causal", "distill"])
def test_every_stage_sees_the_picture_as_frame_0_alone(workshop, ti2v, tmp_path, monkeypatch, stage):
    config = config_of(workshop, ti2v, tmp_path, stage)
    calls = spied(monkeypatch)
    run_stage(config, Mesh())
    assert calls and all(condition.frames is None and condition.image is None for _, _, condition, _ in calls)
    encoders = load_encoders(config.encoders_folder, config.model, torch.device("cpu"), with_image=False)
    pictures = torch.stack([prepare_image(sample_world(0, k).render(1)[0], 64, 64) for k in range(6)])
    # Clips are mp4 files, so their first frames are near the pictures and not equal to them.
    known = encoders.vae.encode(pictures[:, None])[:, 0]
    tolerance = 1e-4 if stage == "distill" else 0.5
    whole = [(x, sigma) for x, sigma, _, cached in calls if not cached]
    assert whole
    for x, sigma in whole:
        assert (sigma[:, 0] == 0).all() and (sigma[:, -1] > 0).all()
        nearest = (x[:, None, 0] - known[None]).abs().amax((2, 3, 4)).amin(1)
        assert (nearest < tolerance).all()
    if stage == "distill":  # the picture is committed at level 0 and then never generated
        first = [x for x, sigma, _, cached in calls if cached and x.shape[1] == 1]
        assert first and all((x[:, None, 0] - known[None]).abs().amax((2, 3, 4)).amin(1).max() < 1e-4 for x in first)


@pytest.mark.whole
def test_an_encoded_set_has_the_latent_and_neither_y_nor_tokens(workshop, ti2v, tmp_path, monkeypatch):
    rounding(monkeypatch)
    direct = config_of(workshop, ti2v, tmp_path / "direct", "causal")
    encode(direct, tmp_path / "set", Mesh())
    rows = EncodedRows(tmp_path / "set")
    assert rows.key["contents"] == ["first", "latents"] and set(rows.key["encoders"]) == {"text", "vae"}
    for row in range(len(rows)):
        extras = rows[row].extras
        assert extras["first"].shape == (1, TI2V.out_channels, 4, 4)
        assert np.allclose(extras["first"], extras["latents"][:1], atol=1e-5)
    losses = {}
    for stage in ("causal", "distill"):
        for name, path in (("direct", workshop / "data/clips"), ("cached", tmp_path / "set")):
            data = {"path": str(path), "num_workers": 0}
            config = config_of(workshop, ti2v, tmp_path / name, stage, data=data)
            run_stage(config, Mesh())
            losses[name] = [row[f"{'critic' if stage == 'distill' else 'generator'}_loss"] for row in
                            read_rows(config.folder / "metrics.jsonl")]  # fmt: skip
        assert losses["direct"] == pytest.approx(losses["cached"], rel=1e-4)
    with pytest.raises(DataError, match="it lacks y"):  # a model with y does not take it
        changes = {"data": {"path": str(tmp_path / "set")}, "encoders": str(ti2v)}
        run_stage(stage_config(workshop, tmp_path / "x", "distill", **changes), Mesh())


@pytest.mark.whole
def test_a_trained_student_streams_from_the_picture(workshop, ti2v, tmp_path):
    """Validation, evaluation and generation find the same kind of condition as training."""
    config = config_of(workshop, ti2v, tmp_path, "distill", validate_every=2)
    run_stage(config, Mesh())
    assert "validation/motion_ratio" in read_rows(config.folder / "metrics.jsonl")[0]
    generator = Generator.from_run(tmp_path, "cpu")
    frames = np.concatenate(list(generator.stream(PICTURE, "a red circle", num_frames=9)))
    vae = generator.encoders.vae
    seen = vae.decode(vae.encode(prepare_image(PICTURE, 64, 64)[None, None]))[0, 0]
    assert np.abs(frames[0] - ((seen + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 1
    assert frames.shape == (9, 64, 64, 3) and np.abs(frames[-1].astype(int) - frames[0]).max() > 1
    rows = evaluate(tmp_path, overrides={"num_worlds": 1, "teacher_steps": 2}, device="cpu").summaries
    assert "distill, shuffled captions" in rows and not {"distill, zeroed y", "distill, zeroed CLIP"} & set(rows)


def test_what_does_not_fit_is_refused(workshop, ti2v, tmp_path):
    with pytest.raises(ConfigError, match="first_frame_sigma=zero does not fit the weights .*in_channels=12; .* clip"):
        run_stage(config_of(workshop, ti2v, tmp_path, "causal", init_from=str(workshop / "teacher")), Mesh())
    with pytest.raises(ConfigError, match="image_condition=i2v .*in_channels=48; set it to t2v, or .*sigma=zero"):
        run_stage(config_of(workshop, ti2v, tmp_path, "causal", model={}), Mesh())
    with pytest.raises(ConfigError, match="widen=true adds y"):
        ModelConfig(widen=True, first_frame_sigma="zero")
    with pytest.raises(ConfigError, match="video.spatial_stride=8 is not that of the VAE .* 16; set it to 16"):
        video = {"height": 64, "width": 64, "num_latent_frames": 5}
        run_stage(config_of(workshop, ti2v, tmp_path, "causal", video=video), Mesh())


def test_without_y_a_text_to_video_stage_noises_every_frame(workshop, tmp_path, monkeypatch):
    """`first_frame_sigma` is about a given picture; text-to-video has none."""
    sizes = dataclasses.replace(TEACHER, model_type="t2v", in_channels=TEACHER.out_channels, image_dim=None)
    save_dit(sizes, make_model(sizes).state_dict(), tmp_path / "t2v")
    calls = spied(monkeypatch)
    model = {"image_condition": "t2v", "first_frame_sigma": "zero"}
    changes = {"init_from": str(tmp_path / "t2v"), "model": model, "max_steps": 1}
    run_stage(stage_config(workshop, tmp_path, "teacher", **changes), Mesh())
    assert all((sigma[:, 0] > 0).all() for _, sigma, _, _ in calls)
