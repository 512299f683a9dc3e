"""The browser of tests that look at what a browser shows, over files that they put on a made-up site."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SITE = "http://longtake.test/"
NAMES = ("chromium", "chromium-browser", "google-chrome")
_PICTURE = """async ([url, is_film]) => {
  let shown;
  if (is_film) {
    shown = document.createElement('video');
    document.body.replaceChildren(shown);  // in no page it may be collected while a frame is waited for
    shown.muted = true;
    shown.src = url;
    await new Promise((good, bad) => { shown.onloadeddata = good; shown.onerror = () => bad(shown.error.message); });
    await new Promise(good => { shown.requestVideoFrameCallback(good); shown.currentTime = 0.01; });
    [shown.width, shown.height] = [shown.videoWidth, shown.videoHeight];
  } else {
    shown = new Image();
    shown.src = url;
    await shown.decode();
  }
  const canvas = Object.assign(document.createElement('canvas'), {width: shown.width, height: shown.height});
  const context = canvas.getContext('2d');
  context.drawImage(shown, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let text = '';
  for (let k = 0; k < pixels.length; k += 8192) text += String.fromCharCode(...pixels.subarray(k, k + 8192));
  return [canvas.height, canvas.width, btoa(text)];
}"""

# Of every video of a page, once it has played for a moment: seconds, width, height
PLAYED = """() => Promise.all([...document.querySelectorAll('video')].map(async one => {
  one.muted = true;
  await one.play();
  await new Promise(good => one.requestVideoFrameCallback((_, frame) => frame.mediaTime > 0 ? good() :
    one.requestVideoFrameCallback(good)));
  return [one.currentTime, one.videoWidth, one.videoHeight];
}))"""


def program() -> str:
    """The path of a Chromium: of this machine, else of Playwright. Skips, and in CI fails, where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            found = playwright.chromium.executable_path
        if not Path(found).exists():
            missing = f"no Chromium: none of {', '.join(NAMES)} is in PATH; bash scripts/browser.sh installs one"
            pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium. One at a time in a thread."""
    path = program()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


@contextmanager
def page(folder: Path) -> Iterator[Any]:
    """A page of `SITE`, whose files are those in `folder`."""

    def answer(route: Any) -> None:
        name = route.request.url.removeprefix(SITE).partition("?")[0]
        route.fulfill(path=folder / name) if name else route.fulfill(body="<html></html>", content_type="text/html")

    with browser() as started:
        opened = started.new_page()
        opened.route(f"{SITE}**", answer)
        opened.goto(SITE)
        yield opened


def picture(opened: Any, name: str, *, is_film: bool) -> np.ndarray:
    """The first picture of a file of the site as a canvas gives it, uint8 [h, w, 3]."""
    height, width, data = opened.evaluate(_PICTURE, [f"{SITE}{name}", is_film])
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[..., :3]
