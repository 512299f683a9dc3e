"""Seconds: of one piece of work, and of a video as a viewer would see it arrive. Must know no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# A piece of work is repeated until it took about so long, once at least; more does not make a mean much steadier.
_ABOUT_SECONDS = 0.2
_MOST_REPEATS = 50
_WHOLE = "seconds_of/"


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device, *, about: float = _ABOUT_SECONDS) -> float:
    """Mean seconds of `work()` where kernels run, after a call that does not count (it chooses and compiles).

    Args: `about`, seconds to spend on repetitions; what takes longer is done once.
    """
    work()
    once = timed(work, device)
    repeats = min(_MOST_REPEATS, int(about / max(once, 1e-9)))
    return once if repeats <= 1 else timed(work, device, repeats)


def timed(work: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Mean seconds of `work()`, from when the device has nothing else to do until it has done it so many times."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def wholes(taken: Mapping[str, float]) -> dict[str, float]:
    """Seconds by name of what `PhaseTimer.whole` timed, from what `PhaseTimer.take` gave."""
    return {name.removeprefix(_WHOLE): seconds for name, seconds in taken.items() if name.startswith(_WHOLE)}


@dataclass(frozen=True)
class Stalls:
    """How often a player had to wait, at which chunk first (None: never), and for how many seconds in all."""

    count: int
    first_chunk: int | None
    seconds: float


def playback(arrivals: Sequence[float], chunk_seconds: Sequence[float]) -> Stalls:
    """A player that starts when the first chunk has arrived, plays each to its end, and waits where the next is late.

    Args: `arrivals`, ascending; `chunk_seconds`, how long each plays. Source: spec V (one chunk is buffered).
    """
    ends, late = arrivals[0], []
    for index, (arrival, length) in enumerate(zip(arrivals, chunk_seconds, strict=True)):
        if arrival > ends + 1e-9:
            late.append((index, arrival - ends))
        ends = max(ends, arrival) + length
    return Stalls(len(late), late[0][0] if late else None, sum(wait for _, wait in late))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentile, interpolated; of fewer than 100 values the last is little more than the most.

    None where there are no values.
    """
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
