"""What the tests of encoded sets share."""

from pathlib import Path

from safetensors.torch import load_file
from tiny_stage import TEACHER, make_model, stage_config

from longtake.encoders.bundle import TextEncoder
from longtake.run_folder import latest_checkpoint
from longtake.weights.load import save_dit

ROWS = 6


def config_of(workshop, logdir, stage="causal", **changes):
    return stage_config(workshop, logdir, stage, **changes)


def from_cache(workshop, logdir, path, stage="causal", **changes):
    return config_of(workshop, logdir, stage, **{"data": {"path": str(path), "num_workers": 0}} | changes)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def weights_of(config):
    path = latest_checkpoint(config.folder / "checkpoints")
    return {f.parent.name + k: v for f in sorted(path.rglob("*.safetensors")) for k, v in load_file(f).items()}


def text_to_video(folder, path):
    """Changes of a stage for a text-to-video model, whose weights are written to `folder`."""
    sizes = TEACHER.__class__(**TEACHER.to_dict() | {"in_channels": 4, "image_dim": None, "model_type": "t2v"})
    save_dit(sizes, make_model(sizes).state_dict(), folder / "t2v")
    return {
        "model": {"image_condition": "t2v"},
        "init_from": str(folder / "t2v"),
        "teacher": str(folder / "t2v"),
        "plan": {"block_frames": 2, "first_frames": 2, "window_frames": 4, "sink_frames": 2},
        "video": {"height": 64, "width": 64, "num_latent_frames": 4},
        "data": {"path": str(path), "num_workers": 0},
        "max_steps": 2,
    }


def rounding(monkeypatch):
    """Makes the text encoder round as the set on disk does."""
    exact = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, prompts, **more: exact(self, prompts, **more).bfloat16().float()
    )
