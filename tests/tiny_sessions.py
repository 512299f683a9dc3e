"""A generator of tiny random networks, made in memory, and what its sessions are tested with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tiny_stage import TEACHER, make_encoders, make_model

from longtake.config.generation import generation_settings
from longtake.encoders.bundle import Encoders
from longtake.inference.generator import Generator
from longtake.rollout.denoise import Denoiser
from longtake.toy.world import sample_world

RULES = {"height": 32, "width": 32, "num_latent_frames": 5, "steps": [1.0, 0.5], "shift": 3.0}
PLAN = {"block_frames": 2, "window_frames": 5, "sink_frames": 1}
PICTURE = sample_world(3, 0).render(1)[0][::2, ::2]
OTHER = 255 - PICTURE
A, B, C = "a red circle drifts to the right", "a green square climbs quickly", "a blue triangle stays"

# Every kind of stream that a session must be able to hold
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided, absolute": {
        "guidance": 2.0,
        "rope": "absolute",
        "plan": {"block_frames": 2, "window_frames": 7, "sink_frames": 3},
    },
    "all frames, bf16": {
        "precision": "bf16",
        "plan": {"block_frames": 2, "window_frames": None, "sink_frames": 0},
    },
    "kept sink": {"plan": {"block_frames": 2, "window_frames": 7, "sink_frames": 3, "keep_sink": True}},
    "last step": {
        "guidance": 2.0,
        "steps": [1.0, 0.7, 0.4],
        "later_steps": [1.0, 0.5],
        "plan": {"block_frames": 2, "window_frames": 7, "sink_frames": 1, "context": "last_step"},
    },
    "no y, no sink": {"_y": False, "plan": {"block_frames": 2, "window_frames": 4, "sink_frames": 0}},
    "begun by text alone": {"_y": False, "picture": "frame"},
}


def make_generator(seed: int = 5, encoders_seed: int = 0, **changes: Any) -> Generator:
    """Changes of settings; `_y` False: weights without y and without CLIP tokens."""
    config, encoders = TEACHER, make_encoders(encoders_seed)
    if not changes.pop("_y", True):
        sizes = {**TEACHER.to_dict(), "in_channels": TEACHER.out_channels, "image_dim": None, "model_type": "ti2v"}
        config, encoders = TEACHER.__class__(**sizes), Encoders(encoders.vae, encoders.text, None)
    settings = generation_settings(None, {**RULES, "plan": PLAN, **changes})
    model = make_model(config, seed).eval().requires_grad_(False)
    if settings.is_half:
        model.cast(torch.bfloat16)
    if settings.precision == "fp8":
        model.quantise()
    return Generator(Denoiser(model), encoders, settings, torch.device("cpu"))


def open_session(generator: Generator, prompt: str = A, **given: Any) -> Any:
    if generator.plan.window_frames is None:
        given.setdefault("max_frames", 121)
    return generator.open(first_picture(generator), prompt, **given)


def first_picture(generator: Generator) -> np.ndarray | None:
    """What `open_session` opens with."""
    return None if generator.beginning.picture == "frame" else PICTURE


def take(session: Any, num_blocks: int) -> np.ndarray:
    return np.concatenate([session.next() for _ in range(num_blocks)])
