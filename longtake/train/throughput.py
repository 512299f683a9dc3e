"""What a run does with its machine: samples a second, model FLOP utilisation, memory; and a profiler's trace.

Model operations are those that the mathematics of the stage needs (`rollout/work.py`): each forward and backward once,
nothing that activation checkpointing computes again. Their utilisation is given where the device's peak is known
(`longtake/devices.py`), and never on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from longtake.config.groups import ProfileConfig
from longtake.config.stage import StageConfig
from longtake.devices import find_device
from longtake.models.sizes import DiTConfig
from longtake.objectives.base import Objective
from longtake.parallel.mesh import Mesh
from longtake.rollout.work import loras, model_work, passes

logger = logging.getLogger(__name__)

GIB = 2**30


class Throughput:
    """Counts samples, seconds and operations between two rows of `metrics.jsonl`.

    Args: `operations(step)`, model operations of one rank in an iteration; `peak`, operations a second that its device
    could do; None where they are not known.
    """

    def __init__(self, operations: Callable[[int], float] | None = None, peak: float | None = None) -> None:
        self._operations, self._peak = operations, peak
        self._samples = self._seconds = self._done = 0.0

    def add(self, step: int, seconds: float, samples: int) -> None:
        """One iteration of all ranks' `samples`."""
        self._seconds += seconds
        self._samples += samples
        self._done += self._operations(step) if self._operations is not None else 0.0

    def take(self, mesh: Mesh) -> dict[str, float]:
        """The row's numbers, by the slowest rank's clock, and starts anew; all ranks call it."""
        mine = self._seconds
        seconds = max(mesh.every(lambda: mine))
        row = {"speed/samples_per_second": self._samples / seconds} if seconds else {}
        if self._operations is not None and seconds:
            row["speed/model_tflops"] = self._done / seconds / 1e12
            if self._peak is not None:
                row["speed/mfu"] = self._done / seconds / self._peak
        self._samples = self._seconds = self._done = 0.0
        return row | _memory(mesh)


def _memory(mesh: Mesh) -> dict[str, float]:
    row = {}
    if mesh.device.type == "cuda":  # before the peaks are reset
        mine = torch.cuda.max_memory_reserved(mesh.device)
        row["memory_reserved_gib"] = max(mesh.every(lambda: mine)) / GIB
    if (peak := mesh.peak_memory_bytes()) is not None:
        row["memory_gib"] = peak / GIB
    return row


def stage_throughput(
    config: StageConfig, sizes: Mapping[str, DiTConfig], objective: Objective, mesh: Mesh, image_tokens: int
) -> Throughput:
    """The throughput of a stage. Args: `sizes` of its networks by `generator`, `critic`, `teacher`."""
    peak = None
    if mesh.device.type == "cuda":
        name = torch.cuda.get_device_name(mesh.device)
        if (device := find_device(name)) is not None:
            peak = device.peak(config.precision)
        elif mesh.is_main:
            logger.info("speed/mfu is not logged: the peak rate of %s is not known (longtake/devices.py)", name)
    return Throughput(operations_of(config, sizes, objective, mesh.world_size, image_tokens), peak)


def operations_of(
    config: StageConfig, sizes: Mapping[str, DiTConfig], objective: Objective, world_size: int, image_tokens: int
) -> Callable[[int], float]:
    """Model operations of one of `world_size` ranks as a function of the iteration.

    Buckets of other sizes than `video` count as that size, and encoders, VAE and rebuilt caches do not count.
    """
    inner: Any = objective
    known: dict[tuple[Any, ...], float] = {}

    def operations(step: int) -> float:
        options: dict[str, Any] = {}
        if config.distils:
            options = {"update_generator": "generator" in inner.turns(step), "exit_step": inner.exit_step(step)}
            options["together"] = inner.generator.batched_exit_backward
        if config.stage == "long":
            options["chunk"] = inner.schedule.at(step).chunk
        key = tuple(options.values())
        if key not in known:
            found = passes(config, sizes, config.batch_size, image_tokens, **options)
            known[key] = sum(work.total for work in model_work(found, sizes, loras(config)).values()) / world_size
        return known[key]

    return operations


class Trace:
    """Records some iterations with the PyTorch profiler into `folder`/profile, one Chrome trace a rank.

    `at(step)` goes before each iteration; `close` writes what there is when a run ends inside the recording. PhaseTimer
    (`metrics_log.PhaseTimer`) appear by their names.
    """

    def __init__(self, settings: ProfileConfig, folder: Path, mesh: Mesh) -> None:
        self._settings, self._mesh = settings, mesh
        self._folder = folder / "profile"
        self._wanted = settings.num_steps > 0 and (mesh.is_main or settings.every_rank)
        self._first: int | None = None
        self._profiler: Any = None
        self._begin = 0

    def at(self, step: int) -> None:
        """Starts or ends the recording where iteration `step` is the one to do so."""
        if not self._wanted:
            return
        self._first = step if self._first is None else self._first
        past = step - self._first - self._settings.start_step
        if past == 0:
            self._start(step)
        elif past == self._settings.num_steps:
            self.close()

    def _start(self, step: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._begin = step
        self._profiler = profile(
            activities=activities, record_shapes=self._settings.shapes, profile_memory=self._settings.memory
        )
        self._profiler.start()

    def close(self) -> None:
        """Ends the recording, if there is one, and writes it."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"step_{self._begin:06d}_rank_{self._mesh.rank}.json.gz"
        profiler.export_chrome_trace(str(file))
        logger.info("Wrote the profiler's trace to %s (open it in https://ui.perfetto.dev)", file)
