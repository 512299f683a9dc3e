"""A frozen network of which one matrix at a time is on the device; the others lie in pinned memory of this process.

Each `nn.Linear` becomes one that asks for its weights when it is called. While it works, those of the layer that came
after it in the call before are on their way, so that a call takes as long as sending all of them. The numbers are those
of the network on the device. Must know no network in particular.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.models.attention import ONE_THREAD

_CHUNK_BYTES = 1 << 30  # of pinned memory at a time: torch rounds each piece up to a power of two
_SLOTS = 2  # matrices on the device: one that is read, one that arrives


class WeightLine:
    """Brings matrices of one type to `device`, one after the other; use it as a context around a call of the network.

    One call at a time: others wait at its beginning.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: list[int]) -> None:
        self.device, self.dtype = device, dtype
        self._largest, self._rest = max(sizes, default=0), sum(sizes)
        self._host = torch.empty(0, dtype=dtype)
        self._one_call = RLock()
        self._after: dict[int, StreamedLinear] = {}  # which layer was used after which
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def place(self, tensor: Tensor) -> Tensor:
        """A copy in this process's memory, pinned where the device is a GPU."""
        size = tensor.numel()
        if self._host.numel() < size:
            room = max(size, min(self._rest, _CHUNK_BYTES // self.dtype.itemsize))
            self._host = torch.empty(room, dtype=self.dtype, pin_memory=self._copies is not None)
        place, self._host, self._rest = self._host[:size], self._host[size:], self._rest - size
        return place.view(tensor.shape).copy_(tensor)

    def __enter__(self) -> WeightLine:
        self._one_call.acquire()
        shape = (_SLOTS, self._largest)
        self._slots = torch.empty(shape, device=self.device, dtype=self.dtype)
        self._layers: list[StreamedLinear | None] = [None] * _SLOTS  # whose weights are, or will be, in each slot
        self._turn, self._before = 0, -1
        if self._copies is not None:
            self._arrived, self._read = ([torch.cuda.Event() for _ in range(_SLOTS)] for _ in range(2))
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        del self._slots
        self._layers = []
        self._one_call.release()

    def apply(self, layer: StreamedLinear, x: Tensor) -> Tensor:
        """What a layer makes of `x`."""
        if self._layers[self._turn] is not layer:
            self._send(layer, self._turn)
        slot = self._turn
        if self._before >= 0:
            self._after[self._before] = layer
        self._before, self._turn = id(layer), (slot + 1) % _SLOTS
        if (following := self._after.get(id(layer))) is not None:
            self._send(following, self._turn)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])
        out = F.linear(x, self._slots[slot, : layer.weight.numel()].view(layer.weight.shape), layer.bias)
        if self._copies is not None:
            self._read[slot].record(torch.cuda.current_stream(self.device))
        return out

    def _send(self, layer: StreamedLinear, slot: int) -> None:
        place = self._slots[slot, : layer.weight.numel()].view(layer.weight.shape)
        self._layers[slot] = layer
        if self._copies is None:
            place.copy_(layer.weight)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._read[slot])  # not over what is still read
            place.copy_(layer.weight, non_blocking=True)
            self._arrived[slot].record(self._copies)


class StreamedLinear(nn.Module):
    """A linear layer whose matrix comes by a line. Its tensors have the names that they had."""

    def __init__(self, linear: nn.Linear, line: WeightLine) -> None:
        super().__init__()
        self.weight = nn.Parameter(line.place(linear.weight.detach()), requires_grad=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(line.device), requires_grad=False)
        self._line = [line]  # no submodule, and not copied with the network

    def forward(self, x: Tensor) -> Tensor:
        return self._line[0].apply(self, x)


def offload(network: nn.Module, device: torch.device, stays: nn.Module | None = None) -> WeightLine:
    """Makes a network's matrices come by the line that is returned, and puts all else on `device`.

    Args: `stays`, a table of the network that is looked up on the CPU and goes there.
    """
    dtype = next(network.parameters()).dtype
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child.weight.dtype == dtype  # a few in another type stay on the device
    ]
    line = WeightLine(device, dtype, [child.weight.numel() for _, _, child in found])
    for parent, name, child in found:
        setattr(parent, name, StreamedLinear(child, line))
        child.weight = child.bias = None  # type: ignore[assignment]  # freed one by one: there is no room for two
    kept = {id(module.weight) for module in network.modules() if isinstance(module, StreamedLinear)}
    table = set() if stays is None else {id(parameter) for parameter in stays.parameters()}
    for tensor in [*network.parameters(), *network.buffers()]:
        if id(tensor) not in kept:
            tensor.data = tensor.data.to("cpu" if id(tensor) in table else device)
    return line


class FrozenEncoder:
    """A library's network that is never trained, and whose matrices may come by a line."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self._line: WeightLine | None = None

    def offload(self, device: torch.device) -> None:
        """From now on works on `device` with one matrix at a time there; all weights lie in this process's memory."""
        self._line = offload(self.model, device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device if self._line is None else self._line.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around a call of the network: as precise as its weights, whatever is on outside."""
        with ONE_THREAD, self._line or nullcontext(), torch.autocast(self.device.type, enabled=False):
            yield
