"""Random models and pictures of the published shapes, for measurements; and the two sizes that are measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.models.dit import VideoDiT
from longtake.models.sizes import DiTConfig
from longtake.toy.world import sample_world
from longtake.weights.load import save_dit
from longtake.weights.presets import PRESETS

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "assets"))

import toy_encoders as toy  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """What is measured. `encoder_width`: hidden width of the MLPs of text and image encoder; `windows`: sizes and sinks
    in latent frames; `vae`: what differs from the defaults of `AutoencoderKLWan`, which are Wan2.1's.
    """

    dit: DiTConfig
    height: int
    width: int
    num_latent_frames: int
    windows: str
    vae: Mapping[str, Any]
    encoder_width: int
    image_size: int

    @property
    def tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.height * self.width // 256


FULL = Sizes(PRESETS["wan2.1-fun-1.3b-inp"], 480, 832, 21, "13:5,12:0", {}, 1024, 224)
TINY = Sizes(
    DiTConfig(
        dim=24,
        ffn_dim=48,
        num_heads=2,
        num_layers=2,
        model_type="i2v",
        in_channels=36,
        text_dim=32,
        text_len=48,
        freq_dim=32,
        image_dim=32,
    ),
    64,
    64,
    9,
    "9:1,8:0",
    {**toy.VAE_CONFIG, "base_dim": 8, "dim_mult": [1, 1, 1], "num_res_blocks": 0},
    48,
    28,
)


def write_weights(sizes: Sizes, folder: Path, device: torch.device) -> int:
    """A random transformer in bfloat16; its number of parameters."""
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = VideoDiT(sizes.dit)
        model.head.head.weight.normal_(std=0.02)  # Wan's initialisation is zero: nothing would depend on the rest
    save_dit(sizes.dit, model.state_dict(), folder, torch.bfloat16)
    return sum(parameter.numel() for parameter in model.parameters())


def write_encoders(sizes: Sizes, folder: Path) -> None:
    """A random VAE of the full size, and text and image encoders whose results have the full size."""
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    AutoencoderKLWan(**sizes.vae).save_pretrained(folder / "vae")
    tokenizer = toy.build_tokenizer()
    tokenizer.model_max_length = sizes.dit.text_len
    text = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=sizes.dit.text_dim,
        d_kv=16,
        d_ff=sizes.encoder_width,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "text_encoder")
    image = CLIPVisionConfig(
        hidden_size=sizes.dit.image_dim,
        intermediate_size=sizes.encoder_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=sizes.image_size,
        patch_size=14,
    )
    CLIPVisionModel(image).save_pretrained(folder / "image_encoder")


def write_lmdb(folder: Path, num_rows: int) -> None:
    """Random pictures with prompts in the published image-to-video layout (docs/formats.md)."""
    import lmdb

    random = np.random.default_rng(0)
    with lmdb.open(str(folder), map_size=1 << 32) as database, database.begin(write=True) as transaction:
        for row in range(num_rows):
            picture = random.integers(0, 256, (480, 832, 3), dtype=np.uint8)
            transaction.put(f"img_{row}_data".encode(), picture.tobytes())
            transaction.put(f"prompts_{row}_data".encode(), sample_world(0, row).caption.encode())
