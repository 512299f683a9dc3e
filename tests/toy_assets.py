"""What the programs that made the toy weights have and tests use too: builders of encoders, and a reader of captions."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from longtake.encoders.bundle import Encoders
from longtake.encoders.clip import ImageEncoder
from longtake.encoders.text import TextEncoder
from longtake.encoders.vae import VideoVAE

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "assets"))

import toy_encoders as toy  # noqa: E402
from caption_parser import clause_spans, parse_caption, tokenize  # noqa: E402

__all__ = ["clause_spans", "parse_caption", "random_encoders", "tokenize", "toy"]


def random_encoders(seed: int = 0) -> Encoders:
    """Encoders of the toy sizes with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VideoVAE(toy.build_vae())
        tokenizer = toy.build_tokenizer()
        text = TextEncoder(toy.build_text_model(len(tokenizer)), tokenizer, toy.TEXT_LEN)
        return Encoders(vae, text, ImageEncoder(toy.build_image_model()))
