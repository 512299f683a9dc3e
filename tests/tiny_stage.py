"""A whole stage at the smallest size that runs: random encoders, a random teacher, a toy world, configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import randomize
from toy_assets import toy

from longtake.checkpoint.invariants import invariants
from longtake.checkpoint.save import RunInfo, Snapshot, save_checkpoint
from longtake.config.groups import WorldConfig
from longtake.config.stage import StageConfig
from longtake.encoders.bundle import Encoders, ImageEncoder, TextEncoder, VideoVAE
from longtake.models.dit import VideoDiT
from longtake.models.sizes import DiTConfig
from longtake.parallel.mesh import Mesh
from longtake.rng import KeyedRNG
from longtake.run_folder import latest_checkpoint
from longtake.toy.files import write_world
from longtake.train.state import TrainState
from longtake.weights.load import save_dit

CHANNELS = 4
TEACHER = DiTConfig(
    dim=24,
    ffn_dim=48,
    num_heads=2,
    num_layers=2,
    model_type="i2v",
    in_channels=4 + 2 * CHANNELS,
    out_channels=CHANNELS,
    text_dim=toy.TEXT_WIDTH,
    text_len=toy.TEXT_LEN,
    freq_dim=32,
    image_dim=toy.IMAGE_WIDTH,
)


def make_encoders(seed: int = 0) -> Encoders:
    """Random toy encoders with a smaller VAE of 4 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        statistics = {"latents_mean": [0.1] * CHANNELS, "latents_std": [0.3] * CHANNELS}
        sizes = {"base_dim": 8, "dim_mult": [1, 1, 1], "num_res_blocks": 0, "z_dim": CHANNELS}
        vae = VideoVAE(toy.build_vae(**sizes, **statistics))
        tokenizer = toy.build_tokenizer()
        text = TextEncoder(toy.build_text_model(len(tokenizer)), tokenizer, toy.TEXT_LEN)
        return Encoders(vae, text, ImageEncoder(toy.build_image_model()))


def save_encoders(encoders: Encoders, folder: Path) -> Path:
    encoders.vae.module.save_pretrained(folder / "vae")
    encoders.text.model.save_pretrained(folder / "text_encoder")
    encoders.text.tokenizer.save_pretrained(folder / "text_encoder")
    assert encoders.image is not None
    encoders.image.model.save_pretrained(folder / "image_encoder")
    return folder


def make_model(config: DiTConfig = TEACHER, seed: int = 0) -> VideoDiT:
    model = VideoDiT(config)
    randomize(model, seed)
    return model


def make_workshop(folder: Path) -> Path:
    """A folder with `encoders/`, `teacher/` and `data/` (6 worlds of 17 frames, as images and clips)."""
    save_encoders(make_encoders(), folder / "encoders")
    save_dit(TEACHER, make_model().state_dict(), folder / "teacher")
    write_world(folder / "data", WorldConfig(num_worlds=6, num_frames=17, formats=["images", "clips"]))
    return folder


OF_OBJECTIVE = {"teacher", "critic", "data_loss", "error_recycling", "caption_dropout", "shared_base", "guidance"}
OF_OBJECTIVE |= {"kind", "negative_prompt", "num_chunks", "new_frames", "switch_frames", "anchor"}
OF_OBJECTIVE |= {"context_gradient", "context_writer", "context_scores", "guidance_interval", "teacher_precision"}
OF_OBJECTIVE |= {"teacher_kind", "teacher_steps"}
# What the stages of these names are trained by
KINDS = {"teacher": "flow_matching", "causal": "teacher_forcing", "distill": "dmd", "long": "long_tuning"}
KINDS |= {"ode": "ode_regression"}


def stage_tree(workshop: Path, logdir: Path, stage: str, **changes: Any) -> dict[str, Any]:
    """The configuration tree of a tiny stage: 5 latent frames in blocks [1, 2, 2], window 5, 2 denoising steps.

    Args: `changes`, values of the stage or (`OF_OBJECTIVE`) of its objective, in place of those of the tree.
    """
    objective: dict[str, Any] = {"kind": KINDS[stage]}
    if stage in ("distill", "long"):
        critic = {"lr": 1e-3, "updates_per_generator": 2}
        objective |= {"teacher": str(workshop / "teacher"), "critic": critic, "guidance": 3.0}
    if stage == "ode":
        objective |= {"teacher": str(workshop / "teacher"), "teacher_steps": 4, "guidance": 2.0}
    tree: dict[str, Any] = {
        "objective": objective | {key: changes.pop(key) for key in OF_OBJECTIVE & changes.keys()},
        "name": stage,
        "logdir": str(logdir),
        "seed": 1,
        "init_from": str(workshop / "teacher"),
        "encoders": str(workshop / "encoders"),
        "video": {"height": 64, "width": 64, "num_latent_frames": 5},
        "plan": {"block_frames": 2, "window_frames": 5, "sink_frames": 1},
        "flow": {"steps": [1.0, 0.5], "shift": 3.0},
        "data": {"path": str(workshop / "data" / "clips"), "kind": "clips", "num_workers": 0},
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 3,
        "optim": {"lr": 1e-3},
        "ema": {"decay": 0.5, "start_step": 0},
        "save_every": 2,
        "validate_every": 0,
        "validation": {"num_worlds": 1, "teacher_steps": 2},
    }
    if stage in ("distill", "long"):
        tree["data"] = {"path": str(workshop / "data" / "images"), "kind": "images", "num_workers": 0}
    return tree | changes


def stage_config(workshop: Path, logdir: Path, stage: str, **changes: Any) -> StageConfig:
    return StageConfig.from_tree(stage_tree(workshop, logdir, stage, **changes))


def save_student(config: StageConfig, *, ema: bool = True, seed: int = 5, step: int = 1) -> VideoDiT:
    """Publishes a checkpoint of random weights in the stage's folder with the real code.

    With `ema` the average differs from the weights; the result is the network that inference should take.
    """
    network = make_model(seed=seed)
    state = TrainState.build(
        {"generator": network}, {"generator": config.optim}, {"generator": config.ema} if ema else {}, max_steps=1
    )
    state.step = step
    if ema:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.add_(KeyedRNG(seed).noise(0, name, [0], parameter.shape)[0], alpha=0.05)
    save_checkpoint(
        Snapshot.of(state, ("generator",)),
        config.folder / "checkpoints",
        mesh=Mesh(),
        info=RunInfo(config.model_dump(), invariants(config)),
        keep=3,
    )
    taken = make_model(seed=seed)
    if not ema:
        taken.load_state_dict(network.state_dict())
    return taken.eval().requires_grad_(False)


def newest(config: StageConfig) -> Path:
    """The newest checkpoint of a stage."""
    return latest_checkpoint(config.folder / "checkpoints")


def state_of(config: StageConfig) -> dict[str, torch.Tensor]:
    """Everything that resuming from the newest checkpoint of a stage reads."""
    files = sorted((newest(config) / "state").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
