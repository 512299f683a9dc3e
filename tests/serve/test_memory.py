"""What a server keeps while it runs: bounded, however often prompts and pictures change."""

import logging

import numpy as np
import pytest
from live_server import LiveClient, png_of, serving
from tiny_sessions import OTHER, PICTURE, A, B, C

from longtake.serve.engine import Engine
from longtake.serve.settings import Limits


def contents(engine):
    """How many different ones of its one cache a session holds."""
    session = engine._lanes["one"].session
    streams = [past.stream for past in (*session._history, session.state) if past.stream is not None]
    assert len({id(stream.cache) for stream in streams}) == 1
    return len({stream.content for stream in streams})


@pytest.fixture
def engine(generator):
    """One whose sessions may be six blocks ahead; what comes out goes nowhere."""
    engine = Engine(lambda: generator, lambda output: None, 6, 6)
    engine.start()
    engine.ready.result(30)
    yield engine
    engine.stop()


def test_changes_leave_no_more_caches_than_the_history_may_hold(engine):
    engine.call("open", "one", PICTURE, A, seed=1).result(30)
    most = 0
    for number in range(1, 13):
        engine.call("shown", "one", 10**6, 0.0).result(30)
        engine.call("change", "one", "prompt", (B, C)[number % 2], number, 0.0, False).result(30)
        most = max(most, contents(engine))
    assert most == 3
    engine.call("hold", "one", True).result(30)
    rewindable = engine._lanes["one"].rewindable
    assert 2 <= rewindable <= 6 and rewindable == engine._lanes["one"].session.rewindable
    engine.call("rewind", "one", rewindable, None).result(30)


def test_history_behind_many_changes_is_as_good_as_ever(generator):
    """Blocks that can still be taken back come again, bit for bit."""
    few, all_of_them = (generator.open(PICTURE, A, seed=1, history_blocks=6, history_caches=n) for n in (2, None))
    for session in (few, all_of_them):
        for prompt in (A, B, B, C, C, A, A):
            session.prompt = prompt
            session.next()
    assert (few.rewindable, all_of_them.rewindable) == (5, 6)  # what followed A at the beginning is gone
    made = []
    for session in (few, all_of_them):
        session.rewind(5)
        made.append(np.concatenate([session.next() for _ in range(2)]))
    assert np.array_equal(*made)


def test_unknown_words_are_not_remembered_for_ever(generator, caplog):
    text = generator.encoders.text
    with caplog.at_level(logging.ERROR):
        for number in range(30):
            text.encode([" ".join(f"zq{number}x{k}" for k in range(100))])
            text._say_cut([f"prompt {number}"])
    assert len(text._unknown) <= 1000 and len(text._cut) <= 21


def test_pictures_of_changes_are_bounded(generator, tmp_path):
    with serving(generator, tmp_path, max_sessions=1, limits=Limits(kept_pictures_bytes=5000)) as address:
        client = LiveClient(address)
        client.open()
        client.watch(9)
        codes = []
        for _ in range(6):
            files = {"image": ("p.png", png_of(OTHER), "image/png")}
            codes.append(client.request("POST", "/target", files=files).status_code)
        assert codes[0] == 200 and codes[-1] == 409
