"""The gradient of a roll-out that ran without one: its exit steps once more, all blocks together, in one of two ways.

`exits_with_grad` runs no forward: what each layer made was kept, and backward recomputes a layer for all blocks at
once, against the cache as it was (`PinnedSlots`). The context is detached.

`packed_replay` runs one forward more, over [context | noisy]: what each block was stored as (mostly its clean latents)
and what its exit step began from. Under the teacher-forcing mask each noisy block sees itself and the clean
blocks that its cache would have held; and here the keys and values of that context carry gradient too: the student
learns to write a better context. Source: Self-Gradient Forcing (arXiv 2607.20368), specification R.

This file must know no objective, no block plan and no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longtake.condition import Condition, MaskLayout
from longtake.flow.path import clean_from_velocity
from longtake.models.cache import CacheView, PinnedSlots
from longtake.models.dit import VideoDiT


def packed_replay(
    model: VideoDiT,
    condition: Condition,
    context: Tensor,
    context_sigma: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    layout: MaskLayout,
) -> Tensor:
    """Clean latents [B, F, C, H, W] of the exit steps, with gradient through them and through their context.

    Args: `context` [B, F, C, H, W], what the roll-out stored of each block (a given picture first), at noise levels
    `context_sigma` [B, F] (`StreamPlan.context_levels`: 0, or those of the last denoising step, whose input it then
    is); `noisy` the same, what each block's exit step began from, at `sigma` [B, F]; `layout`, that of
    `teacher_forcing_layout` for the roll-out's window, sink and positions. No gradient goes into the latents.
    """
    frames = context.shape[1]
    both = torch.cat([context, noisy], 1).detach()
    levels = torch.cat([context_sigma, sigma], 1)
    velocity = model(both, levels, condition, layout)[:, frames:]
    return clean_from_velocity(noisy.detach(), velocity, sigma)


@dataclass(frozen=True)
class ExitStep:
    """The last step that a block took without gradient: its noisy latents `x` [B, f, C, H, W] at noise level `sigma`,
    what it saw of the cache, pinned there, and what each layer made of it [B, f, l, D], until that has been used.
    """

    x: Tensor
    sigma: float
    view: CacheView
    pins: PinnedSlots
    layers: list[Tensor] = field(default_factory=list)


def exits_with_grad(model: VideoDiT, condition: Condition, exits: Sequence[ExitStep]) -> Tensor:
    """The exit steps of several blocks, with gradient: their clean latents [B, sum of f, C, H, W].

    No block's exit step depends on the gradient of another, since the context is detached. So backward recomputes and
    differentiates each layer once for all blocks, not once a block, which keeps a GPU busy.
    """
    x = torch.cat([step.x for step in exits], 1)
    sigma = torch.cat([torch.full(step.x.shape[:2], step.sigma, device=x.device) for step in exits], 1)

    def layers(block: nn.Module, run: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> Tensor:
        made = torch.cat([step.layers.pop(0) for step in exits], 1)  # and so freed one by one
        return recompute_on_backward(made, run, inputs, list(block.parameters()))

    with torch.enable_grad():
        velocity = model(x, sigma, condition, CacheView.joined([step.view for step in exits], layers))
        velocity = hold_until_backward(velocity, [step.pins for step in exits])
    return clean_from_velocity(x, velocity, sigma)


def hold_until_backward(output: Tensor, pins: Sequence[PinnedSlots]) -> Tensor:
    """Ties slots that a backward through `output` will read again to its graph."""
    pins = [one for one in pins if one.slots]
    return _HoldUntilBackward.apply(output, *pins) if pins and output.requires_grad else output


class _HoldUntilBackward(torch.autograd.Function):
    """Identity whose graph node owns pins: released after the backward that runs through it, or with the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *pins: PinnedSlots) -> Tensor:
        ctx.pins = pins
        return x.clone()  # no view, for the hooks of sharding

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The node runs first in backward; recomputation happens later in the same pass, so release at its end. A graph
        # that is kept (`retain_graph`) may be recomputed again: it keeps its pins until a backward that frees it.
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            for pins in ctx.pins:
                torch.autograd.Variable._execution_engine.queue_callback(pins.release)
        return grad, *(None for _ in ctx.pins)


def recompute_on_backward(
    made: Tensor, run: Callable[..., Tensor], inputs: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> Tensor:
    """`made`, which `run(*inputs)` gave without a graph, with that graph: backward runs it, and not before.

    Activation checkpointing without its forward. Args: `parameters` that `run` uses besides. It can be
    differentiated once, and nothing of it may be sharded, since only a forward gathers what is.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _RecomputeOnBackward.apply([made], run, _autocast_now(made.device), len(inputs), *inputs, *trained)


class _RecomputeOnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: list[Tensor], run: Callable, autocast: Callable, count: int, *given: Tensor) -> Tensor:
        ctx.run, ctx.autocast, ctx.count = run, autocast, count
        ctx.save_for_backward(*given)
        return made.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given, wanted = ctx.saved_tensors, ctx.needs_input_grad[4:]
        inputs = [None if x is None else x.detach().requires_grad_(on) for x, on in zip(given[: ctx.count], wanted)]
        with torch.enable_grad(), ctx.autocast():
            made = ctx.run(*inputs)
        leaves = [x for x, on in zip([*inputs, *given[ctx.count :]], wanted) if on]
        found = iter(torch.autograd.grad(made, leaves, grad, allow_unused=True))
        return None, None, None, None, *(next(found) if on else None for on in wanted)


def _autocast_now(device: torch.device) -> Callable[[], AbstractContextManager]:
    """Makes the autocast of now, for another thread or time."""
    kind, kept = device.type, torch.is_autocast_cache_enabled()
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype, enabled, kept)
