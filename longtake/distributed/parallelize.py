"""Shards a finished model over the ranks, from outside, in one function."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from longtake.distributed.mesh import Mesh
from longtake.models.dit import VideoDiT


def parallelize(model: nn.Module, mesh: Mesh, *, param_dtype: torch.dtype | None = None) -> nn.Module:
    """`model`, its parameters sharded over all ranks: one FSDP2 unit per transformer block, then the rest as the root.

    Call it last, after weights, LoRA, checkpointing and compile. The same weights must be on every rank before. With
    one rank nothing changes. `model.blocks` are the units; a model without blocks is one unit. With `mesh.sequence`, a
    transformer's calls are shared by the ranks of each sequence group.

    Args: `param_dtype` computes in that type while the shards, their gradients' sum and the optimizer stay float32;
    None computes in the parameters' own type. Inputs are never cast: noise levels stay float32 inside the model.
    """
    if mesh.fsdp_mesh is None:
        return model
    if mesh.sequence is not None and isinstance(model, VideoDiT):
        model.set_token_split(mesh.sequence)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # The root reshards after forward too: otherwise a no-grad pass leaves whole parameters behind, and a later change
    # of the shards (EMA swapped in, checkpoint loaded) would not reach the next forward.
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh.fsdp_mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh.fsdp_mesh, mp_policy=policy, reshard_after_forward=True)
    return model
