"""Counts bytes that operations other than products read and write, as a device without fusion would move them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
