"""How the networks of a stage are computed on its device: by which kernels, and what backward computes again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch

from longtake.config.objective import NetworkConfig
from longtake.errors import ConfigError
from longtake.models.apart import joins
from longtake.models.attention import attend_fastest, choose_kernels
from longtake.models.dit import VideoDiT
from longtake.models.execution import LARGE_WIDTH, Calls, Execution
from longtake.models.norms import are_faster
from longtake.models.recompute import Again, ByBlock
from longtake.parallel.mesh import Mesh
from longtake.train.keeping import FEWEST_BLOCKS, first_ways

logger = logging.getLogger(__name__)


def check_precision(networks: Mapping[str, NetworkConfig], precision: str, mesh: Mesh) -> None:
    """Raises ConfigError where weights in 8-bit floats are asked for that cannot be."""
    for name, wanted in networks.items():
        if not wanted.fp8:
            continue
        if precision != "bf16":
            raise ConfigError(
                f"objective.{name}_precision=fp8 goes with precision=bf16, and precision={precision}; set that, or "
                "leave it out"
            )
        if mesh.fsdp_mesh is not None:
            raise ConfigError(
                f"objective.{name}_precision=fp8: weights in 8-bit floats are not sharded, and {mesh.world_size} ranks "
                "share theirs; set parallel.data_parallel=ddp, or leave it out"
            )


def quick(
    model: VideoDiT,
    device: torch.device,
    product_type: torch.dtype,
    calls: Calls | None,
    *,
    sharded: bool,
    compiled: bool,
) -> Execution:
    """How a network is computed: on a GPU by the fastest kernels of attention, and where it is large, with fused
    element-wise work, else by `calls`; compiled blocks have the first two of their own. Sharded weights, which move,
    have neither of the latter, but with `parallel.fused_shards` the first of them.
    """
    if device.type != "cuda" or compiled:
        return model.execution
    choose_kernels(device, product_type, model.config.head_width)
    fuses = is_fused(model, sharded=sharded)
    by_rows = fuses and are_faster(device, product_type, model.config.dim)
    parts = joins(device, product_type, model.config.head_width) if fuses else None
    execution = replace(model.execution, attend=attend_fastest, fuses=fuses, by_rows=by_rows, joins=parts)
    if model.config.dim >= LARGE_WIDTH:
        return execution
    if sharded and calls is not None:
        _say_that_sharded_calls_are_not_recorded()
    return replace(execution, calls=None if sharded else calls)


def is_fused(model: VideoDiT, *, sharded: bool) -> bool:
    """Whether a GPU computes the element-wise work of a network by compiled functions."""
    return _as_whole(model, sharded) and model.config.dim >= LARGE_WIDTH


def _as_whole(model: VideoDiT, sharded: bool) -> bool:
    return not sharded or model.execution.fused_shards


@cache
def _say_that_sharded_calls_are_not_recorded() -> None:
    logger.info(
        "calls are not recorded as CUDA graphs where weights are sharded; parallel.data_parallel=ddp has them so"
    )


def recomputed(
    model: VideoDiT, given: Again, keeps_some: Callable[[VideoDiT], bool], *, sharded: bool, compiled: bool
) -> Again | ByBlock:
    """What backward computes again of a network that is trained. Args: `given` as `activation_checkpointing`;
    `keeps_some`, as in `keeping.py`.
    """
    if given != "auto":
        return given
    if compiled or len(model.blocks) < FEWEST_BLOCKS:
        return True
    # Sharded weights are gathered in a forward and not in its recomputation, and torch keeps account of all operators.
    return ByBlock(first_ways(len(model.blocks), selective=_as_whole(model, sharded) and keeps_some(model)))
