"""What a person looks at: the table, JSON, curves over time, contact sheets and sample videos."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, aligned."""
    cells = [["row", *(title for title, _, _ in COLUMNS)]]
    for name, summary in summaries.items():
        low, high = summary["position_error_ci95_px"]
        values = {**summary, "interval": None if low is None else (high - low) / 2}
        cells.append([name, *("-" if values[key] is None else form.format(values[key]) for _, key, form in COLUMNS)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """JSON, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)


def write_curves(path: Path, summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Position error, motion ratio and shape kept over time, a line a row, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("position_error", "motion_ratio", "shape_kept", "saturation")
    colours = plt.get_cmap("tab20")
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.2))
    for axis, name in zip(axes, names):
        for number, (row, summary) in enumerate(summaries.items()):
            values = [np.nan if value is None else value for value in summary["curves"][name]]
            axis.plot(values, label=row, linewidth=1.2, color=colours(number % 20))
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("frame")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="center right")
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def contact_sheet(
    rows: Mapping[str, Sequence[NDArray[np.uint8]]], *, num_videos: int = 3, num_frames: int = 9, zoom: int = 2
) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]: a labelled line a row; `num_frames` frames of each of the first `num_videos` videos."""
    from PIL import Image, ImageDraw

    label = 150
    first = next(iter(rows.values()))
    height, width = first[0].shape[1] * zoom, first[0].shape[2] * zoom
    num_videos = min(num_videos, len(first))
    gap = 8
    total = label + num_videos * (num_frames * width + gap)
    sheet = Image.new("RGB", (total, len(rows) * (height + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (name, videos) in enumerate(rows.items()):
        y = line * (height + 2)
        draw.text((4, y + height // 2 - 6), name, fill="black")
        for k, video in enumerate(videos[:num_videos]):
            for j, index in enumerate(np.linspace(0, len(video) - 1, num_frames).round().astype(int)):
                picture = Image.fromarray(video[index]).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(picture, (label + k * (num_frames * width + gap) + j * width, y))
    return np.asarray(sheet)


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """A PNG file, atomically."""
    from PIL import Image

    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    Image.fromarray(image).save(temporary)
    temporary.replace(path)


def write_samples(folder: Path, videos: Mapping[str, NDArray[np.uint8]], fps: int) -> None:
    """One mp4 a name."""
    from longtake.inference.video_io import VideoWriter

    folder.mkdir(parents=True, exist_ok=True)
    for name, video in videos.items():
        with VideoWriter(folder / f"{name}.mp4", fps, video.shape[1], video.shape[2]) as writer:
            writer.write(video)
