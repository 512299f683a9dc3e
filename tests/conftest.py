"""Fixtures over `tiny_models`, for every test folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_condition, make_tiny_latents, make_tiny_model, relative_error

from longtake.condition import Condition
from longtake.models.dit import VideoDiT

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


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
