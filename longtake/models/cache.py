"""The key/value cache of streaming: a preallocated sink and ring of frames, and cross-attention keys and values.

Rules it holds (each has a test):
- only frames that were committed are ever attended to; a slot that holds nothing is never read, and where one is
  missing between those that a block attends to, reading is an error;
- a call with gradient never writes; what it reads while activations are recomputed in backward cannot be overwritten
  (CacheError) until that backward has run or its graph is gone;
- once the window is full, every pass repeats the same shapes and addresses; the position enters only through device
  tensors (`CacheView`), so that a pass can be captured in a CUDA graph;
- no copy of the whole cache and no device synchronisation.

It must not know block plans, noise levels, prompts, gradients or graphs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longtake.condition import Condition
from longtake.errors import CacheError, ConfigError, ShapeError
from longtake.models.layers import rotated


class PinnedSlots:
    """Slots that a pending backward still reads: pinned until `release()`, or until nobody holds this any more."""

    def __init__(self, slots: frozenset[int]) -> None:
        self.slots = slots
        self.active = True

    def release(self) -> None:
        self.active = False


# layers(block, run, inputs) -> what the layer makes of `inputs`, mostly run(*inputs); in place of calling the block
Layers = Callable[[nn.Module, Callable[..., Tensor], Sequence[Tensor | None]], Tensor]


@dataclass(frozen=True, eq=False)
class CacheView:
    """What one call of the transformer reads and writes of a cache. Made by `KVCache.view`.

    Device tensors only, so that a captured graph can be replayed after they were updated: `slots` [P] of the attended
    past, `frame_index` [f] absolute frames of the block, `query_position` [f] and `key_position` [P + f] positions for
    the rotation, `write_slots` [f]. `blocks`, how many frames of the past and of its own (P, f) each block of the call
    has: one, or several that know nothing of each other. `commit`: keys and values are stored. `with_grad`: they carry
    gradient, and tensors are its own, for recomputation in backward. `cross_kept`: those of the condition are read from
    the cache; otherwise they are made, and kept there (not `with_grad`). `layers` runs each layer.
    """

    cache: KVCache
    slots: Tensor
    frame_index: Tensor
    query_position: Tensor
    key_position: Tensor
    write_slots: Tensor
    blocks: tuple[tuple[int, int], ...]
    commit: bool = False
    with_grad: bool = False
    cross_kept: bool = False
    layers: Layers | None = None

    @property
    def num_past(self) -> int:
        """Attended frames of the past, of all blocks."""
        return sum(past for past, _ in self.blocks)

    @property
    def num_frames(self) -> int:
        """Frames of the call."""
        return sum(own for _, own in self.blocks)

    @classmethod
    def joined(cls, views: Sequence[CacheView], layers: Layers | None) -> CacheView:
        """That of several blocks in one call with gradient, one after the other."""
        tensors: dict[str, Any] = {name: torch.cat([getattr(view, name) for view in views]) for name in INDICES}
        blocks = tuple(block for view in views for block in view.blocks)
        return cls(views[0].cache, **tensors, blocks=blocks, with_grad=True, layers=layers)


INDICES = ("slots", "frame_index", "query_position", "key_position", "write_slots")


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """Tensors made here are updated by later calls: made under `inference_mode`, only such calls could do that."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class KVCache:
    """Keys and values of past frames for every layer; made by `VideoDiT.new_cache`.

    Stored keys are rotated for `rope="absolute"` and not rotated for `"relative"`, where positions are indices within
    the attended list (sink first, then window) and are applied at each call. `clock` is what calls against it read of
    noise levels (`StreamPlan`).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        tokens_per_frame: int,
        num_heads: int,
        head_width: int,
        window_frames: int | None,
        sink_frames: int,
        rope: str,
        clock: str,
        max_frames: int | None,
        spare_frames: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if window_frames is None and max_frames is None:
            raise ConfigError("window_frames=None keeps every frame and needs max_frames; give one of them")
        if spare_frames < 0:
            raise ConfigError(f"spare_frames={spare_frames} must not be negative")
        if window_frames is not None and window_frames <= sink_frames:
            raise ConfigError(f"window_frames={window_frames} must be larger than sink_frames={sink_frames}")
        self.window_frames, self.sink_frames, self.rope = window_frames, sink_frames, rope
        self.max_frames, self.clock = max_frames, clock
        self.batch_size, self.tokens_per_frame = batch_size, tokens_per_frame
        if window_frames is None:
            assert max_frames is not None
            # Nothing is evicted, so the sink has no meaning.
            self.sink_frames = 0
            self.num_slots = max_frames
        else:
            self.num_slots = window_frames + spare_frames
        shape = (num_layers, batch_size, self.num_slots, tokens_per_frame, num_heads, head_width)
        with lasting_tensors():
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._held: list[int | None] = [None] * self.num_slots
        self._position = 0
        self._first = 0  # from here to `position` every frame was committed
        # Whose keys and values it holds: whoever fills it says so, and finds out that another one has. None: nobody's.
        self.content: object | None = None
        self._indices: dict[tuple[int, int], Tensor] = {}  # what views of so many frames read, one after the other
        self._pins: list[weakref.ref[PinnedSlots]] = []
        self._cross: dict[int, tuple[Tensor, ...]] = {}
        self._cross_key: tuple | None = None
        self._cross_form: tuple | None = None

    # ---- position and content -------------------------------------------------------------------------------------
    @property
    def position(self) -> int:
        """The absolute frame that the next block starts at."""
        return self._position

    @position.setter
    def position(self, frame: int) -> None:
        if frame < 0:
            raise CacheError(f"cache.position={frame} must not be negative")
        # Frames at or after the new position will be generated again: they are no context any more.
        self._held = [None if held is not None and held >= frame else held for held in self._held]
        jumps = frame > self._position and all(held is None or held < self.sink_frames for held in self._held)
        self._first = frame if jumps else min(self._first, frame)
        self._position = frame

    def skip_to(self, frame: int) -> None:
        """Moves `position` on past frames that are nobody's context from here on."""
        if frame > self._position:
            self._first = self._position = frame

    @property
    def held_frames(self) -> list[int]:
        """Absolute frames whose keys and values can be read, ascending."""
        return sorted(frame for frame in self._held if frame is not None)

    def holds(self, start: int, end: int) -> bool:
        """Whether the keys and values of frames [start, end) can be read."""
        return set(range(start, end)) <= set(self._held)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def size_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def clear(self) -> None:
        """Forgets every frame and the condition and returns to position 0; memory is kept."""
        self.content = None
        self._held = [None] * self.num_slots
        self._position = self._first = 0
        self.clear_condition()

    def clear_condition(self) -> None:
        """Forgets the cross-attention keys and values (after the weights that made them have changed)."""
        self._cross_key = None

    def copy(self) -> KVCache:
        """Another cache with the same rules and content that shares no memory with this one.

        Pending backwards keep reading from this one alone.
        """
        other = copy.copy(self)
        with lasting_tensors():
            other.keys, other.values = self.keys.clone(), self.values.clone()
            other._cross = {layer: tuple(t.clone() for t in kept) for layer, kept in self._cross.items()}
        other._held, other._indices, other._pins = list(self._held), {}, []
        return other

    def slots_of(self, frames: Sequence[int]) -> Tensor:
        """Where the keys and values of held frames are, [F]. Raises: CacheError for frames that are not held."""
        if lost := [frame for frame in frames if frame not in self._held]:
            raise CacheError(f"frames {lost} are not held any more: later ones took their place; raise spare_frames")
        return torch.tensor([self.slot_of(frame) for frame in frames], dtype=torch.long, device=self.device)

    def stored(self, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values [layers, B, F, L, N, K] of held frames."""
        slots = torch.tensor([self.slot_of(frame) for frame in frames], dtype=torch.long, device=self.device)
        return self.keys.index_select(2, slots), self.values.index_select(2, slots)

    def restore(self, position: int, frames: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Holds exactly `frames`, with what `stored` gave for them, and stands at `position`."""
        self.clear()
        parts = {frame: (keys[:, :, index], values[:, :, index]) for index, frame in enumerate(frames)}
        self.hold(parts, position, min((frame for frame in frames if frame >= self.sink_frames), default=position))

    @property
    def first(self) -> int:
        """From here to `position` every frame was committed."""
        return self._first

    def overwritten(self, start: int, end: int) -> list[int]:
        """Held frames in whose place frames [start, end) come."""
        held = {self._held[self.slot_of(frame)] for frame in range(start, end)}
        return sorted(frame for frame in held if frame is not None and not start <= frame < end)

    def hold(self, frames: Mapping[int, tuple[Tensor, Tensor]], position: int, first: int) -> None:
        """Holds these frames, too (keys and values [layers, B, tokens, N, K] of each), and stands at `position`."""
        with lasting_tensors():
            for frame, kept in frames.items():
                slot = self.slot_of(frame)
                for target, source in zip((self.keys, self.values), kept):
                    target[:, :, slot].copy_(source, non_blocking=True)  # in one piece: without waiting for it
                self._held[slot] = frame
        self._position, self._first = position, first

    def slot_of(self, frame: int) -> int:
        """Where a frame lies."""
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (self.num_slots - self.sink_frames)

    def attended_frames(self, block_frames: int) -> list[int]:
        """Committed frames that a block of `block_frames` at `position` attends to, ascending.

        Raises: CacheError when one of them is missing.
        """
        oldest, sink = 0, self.sink_frames
        if self.window_frames is not None:
            oldest = self._position + block_frames - (self.window_frames - sink)
        held, first, end = self.held_frames, self._first, self._position
        wanted = {*range(first, min(sink, end)), *range(max(first, sink, oldest), end)}
        if lost := sorted(wanted.difference(held)):
            raise CacheError(
                f"the block at frame {self._position} attends to frames {lost}, which this cache does not hold: it was "
                "moved past them, or they were overwritten; begin with an empty cache or rebuild it from kept latents"
            )
        return [frame for frame in held if frame < sink or frame >= oldest]

    # ---- one call -------------------------------------------------------------------------------------------------
    def view(
        self, block_frames: int, *, commit: bool = False, with_grad: bool = False, cross_kept: bool = False
    ) -> CacheView:
        """What a block of `block_frames` frames at `position` reads and writes. Without gradient, the tensors of an
        earlier view of as many frames are updated and used again.

        Raises: ShapeError when the block does not fit window or `max_frames`.
        """
        start, end = self._position, self._position + block_frames
        if self.window_frames is None:
            if end > self.num_slots:
                raise ShapeError(
                    f"frames [{start}, {end}) do not fit max_frames={self.num_slots}; make the cache larger"
                )
        elif block_frames > self.window_frames - min(self.sink_frames, start):
            raise ShapeError(
                f"a block of {block_frames} frames at frame {start} does not fit window_frames={self.window_frames} "
                f"beside sink_frames={self.sink_frames}; set window_frames to {block_frames + self.sink_frames} or more"
            )
        past = self.attended_frames(block_frames)
        count = len(past)
        first = count if self.rope == "relative" else start
        columns = {
            "slots": [self.slot_of(frame) for frame in past],
            "frame_index": list(range(start, end)),
            "query_position": list(range(first, first + block_frames)),
            "key_position": list(range(count + block_frames)),
            "write_slots": [self.slot_of(frame) for frame in range(start, end)],
        }
        pinned = self.device.type == "cuda"  # copied beside what the device still does, without waiting for it
        held = None if with_grad else self._indices.get((count, block_frames))
        with lasting_tensors():
            numbers = [number for column in columns.values() for number in column]
            fresh = torch.tensor(numbers, dtype=torch.long, pin_memory=pinned)
            if held is None:
                # A call with gradient keeps its own copy: backward may recompute after later calls have moved on.
                held = fresh.to(self.device, non_blocking=True)
                if not with_grad:
                    self._indices[(count, block_frames)] = held
            else:
                held.copy_(fresh, non_blocking=True)
            indices: dict[str, Any] = dict(zip(columns, held.split([len(column) for column in columns.values()])))
        blocks = ((count, block_frames),)
        return CacheView(self, **indices, blocks=blocks, commit=commit, with_grad=with_grad, cross_kept=cross_kept)

    def pin(self, block_frames: int) -> PinnedSlots:
        """Keeps what the block of `block_frames` frames at `position` attends to, for a later backward."""
        return self.pin_frames(self.attended_frames(block_frames))

    def pin_frames(self, frames: Sequence[int]) -> PinnedSlots:
        """Keeps frames that are held, for a later backward."""
        pins = PinnedSlots(frozenset(self.slot_of(frame) for frame in frames))
        self._pins = [ref for ref in self._pins if ref() is not None]
        if pins.slots:  # which a backward gives back
            self._pins.append(weakref.ref(pins))
        return pins

    def begin_commit(self, block_frames: int) -> None:
        """Reserves the slots of the block at `position`; they hold nothing until `end_commit`.

        Raises: CacheError in a call with gradient, or when a pending backward still reads one of the slots.
        """
        if torch.is_grad_enabled():
            raise CacheError(
                "commit=True was asked for with gradients enabled; commit in a pass of its own under no_grad"
            )
        slots = {self.slot_of(frame) for frame in range(self._position, self._position + block_frames)}
        for pins in self._live_pins():
            if pins.slots & slots:
                raise CacheError(
                    f"frames [{self._position}, {self._position + block_frames}) would overwrite keys that a pending "
                    "backward still recomputes from; run that backward first or raise spare_frames by "
                    f"{block_frames} or more"
                )
        for slot in slots:
            self._held[slot] = None

    def write(self, layer: int, view: CacheView, k: Tensor, v: Tensor) -> None:
        """Stores the block's keys and values of one layer, detached."""
        for target, own in ((self.keys[layer], k), (self.values[layer], v)):
            frames = own.detach().unflatten(1, (-1, self.tokens_per_frame)).to(target.dtype)
            target.index_copy_(1, view.write_slots, frames)

    def end_commit(self, block_frames: int) -> None:
        """Makes the block readable and moves `position` past it."""
        for frame in range(self._position, self._position + block_frames):
            self._held[self.slot_of(frame)] = frame
        self._position += block_frames

    # ---- pending backwards ----------------------------------------------------------------------------------------
    def _live_pins(self) -> list[PinnedSlots]:
        pins = [ref() for ref in self._pins]
        return [one for one in pins if one is not None and one.active]

    @property
    def is_held(self) -> bool:
        """Whether a pending backward still reads from it."""
        return bool(self._live_pins())

    # ---- cross-attention ------------------------------------------------------------------------------------------
    def has_cross(self, network: nn.Module, condition: Condition) -> bool:
        """True when the kept cross-attention keys and values are what this very network made of this very condition."""
        return self._cross_key == _identity(network, condition)

    def cross(self, layer: int) -> tuple[Tensor, ...]:
        """Kept cross-attention keys and values of one layer."""
        return self._cross[layer]

    def cross_addresses(self) -> tuple[int, ...]:
        """Where the kept cross-attention keys and values are."""
        return tuple(t.data_ptr() for tensors in self._cross.values() for t in tensors)

    def set_cross(self, layer: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keeps one layer's cross-attention keys and values, at the old addresses where shapes allow it."""
        self._cross_key = None  # valid again when every layer has been written (`cross_is_for`)
        old = self._cross.get(layer, ())
        if len(old) == len(tensors) and all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(old, tensors)):
            for target, source in zip(old, tensors):
                target.copy_(source)
        else:
            self._cross_form = None
            with lasting_tensors():
                self._cross[layer] = tuple(t.clone() for t in tensors)
        return self._cross[layer]

    def cross_is_for(self, network: nn.Module, condition: Condition, form: tuple) -> None:
        """Declares the kept cross-attention keys and values complete, made by `network` of `condition`;
        `form`, what their shapes and types follow from.
        """
        self._cross_key, self._cross_form = _identity(network, condition), form

    def has_space_for_cross(self, form: tuple) -> bool:
        """Whether keys and values of a condition of this form will be kept at the old addresses."""
        return self._cross_form == form


def beside(
    stored: Tensor, slots: Tensor, own: Tensor, blocks: Sequence[tuple[int, int]], turn: Tensor | None = None
) -> Tensor:
    """The attended past and the own keys, or values, of each block [B, (P + f) * tokens, N, K]; own ones come last.

    Args: `stored` [B, slots, tokens, N, K] of a layer, of which `slots` [P] are read; `own` [B, f * tokens, N, K];
    `blocks` as in `CacheView`; `turn` rotates keys that are stored without.
    """
    past = stored.index_select(1, slots).to(own.dtype)
    own = own.unflatten(1, (-1, stored.shape[2]))
    pasts = past.split([frames for frames, _ in blocks], 1)
    owns = own.split([frames for _, frames in blocks], 1)
    made = torch.cat([part for block in zip(pasts, owns) for part in block], 1).flatten(1, 2)
    return made if turn is None else rotated(made, turn)


def _identity(network: nn.Module, condition: Condition) -> tuple:
    tensors = [t for t in (condition.text, condition.image) if t is not None]
    versions = tuple(None if t.is_inference() else t._version for t in tensors)
    return weakref.ref(network), _ById(condition), versions


class _ById:
    """Equality by identity that keeps its object alive."""

    def __init__(self, item: object) -> None:
        self.item = item

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.item is self.item

    def __hash__(self) -> int:
        return id(self.item)
