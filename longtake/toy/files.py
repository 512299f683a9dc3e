"""Writes the embedded world in the formats that users have: images, clips and LMDB shards with captions.

`docs/formats.md` describes the layouts. A folder appears whole or not at all: everything is written to a temporary
sibling and renamed. This file must know no model.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from longtake.config.groups import WorldConfig, WorldFormat
from longtake.data.h264 import add_h264, encode
from longtake.data.lmdb import FORMAT_VERSION
from longtake.devices import num_cores
from longtake.errors import ConfigError, DataError
from longtake.json_text import parse_json
from longtake.outputs import check_output_folder, check_own, new_folder, writing
from longtake.processes import answered, spawned
from longtake.toy.story import sample_story
from longtake.toy.world import FPS, SIZE, World

STAMP = "world.json"
_OWN = (
    *(STAMP, "worlds.jsonl", "lmdb/shard_*/*.mdb", "images/metadata.jsonl", "clips/metadata.jsonl"),
    *("images/[0-9][0-9][0-9][0-9][0-9][0-9]*.png", "clips/[0-9][0-9][0-9][0-9][0-9][0-9]*.mp4"),
)
_ROWS_A_SHARD = 256
_SHARD_BYTES = 1 << 26  # of pictures of a few kilobytes
_CRF = "10"
_STAMP_VERSION = 1
_CLIPS_A_PROCESS = 64  # fewer are written (some 20 ms each) faster than a process starts


def write_world(folder: str | Path, asked: WorldConfig, *, overwrite: bool = False) -> Path:
    """The folder, holding the worlds asked for in each format; nothing is done if it holds them.

    With switches the worlds are those of `sample_story`, and each row has a caption a segment.

    Layout: `images/NNNNNN.png` (the first frame) and `clips/NNNNNN.mp4` (`num_frames` frames), each with
    `metadata.jsonl` (file_name, and text or prompts and switch_frames); `lmdb/shard_NN` (`data/lmdb.py`'s own format);
    `worlds.jsonl`, from which `sample_story` makes each world again; `world.json` with the request.
    With `overwrite` the world of another request makes way.
    Raises: ConfigError on a request without sense; DataError when the folder holds something else; OutputError when it
    cannot be written.
    """
    folder = Path(folder)
    request = _request(asked)
    if _already_written(folder, request, overwrite):
        return folder
    check_output_folder(folder)
    worlds = [sample_story(asked.seed, k, _frames_of(asked, k), stops=asked.stops) for k in range(asked.num_worlds)]
    with new_folder(folder, overwrite=overwrite) as partial:
        for name in request["formats"]:
            (partial / name).mkdir()
        if "images" in asked.formats:
            _write_images(partial / "images", worlds)
        if "clips" in asked.formats:
            _write_clips(partial / "clips", worlds, asked.num_frames)
        if "lmdb" in asked.formats:
            _write_shards(partial / "lmdb", worlds)
        rows = ({"seed": w.seed, "index": w.index, "caption": w.caption, **_script(w)} for w in worlds)
        _write_jsonl(partial / "worlds.jsonl", rows)
        (partial / STAMP).write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
    return folder


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """PNG bytes of an RGB picture, uint8 [h, w, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _request(asked: WorldConfig) -> dict[str, Any]:
    if asked.stops and not asked.switch_frames:
        raise ConfigError("stops=True lets sprites stop at a switch; give switch_frames, or leave it out")
    if asked.one_switch and not asked.switch_frames:
        raise ConfigError("one_switch=True changes each caption at one of switch_frames; give them, or leave it out")
    values = asked.model_dump() | {"formats": [name for name in get_args(WorldFormat) if name in asked.formats]}
    if not asked.switch_frames:
        del values["switch_frames"], values["stops"]
    if not asked.one_switch:
        del values["one_switch"]
    return {"version": _STAMP_VERSION, "fps": FPS, "size": SIZE, **values}


def _frames_of(asked: WorldConfig, number: int) -> list[int]:
    """At which pixel frames the caption of a world changes."""
    frames = asked.switch_frames
    return [frames[number % len(frames)]] if asked.one_switch else frames


def _script(world: World) -> dict[str, Any]:
    """The columns of a world with switches; none without."""
    if not world.switches:
        return {}
    return {
        "prompts": [segment.caption for segment in world.segments],
        "switch_frames": [segment.frame for segment in world.switches],
    }


def _already_written(folder: Path, request: dict[str, Any], overwrite: bool) -> bool:
    """Whether `folder` holds this request; False when there is nothing in it, or what `overwrite` lets make way.

    Raises: DataError otherwise.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        present = parse_json((folder / STAMP).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} exists and is no folder of write_world ({STAMP}: {error}); name an empty or a new folder"
        ) from error
    if present == request:
        return True
    if overwrite:
        check_own(folder, _OWN)
        return False
    raise DataError(
        f"{folder} holds {present}, asked for was {request}; name another folder, or give --overwrite to replace it"
    )


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_metadata(folder: Path, suffix: str, worlds: list[World]) -> None:
    named = ((f"{number:06d}{suffix}", world) for number, world in enumerate(worlds))
    rows = ({"file_name": name, **(_script(world) or {"text": world.caption})} for name, world in named)
    _write_jsonl(folder / "metadata.jsonl", rows)


def _write_images(folder: Path, worlds: list[World]) -> None:
    for number, world in enumerate(worlds):
        (folder / f"{number:06d}.png").write_bytes(encode_png(world.render(1)[0]))
    _write_metadata(folder, ".png", worlds)


def _write_clips(folder: Path, worlds: list[World], num_frames: int) -> None:
    jobs = [(folder / f"{number:06d}.mp4", world, num_frames) for number, world in enumerate(worlds)]
    processes = min(num_cores(), len(jobs) // _CLIPS_A_PROCESS)
    if processes > 1:
        with spawned(processes) as pool, answered("clips"):
            list(pool.map(_write_clip, *zip(*jobs), chunksize=32))
    else:
        for job in jobs:
            _write_clip(*job)
    _write_metadata(folder, ".mp4", worlds)


def _write_clip(path: Path, world: World, num_frames: int) -> None:
    """H.264 with full colour resolution: sprites are a few pixels wide, and 4:2:0 would smear their colours."""
    import av

    with writing(path), av.open(str(path), "w") as container:
        # Pictures are tiny; threads cost more than they give.
        stream = add_h264(container, FPS, SIZE, SIZE, pixels="yuv444p", threads=1, crf=_CRF, preset="veryfast")
        for picture in world.render(num_frames):
            container.mux(encode(stream, picture))
        container.mux(stream.encode())


def _write_shards(folder: Path, worlds: list[World]) -> None:
    import lmdb

    for number, start in enumerate(range(0, len(worlds), _ROWS_A_SHARD)):
        rows, path = worlds[start : start + _ROWS_A_SHARD], folder / f"shard_{number:02d}"
        entries = {"longtake_format": FORMAT_VERSION, "num_rows": str(len(rows)).encode()}
        for i, world in enumerate(rows):
            entries[f"img_{i}_data"] = encode_png(world.render(1)[0])
            entries[f"prompts_{i}_data"] = "\n".join(segment.caption for segment in world.segments).encode()
        with writing(path), lmdb.open(str(path), map_size=_SHARD_BYTES, lock=False) as db, db.begin(write=True) as out:
            for key, value in entries.items():
                out.put(key.encode(), value)
