"""Makes `tiny_run` importable from these tests and from tests/dist, whatever pytest's import mode."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longtake.toy.world import sample_world

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, so that equal means equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def whole(workshop, tmp_path_factory):
    """The clips of the workshop, encoded for a causal stage in three shards of two rows; only to be read."""
    from encoded_files import config_of

    from longtake.encodings.write import encode_set
    from longtake.parallel.mesh import Mesh

    folder = tmp_path_factory.mktemp("encoded") / "whole"
    encode_set(config_of(workshop, folder), folder, Mesh(), rows_per_shard=2)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Eight pictures of two aspects with captions of the toy world; number 2 is broken, 5 has no caption."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(8):
        shape = (64, 96, 3) if k % 2 else (80, 40, 3)
        pixels = np.random.default_rng(k).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(sample_world(0, k).caption)
    (folder / "2.png").write_bytes(b"broken")
    (folder / "5.txt").write_text("")
    return folder
