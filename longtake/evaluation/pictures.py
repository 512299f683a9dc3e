"""Pictures for people: contact sheets of videos, and curves of scores over time.

Sheets are drawn by Pillow and curves by matplotlib, in matplotlib's font, at most WIDEST pixels wide. This file must
know no model, no world and no run.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longtake.outputs import whole_file

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

WIDEST = 1600
FRAMES = 9  # of a video on a sheet
_ZOOM = 2  # at most, of small frames
_GAP, _PAD = 2, 8  # pixels between frames, and around texts
_TEXT, _CAPTION = 15, 17  # heights of the letters
_CAPTION_LINES, _NAME_LETTERS = 3, 40  # at most

# Colours that people tell apart, of all kinds of colour vision. Source: Okabe and Ito, Color Universal Design.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PANEL = 400, 300  # pixels of a plot
# By part of a summary, what its values are numbered by, and the number of the first
_COUNTS = {"curves": ("frame", 0), "looks": ("frame", 0), "windows": ("window of the training clips' length", 1)}
# By part of a summary, its scores that are drawn: what the axis says, and what the numbers are multiplied by
_CURVES = {
    "curves": {
        "position_error": ("distance from the right place, px", 1),
        "motion_ratio": ("distance moved / true distance", 1),
        "shape_kept": ("sprites of the right shape, %", 100),
        "saturation": ("saturation, %", 100),
    },
    "looks": {
        "motion_px_s": ("motion, px/s", 1),
        "saturation": ("saturation, %", 100),
        "contrast": ("contrast, %", 100),
        "sharpness": ("sharpness, 0 to 1", 1),
        "first_frame_similarity": ("correlation with the first frame", 1),
    },
    "windows": {
        "motion_ratio": ("distance moved / true distance", 1),
        "shape_kept": ("sprites of the right shape, %", 100),
        "colour_kept": ("sprites of the right colour, %", 100),
        "count_kept": ("frames with the right count, %", 100),
        "saturation": ("saturation, % of the first window's", 100),
        "contrast": ("contrast, % of the first window's", 100),
    },
}


# ---- contact sheets -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Strip:
    """Some frames of a video in their order, uint8 [n, h, w, 3], and the number that each has in the video."""

    frames: NDArray[np.uint8]
    numbers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scene:
    """What is to be compared: strips by the names that stand before them, under one caption."""

    caption: str
    strips: Mapping[str, Strip]


def frame_numbers(num_frames: int) -> tuple[int, ...]:
    """Numbers of at most FRAMES frames of a video, evenly spread, the first and the last among them."""
    return tuple(np.linspace(0, num_frames - 1, min(FRAMES, num_frames)).round().astype(int).tolist())


def strip(video: NDArray[np.uint8]) -> Strip:
    """The frames of a video [T, h, w, 3] that a sheet shows."""
    numbers = frame_numbers(len(video))
    return Strip(video[list(numbers)], numbers)


def scenes(rows: Mapping[str, Sequence[NDArray[np.uint8]]], captions: Sequence[str]) -> list[Scene]:
    """A scene a caption: video k of every row under caption k, where the rows have so many."""
    return [
        Scene(caption, {name: strip(videos[k]) for name, videos in rows.items()})
        for k, caption in enumerate(captions[: min(map(len, rows.values()))])
    ]


def contact_sheet(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]: each scene under the one before, a line a strip, with captions, names and frame numbers."""
    from PIL import Image, ImageDraw

    names = [name for scene in scenes for name in (*scene.strips, "frame")]
    label = 2 * _PAD + max(round(_font(_TEXT).getlength(_cut(name))) for name in names)
    strips = [one for scene in scenes for one in scene.strips.values()]
    cell = _cell_width(strips, WIDEST - label - _PAD)
    width = label + max(len(one.frames) for one in strips) * (cell + _GAP) + _PAD
    lines = [_caption_lines(scene.caption, width) for scene in scenes]
    heights = [_scene_height(scene, text, cell) for scene, text in zip(scenes, lines)]
    sheet = Image.new("RGB", (width, sum(heights)), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for scene, text, height in zip(scenes, lines, heights):
        _draw_scene(sheet, draw, scene, text, y, label, cell)
        y += height
    return np.asarray(sheet)


def _cell_width(strips: Sequence[Strip], room: int) -> int:
    """Pixels that the widest frame gets: a whole multiple of its own where there is room, else what there is."""
    most, widest = max(len(one.frames) for one in strips), max(one.frames.shape[2] for one in strips)
    free = room // most - _GAP
    return widest * min(_ZOOM, free // widest) if free >= widest else free


def _caption_lines(caption: str, width: int) -> list[str]:
    letters = int((width - 2 * _PAD) / _font(_CAPTION).getlength("n"))
    return textwrap.wrap(caption, letters, max_lines=_CAPTION_LINES, placeholder=" …")


def _scene_height(scene: Scene, text: Sequence[str], cell: int) -> int:
    strips = list(scene.strips.values())
    frames = sum(_cell_height(one, cell) + _GAP for one in strips)
    return len(text) * _line(_CAPTION) + _num_headers(strips) * _line(_TEXT) + frames + 2 * _PAD


def _num_headers(strips: Sequence[Strip]) -> int:
    """Lines of frame numbers: one above the first strip, and above each that shows other frames than the one before."""
    return 1 + sum(one.numbers != before.numbers for before, one in zip(strips, strips[1:]))


def _cell_height(one: Strip, cell: int) -> int:
    height, width = one.frames.shape[1:3]
    return max(1, round(height * cell / width))


def _draw_scene(sheet: Any, draw: ImageDraw, scene: Scene, text: Sequence[str], y: int, label: int, cell: int) -> None:
    from PIL import Image

    y += _PAD
    for line in text:
        draw.text((_PAD, y), line, fill="black", font=_font(_CAPTION))
        y += _line(_CAPTION)
    before: tuple[int, ...] = ()
    for name, one in scene.strips.items():
        columns = [label + k * (cell + _GAP) for k in range(len(one.frames))]
        if one.numbers != before:
            draw.text((_PAD, y), "frame", fill="#666666", font=_font(_TEXT))
            for x, number in zip(columns, one.numbers):
                draw.text((x + cell // 2, y), str(number), fill="#666666", font=_font(_TEXT), anchor="ma")
            y += _line(_TEXT)
        before = one.numbers
        height = _cell_height(one, cell)
        draw.text((_PAD, y + height // 2), _cut(name), fill="black", font=_font(_TEXT), anchor="lm")
        way = Image.Resampling.NEAREST if cell >= one.frames.shape[2] else Image.Resampling.BOX
        for x, frame in zip(columns, one.frames):
            sheet.paste(Image.fromarray(frame).resize((cell, height), way), (x, y))
        y += height + _GAP


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_LETTERS else f"{name[: _NAME_LETTERS - 1]}…"


def _line(letters: int) -> int:
    """Pixels from one line of text to the next."""
    return round(1.4 * letters)


def _font(size: int) -> FreeTypeFont:
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


# ---- curves ---------------------------------------------------------------------------------------------------------
def curves(rows: Mapping[str, Mapping[str, Any]], part: str = "curves") -> NDArray[np.uint8]:
    """uint8 [h, w, 3]: scores over time, a plot a score and a line a row of `rows`, which are summaries.

    Args: `part` of the summaries: "curves" and "looks" go frame by frame, "windows" window by window.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn, (counted, first) = _CURVES[part], _COUNTS[part]
    columns = 2 if len(drawn) <= 4 else 3
    lines = -(-len(drawn) // columns)
    width = columns * _PANEL[0]
    abreast = max(1, int(width / (70 + 7 * max(map(len, rows)))))
    names = -(-len(rows) // abreast) * 22 + 8  # pixels that the rows' names take
    height = lines * _PANEL[1] + names
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    plots = figure.subplots(lines, columns, squeeze=False).flatten()
    for plot in plots[len(drawn) :]:
        plot.set_axis_off()
    for plot, (score, (unit, factor)) in zip(plots, drawn.items()):
        styles = cycle((colour, style) for style, colour in product(("-", "--", ":"), _COLOURS))
        for (row, summary), (colour, style) in zip(rows.items(), styles):
            values = [np.nan if value is None else factor * value for value in summary[part][score]]
            mark = "o" if len(values) == 1 else None  # a line of one point is not to be seen
            numbers = range(first, first + len(values))
            plot.plot(numbers, values, label=row, linewidth=1.6, color=colour, linestyle=style, marker=mark)
        plot.set_title(unit, fontsize=10, loc="left", y=1)  # where it is anyway: looking for it measures every tick
        plot.set_xlabel(counted, fontsize=9)
        plot.tick_params(labelsize=9)
        plot.xaxis.get_major_locator().set_params(integer=True)
        plot.grid(color="#dddddd", linewidth=0.6)
        plot.spines[["top", "right"]].set_visible(False)
    handles = plots[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=10, loc="upper left", ncols=abreast, frameon=False)
    figure.subplots_adjust(**_margins(width, height, columns, lines, above=names))
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _margins(width: int, height: int, columns: int, lines: int, *, above: int) -> dict[str, float]:
    """Room for ticks and titles, `above` pixels for names; `tight_layout` would draw all once more to measure it."""
    left, right, bottom, top, beside, between = 62, 14, 44, 26, 66, 70  # pixels; the last two between plots
    across = (width - left - right - (columns - 1) * beside) / columns
    up = (height - above - bottom - top - (lines - 1) * between) / lines
    return {
        **{"left": left / width, "right": 1 - right / width, "wspace": beside / across},
        **{"bottom": bottom / height, "top": 1 - (above + top) / height, "hspace": between / up},
    }


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """A PNG file, atomically. Raises: OutputError where the disk refuses."""
    from PIL import Image

    with whole_file(path) as file:
        Image.fromarray(image).save(file, "PNG")
