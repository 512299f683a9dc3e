"""The model card of an exported student: what plays it, the rules it streams by, what it was trained on and how far.

Reads what a run left beside its checkpoints, and no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import longtake
from longtake.config.generation import GenerationConfig
from longtake.config.stage import is_path
from longtake.errors import CheckpointError
from longtake.json_text import parse_json
from longtake.run_folder import checkpoints_folder, chosen_by, list_checkpoints, read_manifest, trained_config
from longtake.weights.students import in_words

CARD = "README.md"
_LAST = 0.1  # of a stage's iterations, over which losses are averaged


def write_card(
    folder: Path, name: str, checkpoint: Path, settings: GenerationConfig, *, with_picture: bool, with_writer: bool
) -> None:
    """Writes `README.md` beside the weights of the student in `checkpoint`, which is exported as `name`."""
    two = " It is two networks: the tensors `memory_*` are those of what writes the context, where they differ." * (
        with_writer
    )
    kind = "image-to-video" if with_picture else "text-to-video"
    picture = "--image photo.jpg " * with_picture
    stages = "\n".join(map(_stage, _lineage(checkpoint)))
    text = f"""---
library_name: longtake
pipeline_tag: {kind}
tags: [streaming, causal]
---

# {name}

A streaming {kind} student, trained with Longtake {longtake.__version__}: frames come block by block, without an end.

```bash
longtake generate --model {name} {picture}--prompt "what happens" --seconds 10 -o out.mp4
```

`--model` takes this folder, or the repository that it was uploaded to. Encoders: {_encoders(settings)}.

## Rules

Pictures of {settings.height}x{settings.width}, {settings.fps} frames a second; {in_words(settings)}.
`generation.yaml` has all of them; other ones than these are not what it was trained for.{two}

## Training

{stages}
Not said here: the licence. It follows from those of the weights it began with and of the data; write it down before you
share this folder.
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def _encoders(settings: GenerationConfig) -> str:
    if settings.encoders is None:
        return "in this folder or beside it"
    return f"`{settings.encoders}`, as `generation.yaml` says (`--encoders` names others)"


def _lineage(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint and those that it began with in the same log folder, the first one first."""
    config = trained_config(checkpoint)
    before, stage = config.init_from, checkpoint.parents[1]
    if before is not None and not is_path(before) and before != stage.name:
        for earlier in reversed(list_checkpoints(checkpoints_folder(stage.parent / before))):
            yield from _lineage(earlier)
            break
    yield checkpoint


def _stage(checkpoint: Path) -> str:
    manifest, config = read_manifest(checkpoint), trained_config(checkpoint)
    names = [f"begins with {config.init_from or 'random weights'}"]
    names += [f"{name}: {network.source}" for name, network in config.networks.items() if name != "generator"]
    lines = [
        f"### {config.name}",
        "",
        f"- objective: {config.objective.kind}; {'; '.join(names)}",
        f"- data: {config.data.kind} in `{config.data.path}`, {config.video.num_latent_frames} latent frames of "
        f"{config.video.height}x{config.video.width}",
        f"- {manifest['step']} iterations of {config.batch_size} samples",
    ]
    if (why := chosen_by(checkpoint)) is not None:
        lines.append(f"- chosen as the best checkpoint: {why}. Numbers of other seeds say how good it is")
    rows = _rows(checkpoint.parents[1], manifest["step"])
    lines += [f"- {name}: {value:.4g}" for name, value in _losses(rows, manifest["step"]).items()]
    lines += [f"- {name}: {value:.4g}" for name, value in _validation(rows).items()]
    return "\n".join(lines) + "\n"


def _rows(stage: Path, step: int) -> list[Mapping[str, Any]]:
    """The numbers of a stage up to an iteration. Raises: CheckpointError."""
    file = stage / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []  # the last one may be unfinished
    try:
        rows = [parse_json(line) for line in lines if line]
    except ValueError as error:
        raise CheckpointError(
            f"{file} is damaged ({error}); move it away: the card goes without its numbers"
        ) from error
    return [row for row in rows if isinstance(row, dict) and row.get("step", step + 1) <= step]


def _losses(rows: list[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Each loss over the last iterations."""
    last = [row for row in rows if step - max(1, _LAST * step) <= row["step"] < step]
    found: dict[str, list[float]] = {}
    for row in last:
        for name, value in row.items():
            if name.endswith("_loss") and isinstance(value, (int, float)):
                found.setdefault(f"{name}, mean of the last {round(100 * _LAST)} % of iterations", []).append(value)
    return {name: fmean(values) for name, values in found.items()}


def _validation(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of the last validation that are the student's own."""
    left_out = ("validation/teacher_", "validation/errors", "validation/seconds")
    for row in reversed(rows):
        values = {name: value for name, value in row.items() if name.startswith("validation/")}
        if own := {name: value for name, value in values.items() if not name.startswith(left_out)}:
            return {name: value for name, value in own.items() if isinstance(value, (int, float))}
    return {}
