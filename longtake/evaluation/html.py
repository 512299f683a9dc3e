"""One HTML page about measured videos: table, curves, and the videos side by side, the worst first.

The page needs no network and no script. Curves are drawn in it, first frames lie in it as JPEG; the videos themselves
stay where they are and are linked relatively, so that the page plays them as long as both move together.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from longtake.evaluation.instruments import Measured
from longtake.evaluation.measure import MeasuredVideo, metrics_of, ratio, shown, summarise, title
from longtake.outputs import write_whole

_COLOURS = ("#1668b8", "#c8501e", "#2a8f4a", "#8a3fa8", "#a08a12", "#b0305c", "#3a8f9c", "#666666")
_MOST_GROUPS = 40  # videos of one name that are shown side by side; the JSON has all
_WIDTH, _HEIGHT, _MARGIN = 260, 110, 44  # pixels of a plot
_MOST_POINTS = 160  # of a line
_FROM_ZERO = ("motion_px_s", "change", "histogram")  # whose small changes are not to look large
_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 24px; color: #222; background: #fff }
table { border-collapse: collapse; margin: 12px 0 } td, th { padding: 3px 10px; border-bottom: 1px solid #ddd }
td { text-align: right; white-space: nowrap } td:first-child, th { text-align: left } h3 { margin: 28px 0 4px }
.videos { display: flex; flex-wrap: wrap; gap: 12px } figure { margin: 0 } figcaption { font-size: 12px }
video { height: 200px; background: #eee; display: block } .bad { color: #b00020; font-weight: 600 }
.plots { display: flex; flex-wrap: wrap; gap: 4px } svg text { font: 10px system-ui, sans-serif; fill: #444 }
.key span { margin-right: 16px; font-weight: 600 } .grey { color: #777 }
"""

Line = list[tuple[float, float]]  # (seconds, value)
Lines = Mapping[str, Line]  # by name


def write_page(
    path: Path,
    videos: Sequence[MeasuredVideo],
    *,
    played: Sequence[MeasuredVideo] | None = None,
    captions: Mapping[str, str] | None = None,
    ratios: Mapping[str, Mapping[str, float | None]] | None = None,
) -> None:
    """Writes the page, atomically. Raises: OutputError where the disk refuses.

    Args: `played`, those of the videos that curves and players are of (None: all, as the table is); `captions`, what
    stands under the name of a file, without its suffix; `ratios` to the teacher's videos, a line a name.
    """
    write_whole(path, page(videos, path.parent, played or videos, captions or {}, ratios or {}))


def page(
    videos: Sequence[MeasuredVideo],
    folder: Path,
    played: Sequence[MeasuredVideo],
    captions: Mapping[str, str],
    ratios: Mapping[str, Mapping[str, float | None]],
) -> str:
    """The page as it lies in `folder`, to which the links are relative."""
    names = list(dict.fromkeys(video.name for video in played))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    groups = _groups(played)
    key = "".join(f'<span style="color:{colours[name]}">{escape(name)}</span>' for name in names)
    averages = _lines({name: [video.measured for video in played if video.name == name] for name in names})
    parts = [
        "<h1>Measured videos</h1>",
        _table(videos),
        *([_ratios(ratios)] if ratios else []),
        f'<h2>Means over time</h2><p class="key">{key}</p>',
        _plots(averages, colours),
        "<h2>Videos, the worst first</h2>",
        f'<p class="grey">{min(len(groups), _MOST_GROUPS)} of {len(groups)} groups of files of one name.</p>',
        *(_group(group, folder, colours, captions) for group in groups[:_MOST_GROUPS]),
    ]
    head = f'<meta charset="utf-8"><title>Measured videos</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _groups(videos: Sequence[MeasuredVideo]) -> list[list[MeasuredVideo]]:
    """Videos whose files have one name, those with most defects first, then those with most drift and stillness."""
    groups: dict[str, list[MeasuredVideo]] = {}
    for video in videos:
        groups.setdefault(video.path.stem, []).append(video)
    return sorted(groups.values(), key=lambda group: max(_badness(video.measured) for video in group), reverse=True)


def _badness(measured: Measured) -> tuple[int, float]:
    drifts = [value or 0.0 for name, value in measured.metrics.items() if name.startswith("drift_")]
    return len(measured.defects), sum(drifts) + (measured.metrics["still_share"] or 0.0)


def _table(videos: Sequence[MeasuredVideo]) -> str:
    rows = summarise(videos)
    count = {name: sum(video.name == name for video in videos) for name in rows}
    head = "".join(f"<th>{escape(name)} ({count[name]})</th>" for name in rows)
    lines = [
        f"<tr><td>{escape(title(metric))}</td>" + "".join(f"<td>{shown(rows[name][metric])}</td>" for name in rows)
        for metric in metrics_of(videos)
    ]
    note = "Means over videos, with 95 % intervals in brackets (number of videos in the head)."
    return f'<table><tr><th></th>{head}</tr>{"</tr>".join(lines)}</tr></table><p class="grey">{note}</p>'


def _ratios(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    head = "".join(f"<th>{escape(title(name))}</th>" for name in next(iter(rows.values())))
    lines = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{ratio(value)}</td>' for value in row.values())}</tr>"
        for name, row in rows.items()
    )
    note = "Means over those of the teacher's videos of the same rows: 1 is the same (of the distance 0)."
    return f'<table><tr><th></th>{head}</tr>{lines}</table><p class="grey">{note}</p>'


def _group(
    group: Sequence[MeasuredVideo], folder: Path, colours: Mapping[str, str], captions: Mapping[str, str]
) -> str:
    name = group[0].path.stem
    figures = "".join(_figure(video, folder, colours[video.name]) for video in group)
    caption = f'<p class="grey">{escape(captions[name])}</p>' if name in captions else ""
    plots = _plots(_lines({video.name: [video.measured] for video in group}), colours)
    return f'<h3>{escape(name)}</h3>{caption}<div class="videos">{figures}</div>{plots}'


def _lines(measured: Mapping[str, Sequence[Measured]]) -> dict[str, dict[str, Line]]:
    """By curve, then by name, the mean over the videos that have the curve."""
    curves = dict.fromkeys(curve for videos in measured.values() for video in videos for curve in video.curves)
    found: dict[str, dict[str, Line]] = {curve: {} for curve in curves}
    for curve in curves:
        for name, videos in measured.items():
            if having := [video for video in videos if curve in video.curves]:
                found[curve][name] = _mean_line(having, curve)
    return found


def _figure(video: MeasuredVideo, folder: Path, colour: str) -> str:
    stream = io.BytesIO()
    Image.fromarray(video.poster).save(stream, "JPEG", quality=80)
    poster = base64.b64encode(stream.getvalue()).decode()
    link = quote(Path(os.path.relpath(video.path, folder)).as_posix())
    defects = "".join(f' <span class="bad">{escape(defect)}</span>' for defect in video.measured.defects)
    return (
        f'<figure><video src="{link}" poster="data:image/jpeg;base64,{poster}" controls loop muted preload="none">'
        f'</video><figcaption><b style="color:{colour}">{escape(video.name)}</b> {video.measured.frames} frames at '
        f"{video.measured.fps:.4g} a second{defects}</figcaption></figure>"
    )


def _mean_line(measured: Sequence[Measured], curve: str) -> Line:
    """Mean over videos at each time; the rate is that of the first, a time that a video does not reach has the rest."""
    length = max(len(one.curves[curve]) for one in measured)
    values = np.full((len(measured), length), np.nan)
    for row, one in zip(values, measured):
        row[: one.frames] = [np.nan if value is None else value for value in one.curves[curve]]
    there = ~np.isnan(values)
    means = np.where(there, values, 0).sum(0) / np.maximum(there.sum(0), 1)
    frames = np.flatnonzero(there.any(0))
    if len(frames) > _MOST_POINTS:  # means of stretches: a single odd frame may be lost, it is in the table
        stretches = np.array_split(frames, _MOST_POINTS)
        return [(float(s.mean()) / measured[0].fps, float(means[s].mean())) for s in stretches]
    return [(float(frame) / measured[0].fps, float(means[frame])) for frame in frames]


def _plots(curves: Mapping[str, Lines], colours: Mapping[str, str]) -> str:
    return f'<div class="plots">{"".join(_plot(name, lines, colours) for name, lines in curves.items())}</div>'


def _plot(name: str, lines: Lines, colours: Mapping[str, str]) -> str:
    """A small plot with a line a name, as SVG."""
    points = np.array([point for line in lines.values() for point in line])
    (_, low), (end, high) = points.min(0), points.max(0)
    low = min(0.0, low) if name in _FROM_ZERO else low
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    width, height = _WIDTH - _MARGIN - 8, _HEIGHT - 34

    def place(point: tuple[float, float]) -> str:
        x = _MARGIN + width * point[0] / max(end, 1e-9)
        return f"{x:.1f},{18 + height * (high - point[1]) / (high - low):.1f}"

    drawn = "".join(
        f'<polyline fill="none" stroke="{colours[row]}" stroke-width="1.3" points="{" ".join(map(place, line))}"/>'
        for row, line in lines.items()
    )
    frame = f'<rect x="{_MARGIN}" y="18" width="{width}" height="{height}" fill="none" stroke="#ccc"/>'
    right, foot = _MARGIN + width, 18 + height
    texts = (
        f'<text x="{_MARGIN}" y="12" font-weight="bold">{escape(title(name))}</text>'
        f'<text x="{_MARGIN - 3}" y="26" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_MARGIN - 3}" y="{foot}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{right}" y="{foot + 12}" text-anchor="end">{end:.3g} s</text>'
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(name)}">{frame}{drawn}{texts}</svg>'
    )
