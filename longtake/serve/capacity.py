"""How many sessions a device carries in real time, and in its memory: measured before the first one comes."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch

from longtake.devices import host_memory
from longtake.inference.generator import Generator
from longtake.inference.session import Session

logger = logging.getLogger(__name__)

_SHARE = 0.9  # of speed and of free memory that sessions may take
_COUNTED_BLOCKS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of a device: `used`, and `held`, with those that the process keeps for later. Of a CPU, the process's."""

    used: int = 0
    held: int = 0

    @classmethod
    def of(cls, device: torch.device) -> Memory:
        if device.type == "cuda":
            return cls(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))
        try:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
        except (OSError, ValueError, IndexError):  # not on this system
            resident = 0
        return cls(resident, resident)

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.used + other.used, self.held + other.held)


@dataclass(frozen=True)
class Capacity:
    """Sessions that may play at once; frames a second that were made alone, and bytes of the device and of the host's
    memory that a session took (None: not measured).
    """

    sessions: int
    frames_per_second: float | None = None
    session_bytes: int | None = None
    host_bytes: int | None = None


def measure(generator: Generator, most: int | None, kept: dict[str, Any]) -> Capacity:
    """The capacity for sessions of this generator; `most`, where somebody has said how many; `kept`, what
    each keeps of its past: `history_blocks` and `ready_blocks`.
    """
    on_gpu = generator.device.type == "cuda"
    if on_gpu:
        warm_up(generator, kept["history_blocks"])
    elif most is not None:
        return Capacity(most)
    rate, session_bytes, host_bytes = _play(generator, kept)
    sessions = max(1, int(_SHARE * rate / generator.fps)) if most is None else most
    if on_gpu and session_bytes:
        _give_back()  # what the session that was measured held
        free, _ = torch.cuda.mem_get_info(generator.device)
        sessions = max(1, min(sessions, int(_SHARE * free / session_bytes)))
        if host_bytes and (free := host_memory()[1]):
            sessions = max(1, min(sessions, int(_SHARE * free / host_bytes)))
    each = session_bytes / 1e9, host_bytes / 1e9
    logger.info("%d sessions at once: %.1f frames/s, %.2f GB and %.2f GB of the host each", sessions, rate, *each)
    return Capacity(sessions, rate, session_bytes, host_bytes)


def warm_up(generator: Generator, history_blocks: int) -> None:
    """Chooses and compiles what blocks need. Sessions with a history never borrow the caches of the videos that were
    made for it: those, and what was captured against them, are given back, gigabytes that nobody could use.
    """
    generator.warm_up()
    if history_blocks:
        gc.collect()  # a video that is still in a circle of references would bring its caches back later
        generator.caches.clear()
        _give_back()


def _give_back() -> None:
    """What torch keeps of the device's memory and nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim() -> None:
    """Gives back what malloc keeps of the process's memory and nobody uses: caches of changes that were forgotten, say.

    Takes some 2 ms; does nothing where libc has no such function.
    """
    if (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        give_back(0)


def _play(generator: Generator, kept: dict[str, Any]) -> tuple[float, int, int]:
    """Frames a second of a session whose history is full, and its bytes on the device and in the host's memory."""
    rules = generator.settings
    picture = np.zeros((rules.height, rules.width, 3), np.uint8) if generator.beginning.needed else None
    before = _allocated(generator)
    session = generator.open(picture, "a picture", seed=0, **kept)
    for _ in range(2 + (kept["history_blocks"] if generator.device.type == "cuda" else 0)):
        session.next()
    # Of a CPU what this thread was given of it: a browser that opens meanwhile must not count for as long as it stays.
    clock = thread_time if generator.device.type == "cpu" else perf_counter
    began = clock()
    frames = sum(len(session.next()) for _ in range(_COUNTED_BLOCKS))
    rate = frames / (clock() - began)
    if generator.device.type != "cuda":
        return rate, 0, 0
    return rate, _allocated(generator) - before, session.host_bytes + changes_bytes(session)


def changes_bytes(session: Session) -> int:
    """What a session takes of the host's memory beside that when it has been changed as often as its history can hold:
    what its caches held, for each.
    """
    if session.state.stream is None or session.history_caches is None:
        return 0
    changes = min(session.history_caches, session.history_blocks)
    return changes * sum(cache.size_bytes for cache in session.state.stream.caches)


def _allocated(generator: Generator) -> int:
    return torch.cuda.memory_allocated(generator.device) if generator.device.type == "cuda" else 0
