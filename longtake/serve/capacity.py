"""How many sessions a device carries in real time, and in its memory: measured before the first one comes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from longtake.inference.generator import Generator

logger = logging.getLogger(__name__)

_SHARE = 0.9  # of speed and of free memory that sessions may take
_COUNTED_BLOCKS = 2


@dataclass(frozen=True)
class Capacity:
    """Sessions that may play at once; frames a second that were made alone, and bytes of the device a session took
    (None: not measured).
    """

    sessions: int
    frames_per_second: float | None = None
    session_bytes: int | None = None


def measure(generator: Generator, most: int | None, kept: dict[str, Any]) -> Capacity:
    """The capacity for sessions of this generator; `most`, where somebody has said how many; `kept`, what
    each keeps of its past: `history_blocks` and `ready_blocks`.
    """
    on_gpu = generator.device.type == "cuda"
    if on_gpu:
        generator.warm_up()
    elif most is not None:
        return Capacity(most)
    before = _allocated(generator)
    rate, session_bytes = _play(generator, kept)
    sessions = max(1, int(_SHARE * rate / generator.fps)) if most is None else most
    if on_gpu and session_bytes:
        free, _ = torch.cuda.mem_get_info(generator.device)
        free += torch.cuda.memory_reserved(generator.device) - before
        sessions = max(1, min(sessions, int(_SHARE * free / session_bytes)))
    logger.info("%d sessions at once: %.1f frames/s, %.2f GB each", sessions, rate, session_bytes / 1e9)
    return Capacity(sessions, rate, session_bytes)


def _play(generator: Generator, kept: dict[str, Any]) -> tuple[float, int]:
    """Frames a second of a session whose history is full, and its bytes on the device."""
    rules = generator.settings
    picture = np.zeros((rules.height, rules.width, 3), np.uint8) if generator.beginning.needed else None
    before = _allocated(generator)
    session = generator.open(picture, "a picture", seed=0, **kept)
    for _ in range(2 + (kept["history_blocks"] if generator.device.type == "cuda" else 0)):
        session.next()
    began = perf_counter()
    frames = sum(len(session.next()) for _ in range(_COUNTED_BLOCKS))
    return frames / (perf_counter() - began), _allocated(generator) - before


def _allocated(generator: Generator) -> int:
    return torch.cuda.memory_allocated(generator.device) if generator.device.type == "cuda" else 0
