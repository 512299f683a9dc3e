"""Encoders of the toy sizes with random weights, for tests that need no files."""

from __future__ import annotations

import torch

from longtake.encoders.bundle import Encoders
from longtake.encoders.clip import ImageEncoder
from longtake.encoders.text import TextEncoder
from longtake.encoders.vae import VideoVAE
from longtake.toy import encoders as toy


def random_encoders(seed: int = 0) -> Encoders:
    """The same for the same seed; the global generator stays where it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VideoVAE(toy.build_vae())
        tokenizer = toy.build_tokenizer()
        text = TextEncoder(toy.build_text_model(len(tokenizer)), tokenizer, toy.TEXT_LEN)
        return Encoders(vae, text, ImageEncoder(toy.build_image_model()))
