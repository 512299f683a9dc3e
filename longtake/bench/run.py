"""`longtake bench` of a stream from its source to its numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longtake.bench.random_models import random_generator, random_settings
from longtake.bench.report import machine
from longtake.bench.streaming import bench_stream, kernel_report, kernels_of, plan_of
from longtake.devices import usable_device
from longtake.inference.generator import Generator
from longtake.inference.source import Source

BLOCKS = 12  # that count, unless another number is asked for


def bench_source(
    source: Source, device: str | torch.device | None, *, blocks: int = BLOCKS, warm_up: bool = False
) -> Iterator[dict[str, Any]]:
    """The numbers of a stream of weights that are there, in parts as they are known. Raises: LongtakeError."""
    started = time.perf_counter()
    generator = Generator.build(source, usable_device(device))
    return _parts(generator, str(source.weights), time.perf_counter() - started, blocks=blocks, warm_up=warm_up)


def bench_random(
    preset: str,
    changes: Mapping[str, Any],
    device: str | torch.device | None,
    *,
    blocks: int = BLOCKS,
    warm_up: bool = False,
    small_text: bool = False,
) -> Iterator[dict[str, Any]]:
    """As `bench_source`, of random weights of a preset, in bfloat16 on a GPU unless `changes` say otherwise.

    Args: `small_text`, as `random_generator`.
    """
    started, place = time.perf_counter(), usable_device(device)
    given = {**({"precision": "bf16"} if place.type == "cuda" else {}), **changes}
    generator = random_generator(preset, random_settings(preset, given), place, small_text=small_text)
    what = "random, " + ("a text encoder of one layer" if small_text else "all encoders whole")
    return _parts(generator, f"{preset}: {what}", time.perf_counter() - started, blocks=blocks, warm_up=warm_up)


def _parts(
    generator: Generator, weights: str, load_seconds: float, *, blocks: int, warm_up: bool
) -> Iterator[dict[str, Any]]:
    yield machine(generator.device) | {"weights": weights, "plan": plan_of(generator)}
    found = bench_stream(generator, load_seconds, blocks=blocks, warm_up=warm_up)
    yield {"kernels": kernels_of(generator)} | found
    yield kernel_report(generator)
