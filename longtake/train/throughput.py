"""What a run does with its machine: samples a second, model FLOP utilisation, memory; and a profiler's trace.

Model operations are those that the mathematics of the stage needs (`Objective.passes`): each forward and backward once,
nothing that activation checkpointing computes again. Their utilisation is given where the device's peak is known
(`longtake/devices.py`), and never on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from longtake.condition import VideoShape
from longtake.config.groups import LoraConfig, ProfileConfig
from longtake.devices import find_device
from longtake.models.flops import Call, backward, forward
from longtake.models.sizes import DiTConfig
from longtake.objectives.base import Objective, Pass
from longtake.parallel.mesh import Mesh

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
        """The row's numbers, by the slowest rank's clock and the fullest rank's memory, and starts anew; all ranks call
        it.
        """
        mine = (self._seconds, *_peaks(mesh.device))
        seconds, *peaks = map(max, zip(*mesh.every(lambda: mine)))
        row = {"speed/samples_per_second": self._samples / seconds} if seconds else {}
        if self._operations is not None and seconds:
            row["speed/model_tflops"] = self._done / seconds / 1e12
            if self._peak is not None:
                row["speed/mfu"] = self._done / seconds / self._peak
        self._samples = self._seconds = self._done = 0.0
        return row | {name: peak / GIB for name, peak in zip(("memory_reserved_gib", "memory_gib"), peaks)}


def _peaks(device: torch.device) -> list[int]:
    """Most bytes that the allocator held and that tensors took since the last call; nothing on a CPU."""
    if device.type != "cuda":
        return []
    peaks = [torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)]
    torch.cuda.reset_peak_memory_stats(device)
    return peaks


def stage_throughput(precision: str, operations: Callable[[int], float] | None, mesh: Mesh) -> Throughput:
    """The throughput of a stage. Args: `operations`, see `operations_of`."""
    peak = None
    if mesh.device.type == "cuda":
        name = torch.cuda.get_device_name(mesh.device)
        if (device := find_device(name)) is not None:
            peak = device.peak(precision)
        elif mesh.is_main:
            logger.info("speed/mfu is not logged: the peak rate of %s is not known (longtake/devices.py)", name)
    return Throughput(operations, peak)


def clip_call(shape: VideoShape, network: DiTConfig, batch: int, image_tokens: int) -> Call:
    """A training clip in one bidirectional call of `network`; `image_tokens` where it has that branch."""
    patch = network.patch_size
    tokens = (shape.latent_height // patch[1]) * (shape.latent_width // patch[2])
    seen = image_tokens if network.image_dim is not None else 0
    return Call.bidirectional(batch, shape.num_latent_frames, tokens, network.text_len, seen)


def operations_of(
    objective: Objective,
    sizes: Mapping[str, DiTConfig],
    loras: Mapping[str, LoraConfig | None],
    clips: Mapping[str, Call],
    world_size: int,
) -> Callable[[int], float] | None:
    """Model operations of one of `world_size` ranks as a function of the iteration, None where the objective does not
    say which calls it makes. Each forward and each backward counts once.

    Buckets of other sizes than `video` count as that size, and encoders, VAE and rebuilt caches do not count.
    """
    if not objective.passes(0, clips):
        return None

    @lru_cache(maxsize=4096)
    def cost(each: Pass) -> float:
        size, lora = sizes[each.network], loras[each.network]
        # Without gradient updates are merged into their weights
        ahead = forward(size, each.call, lora if each.with_grad else None).total if each.ahead else 0.0
        return each.times * (ahead + (backward(size, each.call, lora).total if each.with_grad else 0.0))

    return lambda step: sum(map(cost, objective.passes(step, clips))) / world_size


@contextmanager
def recorded(config: ProfileConfig, folder: Path, mesh: Mesh, first_step: int) -> Iterator[Callable[[], None]]:
    """Records some iterations with the PyTorch profiler into `folder`/profile, one Chrome trace a rank.

    Inside, the function that it gives is called after each iteration. A run that ends inside the recording leaves what
    there is. Phases (`metrics.PhaseTimer`) appear by their names. Args: `first_step`, of this process.
    """
    if config.num_steps == 0 or not (mesh.is_main or config.every_rank):
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    file = folder / "profile" / f"step_{first_step + config.start_step:06d}_rank_{mesh.rank}.json.gz"

    def write(profiler: profile) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
        logger.info("Wrote the profiler's trace to %s (open it in https://ui.perfetto.dev)", file)

    warm = min(1, config.start_step)  # the first iteration under the profiler is slower: it is not kept
    cuda = [ProfilerActivity.CUDA] if mesh.device.type == "cuda" else []
    with profile(
        activities=[ProfilerActivity.CPU, *cuda],
        schedule=schedule(wait=config.start_step - warm, warmup=warm, active=config.num_steps, repeat=1),
        on_trace_ready=write,
        record_shapes=config.shapes,
        profile_memory=config.memory,
    ) as profiler:
        yield profiler.step
