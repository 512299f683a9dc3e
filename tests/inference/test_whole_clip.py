"""`--sampler whole`: the clip of a bidirectional teacher, with its caption, is a data set to train from."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_stage import TEACHER, make_model
from typer.testing import CliRunner

from longtake import Generator
from longtake.cli.app import app
from longtake.config.generation import GenerationConfig
from longtake.data.formats import open_dataset
from longtake.encoders.condition import encode_condition, prepare_image
from longtake.errors import ConfigError
from longtake.rng import KeyedRNG
from longtake.toy.world import sample_world
from longtake.weights.load import save_dit

WORLD = sample_world(3, 0)
PICTURE = WORLD.render(1)[0]
RULES = {"height": 64, "width": 64, "sampler": "whole", "steps": [1.0, 2 / 3, 1 / 3], "shift": 3.0, "guidance": 2.0}


@torch.no_grad()
def euler_by_hand(generator, frames, seed, negative):
    """x <- x + v (next - now) over all frames at one level, guided; the picture enters by y, or as clean frame 0."""
    model, encoders = generator.model, generator.encoders
    condition, first = generator.condition(prepare_image(PICTURE, 64, 64)[None], WORLD.caption)
    if model.config.condition_channels:
        condition, first = encode_condition(encoders, prepare_image(PICTURE, 64, 64)[None], [WORLD.caption]), None
    other = condition.with_text(encoders.text.encode([negative]))
    x = KeyedRNG(seed).noise(0, "teacher", [0], (frames, model.config.out_channels, 8, 8), "cpu")
    sigmas = [3 * u / (1 + 2 * u) for u in (1, 2 / 3, 1 / 3, 0)]
    for now, following in zip(sigmas, sigmas[1:]):
        level = torch.full((1, frames), now)
        if first is not None:
            x[:, :1], level[:, 0] = first, 0
        with_text, without = model(x, level, condition), model(x, level, other)
        x = x + (without + 2 * (with_text - without)) * (following - now)
    if first is not None:
        x[:, :1] = first
    return x


@pytest.fixture(params=["y", "clean first frame"])
def model(request, workshop, tmp_path):
    if request.param == "y":
        return workshop / "teacher"
    sizes = TEACHER.__class__(**TEACHER.to_dict() | {"in_channels": 4, "image_dim": None, "model_type": "ti2v"})
    save_dit(sizes, make_model(sizes).state_dict(), tmp_path / "ti2v")
    return tmp_path / "ti2v"


def test_the_whole_clip_is_sampled_by_euler_steps(model, workshop):
    generator = Generator.from_model(model, "cpu", encoders=workshop / "encoders", changes=RULES)
    shown = list(generator.stream(PICTURE, WORLD.caption, num_frames=15, seed=7, negative="blurred"))
    assert len(shown) == 1 and shown[0].shape == (15, 64, 64, 3)  # 17 frames of 5 latents, cut
    pixels = generator.encoders.vae.decode(euler_by_hand(generator, 5, 7, "blurred"))[0]
    wanted = ((pixels + 1) * 127.5).permute(0, 2, 3, 1).numpy()[:15]
    assert np.abs(shown[0] - wanted).max() <= 1
    with pytest.raises(ConfigError, match="sampler=whole makes all frames at once; it needs num_frames"):
        generator.stream(PICTURE, WORLD.caption)


def test_levels_must_be_even():
    with pytest.raises(ConfigError, match=r"steps=\[1.0, 0.3\] must be evenly spaced with sampler=whole"):
        GenerationConfig(sampler="whole", steps=[1.0, 0.3])


def test_generated_clips_are_a_data_set(workshop, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(PICTURE).save(tmp_path / "photos/cat.png")
    (tmp_path / "photos/cat.txt").write_text(WORLD.caption)
    command = ["generate", "--model", str(workshop / "teacher"), "--encoders", str(workshop / "encoders"), "--inputs"]
    command += [str(tmp_path / "photos"), "-o", str(tmp_path / "clips"), "--sampler", "whole", "--steps", "2"]
    command += ["--height", "64", "--width", "64", "--frames", "9", "--samples", "2"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    clips = open_dataset(tmp_path / "clips", kind="auto", num_frames=9, fps=16, height=64, width=64)
    assert [clips[row].prompt for row in (0, 1)] == [WORLD.caption] * 2 and clips[0].video.shape == (9, 64, 64, 3)
    assert json.loads((tmp_path / "clips/cat-seed1.json").read_text())["settings"]["sampler"] == "whole"
