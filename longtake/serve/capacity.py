"""How many sessions a device carries in real time, and in its memory: measured before the first one comes."""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
from dataclasses import astuple, dataclass
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
    """Bytes of a device: `used`, and `held`, with those that the process keeps for later. Of a CPU, the process's.

    `host`: those of the host's page-locked memory for the histories of a GPU's sessions; `host_seconds`, for which
    making it was waited for.
    """

    used: int = 0
    held: int = 0
    host: int = 0
    host_seconds: float = 0.0

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
        mine, others = astuple(self), astuple(other)
        return Memory(*(one + another for one, another in zip(mine, others)))


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
    each keeps of its past: `history_blocks`, `ready_blocks` and `history_caches`. On a GPU the host's memory that so
    many sessions can need is page-locked then, and no viewer waits for it.
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
        if host_bytes:
            if free := host_memory()[1]:
                free += host_bytes  # what the one that was measured has left
                sessions = max(1, min(sessions, int(_SHARE * free / host_bytes)))
            pool = generator.copies.pool
            sessions = pool.make_ready(sessions)
            logger.info("%.2f GB of the host's memory page-locked in %.1f s", pool.size_bytes / 1e9, pool.seconds)
    each = f", {session_bytes / 1e9:.2f} GB and {host_bytes / 1e9:.2f} GB of the host each" if on_gpu else ""
    logger.info("room for %d session%s: %.1f frames/s in all%s", sessions, "s" * (sessions > 1), rate, each)
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
    on_gpu, before = generator.device.type == "cuda", _allocated(generator)
    session = generator.open(picture, "a picture", seed=0, **kept)
    if on_gpu:
        fill_history(session)
    for _ in range(2):
        session.next()
    # Of a CPU what this thread was given of it: a browser that opens meanwhile must not count for as long as it stays.
    clock = perf_counter if on_gpu else thread_time
    began = clock()
    frames = sum(len(session.next()) for _ in range(_COUNTED_BLOCKS))
    rate = frames / (clock() - began)
    if not on_gpu:
        return rate, 0, 0
    return rate, _allocated(generator) - before, generator.copies.pool.size_bytes


def fill_history(session: Session) -> None:
    """Plays until the history has once taken as much of the host's memory as it ever can: another change comes when its
    blocks follow as many prompts as it may hold, each of which has left a cache behind.
    """
    blocks, plan = session.history_blocks, session.generator.plan
    changes = blocks if session.history_caches is None else min(session.history_caches, blocks)
    for _ in range(2 + blocks + (plan.window_frames or 0) // plan.block_frames):
        session.next()
    for number in range(changes + 1 if blocks else 0):
        session.prompt = f"a picture, {number}"
        for _ in range(max(1, (blocks + 1) // (changes + 1))):
            session.next()


def _allocated(generator: Generator) -> int:
    return torch.cuda.memory_allocated(generator.device) if generator.device.type == "cuda" else 0
