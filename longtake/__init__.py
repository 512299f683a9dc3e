"""Longtake: streaming image-to-video generators distilled from Wan video diffusion models. Public names only."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "CacheError": "longtake.errors",
    "CheckpointError": "longtake.errors",
    "Condition": "longtake.condition",
    "ConfigError": "longtake.errors",
    "DataError": "longtake.errors",
    "Generator": "longtake.inference.generator",
    "LongtakeError": "longtake.errors",
    "OutputError": "longtake.errors",
    "Session": "longtake.inference.session",
    "ShapeError": "longtake.errors",
    "StreamPlan": "longtake.plan",
    "TrainingError": "longtake.errors",
    "Video": "longtake.inference.video",
    "VideoDiT": "longtake.models.dit",
    "VideoShape": "longtake.condition",
    "VideoWriter": "longtake.inference.video_io",
    "clip_size": "longtake.data.clips",
    "decode_image": "longtake.data.images",
    "load_dit": "longtake.weights.load",
    "open_dataset": "longtake.data.formats",
    "prepare_image": "longtake.encoders.condition",
    "read_clip": "longtake.data.clips",
    "read_lora": "longtake.weights.lora",
    "read_video": "longtake.inference.video_io",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:  # the same names for type checkers and editors
    from longtake.condition import Condition as Condition
    from longtake.condition import VideoShape as VideoShape
    from longtake.data.clips import clip_size as clip_size
    from longtake.data.clips import read_clip as read_clip
    from longtake.data.formats import open_dataset as open_dataset
    from longtake.data.images import decode_image as decode_image
    from longtake.encoders.condition import prepare_image as prepare_image
    from longtake.errors import CacheError as CacheError
    from longtake.errors import CheckpointError as CheckpointError
    from longtake.errors import ConfigError as ConfigError
    from longtake.errors import DataError as DataError
    from longtake.errors import LongtakeError as LongtakeError
    from longtake.errors import OutputError as OutputError
    from longtake.errors import ShapeError as ShapeError
    from longtake.errors import TrainingError as TrainingError
    from longtake.inference.generator import Generator as Generator
    from longtake.inference.session import Session as Session
    from longtake.inference.video import Video as Video
    from longtake.inference.video_io import VideoWriter as VideoWriter
    from longtake.inference.video_io import read_video as read_video
    from longtake.models.dit import VideoDiT as VideoDiT
    from longtake.plan import StreamPlan as StreamPlan
    from longtake.weights.load import load_dit as load_dit
    from longtake.weights.lora import read_lora as read_lora
else:

    def __getattr__(name: str) -> object:
        # Imported on first use: `import longtake` and `longtake --help` load no torch.
        from importlib import import_module

        from longtake.errors import nearest

        if name not in _HOMES:
            raise AttributeError(f"module 'longtake' has no attribute {name!r}{nearest(name, _HOMES)}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
