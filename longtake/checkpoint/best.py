"""The best checkpoint so far by a number of the validations: its weights stay in `STAGE/best/`, whatever comes later.

They are hard links to the checkpoint's own files, so that they take room only once the checkpoint is dropped. What a
resumed training needs beside them is not kept.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from longtake import run_folder
from longtake.outputs import new_folder, write_whole, writing
from longtake.parallel.mesh import Mesh


class Best:
    """Knows the best score so far. Args: `score`, a `Score` or None (nothing is kept); `folder` of the stage."""

    def __init__(self, score: str | None, folder: Path, mesh: Mesh) -> None:
        self.score, self.folder = score, run_folder.best_folder(folder)
        self._distance = mesh.on_main(self._read)
        self._value = math.nan

    def improves(self, step: int, numbers: Mapping[str, float]) -> bool:
        """Whether the weights after `step` iterations are the best so far; those before the first are not compared.

        The numbers, and so the answer, are the same on every rank.
        """
        value = numbers.get(f"validation/{self.score}", math.nan)
        distance = self._distance_of(value)
        if step == 0 or not distance < self._distance:
            return False
        self._distance, self._value = distance, value
        return True

    def keep(self, checkpoint: Path) -> None:
        """Keeps the networks of a published checkpoint, the one that was found best last. Raises: OutputError."""
        manifest = run_folder.read_manifest(checkpoint)
        manifest["files"] = {name: file for name, file in manifest["files"].items() if not name.startswith("state/")}
        final = self.folder / checkpoint.name
        with writing(final), new_folder(final, overwrite=True) as partial:
            for name in manifest["files"]:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                _link(checkpoint / name, partial / name)
            (partial / run_folder.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        about = {"step": manifest["step"], "score": self.score, "value": self._value}
        about["seed"] = manifest["config"]["validation"]["seed"]
        write_whole(self.folder / run_folder.BEST, json.dumps(about) + "\n")
        for old in run_folder.list_checkpoints(self.folder):
            if old.name != final.name:
                shutil.rmtree(old)

    def _distance_of(self, value: float) -> float:
        """From the best value that the score can have; NaN where there is none."""
        if self.score is None or not math.isfinite(value):
            return math.nan
        is_ratio = self.score.endswith(("_vs_teacher", "motion_ratio", "_kept"))
        return abs(math.log(max(value, 1e-6))) if is_ratio else value

    def _read(self) -> float:
        """That of the kept one; infinite where there is none by this score."""
        file = self.folder / run_folder.BEST
        if self.score is None or not file.is_file():
            return math.inf
        kept = json.loads(file.read_text())
        return self._distance_of(kept["value"]) if kept["score"] == self.score else math.inf


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
