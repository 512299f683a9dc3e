"""Passes against a cache as CUDA graphs: once a pass has the shapes and addresses of earlier ones, it is recorded, and
from then on replayed by one call, without Python and without a launch for every kernel.

A pass of four frames at 480x832 starts some two thousand kernels; where several GPUs share it they wait for whichever
process starts them last. What a replay reads must be where it was when the pass was recorded: the cache holds to that
(`KVCache`), inputs are copied to places of their own, and the addresses of weights and of the condition's keys and
values are compared each time. This file must not know the transformer.

Any number of threads may run passes of one network, each against a cache of its own and, if it likes, on a CUDA stream
of its own. Recorded passes share their memory: copying the inputs, replaying and copying the results away is done by
one thread at a time, and on the GPU behind the one before. While one records, the others start no pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from longtake.models.attention import ONE_THREAD
from longtake.models.cache import KVCache, Passes

logger = logging.getLogger(__name__)

# Passes of one kind against one cache that run as ever before it is recorded. A block of four steps and its context
# pass come five to a key while the window fills, which is not worth recording, unless the cache comes again and again.
EAGER_PASSES = 8
EAGER_PASSES_LENT = 1

# Tensors that a pass is given, some of which may be missing, and work(*inputs, room=), what it makes: the velocity, and
# more, which goes to the tensors of `room` where there are any.
Inputs = Sequence[Tensor | None]
Made = tuple[Tensor, ...]
Work = Callable[..., Made]


class Recorder(Protocol):
    """Records what a function starts on the device, without doing it: a function that does it, and the results."""

    def __call__(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]: ...


class CudaRecorder:
    """Records CUDA graphs that share their memory: they are replayed one after the other."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # that use it: with the last of them it is gone

    def __call__(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        others = list(self._graphs)  # kept while this one records: another thread may drop its cache
        if not others:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Recording gives free memory back, that of other devices too, where it may still be in use: with growing
        # segments torch then waits for this device alone (pytorch/pytorch 196258, seen in 2.11 and 2.14).
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):
                torch.cuda.synchronize(device)
        # Other threads, such as the one that watches over collectives, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = work()
        self._graphs.add(graph)
        return graph.replay, out


@dataclass
class _Recorded:
    inputs: list[Tensor | None]
    replay: Callable[[], None]
    outputs: Made


class PassGraphs:
    """Runs passes of one network, or replays them. Args: `record` another recorder than that of CUDA graphs (tests)."""

    def __init__(self, record: Recorder | None = None) -> None:
        self._record = record or CudaRecorder()
        self._broken = False
        self._known: WeakSet[KVCache] = WeakSet()
        self._copied: torch.cuda.Event | None = None  # on a GPU: what the latest replay gave is copied away
        with ONE_THREAD:
            _all.add(self)

    def run(
        self,
        work: Work,
        kind: tuple,
        inputs: Inputs,
        cache: KVCache,
        addresses: tuple[int, ...],
        agree: Callable[[bool], bool] = bool,
        *,
        again: bool = True,
    ) -> Made:
        """`work(*inputs)`, no gradient; `kind` says what else tells passes against `cache` apart.

        Args: `inputs`, latents first; `addresses` of what `work` reads besides;
        `agree(fine)`, whether all processes that share the pass are fine: what one cannot record, none replays;
        `again`, whether it has the shapes and addresses of other passes at all.
        """
        with ONE_THREAD:
            if self._broken or not again:
                return work(*inputs)
            return self._run(work, kind, inputs, cache, addresses, agree)

    def _run(
        self,
        work: Work,
        kind: tuple,
        inputs: Inputs,
        cache: KVCache,
        addresses: tuple[int, ...],
        agree: Callable[[bool], bool],
    ) -> Made:
        passes: Passes = cache.passes
        if passes.addresses != addresses:
            passes.forget()
            passes.addresses = addresses
        assert inputs[0] is not None
        key = (kind, _autocast(inputs[0].device), *(None if t is None else (t.shape, t.dtype) for t in inputs))
        if (found := passes.recorded.get(key)) is None:
            passes.uses[key] = passes.uses.get(key, 0) + 1
            left = (EAGER_PASSES_LENT if passes.lent else EAGER_PASSES) - passes.uses[key]
            if left >= 0:
                made = work(*inputs)
                if left == 0:
                    passes.make_room(inputs[0].shape, made[1:])
                return made
            recorded = self._recorded(work, inputs, passes, agree)
            if recorded is None:
                return work(*inputs)
            found = passes.recorded[key] = recorded
            self._known.add(cache)
        with self._behind_the_one_before(inputs[0].device):
            for held, given in zip(found.inputs, inputs, strict=True):
                if held is not None and given is not None:
                    held.copy_(given)
            found.replay()
            return tuple(made.clone() for made in found.outputs)

    @contextmanager
    def _behind_the_one_before(self, device: torch.device) -> Iterator[None]:
        """What is started on this thread's stream begins when the replay before it, on any stream, is copied away."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._copied is None:
            self._copied = torch.cuda.Event()
        else:
            stream.wait_event(self._copied)
        try:
            yield
        finally:
            self._copied.record(stream)

    def forget(self) -> None:
        """Drops all that is recorded: before the process group that a pass uses is gone, say."""
        with ONE_THREAD:
            for cache in list(self._known):
                cache.passes.forget()

    def _recorded(self, work: Work, inputs: Inputs, passes: Passes, agree: Callable[[bool], bool]) -> _Recorded | None:
        """The pass, recorded; None where that failed, after which nothing is recorded any more."""
        with torch.inference_mode(False), torch.no_grad():
            held = [None if t is None else torch.empty_like(t).copy_(t) for t in inputs]
        x = held[0]
        assert x is not None
        made, reason = None, "another process could not"
        try:
            with _own_casts(x.device):
                made = self._record(lambda: work(*held, room=passes.room.get(x.shape)))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if not agree(made is not None) or made is None:
            self._broken = True
            self.forget()
            passes.forget()
            logger.warning("passes are not recorded as CUDA graphs, and run as ever: %s", reason)
            return None
        return _Recorded(held, *made)


_all: WeakSet[PassGraphs] = WeakSet()


def forget_all() -> None:
    """Drops every recorded pass of this process."""
    with ONE_THREAD:
        for graphs in list(_all):
            graphs.forget()


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _own_casts(device: torch.device) -> AbstractContextManager[Any]:
    """Under autocast, casts of weights are recorded too: those that it remembers are gone when it ends."""
    dtype = _autocast(device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False)
