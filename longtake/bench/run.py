"""`longtake bench` of a stream from its source to its numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from longtake.bench.random_models import random_generator, random_settings
from longtake.bench.report import machine
from longtake.bench.streaming import bench_stream, kernel_report, kernels_of, plan_of
from longtake.config.groups import ParallelConfig
from longtake.inference.generator import Generator
from longtake.inference.source import Source
from longtake.models.sequence_parallel import SequenceParallel
from longtake.parallel.mesh import Mesh

BLOCKS = 12  # that count, unless another number is asked for


def bench_source(
    source: Source, mesh: Mesh, *, decode_device: str | None = None, blocks: int = BLOCKS, warm_up: bool = False
) -> Iterator[dict[str, Any]]:
    """The numbers of a stream of weights that are there, in parts as they are known; all ranks of `mesh` make it
    together. Args: `decode_device` as in `Generator.build`. Raises: LongtakeError.
    """
    started = time.perf_counter()
    generator = Generator.build(source, mesh.device, split=_together(mesh), decode_device=decode_device)
    return _parts(generator, str(source.weights), time.perf_counter() - started, mesh, blocks=blocks, warm_up=warm_up)


def bench_random(
    preset: str,
    changes: Mapping[str, Any],
    mesh: Mesh,
    *,
    decode_device: str | None = None,
    blocks: int = BLOCKS,
    warm_up: bool = False,
    small_text: bool = False,
) -> Iterator[dict[str, Any]]:
    """As `bench_source`, of random weights of a preset, in bfloat16 on a GPU unless `changes` say otherwise.

    Args: `small_text`, as `random_generator`.
    """
    started, place = time.perf_counter(), mesh.device
    given = {**({"precision": "bf16"} if place.type == "cuda" else {}), **changes}
    where: dict[str, Any] = {"split": _together(mesh), "decode_device": decode_device}
    generator = random_generator(preset, random_settings(preset, given), place, small_text=small_text, **where)
    what = "random, " + ("a text encoder of one layer" if small_text else "all encoders whole")
    loaded = time.perf_counter() - started
    return _parts(generator, f"{preset}: {what}", loaded, mesh, blocks=blocks, warm_up=warm_up)


def _together(mesh: Mesh) -> SequenceParallel | None:
    """All ranks, as those that compute each pass together."""
    return mesh.arranged(ParallelConfig(sequence=mesh.world_size)).sequence


def _parts(
    generator: Generator, weights: str, load_seconds: float, mesh: Mesh, *, blocks: int, warm_up: bool
) -> Iterator[dict[str, Any]]:
    alone = f"decoding on {generator.decoding_device}"
    shared = "each pass by all ranks, decoding by each" if mesh.is_distributed else alone
    about = {"ranks": mesh.world_size, "shared": shared, "weights": weights, "plan": plan_of(generator)}
    yield machine(generator.device) | about
    found = bench_stream(generator, load_seconds, blocks=blocks, warm_up=warm_up)
    yield {"kernels": kernels_of(generator)} | found | {"rank_peak_gib": mesh.every(lambda: found["peak_gib"])}
    if not mesh.is_distributed:  # else what a rank must compute is less, and waits for others
        yield kernel_report(generator)
