"""Fork, rewind, save, open, the script and the recording, over the API, against a session in Python: bit for bit."""

import errno
import io
import zipfile
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from live_server import LiveClient, serving
from tiny_sessions import KINDS, OTHER, PICTURE, A, B, C, make_generator

from longtake.errors import ConfigError
from longtake.inference.script import read_story
from longtake.serve.timeline import Beginning, Change, Timeline


def made(session, until):
    """Frames from where a session stands to that number."""
    frames = []
    while session.num_frames < until:
        frames.append(session.next())
    return np.concatenate(frames)


def frames_of(data):
    """(time, picture) as far as they can be read."""
    found = []
    with av.open(io.BytesIO(data)) as file, suppress(av.error.InvalidDataError):
        for frame in file.decode(video=0):
            found.append((frame.pts, frame.reformat(format="rgb24").to_ndarray()))
    return found


def opened_so_far(client):
    """Sessions that the server says it has opened."""
    lines = client.http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("longtake_opened_total"))


def replayed(data, folder, generator):
    """The frames of a script that was downloaded."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)
    story = read_story(folder / "story.yaml", generator.settings)
    return np.concatenate(list(story.play(story.open(generator, history_blocks=0))))


def test_a_rewound_session_goes_on_as_in_python(client, generator):
    client.open(seed=4)
    seen = client.watch(33)
    client.post("/pause")
    standing = client.request("GET").json()
    told = client.post("/rewind", json={"to_frame": 17})
    assert told == {"from_frame": 17, "number": 0}
    assert client.request("GET").json()["rewindable"] == standing["rewindable"] - (standing["frame"] - 17) // 8
    client.post("/prompt", json={"prompt": B})
    client.post("/resume")
    client.watch(41, seen=seen)
    session = generator.open(PICTURE, A, seed=4)
    before = made(session, 17)
    session.prompt = B
    assert np.array_equal(seen.pictures()[:41], np.concatenate([before, made(session, 41)]))
    assert client.request("POST", "/rewind", json={"blocks": 99}).json()["error"]["code"] == "conflict"


def test_a_branch_goes_on_as_in_python(client, address, generator):
    client.open(seed=4)
    seen = client.watch(17)
    branch, before = LiveClient(address), opened_so_far(client)
    made_branch = client.post("/fork")
    assert opened_so_far(client) == before + 1
    branch.use(made_branch)
    assert made_branch["frame"] >= 17 and branch.name != client.name and branch.secret != client.secret
    told = branch.post("/prompt", json={"prompt": C})
    assert told["from_frame"] in (17, 25)  # behind what was shown, and what is shown meanwhile
    other = branch.watch(41, from_frame=0)
    client.watch(41, seen=seen)
    session = generator.open(PICTURE, A, seed=4)
    first = made(session, told["from_frame"])
    fork = session.fork()
    fork.prompt = C
    assert np.array_equal(seen.pictures()[:41], np.concatenate([first, made(session, 41)]))
    assert np.array_equal(other.pictures()[:41], np.concatenate([first, made(fork, 41)]))
    assert len(frames_of(branch.request("GET", "/recording").content)) >= 41


@pytest.mark.whole
def test_a_saved_session_is_opened_after_a_restart(generator, tmp_path):
    with serving(generator, tmp_path, max_sessions=2) as address:
        client = LiveClient(address)
        client.open(seed=6)
        client.watch(17)
        client.post("/prompt", json={"prompt": B})
        client.watch(25)
        client.post("/pause")
        saved = client.post("/save")
        client.post("/rewind", json={"blocks": 1})
        client.post("/prompt", json={"prompt": C})
        client.post("/resume")
        client.watch(saved["frame"] + 17)
    with serving(generator, tmp_path, max_sessions=2) as address:  # the end of the first one saved it again
        again = LiveClient(address)
        again.name, again.secret = client.name, client.secret
        assert again.request("GET").status_code == 404
        body = {"id": client.name, "secret": client.secret}
        assert again.http.post("/api/sessions/open", data={**body, "secret": "x"}).status_code == 404
        assert again.http.post("/api/sessions/open", data={**body, "save": 7}).status_code == 404
        opened = again.http.post("/api/sessions/open", data={**body, "save": 1})
        assert opened.status_code == 201 and opened.json()["secret"] == client.secret
        standing = again.request("GET").json()
        assert standing["prompt"] == B and [one["save"] for one in standing["saves"]] == [1, 2]
        seen = again.watch(saved["frame"] + 17)
        session = generator.open(PICTURE, A, seed=6)
        made(session, standing["changes"][0]["from_frame"])
        session.prompt = B
        made(session, saved["frame"])
        assert sorted(seen.frames)[0] == saved["frame"]
        got = [seen.frames[k] for k in sorted(seen.frames)]
        wanted = made(session, saved["frame"] + len(got))
        seen.frames = dict(enumerate(got))
        assert np.array_equal(seen.pictures(), wanted[: len(got)])
        assert (tmp_path / client.name / "earlier.mp4").stat().st_size > 10_000  # what was recorded behind the save


@pytest.mark.whole
def test_the_script_makes_the_same_video_again(client, generator, tmp_path):
    client.open(seed=2)
    at = {
        9: lambda: client.post("/prompt", json={"prompt": B}),
        25: lambda: client.picture("/target", OTHER),
        41: lambda: client.picture("/target", None),
        57: lambda: client.picture("/image", OTHER),
    }
    seen = client.watch(75, at=at)
    client.post("/pause")
    length = client.request("GET").json()["frame"]
    client.watch(length, from_frame=0, seen=seen)
    video = replayed(client.request("GET", "/script").content, tmp_path, generator)
    assert np.array_equal(seen.pictures(), video)


@pytest.mark.parametrize("begin", [None, PICTURE], ids=["alone", "with a picture"])
def test_the_script_of_cuts_with_and_without_a_picture(tmp_path, begin):
    """Also where a session begins with its prompt alone, and the first picture is that of a later scene."""
    generator = make_generator(**KINDS["begun by text alone"], history_blocks=6)
    with serving(generator, tmp_path / "live", max_sessions=1) as address:
        client = LiveClient(address)
        client.open(picture=begin, seed=2)
        at = {9: lambda: client.picture("/image", OTHER), 25: lambda: client.picture("/image", None)}
        seen = client.watch(41, at=at)
        client.post("/pause")
        client.watch(client.request("GET").json()["frame"], from_frame=0, seen=seen)
        data = client.request("GET", "/script").content
        assert np.array_equal(seen.pictures(), replayed(data, tmp_path / "again", generator))


def test_the_script_of_a_cut_to_a_scene_that_moves_towards_a_target(client, generator, tmp_path):
    client.open(seed=2)

    def cut():
        client.post("/pause")
        client.picture("/image", OTHER)
        client.picture("/target", PICTURE)
        client.post("/resume")

    seen = client.watch(41, at={9: cut})
    client.post("/pause")
    client.watch(client.request("GET").json()["frame"], from_frame=0, seen=seen)
    assert np.array_equal(seen.pictures(), replayed(client.request("GET", "/script").content, tmp_path, generator))


def test_a_target_before_the_first_frame_is_in_no_script():
    target = Change(1, "target", 0, A, b"target")
    with pytest.raises(ConfigError, match="begins without a target"):
        Timeline(Beginning(A, b"picture", 0, None, None), [target], 1).script(9)
    for first in ([target, Change(2, "target", 0, A)], [target, Change(2, "image", 0, A, b"other")]):
        assert Timeline(Beginning(A, b"picture", 0, None, None), first, 2).script(9)


def test_guidance_is_that_of_the_session_and_of_its_script(client, generator, tmp_path):
    client.open(seed=2, guidance=2.0, negative=C)
    seen = client.watch(25)
    client.post("/pause")
    client.watch(client.request("GET").json()["frame"], from_frame=0, seen=seen)
    assert np.array_equal(seen.pictures(), replayed(client.request("GET", "/script").content, tmp_path, generator))
    guided = make_generator(history_blocks=6, guidance=2.0).open(PICTURE, A, seed=2, negative=C)
    assert np.array_equal(seen.pictures()[:25], made(guided, 25))
    plain = client.http.post("/api/sessions", data={"prompt": A, "negative": C}, files={"image": ("p.png", b"x")})
    assert plain.status_code == 422  # no picture


def test_a_recording_holds_what_holds_and_begins_at_zero(client):
    client.open()
    client.watch(33)
    client.post("/pause")
    client.post("/rewind", json={"to_frame": 17})
    answer = client.request("GET", "/recording")
    assert answer.headers["content-type"] == "video/mp4"
    shown = frames_of(answer.content)
    assert [pts for pts, _ in shown] == [512 * k for k in range(17)]
    assert shown[0][1].shape == (256, 256, 3)


def test_what_a_killed_server_leaves_plays(client, live_folder):
    client.open()
    client.watch(33)
    (file,) = (live_folder / client.name).glob("recording-*.mp4")
    data = file.read_bytes()
    for cut in (len(data), len(data) - 100):
        shown = frames_of(data[:cut])
        assert len(shown) >= 25


def test_the_oldest_part_of_a_long_recording_goes(tmp_path):
    from longtake.serve.h264 import Headers, LiveEncoder, Size
    from longtake.serve.mp4 import head
    from longtake.serve.recording import Recording

    size = Size.of(32, 32)
    recording = Recording(tmp_path, head(Headers.of(size, 16), size, 16), 100_000)
    encoder, noise = LiveEncoder(size, 16), np.random.default_rng(0)
    for first in range(0, 48, 8):
        recording.append(encoder.encode(noise.integers(0, 256, (8, 32, 32, 3), np.uint8)), first)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 200_000
    assert recording.first > 0 and recording.end == 48
    shown = frames_of(b"".join(recording.read()))
    assert [pts for pts, _ in shown] == [512 * k for k in range(48 - recording.first)]
    again = Recording(tmp_path, recording._head, 100_000)
    assert (again.first, again.end) == (recording.first, 48)
    again.cut(40)
    assert len(frames_of(b"".join(again.read()))) == 40 - again.first


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "pathlib.Path.write_text"])
def test_a_save_that_the_disk_refuses_is_no_save(client, monkeypatch, where):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    client.open()
    client.watch(9)
    assert client.post("/save")["save"] == 1
    with monkeypatch.context() as patched:
        patched.setattr(where, refuse)
        answer = client.request("POST", "/save")
    assert answer.status_code == 507 and answer.json()["error"]["code"] == "failed", answer.text
    assert "disk" in answer.text and "picture" not in answer.text
    assert [one["save"] for one in client.request("GET").json()["saves"]] == [1]
    assert client.post("/save")["save"] == 2


def test_damaged_saves_are_refused_and_cost_nobody_anything(generator, tmp_path):
    with serving(generator, tmp_path, max_sessions=2) as address:
        client = LiveClient(address)
        client.open()
        client.watch(9)
        client.post("/save")
    file = next(Path(tmp_path).glob("*/save-1.safetensors"))
    whole = file.read_bytes()
    with serving(generator, tmp_path, max_sessions=2) as address:
        client.http, honest = LiveClient(address).http, LiveClient(address)
        for data in (b"", whole[:1000], whole[:-5], b"\xff" * 64, whole.replace(b"scene", b"scena")):
            file.write_bytes(data)
            body = {"id": client.name, "secret": client.secret, "save": 1}
            answer = client.http.post("/api/sessions/open", data=body)
            assert answer.status_code == 422 and str(tmp_path) not in answer.text, answer.text
        file.write_bytes(whole)
        assert client.http.post("/api/sessions/open", data=body).status_code == 201
        honest.open()
        assert len(honest.watch(17).frames) >= 17


@pytest.mark.parametrize("count", [2])
def test_who_finds_no_place_is_queued_and_let_in(generator, tmp_path, count):
    with serving(generator, tmp_path, max_sessions=1) as address:
        first, second, third = (LiveClient(address) for _ in range(3))
        assert first.open()["state"] == "starting"
        assert (second.open()["place"], third.open()["place"]) == (1, 2)
        assert second.request("POST", "/prompt", json={"prompt": B}).status_code == 409
        assert first.request("POST", "/fork").json()["error"]["code"] == "full"
        first.request("DELETE")
        assert third.request("GET").json()["place"] == 1
        assert third.request("GET").json()["estimate_seconds"] is not None
        assert len(second.watch(9).frames) >= 9
