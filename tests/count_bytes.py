"""Counts bytes: those that operations other than products read and write, as a device without fusion would move them, and
those of the tensors that there are.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtake.parallel.materialize import local
from longtake.train.keeping import Memory

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class ByteCounter(TorchDispatchMode):
    """`bytes` of inputs and outputs of every operation that is neither a product, attention nor a view; `calls`, all
    that would start a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ("detach", "alias", "_unsafe_view", "empty", "empty_like", "lift_fresh"):
            return out
        self.calls += 1
        if name in _PRODUCTS or "scaled_dot_product" in name:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        # An expanded tensor is read from its own small memory.
        moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        self.bytes += moved
        self.by_name[name] = self.by_name.get(name, 0) + moved
        return out


class Held(TorchDispatchMode, Memory):
    """Bytes of the storages made while it is on, as those of a GPU of `total` bytes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.total = self.held = self.highest = 0
        self.known = {
            local(p).untyped_storage()._cdata for p in model.parameters()
        }  # made before; their views are no others

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.held += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes()).atexit = False
        self.highest = max(self.highest, self.held)
        return out

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size

    def begin(self) -> None:
        self.highest = 0

    def now(self) -> int:
        return self.held

    def most(self) -> int:
        return self.highest

    def all(self) -> int:
        return self.total
