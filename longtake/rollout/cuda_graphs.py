"""Passes against a cache as CUDA graphs: once a pass has the shapes and addresses of earlier ones, it is recorded, and
from then on replayed by one call, without Python and without a launch for every kernel.

A pass of four frames at 480x832 starts some two thousand kernels; where several GPUs share it they wait for whichever
process starts them last. What a replay reads must be where it was when the pass was recorded: the cache holds to that
(`KVCache`), inputs are copied to places of their own, and the addresses of weights and of the condition's keys and
values are compared each time. The cache knows nothing
of it. This file must not know the transformer.

Any number of threads may run passes of one network, each against a cache of its own and, if it likes, on a CUDA stream
of its own. Recorded passes share their memory: copying the inputs, replaying and copying the results away is done by
one thread at a time, and on the GPU behind the one before. While one records, the others start no pass.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from longtake.models.attention import ONE_THREAD
from longtake.models.cache import KVCache, lasting_tensors

logger = logging.getLogger(__name__)

# Passes of one kind against one cache that run as ever before it is recorded. A block of four steps and its context
# pass come five to a key while the window fills, which is not worth recording, unless the cache comes again and again.
EAGER_PASSES = 8
EAGER_PASSES_LENT = 1

# Tensors that a pass is given, some of which may be missing, and work(*inputs, static=), what it makes: the velocity,
# and more, which goes to the tensors of `static` where there are any.
Inputs = Sequence[Tensor | None]
Made = tuple[Tensor, ...]
Work = Callable[..., Made]


# A function that does what was recorded, and where that leaves its results
Recorded = tuple[Callable[[], None], Made]


class Capture(Protocol):
    """Records what functions start on the device, without doing it, each by itself and one after the other."""

    def __call__(self, *works: Callable[[], Made]) -> list[Recorded]: ...


_RECORDS = threading.Lock()  # held while a graph is recorded; the thread that records cannot take it again either
_later: deque[Callable[[], object]] = deque()


@contextmanager
def recording() -> Iterator[None]:
    """Inside, nothing is done that `while_none_records` was told to do."""
    try:
        with _RECORDS:
            yield
    finally:
        _do_what_waits()


def while_none_records(work: Callable[[], object]) -> None:
    """Does `work`, which waits for a device, at once, or where a graph is recorded, in this thread or another, as soon
    as that ends: it would end the recording with an error. Waits for nothing, since garbage collection may call it at
    any point of any thread, one that holds locks or records among them.
    """
    _later.append(work)
    _do_what_waits()


def _do_what_waits() -> None:
    # Whoever has the lock looks again when it is given back, so that what was put there meanwhile is not left over.
    while _later and _RECORDS.acquire(blocking=False):
        try:
            while _later:
                _later.popleft()()
        finally:
            _RECORDS.release()


class CUDAGraphCapture:
    """Records CUDA graphs that share their memory: they are replayed one after the other."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()  # that use it: with the last of them it is gone

    def __call__(self, *works: Callable[[], Made]) -> list[Recorded]:
        for work in works:
            work()  # what is compiled for tensors of this kind, or chosen or allocated once, is so before recording
        others = list(self._graphs)  # kept while this one records: another thread may drop its cache
        if not others:
            self._pool = torch.cuda.graph_pool_handle()
        # Recording gives free memory back, that of other devices too, where it may still be in use: with growing
        # segments torch then waits for this device alone (pytorch/pytorch 196258, seen in 2.11 and 2.14).
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):
                torch.cuda.synchronize(device)
        # Other threads, such as the one that watches over collectives, may call CUDA meanwhile; but no stream of theirs
        # may be the one that records. torch hands out 32 streams in turns, its own for recording among them, and a
        # thread that got that one failed with "invalid argument" (seen in 2.11): streams of high priority are others.
        stream, made = torch.cuda.Stream(priority=-1), []
        for work in works:
            graph = torch.cuda.CUDAGraph()
            # torch leaves its stream alone where recording ends well: the outer context does so where it failed, too.
            with (
                recording(),
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                out = work()
            self._graphs.add(graph)
            made.append((graph.replay, out))
        return made


@dataclass
class _Captured:
    static_inputs: list[Tensor | None]
    replay: Callable[[], None]
    static_outputs: Made


@dataclass
class _Passes:
    """What is known of the passes against one cache: how often each kind ran, and those that are captured."""

    uses: dict[tuple, int] = field(default_factory=dict)
    captured: dict[tuple, _Captured] = field(default_factory=dict)
    addresses: tuple[int, ...] = ()
    eager: int = EAGER_PASSES
    # Where captured passes leave what they make besides the velocity, by the shape of their latents: one place for all
    # kinds of passes, since it is taken away before the next one.
    static: dict[torch.Size, list[Tensor]] = field(default_factory=dict)

    def eager_left(self, key: tuple) -> int:
        """How many more passes of a kind run eagerly after this one; negative: this one is captured, or replayed."""
        self.uses[key] = self.uses.get(key, 0) + 1
        return self.eager - self.uses[key]

    def make_static(self, latents: torch.Size, made: Sequence[Tensor]) -> None:
        """Places for tensors like those of `made`."""
        if made and latents not in self.static:
            with lasting_tensors():
                self.static[latents] = [torch.empty_like(tensor) for tensor in made]

    def forget(self) -> None:
        """Drops what is captured, and counts anew."""
        self.uses.clear()
        self.captured.clear()
        self.static.clear()


class CUDAGraphRunner:
    """Runs passes of one network, or replays them. Args: `capture`, another way than CUDA graphs (tests)."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture or CUDAGraphCapture()
        self._broken = False
        self._passes: WeakKeyDictionary[KVCache, _Passes] = WeakKeyDictionary()
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
            passes, latents = self._known(cache, addresses), inputs[0]
            assert latents is not None
            key = (kind, autocast_type(latents.device), *(None if t is None else (t.shape, t.dtype) for t in inputs))
            if (left := passes.eager_left(key)) >= 0:
                made = work(*inputs)
                if left == 0:
                    passes.make_static(latents.shape, made[1:])
                return made
            found = passes.captured.get(key) or self._captured(work, inputs, passes, agree)
            if found is None:
                return work(*inputs)
            passes.captured[key] = found
            with self._behind_the_one_before(latents.device):
                for held, given in zip(found.static_inputs, inputs, strict=True):
                    if held is not None and given is not None:
                        held.copy_(given)
                found.replay()
                return tuple(made.clone() for made in found.static_outputs)

    def _known(self, cache: KVCache, addresses: tuple[int, ...]) -> _Passes:
        """What is known of the passes against a cache, anew where they read from other addresses."""
        passes = self._passes.setdefault(cache, _Passes())
        if passes.addresses != addresses:
            passes.forget()
            passes.addresses = addresses
        return passes

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
        """Drops all that is captured: before the process group that a pass uses is gone, say."""
        with ONE_THREAD:
            for passes in list(self._passes.values()):
                passes.forget()

    def comes_again(self, cache: KVCache, *, at_once: bool = False) -> None:
        """Says that a cache will serve one roll-out after another, so that even rare passes come again; `at_once`:
        each is captured when it comes for the first time.
        """
        with ONE_THREAD:
            self._passes.setdefault(cache, _Passes()).eager = 0 if at_once else EAGER_PASSES_LENT

    def captured(self, cache: KVCache) -> int:
        """How many kinds of passes against a cache are captured."""
        with ONE_THREAD:
            return len(self._passes[cache].captured) if cache in self._passes else 0

    def _captured(self, work: Work, inputs: Inputs, passes: _Passes, agree: Callable[[bool], bool]) -> _Captured | None:
        """The pass, captured; None where that failed, after which nothing is captured any more."""
        with torch.inference_mode(False), torch.no_grad():
            held = [None if t is None else torch.empty_like(t).copy_(t) for t in inputs]
        x = held[0]
        assert x is not None
        made, reason = None, "another process could not"
        try:
            with own_casts(x.device):
                (made,) = self._capture(lambda: work(*held, static=passes.static.get(x.shape)))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if not agree(made is not None) or made is None:
            self._broken = True
            self.forget()
            passes.forget()
            logger.warning("passes are not captured as CUDA graphs, and run as ever: %s", reason)
            return None
        return _Captured(held, *made)


_all: WeakSet[CUDAGraphRunner] = WeakSet()


def forget_all() -> None:
    """Drops every recorded pass of this process."""
    with ONE_THREAD:
        for graphs in list(_all):
            graphs.forget()


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type of products under the autocast of now, None where there is none."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def own_casts(device: torch.device) -> AbstractContextManager[Any]:
    """For recording: casts of weights under autocast are recorded too, as those that it remembers end with it."""
    dtype = autocast_type(device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False)
