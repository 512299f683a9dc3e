"""What a viewer receives, against the frames of a session in Python."""

import io
import json
import time

import av
import numpy as np
import pytest
from live_server import SECONDS, LiveClient, until_closed
from tiny_sessions import OTHER, PICTURE, A, B, C
from websockets.exceptions import ConnectionClosed

from longtake.serve.h264 import LiveEncoder, Size, nal_units
from longtake.toy.world import sample_world


def made(session, until):
    frames = []
    while sum(map(len, frames)) < until:
        frames.append(session.next())
    return np.concatenate(frames)[:until]


def decoded(units):
    codec = av.CodecContext.create("h264", "r")
    frames = [frame for unit in units for frame in codec.decode(av.Packet(unit))] + codec.decode(None)
    return np.stack([frame.reformat(format="rgb24", src_colorspace="ITU601").to_ndarray() for frame in frames])


def psnr(one, other):
    return 10 * np.log10(255**2 / ((one.astype(float) - other) ** 2).mean())


@pytest.mark.parametrize("made_before", [0, 17])
def test_png_is_the_session_bit_for_bit(client, generator, made_before):
    """Whether the viewer was there first or the blocks: `hello` names those that have begun, each later one is told."""
    client.open(seed=3)
    until = time.monotonic() + SECONDS
    while client.request("GET").json()["frame"] < made_before:
        assert time.monotonic() < until, "no block was made"
        time.sleep(0.02)
    seen = client.watch(41)
    session = generator.open(PICTURE, A, seed=3)
    assert np.array_equal(seen.pictures(), made(session, 41))
    hello = seen.events[0]
    assert hello["type"] == "hello" and hello["stream"]["height"] == 32 and hello["prompt"] == A
    told = [event for event in seen.events if event["type"] == "block"]
    blocks = [(one["first_frame"], one["count"]) for one in [*hello["blocks"], *told]]
    assert blocks == [(0, 1), (1, 8), (9, 8), (17, 8), (25, 8), (33, 8)]
    assert told[0]["thumbnail"].startswith("data:image/jpeg;base64,/9j/")
    assert client.request("GET", "/thumbnails/0").content.startswith(b"\xff\xd8\xff")


def test_h264_and_mp4_are_the_same_pictures_enlarged(client, generator):
    client.open(seed=3)
    units = client.watch(25, "h264").frames
    fragments = client.watch(33, "mp4", from_frame=0).fragments
    frames = decoded(units[k] for k in sorted(units))
    wanted = made(generator.open(PICTURE, A, seed=3), 25).repeat(8, 1).repeat(8, 2)
    assert frames.shape == (25, 256, 256, 3) and psnr(frames, wanted) > 30  # noise
    for first in (0, 1, 9, 17):  # a message can be begun with
        assert [nal[0] & 31 for nal in nal_units(units[first])][:2] == [7, 8]
    with av.open(io.BytesIO(b"".join(fragments))) as file:
        shown = [frame.reformat(format="rgb24", src_colorspace="ITU601").to_ndarray() for frame in file.decode(video=0)]
    assert np.array_equal(np.stack(shown)[:25], frames)


def test_pictures_of_the_toy_are_sent_at_more_than_38_db():
    frames = sample_world(3, 0).render(33)
    encoder = LiveEncoder(Size.of(64, 64), 16)
    units = [unit for first, end in ((0, 1), (1, 5), (5, 17), (17, 33)) for unit in encoder.encode(frames[first:end])]
    assert psnr(decoded(units), frames.repeat(4, 1).repeat(4, 2)) > 38


@pytest.mark.parametrize(("height", "width", "slices"), [(256, 256, 1), (480, 832, 4)])
def test_large_pictures_are_encoded_by_several_threads_and_none_is_held_back(height, width, slices, monkeypatch):
    """The same bytes whenever it is done, and a picture for each unit."""
    monkeypatch.setattr("longtake.serve.h264.num_cores", lambda: 8)
    rows, columns = np.mgrid[:height, :width]
    grey = np.stack([(rows + columns + 8 * k) * 200 // (height + width) for k in range(3)]).astype(np.uint8)
    pictures = grey[..., None].repeat(3, -1)
    units, again = (LiveEncoder(Size.of(height, width), 16).encode(pictures) for _ in range(2))
    assert units == again and all(len(decoded(units[: k + 1])) == k + 1 for k in range(3))
    assert [len(nal_units(unit)) for unit in units[1:]] == [slices] * 2
    assert psnr(decoded(units), pictures) > 36


def test_changes_drop_what_was_not_shown_and_say_from_which_frame_they_hold(client, generator):
    client.open(seed=3)
    told = []
    at = {
        9: lambda: told.append(client.post("/prompt", json={"prompt": B})),
        25: lambda: told.append(client.picture("/image", OTHER)),
        33: lambda: told.append(client.post("/prompt", json={"prompt": C, "drop": False})),
    }
    seen = client.watch(66, at=at)
    frames = [one["from_frame"] for one in told]
    session = generator.open(PICTURE, A, seed=3)
    wanted = [made(session, frames[0])]
    session.prompt = B
    wanted.append(made(session, frames[1] - frames[0]))
    session.image = OTHER
    wanted.append(made(session, frames[2] - frames[1]))
    session.prompt = C
    wanted.append(made(session, 66 - frames[2]))
    assert np.array_equal(seen.pictures()[:66], np.concatenate(wanted))
    changes = [event for event in seen.events if event["type"] == "change"]
    assert [(one["from_frame"], one["number"], one["kind"]) for one in changes] == [
        (frames[0], 1, "prompt"),
        (frames[1], 2, "image"),
        (frames[2], 3, "prompt"),
    ]
    assert [event["reason"] for event in seen.events if event["type"] == "rewound"] == ["drop"] * sum(
        one["dropped"] for one in changes
    )


def test_no_more_blocks_are_made_than_may_be_ahead(client):
    client.open()
    seen = client.watch(9)
    paused = client.post("/pause")
    assert paused["state"] == "paused" and paused["frame"] <= 9 + 2 * 8 + 8
    time.sleep(0.3)
    assert client.request("GET").json()["frame"] == paused["frame"]
    client.post("/resume")
    assert client.watch(paused["frame"] + 8, from_frame=9, seen=seen).pictures().shape[0] >= paused["frame"] + 8


def test_who_comes_back_goes_on(client, generator):
    client.open(seed=1)
    seen = client.watch(20)
    client.watch(60, from_frame=20, seen=seen)
    assert np.array_equal(seen.pictures()[:60], made(generator.open(PICTURE, A, seed=1), 60))


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ('{"secret": "wrong"}', "not_found"),
        ("{", "bad_request"),
        ('{"secret": "x", "format": "gif"}', "bad_request"),
        (json.dumps({"secret": "x" * 2000}), "bad_request"),
        (b"\0\1", "bad_request"),
    ],
)
def test_a_wrong_first_message_is_refused(client, first, code):
    client.open()
    with client.connect() as socket:
        socket.send(first)
        assert json.loads(socket.recv(timeout=10))["error"]["code"] == code
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=10)


def test_a_deleted_session_says_goodbye(client):
    client.open()
    with client.connect() as socket:
        socket.send(json.dumps({"secret": client.secret, "format": "h264"}))
        assert json.loads(socket.recv(timeout=10))["type"] == "hello"
        assert client.request("DELETE").status_code == 204
        last = until_closed(socket)
    assert json.loads(last)["reason"] == "deleted"
    assert client.request("GET").status_code == 404


def test_two_sessions_play_beside_each_other(address, generator):
    first, second = LiveClient(address), LiveClient(address)
    first.open(seed=1)
    second.open(seed=2)
    for client, seed in ((first, 1), (second, 2), (first, 1)):
        seen = client.watch(25)
        assert seen.events[0]["seed"] == seed
    assert np.array_equal(second.watch(33, from_frame=0).pictures(), made(generator.open(PICTURE, A, seed=2), 33))
