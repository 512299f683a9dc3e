"""Writes the embedded world in the formats that users have: images, clips and LMDB shards with captions.

`docs/formats.md` describes the layouts. A folder appears whole or not at all: everything is written to a temporary
sibling and renamed. This file must know no model; LMDB shards may carry encodings, which are bytes to it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtake.data.h264 import add_h264, encode
from longtake.errors import ConfigError, DataError
from longtake.json_text import parse_json
from longtake.outputs import check_output_folder, check_own, publish_folder, writing
from longtake.toy.story import sample_story
from longtake.toy.world import FPS, SIZE, World

FORMATS = ("images", "clips", "lmdb")
_OWN = (
    *("world.json", "worlds.jsonl", "lmdb/shard_*/*.mdb", "images/metadata.jsonl", "clips/metadata.jsonl"),
    *("images/[0-9][0-9][0-9][0-9][0-9][0-9]*.png", "clips/[0-9][0-9][0-9][0-9][0-9][0-9]*.mp4"),
)
STAMP = "world.json"
LMDB_FORMAT = "1"
LMDB_ARRAYS = ("latents", "y", "clip", "text")  # optional columns of a shard
_ROWS_A_SHARD = 256
_CRF = "10"
_STAMP_VERSION = 1
_CLIPS_A_PROCESS = 500  # fewer are written faster than a process starts
_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


def write_world(
    folder: str | Path,
    num_worlds: int,
    *,
    seed: int,
    num_frames: int,
    formats: Sequence[str] = FORMATS,
    switch_frames: Sequence[int] = (),
    stops: bool = False,
    overwrite: bool = False,
) -> Path:
    """The folder, holding worlds 0..num_worlds-1 of `seed` in each of `formats`; nothing is done if it holds them.

    With `switch_frames` (pixel frames) the worlds are those of `sample_story`, and each row has a caption a segment.

    Layout: `images/NNNNNN.png` (the first frame) and `clips/NNNNNN.mp4` (`num_frames` frames), each with
    `metadata.jsonl` (file_name, and text or prompts and switch_frames); `lmdb/shard_NN` (see `write_lmdb_shard`);
    `worlds.jsonl` (see `read_worlds`); `world.json` with the request.
    With `overwrite` the world of another request makes way.
    Raises: ConfigError on a request without sense; DataError when the folder holds something else; OutputError when it
    cannot be written.
    """
    folder = Path(folder)
    request = _request(num_worlds, seed, num_frames, formats, list(switch_frames), stops)
    if _already_written(folder, request, overwrite):
        return folder
    check_output_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    partial = folder.parent / f"{_partial_prefix(folder)}{os.getpid()}"
    partial.mkdir()
    try:
        worlds = [sample_story(seed, index, switch_frames, stops=stops) for index in range(num_worlds)]
        writers: dict[str, Callable[[Path], None]] = {
            "images": lambda path: _write_images(path, worlds),
            "clips": lambda path: _write_clips(path, worlds, num_frames),
            "lmdb": lambda path: _write_shards(path, worlds),
        }
        for name in request["formats"]:
            (partial / name).mkdir()
            writers[name](partial / name)
        rows = ({"seed": w.seed, "index": w.index, "caption": w.caption, **_script(w)} for w in worlds)
        _write_jsonl(partial / "worlds.jsonl", rows)
        (partial / STAMP).write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
        _publish(partial, folder, request, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_worlds(folder: str | Path) -> list[World]:
    """The worlds that a folder of `write_world` holds, in the order of its rows, rebuilt from `worlds.jsonl`.

    Raises: DataError when a file is missing, or when a rebuilt caption is not the written one.
    """
    path, stamp = Path(folder) / "worlds.jsonl", Path(folder) / STAMP
    if not path.is_file() or not stamp.is_file():
        raise DataError(f"{path} or {STAMP} is missing; truth can only be rebuilt for folders that write_world made")
    stops = parse_json(stamp.read_bytes()).get("stops", False)
    worlds = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = parse_json(line)
        world = sample_story(row["seed"], row["index"], row.get("switch_frames", ()), stops=stops)
        written = [row["caption"], *row.get("prompts", [])[1:]]
        if (captions := [segment.caption for segment in world.segments]) != written:
            raise DataError(
                f"{path}: world {row['index']} is now {captions} and was written as {written}; "
                f"the generator of worlds has changed since: delete the folder and write it again"
            )
        worlds.append(world)
    return worlds


def write_lmdb_shard(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes one shard, an LMDB folder in Longtake's format, and returns the number of rows.

    Args: `rows` hold `img` (bytes of a PNG, JPEG or WebP), `prompts` (str, one prompt a line), and any of LMDB_ARRAYS
    as a numpy array or a torch tensor (any dtype, bfloat16 included).
    Keys written: `longtake_format` = `1`, `num_rows`, `img_{i}_data`, `prompts_{i}_data` (UTF-8), and for each array
    `{name}_{i}_data` (raw, C order, little endian), `{name}_{i}_shape` (integers separated by spaces) and
    `{name}_{i}_dtype`. The shard appears whole or not at all.
    Raises: DataError when `path` exists or a row lacks something.
    """
    import lmdb

    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists already; delete it or write the shard elsewhere")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        count = 0
        with writing(path), lmdb.open(str(partial), map_size=1 << 26, lock=False, sync=False) as env:
            for count, row in enumerate(rows, start=1):
                _put(env, _row_entries(count - 1, row, path))
            _put(env, {"longtake_format": LMDB_FORMAT.encode(), "num_rows": str(count).encode()})
            env.sync(True)
        publish_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """PNG bytes of an RGB picture, uint8 [h, w, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _request(
    num_worlds: int, seed: int, num_frames: int, formats: Sequence[str], switch_frames: list[int], stops: bool
) -> dict[str, Any]:
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(f"formats={list(formats)} must name at least one of {list(FORMATS)} and nothing else")
    for name, value, least in (("num_worlds", num_worlds, 1), ("num_frames", num_frames, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")
    if stops and not switch_frames:
        raise ConfigError("stops=True lets sprites stop at a switch; give switch_frames, or leave it out")
    if switch_frames and "clips" in formats and num_frames > switch_frames[0]:
        raise ConfigError(
            f"clips of num_frames={num_frames} would show motion after the switch at frame {switch_frames[0]}, and "
            f"training reads clips under their first caption; set num_frames to {switch_frames[0]} or fewer, or leave "
            "clips out of formats"
        )
    script = {"switch_frames": switch_frames, "stops": stops} if switch_frames else {}
    return {
        "version": _STAMP_VERSION,
        "num_worlds": num_worlds,
        "seed": seed,
        "num_frames": num_frames,
        "formats": [name for name in FORMATS if name in formats],
        "fps": FPS,
        "size": SIZE,
        **script,
    }


def _script(world: World) -> dict[str, Any]:
    """The columns of a world with switches; none without."""
    if not world.switches:
        return {}
    return {
        "prompts": [segment.caption for segment in world.segments],
        "switch_frames": [segment.frame for segment in world.switches],
    }


def _captions(world: World) -> dict[str, Any]:
    """The columns of `metadata.jsonl` that say what a picture or clip shows."""
    return _script(world) or {"text": world.caption}


def _already_written(folder: Path, request: dict[str, Any], overwrite: bool) -> bool:
    """Whether `folder` holds this request; False when there is nothing in it, or what `overwrite` lets make way.

    Raises: DataError otherwise.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    stamp = folder / STAMP
    if not stamp.is_file():
        raise DataError(f"{folder} exists and is no folder of write_world (no {STAMP}); name an empty or a new folder")
    try:
        present = parse_json(stamp.read_bytes())
    except ValueError as error:
        raise DataError(f"{stamp} is not readable ({error}); delete {folder} or name another folder") from error
    if present != request:
        if overwrite:
            check_own(folder, _OWN)
            return False
        raise DataError(
            f"{folder} holds {present}, asked for was {request}; name another folder, or give --overwrite to replace it"
        )
    return True


def _publish(partial: Path, folder: Path, request: dict[str, Any], overwrite: bool) -> None:
    # Another process may have been faster; its folder is as good if it holds the same request.
    if not _already_written(folder, request, overwrite):
        publish_folder(partial, folder, overwrite=overwrite)


def _partial_prefix(folder: Path) -> str:
    return f".{folder.name}.partial-{socket.gethostname()}-"


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed runs on this machine left beside `folder`."""
    prefix = _partial_prefix(folder)
    for path in folder.parent.iterdir():
        process = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and process.isdigit() and not _alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # a run before this one had the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_images(folder: Path, worlds: list[World]) -> None:
    for number, world in enumerate(worlds):
        (folder / f"{number:06d}.png").write_bytes(encode_png(world.render(1)[0]))
    rows = ({"file_name": f"{number:06d}.png", **_captions(world)} for number, world in enumerate(worlds))
    _write_jsonl(folder / "metadata.jsonl", rows)


def _write_clips(folder: Path, worlds: list[World], num_frames: int) -> None:
    jobs = [(folder / f"{number:06d}.mp4", world, num_frames) for number, world in enumerate(worlds)]
    processes = min(os.cpu_count() or 1, len(jobs) // _CLIPS_A_PROCESS)
    if processes > 1:
        # Spawned, not forked: the caller may have threads.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(_write_clip, *zip(*jobs), chunksize=32))
    else:
        for job in jobs:
            _write_clip(*job)
    rows = ({"file_name": f"{number:06d}.mp4", **_captions(world)} for number, world in enumerate(worlds))
    _write_jsonl(folder / "metadata.jsonl", rows)


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
    for shard, start in enumerate(range(0, len(worlds), _ROWS_A_SHARD)):
        rows = (
            {
                "img": encode_png(world.render(1)[0]),
                "prompts": "\n".join(segment.caption for segment in world.segments),
            }
            for world in worlds[start : start + _ROWS_A_SHARD]
        )
        write_lmdb_shard(folder / f"shard_{shard:02d}", rows)


def _row_entries(number: int, row: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    where = f"row {number} of {path}"
    surplus = set(row) - {"img", "prompts", *LMDB_ARRAYS}
    if surplus or not {"img", "prompts"} <= set(row):
        raise DataError(f"{where} has columns {sorted(row)}; img and prompts are needed, {LMDB_ARRAYS} are allowed")
    if not bytes(row["img"]).startswith(_IMAGE_MAGIC):
        raise DataError(
            f"{where}: img starts with {bytes(row['img'][:4])!r}; give the bytes of a PNG, JPEG or WebP file"
        )
    entries = {f"img_{number}_data": bytes(row["img"]), f"prompts_{number}_data": row["prompts"].encode("utf-8")}
    for name in LMDB_ARRAYS:
        if name in row:
            data, shape, dtype = _raw(row[name])
            entries[f"{name}_{number}_data"] = data
            entries[f"{name}_{number}_shape"] = " ".join(map(str, shape)).encode()
            entries[f"{name}_{number}_dtype"] = dtype.encode()
    return entries


def _raw(array: Any) -> tuple[bytes, tuple[int, ...], str]:
    """Bytes, shape and dtype name of a numpy array or a torch tensor."""
    if isinstance(array, np.ndarray):
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        return little.tobytes(), array.shape, array.dtype.name
    import torch

    flat = array.detach().cpu().contiguous().reshape(-1)  # numpy has no bfloat16, hence the view as bytes
    return flat.view(torch.uint8).numpy().tobytes(), tuple(array.shape), str(array.dtype).removeprefix("torch.")


def _put(env: Any, entries: Mapping[str, bytes]) -> None:
    """One transaction; the map grows as it fills, so that no size has to be guessed."""
    import lmdb

    while True:
        try:
            with env.begin(write=True) as transaction:
                for key, value in entries.items():
                    transaction.put(key.encode(), value)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])
