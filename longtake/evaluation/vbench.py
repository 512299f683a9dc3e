"""Lays videos out as VBench-I2V and VBench-Long find them: names of files are all that they read beside the pixels.

- `i2v/videos/PROMPT-INDEX.mp4` and `i2v/images/PROMPT.png`, whose names VBench-I2V pairs in custom mode; with prompts
  of its own suite its standard mode reads the same videos.
- `long/PROMPT-INDEX.mp4`: VBench-Long writes folders of clips beside the videos, so it gets a folder of its own. It
  looks for what it knows of a video under what stands before the first `_`, and cuts names at `-Scene` and `.mp4`.

Source: Vchitect/VBench at 45e79ec: vbench/__init__.py, vbench2_beta_long/{__init__,utils}.py. Must know no model.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longtake.evaluation.pictures import write_png

_MOST_BYTES = 200  # of a prompt in a name: VBench-Long adds the numbers of scene and clip, a file system takes 255
_UNWANTED = re.compile(r"[\x00-\x1f/\\_]|\.mp4|(?<=-)(?=Scene)")


@dataclass(frozen=True, eq=False)
class LaidVideo:
    """A file with a video that was made of `picture`, uint8 [h, w, 3]; `index` numbers the videos of one row."""

    path: Path
    row: str
    prompt: str
    picture: NDArray[np.uint8]
    index: int = 0


def lay_out(videos: Sequence[LaidVideo], folder: Path) -> None:
    """Links (or copies) the videos of one model into `folder`, which holds nothing yet, and writes the pictures."""
    names = _names({video.row: video.prompt for video in videos})
    images, *targets = (folder / name for name in ("i2v/images", "i2v/videos", "long"))
    for target in (images, *targets):
        target.mkdir(parents=True, exist_ok=True)
    for video in videos:
        name = names[video.row]
        if not (image := images / f"{name}.png").exists():
            write_png(image, video.picture)
        for target in targets:
            _link(video.path, target / f"{name}-{video.index}.mp4")


def _names(prompts: dict[str, str]) -> dict[str, str]:
    """By row the prompt as both programs read it back from a name: itself where it can be, no two rows alike."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for row, prompt in prompts.items():
        plain = " ".join(_UNWANTED.sub(" ", prompt).split()).encode()[:_MOST_BYTES].decode(errors="ignore").strip()
        name, number = plain, 1
        while name.casefold() in taken or not name:
            number += 1
            name = f"{plain} ({number})".strip()
        taken.add(name.casefold())
        names[row] = name
    return names


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(path, target)
