"""Safetensors files of published names, shapes and sizes whose data is a hole: nothing is written but the header."""

from __future__ import annotations

import json
import math
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]


def write_hollow(file: Path, shapes: Shapes) -> None:
    """A bfloat16 safetensors file of zeros that takes the disk space of its header."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def write_tree(folder: Path, shapes: Shapes, config: dict, shards: int = 1) -> None:
    """A model folder as published: config.json, and one file or several with their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(shapes)
    if shards == 1:
        write_hollow(folder / "diffusion_pytorch_model.safetensors", shapes)
        return
    places = {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        places |= dict.fromkeys(part, file)
        write_hollow(folder / file, {name: shapes[name] for name in part})
    index = {"metadata": {"total_size": sum(2 * math.prod(s) for s in shapes.values())}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
