"""Several networks as one: frozen weights that are held once, and low-rank updates that are on for one role at a time.

Teacher, critic and student of a distillation differ by their updates alone: the teacher is the base without any. A
role is called as a network of its own would be, has the parameters, names and state of one, and so everything above
(objectives, optimizer, averages, checkpoints, export) treats it as one.

Which updates are on is a value that one call sets and takes back (`AdapterSwitch.on`); a hook of each updated layer
hands it to PEFT. A block that is recomputed in backward, when another role may have been called since, sees the updates
of its own forward, through `Execution.around`. Must know no file, no rank and no objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from longtake.models.cache import KVCache
from longtake.models.dit import VideoDiT
from longtake.models.execution import Execution
from longtake.models.lora import DEFAULT, is_factor
from longtake.models.recompute import Contexts


class AdapterSwitch:
    """Which updates are on: those of one role, or none (None)."""

    def __init__(self) -> None:
        self.active: str | None = None

    def on(self, role: str | None) -> AbstractContextManager:
        """A context in which the updates of `role` are on; None: none."""
        return _On(self, role)

    def contexts(self) -> Contexts:
        """For `Execution.around`: a block is recomputed under the updates that are on now."""
        return nullcontext(), self.on(self.active)


class SharedBase:
    """A frozen network whose low-rank updates, each called by its role, are on for one role at a time.

    Call it after `inject_lora`. Args: `switch`, whose `contexts` are around the blocks of `model` (its `Execution`),
    for one that is sharded already; by default the network is executed under one of its own.
    """

    def __init__(self, model: VideoDiT, switch: AdapterSwitch | None = None) -> None:
        if switch is None:
            switch = AdapterSwitch()
            model = model.executed(replace(model.execution, around=switch.contexts))
        self.model, self.switch = model, switch
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.register_forward_pre_hook(self._select)

    def _select(self, layer: Any, _: Any) -> None:
        # PEFT's own `set_adapter` also decides what is trained, which must not change between forward and backward.
        layer._active_adapter = [] if self.switch.active is None else [self.switch.active]


class _On(AbstractContextManager):
    def __init__(self, switch: AdapterSwitch, role: str | None) -> None:
        self.switch, self.role = switch, role
        self._before: list[str | None] = []

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
