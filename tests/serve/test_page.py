"""The page as a person uses it, in headless Chromium: what is on the screen, against the frames of a session in Python."""

import base64
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from time import monotonic

import av
import chromium
import numpy as np
import pytest
from live_server import LiveClient, png_of, serving
from PIL import Image
from playwright.sync_api import expect
from tiny_sessions import PICTURE, make_generator

from longtake.inference.generator import Generator
from longtake.serve.app import STATIC
from longtake.serve.lanes import apply

A, B = "a yellow cross slides upwards", "a yellow cross goes left"
TOKEN = "a token that is long enough"
SECONDS = 60  # that anything may take on a busy machine
# Keeps what is on the screen of each video whenever another frame is told, and the sockets, to cut them.
WATCH = """
window.seen = {}; window.sockets = [];
const Plain = WebSocket;
window.WebSocket = class extends Plain { constructor(...given) { super(...given); sockets.push(this); } };
new MutationObserver(news => {
  for (const { target } of news) {
    if (target.dataset?.of !== 'frame') continue;
    const view = target.closest('article');
    const [canvas, film] = [view.querySelector('canvas'), view.querySelector('video')];
    let screen = canvas;
    if (canvas.hidden) {
      screen = new OffscreenCanvas(film.videoWidth, film.videoHeight);
      screen.getContext('2d').drawImage(film, 0, 0);
    }
    const picture = screen.getContext('2d').getImageData(0, 0, screen.width, screen.height);
    (seen[view.view.session.id] ??= {})[target.textContent] = picture;
  }
}).observe(document, { subtree: true, childList: true });
"""
TAKE = """([id, frame]) => {
  const picture = seen[id]?.[frame];
  if (!picture) return null;
  let text = '';
  for (let k = 0; k < picture.data.length; k += 8192) text += String.fromCharCode(...picture.data.subarray(k, k + 8192));
  return [picture.height, picture.width, btoa(text)];
}"""

SEEKING = "view => view.querySelector('video').seeking"
STILL = """view => {
  const film = view.querySelector('video');
  const screen = new OffscreenCanvas(film.videoWidth, film.videoHeight);
  screen.getContext('2d').drawImage(film, 0, 0);
  const picture = screen.getContext('2d').getImageData(0, 0, screen.width, screen.height);
  let text = '';
  for (let k = 0; k < picture.data.length; k += 8192) text += String.fromCharCode(...picture.data.subarray(k, k + 8192));
  return [picture.height, picture.width, btoa(text)];
}"""
UNNAMED = """all => all.filter(one => !(one.ariaLabel || one.innerText?.trim() || one.labels?.length))
  .map(one => one.outerHTML)"""


@pytest.fixture(scope="module")
def browser():
    with chromium.browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def toy():
    return Generator.from_model("toy")


@pytest.fixture
def visit(browser):
    """Opens the page; what it complains of fails the test."""
    contexts, complaints = [], []

    def visit(address, query="", **context):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **context))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Content Security" in said.text else None)
        page.add_init_script(WATCH)
        page.goto(f"{address}/{query}")
        return page

    expect.set_options(timeout=SECONDS * 1000)
    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def until(page, holds):
    end = monotonic() + SECONDS
    while not holds():
        assert monotonic() < end, page.locator("body").inner_text()
        page.wait_for_timeout(50)


def number_of(view, name):
    text = view.locator(f"[data-of={name}]").text_content()
    return float(text.split()[0]) if text[0].isdigit() else -1.0


def at_frame(page, view, frame):
    until(page, lambda: number_of(view, "frame") >= frame)


def client_of(page, view, address):
    client = LiveClient(address)
    client.use(view.evaluate("view => view.view.session"))
    return client


def on_screen(page, client, frames):
    """What the page showed of these frames, uint8 [T, h, w, 3]."""
    shown = [page.evaluate(TAKE, [client.name, str(frame)]) for frame in frames]
    assert all(shown), [frame for frame, one in zip(frames, shown) if one is None]
    return np.stack([np.frombuffer(base64.b64decode(d), np.uint8).reshape(h, w, 4)[..., :3] for h, w, d in shown])


def wanted_of(generator, picture, state, pictures, length):
    """The frames of a session in Python: `state` says what changed when, `pictures` by the number of the change."""
    session, frames = generator.open(picture, state["first_prompt"], seed=state["seed"]), []
    changes = {(one["from_frame"], one["number"]): one for one in state["changes"]}
    while session.num_frames < length:
        for (frame, number), change in sorted(changes.items()):
            if frame == session.num_frames:
                apply(session, change["kind"], change["prompt"] if change["kind"] == "prompt" else pictures[number])
        frames.append(session.next())
    return np.concatenate(frames)


def psnr(one, other):
    return 10 * np.log10(255**2 / ((one.astype(float) - other) ** 2).mean())


def example(name="yellow_cross"):
    return np.array(Image.open(STATIC / "examples" / f"{name}.png").convert("RGB"))


def play_example(page):
    page.get_by_role("button", name=f"Example: {A}").click()
    expect(page.locator("#prompt")).to_have_value(A)
    page.get_by_role("button", name="Play", exact=True).click()
    return page.locator("article").nth(0)


def press(view, name):
    view.get_by_role("button", name=name, exact=True).click()


def steer(view, prompt):
    view.get_by_label("Prompt from now on").fill(prompt)
    press(view, "Send")


def pause(page, view, client):
    """Stops it; the block in the making still comes. Returns: the state."""
    press(view, "Pause")
    expect(view.locator(".cover")).to_have_text("Paused")
    states = []
    while not (len(states) > 1 and states[-1] == states[-2] and states[-1]["state"] == "paused"):
        page.wait_for_timeout(1000)
        states.append(client.request("GET").json())
    return states[-1]


# ---- in the fast set -----------------------------------------------------------------------------------------------
@pytest.mark.whole
def test_a_video_plays_and_is_steered_by_the_keyboard_alone(visit, generator, tmp_path):
    """Bit for bit in PNG, and nothing is wider than a small phone."""
    with serving(generator, tmp_path, max_sessions=2) as address:
        page = visit(address, "?format=png")
        page.set_viewport_size({"width": 320, "height": 640})
        keys, view = page.keyboard, page.locator("article").nth(0)
        page.locator("#picture").set_input_files({"name": "p.png", "mimeType": "image/png", "buffer": png_of(PICTURE)})
        page.locator("#prompt").focus()
        keys.type(A)
        keys.press("Control+Enter")
        at_frame(page, view, 9)
        assert view.evaluate("view => view === document.activeElement")
        keys.press("p")
        keys.press("Control+a")
        keys.type(B)
        keys.press("Control+Enter")
        expect(view.locator(".changes li")).to_have_count(2)
        expect(view.locator(".changes li").nth(0)).to_contain_text(f"{A} (seed 0")
        until(page, lambda: view.locator(".coming").count() == 0)
        view.focus()
        keys.press(" ")
        expect(view.locator(".cover")).to_have_text("Paused")
        standing = number_of(view, "frame")
        keys.press("?")
        expect(page.locator("#help")).to_be_visible()
        keys.press("Escape")
        view.focus()
        keys.press(" ")
        at_frame(page, view, standing + 8)
        keys.press("f")
        expect(page.locator("article")).to_have_count(2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        keys.press("n")
        assert page.evaluate("document.activeElement.id") == "prompt"
        client = client_of(page, view, address)
        page.wait_for_timeout(300)
        length = int(number_of(view, "frame"))
        wanted = wanted_of(generator, PICTURE, client.request("GET").json(), {}, length)
        assert np.array_equal(on_screen(page, client, range(length)), wanted[:length])
        controls = page.locator("button:visible, input:visible, textarea:visible, [role=img]:visible")
        assert controls.evaluate_all(UNNAMED) == []


def test_what_is_written_can_be_read_in_light_and_in_dark():
    """Contrast of WCAG 2.2, AA: 4.5 for text, 3 for edges of controls."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * one for one in colour[1:])
        linear = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in (int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4))
        ]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    schemes = re.findall(r":root \{(.*?)\}", (STATIC / "page.css").read_text(), re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#\w+)", scheme))
        for front in ("ink", "dim", "main", "warn", "edge"):
            for ground in ("card", "ground", "hover"):
                bright, dark = sorted((luminance(colours[front]), luminance(colours[ground])), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= (3 if front == "edge" else 4.5), (front, ground)
        bright, dark = sorted((luminance(colours["main"]), luminance(colours["on-main"])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


# ---- the rest ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_all_that_a_person_does_with_a_video(visit, toy, tmp_path):
    with serving(toy, tmp_path / "live", max_sessions=2) as address:
        page = visit(address, accept_downloads=True)
        view = play_example(page)
        at_frame(page, view, 5)
        steer(view, B)
        expect(view.locator(".changes li")).to_have_count(2)
        until(page, lambda: view.locator(".coming").count() == 0)
        assert number_of(view, "latency") > 0
        other, aim = example("blue_cross"), example("cyan_square")
        for changes, kind, picture in ((3, "image", other), (4, "target", aim)):
            file = {"name": "p.png", "mimeType": "image/png", "buffer": png_of(picture)}
            view.locator(f"[data-picture={kind}] input").set_input_files(file)
            # First that it stands there, or what is awaited next would be true of the change before.
            expect(view.locator(".changes li")).to_have_count(changes)
            until(page, lambda: view.locator(".coming").count() == 0)
        expect(view.get_by_role("button", name="No target")).to_be_visible()
        until(page, lambda: view.locator(".strip li").count() > 2)  # of few changes what was before is kept
        client = client_of(page, view, address)
        state = pause(page, view, client)
        length = int(number_of(view, "frame")) + 1
        wanted = wanted_of(toy, example(), state, {2: other, 3: aim}, length)
        frames = range(0, length, 3)
        shown = on_screen(page, client, frames)
        assert shown.shape[1:] == (256, 256, 3)
        quality = psnr(shown, wanted[frames].repeat(4, 1).repeat(4, 2))
        print(f"PSNR of the screen: {quality:.1f} dB over {len(shown)} frames")
        assert quality >= 38
        standing = number_of(view, "frame")
        page.wait_for_timeout(500)
        assert number_of(view, "frame") == standing  # paused
        the_rest(page, view, client, toy, tmp_path)


def the_rest(page, view, client, toy, folder):
    """Of a paused video: rewind by a thumbnail, resume, fork, downloads, save, reload, reopen, close."""
    strip = view.locator(".strip li")
    first = int(strip.nth(1).get_attribute("data-frame"))
    blocks = strip.count()
    strip.nth(1).get_by_role("button").click()
    until(page, lambda: strip.count() == 1)
    assert blocks > 2 and client.request("GET").json()["frame"] == first
    assert {one["from_frame"] for one in client.request("GET").json()["changes"]} <= set(range(first + 1))
    press(view, "Play")
    at_frame(page, view, first + 4)
    press(view, "Fork")
    expect(page.locator("article")).to_have_count(2)
    branch = page.locator("article").nth(1)
    at_frame(page, branch, first + 8)
    left, right = view.bounding_box(), branch.bounding_box()
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]  # beside each other
    press(branch, "Fork")
    expect(branch.locator(".message")).to_have_text(
        "there is no room for a branch; end another session, or come back later"
    )
    press(branch, "Close")
    expect(page.locator("article")).to_have_count(1)
    made = pause(page, view, client)["frame"]
    with page.expect_download() as video:
        press(view, "Video")
    with av.open(video.value.path()) as file:
        assert len(list(file.decode(video=0))) == made
    with page.expect_download() as script:
        press(view, "Script")
    check_script(script.value.path(), folder, client, made)
    press(view, "Save")
    expect(page.locator("#saved-list li")).to_have_count(1)
    page.reload()
    view = page.locator("article").nth(0)  # it goes on in this tab
    expect(view.locator(".cover")).to_have_text("Paused")
    press(view, "Play")
    at_frame(page, view, made + 8)
    page.locator("#new > summary").click()
    page.get_by_role("button", name=f"frame {made}").first.click()
    expect(page.locator("article")).to_have_count(1)
    at_frame(page, page.locator("article"), made + 8)
    press(page.locator("article"), "Close")
    expect(page.locator("article")).to_have_count(0)
    assert client.request("GET").status_code == 404


def check_script(path, folder, client, made):
    """`longtake generate` makes the frames of the session of a downloaded script, bit for bit."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "story")
    command = ["generate", "--model", "toy", "--script", "story.yaml", "-o", str(folder / "again" / "%05d.png")]
    program = [sys.executable, "-m", "longtake", *command]
    done = subprocess.run(program, cwd=folder / "story", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = sorted((folder / "again").glob("*.png"))
    seen = client.watch(made, from_frame=0)
    again = np.stack([np.array(Image.open(file)) for file in files])
    assert len(again) == made
    for frame in sorted(seen.frames):
        assert np.array_equal(np.array(Image.open(io.BytesIO(seen.frames[frame]))), again[frame])


@pytest.mark.slow
def test_a_token_is_asked_for_and_kept_out_of_addresses(visit, generator, tmp_path):
    with serving(generator, tmp_path, max_sessions=1, token=TOKEN) as address:
        page = visit(address)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        dialog = page.locator("#token-dialog")
        expect(dialog).to_be_visible()
        page.locator("#token").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#token-message")).to_have_text("It was not taken.")
        page.locator("#token").fill(TOKEN)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        at_frame(page, play_example(page), 9)
        page.reload()
        at_frame(page, page.locator("article"), 9)  # this tab knows it
        assert len(asked) > 10 and not any(TOKEN.split()[-1] in address for address in asked)


@pytest.mark.slow
def test_a_socket_that_breaks_costs_no_frame(visit, toy, tmp_path):
    with serving(toy, tmp_path, max_sessions=1) as address:
        page = visit(address, "?format=png")
        view = play_example(page)
        for frame in (5, 25):
            at_frame(page, view, frame)
            page.evaluate("sockets.at(-1).close()")
        at_frame(page, view, 50)
        assert page.evaluate("sockets.length") == 3
        client = client_of(page, view, address)
        wanted = wanted_of(toy, example(), client.request("GET").json(), {}, 50)[:50]
        assert np.array_equal(on_screen(page, client, range(50)), wanted)


@pytest.mark.slow
def test_pages_without_webcodecs_play_mp4(visit, toy, tmp_path):
    with serving(toy, tmp_path, max_sessions=1) as address:
        page = visit(address, "?format=mp4")
        view = play_example(page)
        at_frame(page, view, 5)
        steer(view, B)
        expect(view.locator(".changes li")).to_have_count(2)
        until(page, lambda: view.locator(".coming").count() == 0)
        # Past the third block's first frame, 33, also where the change came sooner: a quick machine shows it from 17 on.
        at_frame(page, view, max(number_of(view, "frame") + 8, 36))
        client = client_of(page, view, address)
        state, length = pause(page, view, client), int(number_of(view, "frame"))
        shown = sorted(int(frame) for frame in page.evaluate("id => Object.keys(seen[id])", client.name))
        frames = [frame for frame in shown if frame < length]
        assert len(frames) > length / 3  # a busy machine leaves some out
        wanted = wanted_of(toy, example(), state, {}, length)[frames].repeat(4, 1).repeat(4, 2)
        got = on_screen(page, client, frames)
        # A film may be a frame further than it said when it is read
        best = [max(psnr(one, wanted[k]), psnr(one, wanted[min(k + 1, len(frames) - 1)])) for k, one in enumerate(got)]
        assert np.median(best) >= 38
        strip = view.locator(".strip li")
        first = int(strip.nth(2).get_attribute("data-frame"))
        strip.nth(2).get_by_role("button").click()
        until(page, lambda: strip.count() == 2)
        # What stands there is the frame before the one it was taken back to, and not the one where it was paused.
        film = "view => view.querySelector('video').currentTime"
        until(page, lambda: abs(view.evaluate(film) - (first - 0.5) / toy.fps) < 0.01 and not view.evaluate(SEEKING))
        still = view.evaluate(STILL)
        screen = np.frombuffer(base64.b64decode(still[2]), np.uint8).reshape(still[0], still[1], 4)[..., :3]
        before = wanted_of(toy, example(), state, {}, length)[first - 1].repeat(4, 0).repeat(4, 1)
        assert psnr(screen, before) >= 36
        press(view, "Play")
        until(page, lambda: first < number_of(view, "frame") < length + 8)


@pytest.mark.slow
def test_students_without_a_picture_play_too(visit, tmp_path):
    generator = make_generator(history_blocks=6, _y=False, picture="frame")
    with serving(generator, tmp_path, max_sessions=1) as address:
        page = visit(address)
        page.locator("#prompt").fill(A)
        page.get_by_role("button", name="Play", exact=True).click()
        at_frame(page, page.locator("article"), 9)
        expect(page.locator("#picture-part")).to_be_hidden()


def test_examples_are_of_the_size_of_the_toy():
    files = sorted(Path(STATIC / "examples").glob("*.png"))
    assert len(files) == 4
    for file in files:
        assert Image.open(file).size == (64, 64)
        assert file.stem in (STATIC / "main.js").read_text()
