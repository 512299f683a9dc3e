"""What went wrong once: sessions opened twice, a full disk, viewers who say odd things, busy machines."""

import asyncio
import errno
import gc
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import psutil
import pytest
from live_server import LiveClient, serving
from tiny_sessions import PICTURE, A, B, make_generator
from websockets.sync.client import connect

from longtake.errors import OutputError
from longtake.inference.session import Session
from longtake.serve import capacity, store
from longtake.serve.engine import Engine
from longtake.serve.h264 import LiveEncoder, Size
from longtake.serve.live import Live
from longtake.serve.mp4 import span
from longtake.serve.recording import Recording
from longtake.serve.settings import Limits
from longtake.serve.timeline import Beginning, Timeline


def wanted(generator, seed, first, count):
    session, frames = generator.open(PICTURE, A, seed=seed), []
    while sum(map(len, frames)) < first + count:
        frames.append(session.next())
    return np.concatenate(frames)[first : first + count]


def saved(address, frame=17, **fields):
    client = LiveClient(address)
    client.open(**fields)
    client.watch(frame)
    client.post("/pause")
    return client, client.post("/save")["frame"]


def opened(client, **fields):
    body = {"id": client.name, "secret": client.secret, **fields}
    return client.http.post("/api/sessions/open", data=body)


@pytest.mark.whole
def test_a_save_that_is_opened_many_times_at_once_plays_once(generator, tmp_path, monkeypatch):
    end = Live.end

    async def slowly(self, *args, **given):
        await asyncio.sleep(0.2)
        await end(self, *args, **given)

    monkeypatch.setattr(Live, "end", slowly)
    with serving(generator, tmp_path, max_sessions=4) as address:
        client, frame = saved(address, seed=5)
        client.post("/resume")
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: opened(client), range(6)))
        assert {201} <= {answer.status_code for answer in answers} <= {201, 409}
        (playing,) = [one for one in gc.get_objects() if type(one) is Live and one.state != "ended"]
        assert playing.name == client.name
        seen = client.watch(frame + 24, from_frame=frame)
        kept = [seen.frames[frame + k] for k in range(24)]
        seen.frames = dict(enumerate(kept))
        assert np.array_equal(seen.pictures(), wanted(generator, 5, frame, 24))
        standing = client.post("/pause")
        assert standing["recording_seconds"] == round(standing["frame"] / 16, 3)


@pytest.mark.whole
def test_blocks_of_the_session_before_are_not_taken_for_those_of_its_save(generator, tmp_path, monkeypatch):
    """They come out when the save is open already."""
    late, end, whole = threading.Event(), Engine.do_close, Session.begin

    def close(self, name):
        end(self, name)
        late.set()

    class Held:
        """Frames that come only when their session has been closed."""

        def __init__(self, frames):
            self.frames = frames

        def __len__(self):
            return len(self.frames)

        @property
        def pieces(self):
            late.wait(5)
            time.sleep(0.3)
            return self.frames.pieces

    def held(self, check, _early):
        frames = whole(self, check)
        return frames if late.is_set() else Held(frames)

    with serving(generator, tmp_path, max_sessions=2) as address:
        client, frame = saved(address, seed=5)
        client.post("/prompt", json={"prompt": B, "drop": False})  # of which nothing may be seen
        client.watch(frame, from_frame=frame - 8)  # so that more is wanted
        monkeypatch.setattr(Engine, "do_close", close)
        monkeypatch.setattr(Session, "begin", held)
        client.post("/resume")
        assert opened(client).status_code == 201
        seen = client.watch(frame + 16, from_frame=frame)
        seen.frames = {k - frame: one for k, one in seen.frames.items() if k >= frame}
        assert np.array_equal(seen.pictures()[:16], wanted(generator, 5, frame, 16))
        length = client.post("/pause")["frame"]
        data = client.request("GET", "/recording").content
        spans, at = [], data.index(b"moof") - 4
        while at < len(data):
            spans.append(span(data, at))
            at += spans[-1][2]
        assert [first for first, *_ in spans] == [0, *accumulate(count for _, count, _ in spans)][:-1]
        assert spans[-1][0] + spans[-1][1] == length


def test_a_viewer_of_a_queued_session_says_what_it_likes(generator, tmp_path):
    """Below the frame of the save, too; and when it plays, it goes on."""
    with serving(generator, tmp_path, max_sessions=1) as address:
        client, frame = saved(address)
        client.request("POST", "/resume")
        first = LiveClient(address)
        assert first.open()["state"] == "queued"
        assert opened(client).json()["state"] == "queued"  # and the other one plays now
        with client.connect() as socket:
            socket.send(f'{{"secret": "{client.secret}", "format": "png"}}')
            for said in (0, 10**6, 3):
                socket.send(f'{{"type": "shown", "frame": {said}}}')
            socket.send('{"type": "ping", "id": 7}')
            messages = [socket.recv(timeout=10) for _ in range(2)]
            assert '"pong"' in messages[-1] or any('"pong"' in socket.recv(timeout=10) for _ in range(3))
        first.request("DELETE")
        assert client.watch(frame + 16).frames


def test_a_full_disk_ends_the_recording_and_no_video(generator, tmp_path, monkeypatch):
    write = Recording._write

    def refuse(self, data, first, count):
        if first >= 17:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data, first, count)

    monkeypatch.setattr(Recording, "_write", refuse)
    with serving(generator, tmp_path, max_sessions=1) as address:
        client = LiveClient(address)
        client.open(seed=3)
        seen = client.watch(41)
        assert np.array_equal(seen.pictures()[:41], wanted(generator, 3, 0, 41))
        (told,) = [event for event in seen.events if event["type"] == "recording_ended"]
        assert told["frame"] == 17 and told["error"]["code"] == "failed" and "17" in told["error"]["message"]
        assert "error" not in seen.kinds()
        client.post("/pause")
        client.post("/rewind", json={"blocks": 1})
        standing = client.request("GET").json()
        assert standing["recording_ended"] and standing["recording_seconds"] == 1.062
        assert len(client.request("GET", "/recording").content) > 1000


def test_a_recording_that_cannot_begin_is_over(tmp_path):
    recording = Recording(tmp_path / "gone", b"head", 1000)
    assert (
        recording.append([], 0) and recording.is_over and recording.end == 0 and b"".join(recording.read()) == b"head"
    )


@pytest.mark.whole
def test_nothing_is_kept_where_nothing_may_be(generator, tmp_path):
    with serving(generator, tmp_path, max_sessions=2, limits=Limits(kept_sessions=0, idle_seconds=2.0)) as address:
        client, _ = saved(address)
        until = time.monotonic() + 20
        while client.request("GET").status_code == 200:
            assert time.monotonic() < until
            time.sleep(3.0)
        other = LiveClient(address)
        other.open()
        while Path(tmp_path, client.name).exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert opened(client).status_code == 404
        assert Path(tmp_path, other.name).exists()


def test_what_else_runs_does_not_count(monkeypatch):
    """A busy machine: for each second that a block takes, others have taken nine."""
    generator = make_generator(history_blocks=2)
    clock = capacity.thread_time
    monkeypatch.setattr(capacity, "perf_counter", lambda: 1000 * clock())
    measured = capacity.measure(generator, None, {"history_blocks": 2})
    assert measured.frames_per_second is not None
    alone = capacity._play(generator, {"history_blocks": 2})[0]
    assert 0.2 < measured.frames_per_second / alone < 5 and measured.sessions > 1


def test_a_folder_that_somebody_removes_costs_recordings_alone(generator, tmp_path):
    folder = tmp_path / "live"
    with serving(generator, folder, max_sessions=2) as address:
        client = LiveClient(address)
        client.open(seed=3)
        seen = client.watch(17)
        shutil.rmtree(folder)
        client.watch(41, from_frame=17, seen=seen)
        assert np.array_equal(seen.pictures()[:41], wanted(generator, 3, 0, 41))
        assert "recording_ended" in seen.kinds()
        assert client.request("GET", "/recording").status_code == 200
        assert client.request("POST", "/save").status_code == 507
        other = LiveClient(address)
        other.open()
        assert other.watch(9).frames


@pytest.mark.whole
def test_who_takes_nothing_has_no_connection_in_the_end(generator, tmp_path):
    """Also where its end of the connection stays open, and asks for nothing more."""
    with serving(generator, tmp_path, max_sessions=1, limits=Limits(slow_seconds=0.5)) as address:
        client = LiveClient(address)
        client.open()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", int(address.rpartition(":")[2])))
        mine = deaf.getsockname()
        with connect(
            f"ws://127.0.0.1/api/sessions/{client.name}/stream", sock=deaf, max_queue=1, close_timeout=0.1
        ) as one:
            one.send(f'{{"secret": "{client.secret}", "format": "png"}}')
            before, until = None, time.monotonic() + 40
            while before != 0:
                client.watch(client.request("GET").json()["frame"] + 64)  # which it would be sent, too
                found = psutil.Process().net_connections("tcp")
                before = sum(it.status == "ESTABLISHED" and it.raddr == mine for it in found)
                assert time.monotonic() < until, "it is still connected"


def test_nothing_but_sessions_is_removed(generator, tmp_path):
    """Somebody has other things where the server keeps its sessions: `--folder outputs`, say."""
    for name in ("run", "photographs", "0123456789abcdeg"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"w")
    stale = tmp_path / "0123456789abcdef"
    stale.mkdir()
    with serving(generator, tmp_path, max_sessions=1, limits=Limits(kept_sessions=0)) as address:
        LiveClient(address).open()
        until = time.monotonic() + 20
        while stale.exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert len(list(tmp_path.glob("*/weights.safetensors"))) == 3


def test_a_picture_that_the_disk_refused_costs_no_later_save(tmp_path, monkeypatch):
    begin = Beginning(A, b"picture" * 1000, 0, None, None)
    stored = store.Stored(tmp_path / "s", b"secret", (store.Saved(1, 9, 0, 0, Timeline(begin)),))
    stored.folder.mkdir()
    store.save_file(stored.folder, 1).touch()
    write = Path.write_bytes

    def half(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OutputError, match="No space"):
            store.write(stored)
    assert not list(stored.folder.glob(".*.part"))
    store.write(stored)
    assert store.read_all(tmp_path)["s"] == stored


@pytest.mark.slow
def test_what_was_recorded_behind_a_save_is_kept_or_the_save_stays_shut(generator, tmp_path, monkeypatch):
    read = Recording.read

    def refuse(self):
        yield next(read(self))
        raise OSError(errno.ENOSPC, "No space left on device")

    with serving(generator, tmp_path, max_sessions=1) as address:
        client, frame = saved(address, seed=3)
        client.post("/resume")
        client.watch(frame + 16)
        earlier = tmp_path / client.name / "earlier.mp4"
        assert opened(client).status_code == 201
        before = earlier.read_bytes()
        client.watch(frame + 16)
        with monkeypatch.context() as patch:
            patch.setattr(Recording, "read", refuse)
            answer = opened(client)
        assert answer.status_code == 507 and answer.json()["error"]["code"] == "failed"
        assert client.request("GET").status_code == 404  # and no session is left that never plays
        assert earlier.read_bytes() == before and not list(earlier.parent.glob(".*.part"))
        assert opened(client).status_code == 201
        assert client.watch(frame + 8).frames


@pytest.mark.slow
def test_a_save_that_was_on_its_way_when_its_session_made_way_is_opened(generator, tmp_path, monkeypatch):
    begun, write = threading.Event(), store.write

    def slowly(stored):
        if len(stored.saves) == 2:
            begun.set()
            time.sleep(0.5)
        write(stored)

    with serving(generator, tmp_path, max_sessions=1) as address, ThreadPoolExecutor(1) as pool:
        client, _ = saved(address, seed=3)
        monkeypatch.setattr(store, "write", slowly)
        saving = pool.submit(client.request, "POST", "/save")
        assert begun.wait(20)
        other = LiveClient(address)
        other.name, other.secret = client.name, client.secret
        assert opened(other).status_code == 201
        saving.result(timeout=20)
        assert [one["save"] for one in other.request("GET").json()["saves"]] == [1, 2]


def test_a_recording_that_is_read_while_it_is_rewound_ends_whole(tmp_path):
    """What is written anew where the old frames lay is no part of what was asked for."""
    size = Size.of(32, 32)
    recording, encoder = Recording(tmp_path, b"head", 1 << 20), LiveEncoder(size, 16)
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
    whole = [recording.append(encoder.encode(noise[k : k + 8]), k) for k in (0, 8, 16)]
    reading = recording.read()
    assert next(reading) == b"head" and next(reading) == whole[0]
    recording.cut(8)
    recording.append(encoder.encode(np.zeros_like(noise[:8])), 8)
    recording.append(encoder.encode(noise[:8]), 16)
    assert list(reading) == []
