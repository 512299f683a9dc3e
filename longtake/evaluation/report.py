"""What a person reads and plays: the tables, JSON and sample videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.outputs import write_whole

# column title, key of the summary, format
COLUMNS = (
    ("position px", "position_error_px", "{:.2f}"),
    ("± 95 %", "interval", "{:.2f}"),
    ("motion", "motion_ratio", "{:.2f}"),
    ("stopped", "stop_rate", "{:.0%}"),
    ("shape", "shape_kept", "{:.0%}"),
    ("colour", "colour_kept", "{:.0%}"),
    ("count", "count_kept", "{:.0%}"),
    ("1st frame dB", "first_frame_psnr_db", "{:.1f}"),
    ("open bits", "open_entropy_bits", "{:.2f}"),
)


# The same of the table over open worlds
OPEN_COLUMNS = (
    ("worlds", "num_open_worlds", "{}"),
    ("open bits", "open_entropy_bits", "{:.2f}"),
    ("from", "low", "{:.2f}"),
    ("to", "high", "{:.2f}"),
    ("of teacher", "share", "{:.0%}"),
    ("open stopped", "open_stop_rate", "{:.1%}"),
    ("stopped", "stop_rate", "{:.1%}"),
    ("position px", "position_error_px", "{:.2f}"),
    ("motion", "motion_ratio", "{:.2f}"),
    ("shape", "shape_kept", "{:.1%}"),
    ("count", "count_kept", "{:.1%}"),
)


def _farthest(values: Sequence[float]) -> float:
    """The one farthest from 1."""
    return max(values, key=lambda value: abs(value - 1))


# column title of the windows' table, key of the summary's windows, which windows, which of their values, format
WINDOW_COLUMNS: tuple[tuple[str, str, slice, Callable[[Sequence[float]], float], str], ...] = (
    ("motion first", "motion_ratio", slice(1), min, "{:.2f}"),
    ("last", "motion_ratio", slice(-1, None), min, "{:.2f}"),
    ("lowest", "motion_ratio", slice(None), min, "{:.2f}"),
    ("highest", "motion_ratio", slice(None), max, "{:.2f}"),
    ("shape lowest", "shape_kept", slice(None), min, "{:.1%}"),
    ("colour lowest", "colour_kept", slice(None), min, "{:.1%}"),
    ("count lowest", "count_kept", slice(None), min, "{:.1%}"),
    ("saturation", "saturation", slice(None), _farthest, "{:.3f}"),
    ("contrast", "contrast", slice(None), _farthest, "{:.3f}"),
)


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, aligned."""

    def values(summary: Mapping[str, Any]) -> dict[str, Any]:
        low, high = summary["position_error_ci95_px"]
        return {**summary, "interval": None if low is None else (high - low) / 2}

    return _formatted(COLUMNS, {name: values(summary) for name, summary in summaries.items()})


def open_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores over the worlds whose captions leave a motion open, as a Markdown table: how varied the choices are.

    `from` and `to` are the 95 % interval of the bits; `of teacher`, the bits as a share of those of the bidirectional
    teacher; `open stopped` the share of sprites, left open, that stood still.
    """
    teacher = summaries.get("teacher", {}).get("open_worlds", {}).get("open_entropy_bits")

    def values(part: Mapping[str, Any]) -> dict[str, Any]:
        low, high = part["open_entropy_ci95_bits"] or (None, None)
        bits = part["open_entropy_bits"]
        return {**part, "low": low, "high": high, "share": bits / teacher if bits is not None and teacher else None}

    parts = {name: summary["open_worlds"] for name, summary in summaries.items() if "open_worlds" in summary}
    return _formatted(OPEN_COLUMNS, {name: values(part) for name, part in parts.items()})


def window_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores window by window as a Markdown table: the worst window of each row, and who follows a new caption.

    `saturation` and `contrast` are those of the window that is farthest from the first, relative to it.
    """

    def values(windows: Mapping[str, Any]) -> dict[str, Any]:
        found = {**windows, "windows": len(windows["count_kept"])}
        for title, key, which, pick, _ in WINDOW_COLUMNS:
            known = [value for value in windows[key][which] if value is not None]
            found[title] = pick(known) if known else None
        return found

    switched = any(summary["windows"]["follow_shares"] for summary in summaries.values())
    columns = [("windows", "windows", "{}"), *((title, title, form) for title, *_, form in WINDOW_COLUMNS)]
    columns += [("follow", "follow_share", "{:.1%}"), ("of", "num_followers", "{}")] if switched else []
    return _formatted(columns, {name: values(summary["windows"]) for name, summary in summaries.items()})


def _formatted(columns: Sequence[tuple[str, str, str]], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: a line a row, its columns given by title, key of the row's values and format."""
    cells = [["row", *(title for title, _, _ in columns)]]
    for name, row in rows.items():
        cells.append([name, *("-" if row[key] is None else form.format(row[key]) for _, key, form in columns)])
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table of these cells, its head first."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """JSON, atomically. Raises: OutputError where the disk refuses."""
    write_whole(path, json.dumps(data, indent=1) + "\n")


def write_samples(folder: Path, videos: Mapping[str, NDArray[np.uint8]], fps: int) -> None:
    """One mp4 a name."""
    from longtake.inference.video_io import VideoWriter

    folder.mkdir(parents=True, exist_ok=True)
    for name, video in videos.items():
        with VideoWriter(folder / f"{name}.mp4", fps, video.shape[1], video.shape[2]) as writer:
            writer.write(video)
