"""Makes a finished model fit the machine, from outside, in one function: recomputation, compiling, sharding.

The order is the one in which they nest: a block is compiled, then sharded, and what is recomputed is the whole of it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from longtake.models.attention import VARIANTS, limited
from longtake.models.dit import VideoDiT
from longtake.models.recompute import Again, ByBlock
from longtake.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

_BUCKET_BYTES = 2**28

M = TypeVar("M", bound=nn.Module)


def parallelize(
    model: M,
    mesh: Mesh,
    *,
    param_dtype: torch.dtype | None = None,
    recompute: Again | ByBlock | None = None,
    recompute_from: torch.dtype | None = None,
    compiled: bool = False,
) -> M:
    """`model`, its parameters sharded over all ranks: one FSDP2 unit per transformer block, then the rest as the root.

    Call it last, after LoRA, and use what it returns: of a transformer, another object of the same modules. The same
    weights must be on every rank before, or none yet (meta device; `materialize` fills them in). `model.blocks` are the
    units; a model without blocks is one unit. Nothing is sharded on one rank, or where each rank keeps whole weights
    (`mesh.whole_weights`): see `average_gradients`. With `mesh.sequence`, a transformer's calls are shared by the ranks
    of each sequence group.

    Args: `param_dtype` gathers attention and MLP of the blocks (a model without blocks whole) in that type, for use
    under autocast to it, while the shards, the sum of their gradients and the optimizer stay float32; None gathers the
    parameters' own type. Inputs are never cast: noise levels stay float32 inside the model.
    `recompute` blocks in backward, as `Execution` takes it; None leaves the model as it is; from their tokens in the
    type `recompute_from` (None: their own). `compiled` blocks, where there is a compiler.
    """
    if isinstance(model, VideoDiT):  # before anything knows the module by its identity
        again = model.execution.recompute if recompute is None else recompute
        execution = replace(model.execution, split=mesh.sequence, recompute=again, recompute_from=recompute_from)
        model = cast(M, model.executed(execution))
    if compiled and _has_compiler(mesh.device.type):
        blocks = list(getattr(model, "blocks", []))
        for block in blocks:
            block.compile()
            block._compiled_call_impl = limited(block._compiled_call_impl, VARIANTS * len(blocks), "blocks")
    if mesh.fsdp_mesh is None:
        return model
    # The root reshards after forward too: otherwise a no-grad pass leaves whole parameters behind, and a later change
    # of the shards (EMA swapped in, checkpoint loaded) would not reach the next forward.
    options: dict[str, Any] = {"mesh": mesh.fsdp_mesh, "reshard_after_forward": True}
    as_they_are, gathered_as = _policy(None), _policy(param_dtype)
    blocks = getattr(model, "blocks", [])
    for block in blocks:
        if param_dtype is not None or len({p.dtype for p in block.parameters() if p.requires_grad}) > 1:
            # The large parts together, and what stays float32 around them: one unit is gathered in one type.
            fully_shard([block.self_attn, block.cross_attn, block.ffn], mp_policy=gathered_as, **options)
        fully_shard(block, mp_policy=as_they_are, **options)
    fully_shard(model, mp_policy=as_they_are if len(blocks) else gathered_as, **options)
    return model


def _policy(param_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, each unit of a sharded model is gathered by its first forward and stays so: for several calls between
    which no weight changes.
    """
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(False)
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def average_gradients(network: nn.Module, mesh: Mesh) -> None:
    """After the last backward of an update: the mean over all ranks of gradients that each rank has whole.

    Sharded networks have it already. All ranks call it; the same parameters have gradients on each.
    """
    if not mesh.whole_weights:
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket]) if len(bucket) > 1 else bucket[0].flatten()
        dist.all_reduce(flat)
        flat /= mesh.world_size
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket)])


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, together at most `_BUCKET_BYTES` or a single larger one."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.nbytes for t in (*bucket, tensor)) > _BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


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
