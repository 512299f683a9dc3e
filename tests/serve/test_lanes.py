"""What a change takes back of what is made and not shown: as much as its viewer does not need until the next block."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from longtake.serve import engine as engine_module
from longtake.serve.engine import Engine, _Begun
from longtake.serve.lanes import Block, Lane

FPS, FRAMES = 16, 16


class Played:
    """A session of so many blocks, of which only numbers are known."""

    def __init__(self, blocks: int) -> None:
        self.num_frames, self.rewindable = blocks * FRAMES, 8
        self.generator = SimpleNamespace(fps=FPS)
        self.prompt = ""

    def rewind(self, blocks: int, *, keep_wanted: bool) -> None:
        self.num_frames -= blocks * FRAMES


class Piece:
    """Frames that are here at that time, by a clock that is waited with."""

    def __init__(self, clock: list[float], arrives: float, count: int = FRAMES) -> None:
        self.clock, self.arrives, self.count = clock, arrives, count

    def array(self) -> np.ndarray:
        self.clock[0] = self.arrives
        return np.zeros((self.count, 1, 1, 3), np.uint8)


def lane(blocks: int = 3, *, ahead: int = 2 * FRAMES) -> Lane:
    """One whose blocks are all made, none shown."""
    made = [Block(FRAMES * k, FRAMES, 0) for k in range(blocks)]
    return Lane("one", cast(Any, Played(blocks)), 0, 0, ahead, 0.0, blocks=made)


def change(one: Lane, shown: int, *, at: float, told: float, number: int = 1, asked: float | None = None) -> int:
    """Its first frame, when `shown` frames were told at time `told` and a prompt changes at time `at`."""
    one.saw(shown, told)
    one.change("prompt", "another", number, at if asked is None else asked, at, drop=True)
    return one.session.num_frames


def test_blocks_that_are_seen_before_the_next_can_come_stay() -> None:
    fast, slow = lane(), lane()
    fast.came(fast.blocks[-1], 0.2, 1.0)  # 0.3 s with a rebuild, and 0.04 s to the viewer: 6 frames
    slow.came(slow.blocks[-1], 0.5, 1.0)
    assert change(fast, 26, at=2.0, told=2.0) == 32  # 6 frames are left of the block on the screen
    assert change(slow, 24, at=2.0, told=2.0) == 48


def test_a_turn_with_its_rebuild_counts_and_not_a_block_alone() -> None:
    """The first block after a change rebuilds the cache, and other sessions' blocks may come before it."""
    one = lane(4)
    one.came(one.blocks[-1], 0.2, 1.0)
    first = change(one, 20, at=2.0, told=2.0)
    assert first == 32
    one.came(Block(first, FRAMES, 1), 0.3, 2.6)
    assert list(one.turns) == [pytest.approx(0.6)]
    one.session.num_frames = 64
    assert change(one, 26, at=9.0, told=9.0, number=2) == 64  # 6 frames are less than 0.64 s


def test_what_follows_a_change_may_come_before_a_block_would_be_whole() -> None:
    """Its first frames go out before the others are decoded, and no context of a block before it is to be stored."""
    one = lane(4)
    one.came(one.blocks[-1], 0.5, 1.0)
    one.turns.append(0.3)
    assert change(one, 26, at=2.0, told=2.0) == 32  # and not in 0.54 s


def test_a_block_of_another_session_may_come_between() -> None:
    alone, shared = lane(), lane()
    for one in (alone, shared):
        one.came(one.blocks[-1], 0.2, 1.0)
        one.turns.append(0.3)
        one.saw(26, 2.0)
    alone.change("prompt", "another", 1, 2.0, 2.0, drop=True)
    shared.change("prompt", "another", 1, 2.0, 2.0, drop=True, others=0.25)
    assert (alone.session.num_frames, shared.session.num_frames) == (32, 48)


def test_what_a_viewer_has_seen_since_it_said_so_counts() -> None:
    one = lane()
    one.came(one.blocks[-1], 0.2, 1.0)
    assert change(one, 26, at=2.2, told=2.0) == 48  # 30 by now: 2 frames are left
    between = lane()  # it says whole frames: at once after 26 it may be in the middle of the next one
    between.came(between.blocks[-1], 0.2, 1.0)
    assert change(between, 26, at=2.01, told=2.0) == 48
    waiting = lane(4)  # a change that was asked for at once, and waited for blocks on their way
    waiting.came(waiting.blocks[-1], 0.2, 1.0)
    assert change(waiting, 27, at=3.0, told=2.0, asked=2.1) == 64
    silent = lane()
    silent.came(silent.blocks[-1], 0.2, 1.0)
    assert change(silent, 8, at=99.0, told=2.0) == 16  # one that says nothing is not playing on


@pytest.mark.parametrize("waits", ["paused", "full"])
def test_waiting_for_the_viewer_is_no_turn(waits: str) -> None:
    one = lane(ahead=2 * FRAMES if waits == "paused" else FRAMES)
    one.came(one.blocks[-1], 0.2, 1.0)
    one.saw(16, 2.0)
    one.change("prompt", "another", 1, 2.0, 2.0, drop=False)
    if waits == "paused":
        one.hold(True, 2.1)
    one.came(Block(48, FRAMES, 1), 0.2, 30.0)
    assert not one.turns


def test_a_branch_has_turns_of_its_own() -> None:
    one = lane()
    one.session.fork = lambda: one.session  # type: ignore[method-assign]
    one.saw(5, 2.0)
    branch = one.fork("two")
    one.turns.append(0.5)
    assert not branch.turns and (branch.shown, branch.shown_at) == (5, None)


def test_seconds_of_a_block_are_those_of_the_device_for_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one is begun while the first is made, and waits for it; a third when nobody has wanted one for a while."""
    now, out = [0.0], []
    monkeypatch.setattr(engine_module, "monotonic", lambda: now[0])
    engine, one = Engine(cast(Any, None), out.append, 2, 2), lane()
    for number, (began, arrives) in enumerate([(0.0, 0.5), (0.125, 1.0), (2.0, 2.5)]):
        first, pieces = FRAMES * number, cast(Any, [Piece(now, arrives)])
        engine._on_their_way.put(_Begun(one, Block(first, FRAMES, 0), pieces, began, first, is_whole=True))
    engine._on_their_way.put(None)
    engine._fetch()
    assert [made.seconds for made in out] == [0.5] * 3


@pytest.mark.parametrize(("rest_at", "turn"), [(0.5, 0.375), (1.0, 0.75)])  # 4 frames last 0.25 s
def test_a_change_has_come_when_it_can_be_watched_without_a_wait(
    monkeypatch: pytest.MonkeyPatch, rest_at: float, turn: float
) -> None:
    now = [0.0]
    monkeypatch.setattr(engine_module, "monotonic", lambda: now[0])
    engine, one = Engine(cast(Any, None), lambda output: None, 2, 2), lane()
    one.change("prompt", "another", 1, 0.0, 0.0, drop=False)
    one.session.num_frames, one.shown = 48, 40
    one._changed = (1, 0.0)
    block, head, rest = Block(48, FRAMES, 1), Piece(now, 0.375, 4), Piece(now, rest_at, 12)
    engine._on_their_way.put(_Begun(one, block, cast(Any, [head]), 0.0, 48))
    engine._on_their_way.put(_Begun(one, block, cast(Any, [rest]), 0.0, 52, is_whole=True))
    engine._on_their_way.put(None)
    engine._fetch()
    assert list(one.turns) == [turn] and one.block_seconds == rest_at


def test_the_rest_of_a_block_does_not_come_without_its_beginning() -> None:
    """Its session is lost; the next block of another one comes as ever."""
    out: list[Any] = []
    engine, lanes = Engine(cast(Any, None), out.append, 2, 2), (lane(), lane())
    lanes[1].name = "two"
    block, broken = Block(48, FRAMES, 0), SimpleNamespace(array=lambda: 1 / 0)
    engine._on_their_way.put(_Begun(lanes[0], block, cast(Any, [broken]), 0.0, 48))
    for one, first in zip(lanes, (52, 48), strict=True):
        engine._on_their_way.put(_Begun(one, block, cast(Any, [Piece([0.0], 1.0)]), 0.0, first, is_whole=True))
    engine._on_their_way.put(None)
    engine._fetch()
    assert [made.session for made in out] == ["two"] and [one.operation for one in engine._asked] == ["lose"]


@pytest.mark.parametrize(("shown", "drops"), [(16, True), (43, False)])
def test_a_block_is_let_go_for_a_change_that_would_drop_it(shown: int, drops: bool) -> None:
    """The one in the making begins at frame 48; who has seen 43 has 0.3 s left, less than another one takes."""
    engine, one = Engine(cast(Any, None), lambda output: None, 2, 2), lane()
    one.came(one.blocks[-1], 0.25, 1.0)
    one.saw(shown, 2.0)
    engine._lanes = {"one": one}
    engine._let_go(one)  # nothing is asked for
    engine.call("change", "other", "prompt", "another", 1, 0.0, True)
    engine.call("change", "one", "prompt", "another", 1, 0.0, False)
    engine._let_go(one)
    engine.call("change", "one", "prompt", "another", 2, 0.0, True)
    with pytest.raises(engine_module._Dropped) if drops else nullcontext():
        engine._let_go(one)
