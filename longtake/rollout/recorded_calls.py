"""Whole calls of a network as CUDA graphs, their backward too: for networks that a GPU computes faster than Python
starts their kernels.

A call of the toy with its backward starts more than a thousand kernels of some microseconds each. Once calls of one
form (shapes, mask, gradient) came a few times, forward and backward are recorded, and from then on each is replayed by
one call. They are the same kernels in the same order, so the same numbers; what is in no network (noise, losses, the
optimizer) is Python's as ever, so an objective and its loop know nothing of this. What a replay reads must be where it
was: inputs are copied to places of their own, and the addresses of weights are compared each time. Passes against a
cache without gradient are recorded by whom they belong to (`cuda_graphs.py`).

What a forward keeps for its backward lies where the next forward of the same form would write it. So while one waits
for its backward, others of that form run as ever. This file must know no objective and no optimizer.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longtake.condition import Condition, MaskLayout
from longtake.models.cache import INDICES, CacheView
from longtake.models.dit import Context, VideoDiT
from longtake.rollout.cuda_graphs import Capture, CUDAGraphCapture, Inputs, Made, autocast_type, own_casts

logger = logging.getLogger(__name__)

EAGER_CALLS = 3  # of a form, before it is recorded: what comes rarely is not worth it
MOST_FORMS = 16  # of one network, each of which keeps its memory: in a run of more sizes the others run as ever


class RecordedCalls:
    """Makes calls of networks (`Execution.calls`), recorded ones by replaying them.

    Args: `new_capture` makes what records; forward and backward of a form have one of their own, forms without gradient
    share one.
    """

    def __init__(self, new_capture: Callable[[], Capture] = CUDAGraphCapture) -> None:
        self._new_capture, self._forwards = new_capture, new_capture()
        self._broken = False
        self._networks: weakref.WeakKeyDictionary[VideoDiT, _Network] = weakref.WeakKeyDictionary()

    def __call__(self, model: VideoDiT, x: Tensor, sigma: Tensor, condition: Condition, context: Context) -> Tensor:
        """As `VideoDiT.forward`."""
        given = _inputs(model, x, sigma, condition, context)
        if self._broken or given is None:
            return model.computed(x, sigma, condition, context)
        network = self._network(model)
        learns = torch.is_grad_enabled() and network.learns
        form = (
            learns,
            _seen(context),
            autocast_type(x.device),
            *(t if t is None else (t.shape, t.dtype) for t in given),
        )
        if form not in network.uses:
            network.forget_what_is_gone()
        network.uses[form] += model.execution.settled  # while its forwards are measured it is called as ever
        if form not in network.records and network.comes_again(form):
            self._record(model, network, form, given, context)
        record = network.records.get(form)
        if record is None or record.waits:
            return model.computed(x, sigma, condition, context)
        return record.replayed(given, context)

    def recorded(self, model: VideoDiT) -> int:
        """How many forms of a network's calls are recorded."""
        return len(self._networks[model].records) if model in self._networks else 0

    def forms(self, blocks: nn.ModuleList) -> int:
        """How many kinds of calls with gradient of networks of these blocks have come, as far as they may be recorded:
        each would hold memory of its own.
        """
        found = 0
        for model, network in list(self._networks.items()):
            if model.blocks is blocks and not self._broken:
                network.forget_what_is_gone()
                found += min(MOST_FORMS, sum(form[0] for form in network.uses))
        return found

    def _network(self, model: VideoDiT) -> _Network:
        """What is known of a network, anew where its weights lie elsewhere or something else is computed again."""
        network = self._networks.get(model)
        weights = list(model.parameters()) if network is None else network.weights
        again = (model.execution.again(layer) for layer in range(len(model.blocks)))
        reads = (*again, *(weight.data_ptr() for weight in weights))
        if network is None or network.reads != reads:
            network = self._networks[model] = _Network(weights, reads)
        return network

    def _record(self, model: VideoDiT, network: _Network, form: tuple, given: Inputs, context: Context) -> None:
        """Records calls of one form; where that fails, nothing is recorded any more."""
        with torch.inference_mode(False), torch.no_grad():
            held = [None if t is None else t.detach().clone() for t in given]
        if network.twin is None:
            network.twin = _twin(model, network.weights)
        work = _work(network.twin, held, context)
        try:
            if form[0]:  # learns
                made = _with_gradient(self._new_capture(), work, held, network)
            else:
                made = _without(self._forwards, work, held)
        except RuntimeError as error:
            self._broken = True
            self._networks.clear()
            logger.warning("calls are not recorded as CUDA graphs, and run as ever: %s", str(error).splitlines()[0])
            logger.debug("where that was:", exc_info=error)
            return
        network.records[form] = made


@dataclass(eq=False)
class _Network:
    """What is known of one network's calls: how often each form came (`uses`), and those that are recorded (`records`).

    Fields: its `weights`; `reads`, what recorded calls depend on besides their inputs; `twin`, what is recorded.
    """

    weights: Sequence[nn.Parameter]
    reads: tuple
    uses: Counter[tuple] = field(default_factory=Counter)
    records: dict[tuple, _Record] = field(default_factory=dict)
    twin: VideoDiT | None = None

    @cached_property
    def learns(self) -> bool:
        """Whether calls with gradient have one."""
        return any(weight.requires_grad for weight in self.weights)

    def comes_again(self, form: tuple) -> bool:
        """Whether a form that is not recorded should be."""
        return self.uses[form] > EAGER_CALLS and len(self.records) < MOST_FORMS

    def forget_what_is_gone(self) -> None:
        """Drops the forms of caches and masks that nobody has any more, and what was recorded of them."""
        for form in [form for form in self.uses if form[1][0] is not None and form[1][0]() is None]:
            del self.uses[form]
            self.records.pop(form, None)


def _twin(model: VideoDiT, weights: Sequence[nn.Parameter]) -> VideoDiT:
    """The same network, of the same weights, which are leaves of their own: a loss that is under way ties those of
    `model` to the stream on which it was begun, and a backward that is recorded must not leave its own.
    """
    leaves = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in weights}
    shared = {id(one): one for one in (model.execution, *model.buffers())}
    return copy.deepcopy(model, leaves | shared)


@dataclass(eq=False)
class _Record:
    """Calls of one form: tensors that are read, and `velocity`, which `forward` makes; `backward`, of what lies in
    `gradient`, those of some `parameters`, `gradients`.
    """

    held: Inputs
    velocity: Tensor
    forward: Callable[[], None]
    gradient: Tensor | None = None
    backward: Callable[[], None] | None = None
    parameters: Sequence[nn.Parameter] = ()
    gradients: Sequence[Tensor] = ()
    _waiting: Callable[[], _Waits | None] = lambda: None

    @property
    def waits(self) -> bool:
        """Whether the latest forward may still have its backward."""
        return self._waiting() is not None

    def replayed(self, given: Inputs, context: Context) -> Tensor:
        """The velocity of these inputs, and of a `context` of this form."""
        with torch.no_grad():  # the same are missing
            torch._foreach_copy_([t for t in self.held if t is not None], [t for t in given if t is not None])
        if self.backward is None:
            self.forward()
            return self.velocity.clone()
        waits = _Waits(context)
        self._waiting = weakref.ref(waits)
        return _Replayed.apply(torch.zeros((), device=self.velocity.device, requires_grad=True), self, waits)


@dataclass(eq=False)
class _Waits:
    """A forward whose backward may come: as long as anybody holds this, which keeps what that would read again."""

    context: Context


class _Replayed(torch.autograd.Function):
    """Forward and backward of a record. A leaf stands for its parameters, so that there is a backward."""

    @staticmethod
    def forward(ctx: Any, _leaf: Tensor, record: _Record, waits: _Waits) -> Tensor:
        ctx.record, ctx.waits = record, waits
        record.forward()
        return record.velocity.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        record: _Record = ctx.record
        assert ctx.waits is not None, "a recorded call was differentiated twice"
        assert record.gradient is not None and record.backward is not None
        record.gradient.copy_(gradient)
        record.backward()
        accumulate(record.parameters, record.gradients)
        ctx.waits = None
        return None, None, None


@torch.no_grad()
def accumulate(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Adds to the gradients of parameters what others will write over: as autograd does it, in a few kernels instead of
    one a parameter.
    """
    old = [(p.grad, new) for p, new in zip(parameters, gradients, strict=True) if p.grad is not None]
    fresh = [(p, new) for p, new in zip(parameters, gradients, strict=True) if p.grad is None]
    if old:
        torch._foreach_add_([mine for mine, _ in old], [new for _, new in old])
    if fresh:
        for (parameter, _), own in zip(fresh, torch._foreach_mul([new for _, new in fresh], 1.0)):
            parameter.grad = own


def _inputs(model: VideoDiT, x: Tensor, sigma: Tensor, condition: Condition, context: Context) -> Inputs | None:
    """All tensors that a call reads but weights and caches; None for calls that are not recorded: those of which the
    inputs want gradients, and those against a cache that somebody else records, or that see it through a mask.
    """
    views = isinstance(context, CacheView) and context.with_grad and context.layers is None
    if not (context is None or isinstance(context, MaskLayout) or views):
        return None
    length = model.config.text_len
    text, later = (
        t if t is None or t.shape[1] == length else F.pad(t, (0, 0, 0, length - t.shape[1]))
        for t in (condition.text, condition.later_text)
    )
    given = [x, sigma, text, condition.image, condition.frames, later]
    if any(t is not None and t.requires_grad for t in given):
        return None
    return given + [getattr(context, name) for name in INDICES] if views else given


def _seen(context: Context) -> tuple:
    """What tells calls apart that see something else, first a reference to that. It keeps none of it: there is a cache
    for each roll-out or video that no other may lend its own.
    """
    if isinstance(context, CacheView):
        return weakref.ref(context.cache), context.blocks
    return (None if context is None else weakref.ref(context),)


def _work(model: VideoDiT, held: Inputs, context: Context) -> Callable[[], Tensor]:
    """The call of tensors that are `held`."""
    x, sigma, text, image, frames, later, *indices = held
    assert x is not None and sigma is not None and text is not None
    if isinstance(context, CacheView):
        read: dict[str, Any] = dict(zip(INDICES, indices))
        context = replace(context, **read)
    condition = Condition(text, image, frames, later)
    return lambda: model.computed(x, sigma, condition, context)


def _without(capture: Capture, work: Callable[[], Tensor], held: Inputs) -> _Record:
    x = held[0]
    assert x is not None
    device = x.device

    def forward() -> Made:
        with torch.no_grad(), own_casts(device):
            return (work(),)

    ((replay, (velocity,)),) = capture(forward)
    return _Record(held, velocity, replay)


def _with_gradient(capture: Capture, work: Callable[[], Tensor], held: Inputs, network: _Network) -> _Record:
    made: list[Tensor] = []
    reached: list[nn.Parameter] = []
    assert held[0] is not None and network.twin is not None
    gradient = torch.zeros_like(held[0], dtype=torch.float32)  # a velocity is as large as what it is of
    pairs = [(leaf, own) for leaf, own in zip(network.twin.parameters(), network.weights) if leaf.requires_grad]

    def forward() -> Made:
        with torch.enable_grad(), own_casts(gradient.device):
            made[:] = [work()]
        return (made[0].detach(),)

    def backward() -> Made:
        with torch.autocast(gradient.device.type, enabled=False):  # the forward alone runs under it
            found = torch.autograd.grad(made.pop(), [leaf for leaf, _ in pairs], gradient, allow_unused=True)
        reached[:] = [own for (_, own), one in zip(pairs, found) if one is not None]
        return tuple(one for one in found if one is not None)

    (ahead, (velocity,)), (back, gradients) = capture(forward, backward)
    return _Record(held, velocity, ahead, gradient, back, list(reached), gradients)
