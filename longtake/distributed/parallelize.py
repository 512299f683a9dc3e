"""Makes a finished model fit the machine, from outside, in one function: recomputation, compiling, sharding.

The order is the one in which they nest: a block is compiled, then sharded, and what is recomputed is the whole of it.
"""

from __future__ import annotations

import logging
import shutil
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from longtake.distributed.mesh import Mesh
from longtake.errors import ConfigError
from longtake.models.dit import VideoDiT
from longtake.models.recompute import keep_attention
from longtake.models.roles import Role

logger = logging.getLogger(__name__)

# Variants of a block that one process may need: with and without cache, mask, gradient, commit, updates, first block
_VARIANTS = 64


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    param_dtype: torch.dtype | None = None,
    recompute: bool | str | None = None,
    compiled: bool = False,
    cpu_offload: bool = False,
) -> nn.Module:
    """`model`, its parameters sharded over all ranks: one FSDP2 unit per transformer block, then the rest as the root.

    Call it last, after LoRA; the same weights must be on every rank before, or none yet (meta device; `materialize`
    fills them in). With one rank nothing is sharded. `model.blocks` are the units; a model without blocks is one unit.
    With `mesh.sequence`, a transformer's calls are shared by the ranks of each sequence group.

    Args: `param_dtype` computes in that type while the shards, their gradients' sum and the optimizer stay float32;
    None computes in the parameters' own type. Inputs are never cast: noise levels stay float32 inside the model.
    `recompute` blocks in backward: all of it (True), all but attention ("selective"), nothing (False); None leaves the
    model as it is. `compiled` blocks, where there is a compiler. `cpu_offload` keeps the shards on the CPU.
    Raises: ConfigError for `cpu_offload` on one rank.
    """
    if cpu_offload and mesh.fsdp_mesh is None:
        raise ConfigError("parallel.cpu_offload=true needs several ranks, this is one; set it to false or start more")
    if recompute is not None:
        model.activation_checkpointing = bool(recompute)  # type: ignore[assignment]
        if recompute == "selective":
            model.checkpoint_contexts.append(keep_attention)  # type: ignore[union-attr,operator]
    if compiled and _has_compiler(mesh.device.type):
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
        for block in getattr(model, "blocks", []):
            block.compile()
    if mesh.fsdp_mesh is None:
        return model
    if cpu_offload:
        model.compute_device = mesh.device  # type: ignore[assignment]
    if mesh.sequence is not None and isinstance(model, VideoDiT):
        model.set_token_split(mesh.sequence)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if cpu_offload else OffloadPolicy()
    # The root reshards after forward too: otherwise a no-grad pass leaves whole parameters behind, and a later change
    # of the shards (EMA swapped in, checkpoint loaded) would not reach the next forward.
    options: dict[str, Any] = {"mesh": mesh.fsdp_mesh, "mp_policy": policy, "offload_policy": offload}
    for block in getattr(model, "blocks", []):
        if len({p.dtype for p in block.parameters() if p.requires_grad}) > 1:
            # What is trained in one unit has one type: the large parts together, and what stays float32 around them.
            fully_shard([block.self_attn, block.cross_attn, block.ffn], reshard_after_forward=True, **options)
        fully_shard(block, reshard_after_forward=True, **options)
    fully_shard(model, reshard_after_forward=True, **options)
    return model


def sum_gradients(network: nn.Module, now: bool) -> None:
    """Whether the next backwards of a sharded network sum gradients over the ranks, or keep whole ones on each rank."""
    model = network.base.model if isinstance(network, Role) else network
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


@cache
def _has_compiler(kind: str) -> bool:
    """Whether torch.compile can make code for a device; says once that it cannot."""
    if kind == "cuda":
        missing = None if find_spec("triton") is not None else "the package triton"
    else:
        missing = None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "a C++ compiler"
    if missing is not None:
        logger.warning("parallel.compile=true needs %s, which is not there: blocks run uncompiled", missing)
    return missing is None
