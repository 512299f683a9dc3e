"""Who is refused, and that the honest viewer does not notice. Loopback only."""

import asyncio
import io
import json
import logging
import socket
import struct
import zlib

import httpx
import numpy as np
import pytest
from live_server import LiveClient, png_of, serving, until_closed
from PIL import Image
from tiny_sessions import PICTURE, A
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from longtake.errors import ConfigError
from longtake.serve.app import make_app
from longtake.serve.run import address_of
from longtake.serve.security import Guard
from longtake.serve.settings import Limits, ServeSettings

TOKEN = "0123456789abcdef0123456789abcdef"
LIMITS = Limits(creates_per_minute=1000, hello_seconds=1.0, slow_seconds=2.0)


@pytest.fixture(scope="module")
def guarded(generator, tmp_path_factory):
    with serving(generator, tmp_path_factory.mktemp("guarded"), token=TOKEN, max_sessions=3, limits=LIMITS) as address:
        yield address


@pytest.fixture(scope="module")
def client(guarded):
    """A session of which nothing is changed and that nobody watches."""
    client = LiveClient(guarded, TOKEN)
    client.open(seed=1)
    return client


@pytest.fixture
def watched(guarded):
    client = LiveClient(guarded, TOKEN)
    client.open(seed=1)
    yield client
    client.request("DELETE")


def error_of(answer):
    """The error of an answer, which says nothing of this machine."""
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "fix"} and all(isinstance(one, str) for one in error.values())
    assert "/work" not in answer.text and "/tmp" not in answer.text and "Traceback" not in answer.text
    return answer.status_code, error["code"]


def bomb(width, height):
    """A PNG of a few bytes that would be gigabytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(bytes(1000))) + part(b"IEND", b"")


def test_the_token_is_asked_for(client, guarded):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
        for path in ("/api/info", "/openapi.json", f"/api/sessions/{client.name}"):
            assert error_of(httpx.get(guarded + path, headers=headers)) == (401, "unauthorized")
    assert httpx.get(f"{guarded}/api/info?token={TOKEN}").status_code == 401
    info = client.http.get("/api/info")
    assert info.status_code == 200 and info.json()["model"]["name"] == "student"  # the page shows it
    with connect(f"{guarded.replace('http', 'ws')}/api/sessions/{client.name}/stream") as stream:
        stream.send(json.dumps({"secret": client.secret, "token": "wrong"}))
        assert json.loads(stream.recv(timeout=5))["error"]["code"] == "unauthorized"


ROUTES = [
    ("GET", ""),
    ("DELETE", ""),
    ("POST", "/prompt"),
    ("POST", "/image"),
    ("POST", "/target"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/rewind"),
    ("POST", "/fork"),
    ("POST", "/save"),
    ("GET", "/recording"),
    ("GET", "/script"),
    ("GET", "/thumbnails/0"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_route_of_a_session_answers_without_its_secret(client, method, path):
    body = {"/prompt": {"json": {"prompt": A}}, "/rewind": {"json": {"blocks": 1}}}.get(path, {})
    for headers in ({}, {"x-session-secret": "x"}, {"x-session-secret": client.secret[:-1]}):
        answer = client.http.request(method, f"/api/sessions/{client.name}{path}", headers=headers, **body)
        assert error_of(answer) == (404, "not_found")
    assert client.request("GET").status_code == 200


def test_foreign_hosts_and_origins_are_refused(client, guarded):
    assert error_of(client.http.get("/api/info", headers={"host": "evil.example"})) == (403, "forbidden")
    assert error_of(client.http.get("/", headers={"host": "127.0.0.1.evil.example:80"})) == (403, "forbidden")
    for origin in ("http://evil.example", "null", guarded.replace("http", "https") + "0"):
        assert error_of(client.http.get("/api/info", headers={"origin": origin})) == (403, "forbidden")
        with pytest.raises(InvalidStatus):
            connect(f"{guarded.replace('http', 'ws')}/api/sessions/{client.name}/stream", origin=origin)
    assert client.http.get("/api/info", headers={"origin": guarded}).status_code == 200


def test_names_are_names_however_they_are_written(tmp_path):
    guard = Guard(None, ServeSettings(tmp_path, hosts=("Box.Local",)), None)
    guard._check({"type": "http", "path": "/", "headers": [(b"host", b"box.local:8765")]})
    assert [address_of(host, 80) for host in ("127.0.0.1", "::1")] == ["http://127.0.0.1:80", "http://[::1]:80"]


def test_every_answer_carries_the_policy(client):
    for path in ("/api/info", "/health", "/nowhere", "/static/nothing.js"):
        headers = client.http.get(path).headers
        assert "script-src 'self';" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (bomb(60_000, 60_000), 422),
        (bomb(2000, 2000), 422),  # not whole
        (b"", 422),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422),
        (b"GIF89a" + bytes(100), 422),
        (png_of(PICTURE)[:200], 422),
        (bytes(LIMITS.upload_bytes + 1), 413),
        (bytes(LIMITS.body_bytes + 1), 413),
    ],
    ids=["bomb", "cut bomb", "empty", "svg", "gif", "cut", "large", "larger"],
)
def test_pictures_that_are_not_taken(client, data, status):
    answer = client.request("POST", "/image", files={"image": ("../../etc/passwd", data, "image/png")})
    assert error_of(answer)[0] == status
    assert client.request("GET").json()["changes"] == []


def test_a_tiff_and_a_picture_of_many_pixels_are_refused(client):
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "TIFF")
    assert error_of(client.request("POST", "/image", files={"image": ("a.png", file.getvalue())})) == (422, "unusable")
    file = io.BytesIO()
    Image.new("1", (8000, 5000)).save(file, "PNG")  # a few kilobytes
    assert error_of(client.request("POST", "/image", files={"image": ("a.png", file.getvalue())})) == (413, "too_large")


def test_a_body_without_a_length_is_counted(client):
    def endless():
        for _ in range(400):
            yield bytes(1 << 16)

    answer = client.http.post(
        f"/api/sessions/{client.name}/prompt",
        content=endless(),
        headers={"x-session-secret": client.secret, "content-type": "application/json"},
    )
    assert error_of(answer) == (413, "too_large")


@pytest.mark.parametrize("name", ["..", "../x", "..%2f..%2fetc", "%00", "a" * 5000, "x/../../y", "*"])
def test_names_lead_nowhere(client, name):
    for path in (f"/api/sessions/{name}", f"/static/{name}", f"/api/sessions/{client.name}/thumbnails/{name}"):
        answer = client.http.get(path, headers={"x-session-secret": client.secret})
        assert answer.status_code in (404, 422, 405, 200), answer.text
        if answer.status_code == 200:  # the client has shortened the address itself
            assert answer.request.url.path in ("/api/info", "/", f"/api/sessions/{client.name}")
    opened = client.http.post("/api/sessions/open", data={"id": name[:64], "secret": client.secret})
    assert opened.status_code in (404, 422)


def test_prompts_that_are_not_taken(client):
    for prompt in ("", "   ", "x" * 1001, "\ud800"):
        body = json.dumps({"prompt": prompt}).encode()
        answer = client.request("POST", "/prompt", content=body)
        assert error_of(answer) == (422, "bad_request"), prompt[:10]
    for body in ({"prompt": A, "more": 1}, {"prompt": 3}, {}, [], {"prompt": A, "drop": "perhaps"}):
        assert error_of(client.request("POST", "/prompt", json=body)) == (422, "bad_request")
    for body in ({"blocks": 0}, {"blocks": -1}, {"blocks": 10**30}, {"blocks": 1, "to_frame": 1}, {}):
        assert error_of(client.request("POST", "/rewind", json=body)) == (422, "bad_request")
    for fields in ({"seed": -1}, {"seed": 2**63}, {"guidance": "nan"}, {"guidance": -1}, {"prompt": ""}):
        answer = client.http.post(
            "/api/sessions", data={"prompt": A, **fields}, files={"image": ("a.png", png_of(PICTURE))}
        )
        assert error_of(answer) == (422, "bad_request"), fields


def test_a_viewer_that_says_nothing_or_too_much_is_closed(watched):
    with watched.connect() as stream:
        assert json.loads(stream.recv(timeout=5))["error"]["code"] == "bad_request"  # no hello within a second
    hello = json.dumps({"secret": watched.secret, "token": TOKEN})
    for said in ('{"type": "shown"}', '{"type": "shown", "frame": -1}', "{", "[]", b"\0", "x" * 5000, '"shown"'):
        with watched.connect() as stream:
            stream.send(hello)
            with pytest.raises(ConnectionClosed):
                stream.send(said)
                until_closed(stream)
                stream.send(said)
    with watched.connect() as stream:
        stream.send(hello)
        with pytest.raises(ConnectionClosed):
            for k in range(200):
                stream.send(json.dumps({"type": "ping", "id": k}))
            until_closed(stream)
            stream.send(hello)
    assert len(watched.watch(17).frames) >= 17


def test_more_viewers_than_may_watch_are_refused(watched):
    hello = json.dumps({"secret": watched.secret, "token": TOKEN})
    streams = [watched.connect() for _ in range(5)]
    for stream in streams:
        stream.send(hello)
    said = sorted(json.loads(one.recv(timeout=5))["type"] for one in streams)
    assert said[0] == "error" and set(said[1:]) <= {"hello", "error"} and "hello" in said
    for stream in streams:
        stream.close()


def test_a_slow_reader_is_dropped_and_costs_the_other_viewer_nothing(watched):
    """One viewer takes nothing and has no room for it in the kernel either."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", int(watched.address.rpartition(":")[2])))
    with connect(
        f"ws://127.0.0.1/api/sessions/{watched.name}/stream", sock=slow, max_queue=1, close_timeout=0.1
    ) as stream:
        stream.send(json.dumps({"secret": watched.secret, "token": TOKEN, "format": "png"}))
        seen = watched.watch(96)
    assert len(seen.frames) >= 96 and "error" not in seen.kinds()


def test_what_is_said_is_not_in_the_log(generator, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(generator, tmp_path, token=TOKEN, max_sessions=1) as address:
        client = LiveClient(address, TOKEN)
        client.open(prompt="a zebra that nobody knows")
        client.watch(9)
        client.post("/prompt", json={"prompt": "a giraffe that nobody knows"})
        client.request("POST", "/rewind", json={"blocks": 99})
        client.watch(25)
    said = "\n".join(
        f"{record.name} {record.getMessage()}" for record in caplog.records if "httpcore" not in record.name
    )
    ours = "\n".join(line for line in said.splitlines() if line.startswith(("longtake", "uvicorn")))
    for word in ("zebra", "giraffe", client.secret, TOKEN):
        assert word not in ours


def test_beyond_this_machine_there_must_be_a_token(tmp_path):
    with pytest.raises(ConfigError, match="token"):
        ServeSettings(tmp_path, host="0.0.0.0")
    with pytest.raises(ConfigError, match="16 characters"):
        ServeSettings(tmp_path, token="short")
    assert "0123" not in repr(ServeSettings(tmp_path, token=TOKEN))


def test_metrics_need_the_token_beyond_this_machine(tmp_path, guarded):
    """The layer alone, which listens nowhere."""
    app = make_app([], ServeSettings(tmp_path, host="0.0.0.0", token=TOKEN, hosts=("live.example",)))

    async def ask(path, **headers):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://live.example") as http:
            return (await http.get(path, headers=headers)).status_code

    assert asyncio.run(ask("/metrics")) == 401
    assert asyncio.run(ask("/health")) == 200
    text = httpx.get(f"{guarded}/metrics").text
    assert "longtake_sessions " in text and "longtake_frames_total" in text


def test_too_many_creates_are_refused(generator, tmp_path):
    with serving(generator, tmp_path, max_sessions=1, limits=Limits(creates_per_minute=5, queued=3)) as address:
        client = LiveClient(address)
        client.open()
        codes = [
            client.http.post(
                "/api/sessions", data={"prompt": A}, files={"image": ("a.png", png_of(PICTURE))}
            ).status_code
            for _ in range(10)
        ]
        assert codes == [201] * 3 + [503] + [429] * 6
        assert len(client.watch(17).frames) >= 17


@pytest.mark.whole
def test_sessions_that_nobody_watches_end_and_can_be_opened(generator, tmp_path):
    with serving(generator, tmp_path, max_sessions=2, limits=Limits(idle_seconds=0.3, total_seconds=2.5)) as address:
        idle, long = LiveClient(address), LiveClient(address)
        idle.open()
        long.open()
        seen = long.until_the_end()
        assert seen.events[-1]["type"] == "bye"
        assert (seen.events[-1]["reason"], seen.events[-1]["reopens"]) == ("time", True)
        assert idle.request("GET").status_code == 404
        body = {"id": idle.name, "secret": idle.secret}
        assert idle.http.post("/api/sessions/open", data=body).status_code == 201


def test_a_full_memory_ends_one_session_alone(generator, tmp_path, monkeypatch):
    from longtake.inference.session import Session

    whole = Session.begin

    def begin(self, *given):
        if self.seed == 666 and self.num_frames >= 41:  # when somebody watches
            raise MemoryError
        return whole(self, *given)

    monkeypatch.setattr(Session, "begin", begin)
    with serving(generator, tmp_path, max_sessions=2) as address:
        poor, honest = LiveClient(address), LiveClient(address)
        poor.open(seed=666)
        honest.open(seed=1)
        said = {event["type"]: event for event in poor.until_the_end().events}
        assert said["error"]["error"]["code"] == "out_of_memory" and said["bye"]["reason"] == "out_of_memory"
        assert len(honest.watch(33).frames) >= 33
        assert poor.open(seed=2)["state"] == "starting"
        assert np.array(poor.watch(9).pictures()).shape[0] >= 9
