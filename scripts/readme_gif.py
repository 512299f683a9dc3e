#!/usr/bin/env python3
"""The moving picture of the README: 30 seconds of the packaged student, whose prompt changes half-way.

    python scripts/readme_gif.py -o docs/figures/stream.gif

Frames are enlarged by whole pixels. Under them stand both prompts, of which the one in force is bold, and the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import longtake

ROOT = Path(__file__).parent.parent
PROMPTS = (
    "a large green square gently goes right, and a red circle crawls left",
    "a large green square gently climbs, and a red circle crawls down",
)
SECONDS, SWITCH_SECONDS = 30, 15
ZOOM, EVERY = 3, 2  # pixels a pixel; one of so many frames is shown
WIDTH, LINE, MARGIN = 528, 20, 8
COLOURS = 20  # of all frames: few, since a GIF is compressed by what repeats
BARS, GREYS = ("#0072B2", "#D55E00"), tuple(range(0, 256, 51))  # and of what stands under them


def frames(image: Path, prompts: tuple[str, str]) -> Iterator[tuple[int, bool, NDArray[np.uint8]]]:
    """Yields frame number, whether the second prompt is in force, and uint8 [h, w, 3]."""
    generator = longtake.Generator.from_model("toy", device="cpu")
    fps = generator.settings.fps
    session, number = generator.open(image, prompts[0], seed=0), 0
    while number < SECONDS * fps:
        if number >= SWITCH_SECONDS * fps:
            session.prompt = prompts[1]
        for frame in session.next():
            yield number, session.prompt == prompts[1], frame
            number += 1


def panel(frame: NDArray[np.uint8], seconds: float, second: bool, prompts: tuple[str, str]) -> Image.Image:
    """A frame in the middle, the prompts and a bar of the time under it."""
    height = frame.shape[0] * ZOOM
    picture = Image.new("RGB", (WIDTH, height + 2 * LINE + 3 * MARGIN), "white")
    large = Image.fromarray(frame).resize((frame.shape[1] * ZOOM, height), Image.Resampling.NEAREST)
    picture.paste(large, ((WIDTH - large.width) // 2, 0))
    draw, y = ImageDraw.Draw(picture), height + MARGIN
    for which, prompt in enumerate(prompts):
        now = which == second
        since = (0, SWITCH_SECONDS)[which]
        draw.text((MARGIN, y), f"{since:2d} s  {prompt}", fill="black" if now else "#aaaaaa", font=_font(now))
        y += LINE
    draw.rectangle((0, y + 4, WIDTH * seconds / SECONDS, y + 8), fill=BARS[second])
    return picture


def _font(bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf", name)), 12)


def main() -> None:
    """Writes the GIF and says how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs/figures/stream.gif")
    parser.add_argument("--image", type=Path, default=ROOT / "examples/first_frame.png")
    parser.add_argument("--prompt", nargs=2, default=PROMPTS, help="the first prompt and the second")
    given = parser.parse_args()
    prompts, fps = tuple(given.prompt), 16
    film = [(number / fps, *rest) for number, *rest in frames(given.image, prompts) if number % EVERY == 0]
    palette = palette_of([frame for *_, frame in film])
    few = [panel(frame, seconds, second, prompts).quantize(palette=palette, dither=Image.Dither.NONE)
           for seconds, second, frame in film]  # fmt: skip
    # A GIF counts hundredths of a second.
    ends = [round(100 * (number + 1) * EVERY / fps) * 10 for number in range(len(few))]
    durations = [end - begin for begin, end in zip([0, *ends], ends)]
    few[0].save(given.output, save_all=True, append_images=few[1:], duration=durations, loop=0, optimize=False)
    print(f"{given.output}: {len(few)} frames, {given.output.stat().st_size / 2**20:.2f} MiB")


def palette_of(frames: list[NDArray[np.uint8]]) -> Image.Image:
    """Colours of the frames, and those that texts and bars need."""
    seen = Image.fromarray(np.concatenate(frames[:: max(1, len(frames) // 12)])).quantize(COLOURS)
    bars = [int(bar[k : k + 2], 16) for bar in BARS for k in (1, 3, 5)]
    colours = [*(seen.getpalette() or [])[: 3 * COLOURS], *(level for grey in GREYS for level in (grey,) * 3), *bars]
    image = Image.new("P", (1, 1))
    image.putpalette(colours)
    return image


if __name__ == "__main__":
    main()
