"""Several networks as one: frozen weights that are held once, and low-rank updates that are on for one role at a time.

Teacher, critic and student of a distillation differ by their updates alone: the teacher is the base without any. A
role is called as a network of its own would be, has the parameters, names and state of one, and so everything above
(objectives, optimizer, averages, checkpoints, export) treats it as one.

Which updates are on is a value that one call sets and takes back (`AdapterSwitch.on`); a hook of each updated layer
hands it to PEFT, and where they are merged (`low_rank.py`) the layer reads it. A block that is recomputed in backward,
when another role may have been called since, sees the updates of its own forward, through `Execution.updates`.

A student may be two roles, of which one writes the context that the other reads (`WriterApart`). Their calls against a
cache are each one role's. A packed call, [context | noisy], is both's: attention is one, and every updated layer gives
each entry the updates of its role. Must know no file, no rank and no objective.

Source of the two roles: Self-Gradient Forcing, plus form (Zihan-Su/Self_Gradient_Forcing_Plus), specification R.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from longtake.condition import Condition, MaskLayout
from longtake.models.cache import CacheView, KVCache
from longtake.models.context import MaskOverCache
from longtake.models.dit import Context, VideoDiT
from longtake.models.execution import Execution, Run
from longtake.models.lora import DEFAULT, WRITER, is_factor
from longtake.models.low_rank import Merging
from longtake.models.recompute import Contexts


@dataclass(frozen=True)
class Turns:
    """The roles of the entries of one call, one run after the other: (how many entries, whose)."""

    runs: tuple[tuple[int, str], ...]

    @property
    def entries(self) -> int:
        return sum(count for count, _ in self.runs)


Active = str | Turns | None


class AdapterSwitch:
    """Which updates are on: those of one role, of several roles for parts of a call, or none (None)."""

    def __init__(self) -> None:
        self.active: Active = None

    def on(self, active: Active) -> AbstractContextManager:
        """A context in which these updates are on."""
        return _On(self, active)

    def contexts(self) -> Contexts:
        """As `Updates.contexts`: a block is recomputed under the updates that are on now."""
        return nullcontext(), self.on(self.active)

    def runs(self) -> list[Run] | None:
        """As `Updates.runs`."""
        if not isinstance(self.active, Turns):
            return None
        return [(count, role, self.on(role)) for count, role in self.active.runs]


class SharedBase:
    """A frozen network whose low-rank updates, each called by its role, are on for one role at a time.

    Call it after `inject_lora`. Args: `switch`, the `updates` of the `Execution` of `model`, for one that is sharded
    already; by default the network is executed under one of its own.
    """

    def __init__(self, model: VideoDiT, switch: AdapterSwitch | None = None) -> None:
        if switch is None:
            switch = AdapterSwitch()
            model = model.executed(replace(model.execution, updates=switch))
        self.model, self.switch = model, switch
        for module in model.modules():
            if isinstance(module, Merging):
                module.follow(switch)
                module.register_forward_pre_hook(self._select)
                module.register_forward_hook(self._add)

    def _select(self, layer: Any, _: Any) -> None:
        # PEFT's own `set_adapter` also decides what is trained, which must not change between forward and backward.
        layer._active_adapter = [self.switch.active] if isinstance(self.switch.active, str) else []

    def _add(self, layer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Where roles take turns: `out`, without updates until here, with those of each entry's role."""
        turns, (x,) = self.switch.active, inputs
        if not isinstance(turns, Turns) or not any(role in layer.lora_A for _, role in turns.runs):
            return out
        tokens = x.shape[1] // turns.entries  # 1 where x is [B, E, l, D], l where it is [B, E * l, D]
        parts = x.split([count * tokens for count, _ in turns.runs], 1)
        made = [_update(layer, role, part) for part, (_, role) in zip(parts, turns.runs)]
        return out + torch.cat(made, 1).to(out.dtype)


def _update(layer: Any, role: str, x: Tensor) -> Tensor:
    """(alpha / rank) B A x of one role; both factors are there for all roles that take turns."""
    a, b = layer.lora_A[role], layer.lora_B[role]
    return b(a(layer._cast_input_dtype(x, a.weight.dtype))) * layer.scaling[role]


class _On(AbstractContextManager):
    def __init__(self, switch: AdapterSwitch, role: Active) -> None:
        self.switch, self.role = switch, role
        self._before: list[Active] = []

    def __enter__(self) -> None:
        self._before.append(self.switch.active)
        self.switch.active = self.role

    def __exit__(self, *_: object) -> None:
        self.switch.active = self._before.pop()


class AdapterView(VideoDiT):
    """One of the networks that a `SharedBase` is; `name` is that of its updates, None for the base as it is.

    It owns nothing: its parameters are the base's frozen ones and its own updates, under the names that these have in a
    network of their own (`...lora_A.default.weight`).
    """

    def __init__(self, base: SharedBase, name: str | None) -> None:
        nn.Module.__init__(self)
        self.base, self.name = base, name
        self.config = base.model.config

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """As `VideoDiT.forward`, with the updates of this role."""
        with self.base.switch.on(self.name):
            return self.base.model(*arguments, **options)

    def new_cache(self, *arguments: Any, **options: Any) -> KVCache:
        """As `VideoDiT.new_cache`."""
        return self.base.model.new_cache(*arguments, **options)

    @property
    def execution(self) -> Execution:  # type: ignore[override]
        """That of the base, for all roles."""
        return self.base.model.execution

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Frozen parameters of the base and this role's updates, under the names of a network of its own."""
        for name, parameter in self.base.model.named_parameters(prefix, recurse, remove_duplicate):
            if (own := self._own_name(name)) is not None:
                yield own, parameter

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tensors of `named_parameters`."""
        state = self.base.model.state_dict(*arguments, **options)
        return {own: value for name, value in state.items() if (own := self._own_name(name)) is not None}

    def _own_name(self, name: str) -> str | None:
        """The name that a parameter of the base has in this role; None for one of another role."""
        if not is_factor(name):
            return name
        return name.replace(f".{self.name}.", f".{DEFAULT}.") if f".{self.name}." in name else None


class WriterApart(AdapterView):
    """A student of two roles: `name` denoises, and `writer`, the role of that name, writes the context that it reads.

    Its calls are those of the role that denoises, but for masked ones whose layout says which entries are stored: these
    are the writer's. Who commits to a cache calls `writer`. It has the updates of both, the writer's under its name.
    """

    def __init__(self, base: SharedBase, name: str) -> None:
        super().__init__(base, name)
        self._writer = (AdapterView(base, WRITER),)  # no sub-module: it has the same parameters

    @property
    def writer(self) -> AdapterView:
        """The network that writes the context; always this one object, by which caches tell networks apart."""
        return self._writer[0]

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition, context: Context = None) -> Tensor:
        """As `VideoDiT.forward`."""
        layout = context.layout if isinstance(context, MaskOverCache) else context
        if not isinstance(layout, MaskLayout) or layout.stored is None:
            assert not (isinstance(context, CacheView) and context.commit), "the writer writes"
            return super().forward(x, sigma, condition, context)
        assert self.name is not None
        roles = [WRITER if stored else self.name for stored in layout.stored]
        turns = Turns(tuple((len(list(run)), role) for role, run in groupby(roles)))
        with self.base.switch.on(turns):
            return self.base.model(x, sigma, condition, context)

    def _own_name(self, name: str) -> str | None:
        own = super()._own_name(name)
        return name if own is None and f".{WRITER}." in name else own
