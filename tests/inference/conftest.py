"""A student, pictures with their texts, and a generator, for the tests that make videos of them."""

import pytest
from PIL import Image
from tiny_sessions import OTHER, PICTURE, make_generator
from tiny_stage import save_student, stage_config

from longtake.toy.world import sample_world


@pytest.fixture(scope="module")
def run(workshop, tmp_path_factory):
    """A log folder with one student."""
    logdir = tmp_path_factory.mktemp("log")
    save_student(stage_config(workshop, logdir, "causal"), ema=False)
    return logdir


@pytest.fixture
def inputs(tmp_path):
    """A folder of three pictures, of worlds 0 to 2 of seed 3, with text files."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for k in range(3):
        world = sample_world(3, k)
        Image.fromarray(world.render(1)[0]).save(folder / f"w{k}.png")
        (folder / f"w{k}.txt").write_text(world.caption)
    return folder


@pytest.fixture(scope="module")
def generator():
    return make_generator()


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures."""
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    Image.fromarray(OTHER).save(tmp_path / "b.png")
    return tmp_path
