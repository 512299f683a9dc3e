"""Several networks as one: frozen weights that are held once, and low-rank updates that are on for one role at a time.

Teacher, critic and student of a distillation differ by their updates alone: the teacher is the base without any. A
role is called as a network of its own would be, has the parameters, names and state of one, and so everything above
(objectives, optimizer, averages, checkpoints, export) treats it as one.

Which updates are on is a value that one call sets and takes back (`SharedBase.on`); a hook of each updated layer hands
it to PEFT. A block that is recomputed in backward, when another role may have been called since, sees the updates of
its own forward, through `VideoDiT.checkpoint_contexts`. Must know no file, no rank and no objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from longtake.models.attention import Attention
from longtake.models.cache import KVCache
from longtake.models.dit import VideoDiT
from longtake.models.lora import DEFAULT, is_factor
from longtake.models.recompute import Contexts


class SharedBase:
    """A frozen network whose low-rank updates, each called by its role, are on for one role at a time.

    Call it after `inject_lora`; sharding may come before or after.
    """

    def __init__(self, model: VideoDiT) -> None:
        self.model = model
        self.active: str | None = None
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.register_forward_pre_hook(self._select)
        model.checkpoint_contexts.append(self._recompute)

    def on(self, role: str | None) -> AbstractContextManager:
        """A context in which the updates of `role` are on; None: none."""
        return _On(self, role)

    def _select(self, layer: Any, _: Any) -> None:
        # PEFT's own `set_adapter` also decides what is trained, which must not change between forward and backward.
        layer._active_adapter = [] if self.active is None else [self.active]

    def _recompute(self) -> Contexts:
        return nullcontext(), self.on(self.active)


class _On(AbstractContextManager):
    def __init__(self, base: SharedBase, role: str | None) -> None:
        self.base, self.role = base, role
        self._before: list[str | None] = []

    def __enter__(self) -> None:
        self._before.append(self.base.active)
        self.base.active = self.role

    def __exit__(self, *_: object) -> None:
        self.base.active = self._before.pop()


class Role(VideoDiT):
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
        with self.base.on(self.name):
            return self.base.model(*arguments, **options)

    def new_cache(self, *arguments: Any, **options: Any) -> KVCache:
        """As `VideoDiT.new_cache`."""
        return self.base.model.new_cache(*arguments, **options)

    def set_attention(self, attend: Attention) -> None:
        """Replaces the attention of all roles."""
        self.base.model.set_attention(attend)

    @property
    def activation_checkpointing(self) -> bool:  # type: ignore[override]
        """That of the base: all roles recompute, or none does."""
        return self.base.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        self.base.model.activation_checkpointing = value

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
