"""Fixtures over `tiny_models`, for every test folder."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import FakeHub
from PIL import Image
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error

from longtake.condition import Condition
from longtake.models.dit import VideoDiT
from longtake.toy.world import sample_world

SLOW_SECONDS = 900  # the limit of a slow test that names none; that of fast ones is `timeout` of pyproject.toml
_FROZEN = {"modules": 0}
_STDERR = pytest.StashKey[int]()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.dup(2)  # before pytest captures it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


def _end_at_limit(item: pytest.Item) -> None:
    """Prints the stacks of all threads and ends the process half a minute after pytest-timeout lets a test fail.

    Its signal does nothing while the test waits inside C, is forgotten where a test swallows it, and is off from a failure
    on, however long the fixtures then take to end.
    """
    marker = item.get_closest_marker("timeout")
    of_all = item.config.getoption("timeout") or item.config.getini("timeout")
    if (seconds := float(marker.args[0] if marker else of_all)) > 0:
        faulthandler.dump_traceback_later(seconds + min(seconds, 30), file=item.config.stash[_STDERR], exit=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    _end_at_limit(item)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    if isinstance(node, pytest.Item):
        _end_at_limit(node)  # again: pytest itself has just put it off


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """What is imported stays: no later collection of garbage looks through it (a fifth of a second each time)."""
    if len(sys.modules) > _FROZEN["modules"] + 50:
        gc.collect()
        gc.freeze()
        _FROZEN["modules"] = len(sys.modules)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a command of an earlier test told logging, whose stream is closed by now, is gone."""
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    root.setLevel(logging.WARNING)
    logging.getLogger("longtake").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., VideoDiT]:
    """`tiny_model(i2v=False, seed=0, **config changes)`: a fresh model."""
    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_condition() -> Callable[..., Condition]:
    """`tiny_condition(model, batch=2, seed=1, num_frames=7)`: different captions (and pictures) per sample."""
    return make_tiny_condition


@pytest.fixture(scope="session")
def tiny_latents() -> Callable[..., torch.Tensor]:
    """`tiny_latents(num_frames, batch=2, seed=2)`: [B, F, 4, 4, 6]."""
    return make_tiny_latents


@pytest.fixture(scope="session")
def rel() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return relative_error


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random tiny `encoders/`, a random `teacher/` and the `data/` of six worlds; only to be read."""
    from tiny_stage import make_workshop

    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of local folders (`fake_hub.py`); the folder of the test is the current one."""
    monkeypatch.chdir(tmp_path)
    return FakeHub(tmp_path / "hub", monkeypatch)


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

    from longtake.encodings.write import encode
    from longtake.parallel.mesh import Mesh

    folder = tmp_path_factory.mktemp("encoded") / "whole"
    encode(config_of(workshop, folder), folder, Mesh(), rows_per_shard=2)
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
