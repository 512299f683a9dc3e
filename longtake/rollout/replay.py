"""The gradient of a roll-out that ran without one: its exit steps once more, all blocks together, in one of two ways.

`exits_with_grad` runs no forward: what each layer made was kept, and backward recomputes a layer for all blocks at
once, against the cache as it was (`PinnedSlots`). The context is detached.

`packed_replay` runs one forward more, over [context | noisy]: what each block was stored as (mostly its clean latents)
and what its exit step began from. Under the teacher-forcing mask each noisy block sees itself and the clean
blocks that its cache would have held; and here the keys and values of that context carry gradient too: the student
learns to write a better context. Source: Self-Gradient Forcing (arXiv 2607.20368), specification R. What a roll-out
must leave for it is a `Replay`.

This file must know no objective and no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longtake.condition import Condition, MaskLayout
from longtake.flow.path import clean_from_velocity
from longtake.models.cache import CacheView, KVCache, PinnedSlots
from longtake.models.context import MaskOverCache
from longtake.models.dit import VideoDiT
from longtake.plan import StreamPlan


def packed_replay(
    model: VideoDiT,
    condition: Condition,
    context: Tensor,
    context_sigma: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    seen: MaskLayout | MaskOverCache,
) -> Tensor:
    """Clean latents [B, F, C, H, W] of the exit steps, with gradient through them and through their context.

    Args: `context` [B, F_c, C, H, W], what the roll-out stored of each block (a given picture first), at noise levels
    `context_sigma` [B, F_c] (`StreamPlan.context_levels`: 0, or those of the last denoising step, whose input it then
    is); `noisy` [B, F, C, H, W], what each block's exit step began from, at `sigma` [B, F]; `seen`, a layout of these
    entries for the roll-out's window, sink and positions (`StreamPlan.replay_layout`, `teacher_forcing_layout`). No
    gradient goes into the latents.
    """
    frames = context.shape[1]
    both = torch.cat([context, noisy], 1).detach()
    levels = torch.cat([context_sigma, sigma], 1)
    velocity = model(both, levels, condition, seen)[:, frames:]
    return clean_from_velocity(noisy.detach(), velocity, sigma)


class Replay:
    """What a roll-out without gradient leaves, to be made again with gradient into its context (`packed_replay`).

    The law: one forward holds what was stored since this began, as it was stored, and the exit steps that are learnt
    from. A block sees in it what it saw of the cache: of what was stored since, made again, so with gradient; of what
    lay in the cache before, which other weights or another prompt made, the stored keys and values, without gradient.
    A roll-out begins with an empty cache, and so all of its context has gradient. Part of a long video
    (`long_video.py`) begins before the latest block of the part before is stored, and anew where the prompt changes.
    Each block of the context is made by the rules of the roll-out: at its own level, its own position and distance, and
    never sees an exit step; no exit step sees its own block as it was stored.
    """

    def __init__(self, plan: StreamPlan, cache: KVCache) -> None:
        self.plan, self.cache = plan, cache
        self.begin()

    def begin(self) -> None:
        """Whatever the cache holds now is past, without gradient."""
        self.first = self.cache.position
        self._context: list[tuple[Tensor, float]] = []
        self._exits: list[tuple[Tensor, float]] = []
        self._exits_from = self.end = self.first

    @property
    def num_exits(self) -> int:
        """Blocks that are made again with gradient."""
        return len(self._exits)

    def stored(self, latents: Tensor, sigma: float) -> None:
        """The next block was stored as `latents` [B, f, C, H, W] at level `sigma`."""
        self._context.append((latents, sigma))

    def left(self, start: int, noisy: Tensor, sigma: float) -> None:
        """The exit step of the block at frame `start` began from `noisy` [B, f, C, H, W] at level `sigma`."""
        if not self._exits:
            self._exits_from = start
        self._exits.append((noisy, sigma))
        self.end = start + noisy.shape[1]

    def with_grad(self, model: VideoDiT, condition: Condition) -> Tensor:
        """Clean latents [B, sum of f, C, H, W] of the exit steps. Raises: CacheError when the cache has lost a past
        frame.
        """
        past, offset = self.plan.past(self.first), _offset(self.plan, self.first)
        layout = _layout(self.plan, *(frame - offset for frame in (self.first, self._exits_from, self.end)))
        seen = MaskOverCache(layout, self.cache, self.cache.slots_of(past), offset)
        none = self._exits[0][0][:, :0], 0.0  # of a context of no frames
        made = packed_replay(model, condition, *_joined([none, *self._context]), *_joined(self._exits), seen)
        return hold_until_backward(made, [self.cache.pin_frames(past)]) if model.execution.recompute else made


def _joined(blocks: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Latents [B, F, C, H, W] of blocks, and their levels [B, F]."""
    levels = [torch.full(latents.shape[:2], sigma, device=latents.device) for latents, sigma in blocks]
    return torch.cat([latents for latents, _ in blocks], 1), torch.cat(levels, 1)


def _offset(plan: StreamPlan, first: int) -> int:
    """How much later `first` is than the first boundary from which all looks alike by relative positions."""
    if plan.window_frames is None or plan.rope == "absolute":
        return 0
    late = max(plan.window_frames, plan.first_frames)  # the window is full, and its frames are none of the sink's
    late += -(late - plan.first_frames) % plan.block_frames
    return max(0, first - late)


@lru_cache(maxsize=32)  # a transformer keeps what it makes of a layout as long as there is this one object
def _layout(plan: StreamPlan, first: int, exits_from: int, end: int) -> MaskLayout:
    return plan.replay_layout(first, exits_from, end)


@dataclass(frozen=True)
class ExitStep:
    """The last step that a block took without gradient: its noisy latents `x` [B, f, C, H, W] at noise level `sigma`,
    what it saw of the cache, pinned there, and what each layer made of it [B, f, l, D], until that has been used; not
    kept where the network's calls are recorded.
    """

    x: Tensor
    sigma: float
    view: CacheView
    pins: PinnedSlots
    layers: list[Tensor] = field(default_factory=list)


def exits_with_grad(model: VideoDiT, condition: Condition, exits: Sequence[ExitStep]) -> Tensor:
    """The exit steps of several blocks, with gradient: their clean latents [B, sum of f, C, H, W].

    No block's exit step depends on the gradient of another, since the context is detached. So backward recomputes and
    differentiates each layer once for all blocks, not once a block, which keeps a GPU busy. Where layers were not kept
    the call is made again, with its graph.
    """
    x = torch.cat([step.x for step in exits], 1)
    sigma = torch.cat([torch.full(step.x.shape[:2], step.sigma, device=x.device) for step in exits], 1)

    def layers(block: nn.Module, run: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> Tensor:
        made = torch.cat([step.layers.pop(0) for step in exits], 1)  # and so freed one by one
        return recompute_on_backward(made, run, inputs, list(block.parameters()))

    with torch.enable_grad():
        kept = layers if exits[0].layers else None
        velocity = model(x, sigma, condition, CacheView.joined([step.view for step in exits], kept))
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
