"""The folders that the recipes in configs/wan name, with tiny weights of the same kinds in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image
from tiny_stage import TEACHER, make_encoders, make_model, save_encoders
from toy_assets import toy

from longtake.config.groups import WorldConfig
from longtake.encoders.bundle import Encoders, VideoVAE
from longtake.models.sizes import DiTConfig
from longtake.toy.files import write_world
from longtake.toy.world import sample_world
from longtake.weights.config_json import config_to_json
from longtake.weights.load import save_dit

I2V = TEACHER
LARGE_I2V = dataclasses.replace(TEACHER, dim=32, ffn_dim=64, num_layers=3)
T2V = dataclasses.replace(TEACHER, model_type="t2v", in_channels=TEACHER.out_channels, image_dim=None)
LARGE_T2V = dataclasses.replace(T2V, dim=32, num_layers=3)
TI2V_CHANNELS = 48
TI2V = dataclasses.replace(T2V, model_type="ti2v", in_channels=TI2V_CHANNELS, out_channels=TI2V_CHANNELS)
REHEARSAL = ["video.height=32", "video.width=32"]


def ti2v_encoders() -> Encoders:
    """Those of `make_encoders` with a VAE of stride 4x16x16."""
    given = make_encoders()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sizes = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 0, "z_dim": TI2V_CHANNELS}
        statistics = {"latents_mean": [0.1] * TI2V_CHANNELS, "latents_std": [0.3] * TI2V_CHANNELS}
        vae = VideoVAE(toy.build_vae(**sizes, **statistics, temperal_downsample=[False, True, True]))
    assert (vae.temporal_stride, vae.spatial_stride) == (4, 16)
    return dataclasses.replace(given, vae=vae)


def write_model(folder: Path, config: DiTConfig, encoders: Encoders) -> Path:
    """A folder as it is downloaded: the transformer and its encoders."""
    save_dit(config, make_model(config).state_dict(), folder)
    return save_encoders(encoders, folder)


def write_wan_weights(weights: Path) -> None:
    """`weights/` of the recipes."""
    encoders = make_encoders()
    write_model(weights / "Wan2.1-Fun-1.3B-InP", I2V, encoders)
    write_model(weights / "Wan2.1-I2V-14B-480P", LARGE_I2V, encoders)
    write_model(weights / "Wan2.1-T2V-1.3B", T2V, encoders)
    write_model(weights / "Wan2.1-T2V-14B", LARGE_T2V, encoders)
    write_model(weights / "Wan2.2-TI2V-5B", TI2V, ti2v_encoders())
    student = weights / "Self-Forcing" / "checkpoints" / "ode_init.pt"
    student.parent.mkdir(parents=True)
    state = make_model(T2V, seed=4).state_dict()
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in state.items()}}, student)
    # The published file has none and is known by its sizes.
    (student.parent / "config.json").write_text(json.dumps(config_to_json(T2V)))


def write_photos(folder: Path, count: int = 2) -> None:
    """Pictures with a caption each."""
    folder.mkdir(parents=True)
    for number in range(count):
        world = sample_world(0, number)
        Image.fromarray(world.render(1)[0]).resize((96, 64)).save(folder / f"photo{number}.jpg")
        (folder / f"photo{number}.txt").write_text(world.caption)


def write_data(folder: Path) -> None:
    """`photos/`, `prompts.txt`, and `world/clips/` that are long enough for every recipe."""
    write_photos(folder / "photos")
    (folder / "prompts.txt").write_text("\n".join(sample_world(0, k).caption for k in range(3)))
    write_world(folder / "world", WorldConfig(num_worlds=2, num_frames=121, formats=["clips"]))
