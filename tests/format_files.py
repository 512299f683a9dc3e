"""Writes a small data set in every format, some rows damaged; row i has the prompt `prompt i`."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from longtake.data.encoded import FORMAT, VERSION, EncodedSample, shard_name, write_empty_text, write_index, write_shard


def pixels(seed, height=24, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def mp4(num_frames=5, size=(16, 16), fps=16, grey=6):
    """Bytes of a clip whose frame t is a grey of `grey` t."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "0", "preset": "ultrafast"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv444p"
        for t in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), grey * t, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def caption(i, bad):
    return "  \n" if i in bad else f"prompt {i}"


def metadata_images(folder, number, bad=()):
    lines = [{"file_name": f"{i:02d}.png", "text": caption(i, bad)} for i in range(number)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(number):
        (folder / f"{i:02d}.png").write_bytes(encode(pixels(i)))
    return folder


def paired_images(folder, number, bad=()):
    for i in range(number):
        (folder / f"{i:02d}.jpg").write_bytes(encode(pixels(i), "JPEG"))
        (folder / f"{i:02d}.txt").write_text(caption(i, bad))
    return folder


def image_and_prompt_folders(folder, number, bad=()):
    for name in ("image", "prompt"):
        (folder / name).mkdir()
    for i in range(number):
        (folder / "image" / f"{i:06d}.webp").write_bytes(encode(pixels(i), "WEBP"))
        (folder / "prompt" / f"{i:06d}.txt").write_text(caption(i, bad))
    (folder / "target_crop_info_16-9.json").write_text("[]")  # the published test set has one beside
    return folder


def paired_clips(folder, number, bad=()):
    clip = mp4()
    for i in range(number):
        (folder / f"{i:02d}.mp4").write_bytes(clip)
        (folder / f"{i:02d}.txt").write_text(caption(i, bad))
    return folder


def text_file(folder, number, bad=()):
    """Empty lines are no rows in this format, so that no row of it can be bad."""
    assert not bad
    (folder / "prompts.txt").write_text("\n".join(f"prompt {i}\n" for i in range(number)))
    return folder / "prompts.txt"


def text_jsonl(folder, number, bad=()):
    lines = [{"prompts": [caption(i, bad), f"then {i}"]} for i in range(number)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def text_folder(folder, number, bad=()):
    for i in range(number):
        (folder / f"{i:02d}.txt").write_text(caption(i, bad))
    return folder


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tar_images(folder, number, bad=()):
    half = number // 2
    for shard, rows in enumerate((range(half), range(half, number))):
        members = []
        for i in rows:
            members.append((f"{i:04d}.png", encode(pixels(i))))
            members.append((f"{i:04d}.txt", caption(i, bad).encode()))
        write_tar(folder / f"train-{shard:03d}.tar", members)
    return folder


def tar_clips(folder, number, bad=()):
    clip, members = mp4(), []
    for i in range(number):
        members.append((f"clips/{i}.json", json.dumps({"caption": caption(i, bad)}).encode()))
        members.append((f"clips/{i}.mp4", clip))
    write_tar(folder / "all.tar", members)
    return folder / "all.tar"


def write_lmdb(folder, entries):
    import lmdb

    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=1 << 28) as database, database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value if isinstance(value, bytes) else str(value).encode())


def own_lmdb(folder, number, bad=()):
    entries = {"longtake_format": "1", "num_rows": number}
    for i in range(number):
        entries |= {f"img_{i}_data": encode(pixels(i)), f"prompts_{i}_data": caption(i, bad)}
    write_lmdb(folder, entries)
    return folder


def published_lmdb(folder, number, bad=()):
    half = number // 2
    for shard, rows in enumerate((range(half), range(half, number))):
        entries = {}
        for local, i in enumerate(rows):
            entries |= {f"img_{local}_data": np.full((480, 832, 3), i, np.uint8).tobytes()}
            entries |= {f"prompts_{local}_data": caption(i, bad)}
        write_lmdb(folder / f"shard_{shard}", entries)
    return folder


def encoded(folder, number, bad=()):
    assert not bad
    key = {"contents": ["y"], "text_len": 4, "sizes": [[16, 16]]}
    shards = []
    for shard, rows in enumerate((range(number // 2), range(number // 2, number))):
        samples = [
            EncodedSample(
                i, f"s{i}", (f"prompt {i}",), [torch.full((2, 3), i).bfloat16()], {"y": torch.full((2, 1), i)}
            )
            for i in rows
        ]
        file = folder / shard_name(shard)
        write_shard(file, samples, [])
        shards.append(
            {"file": file.name, "num_rows": len(rows), "size_bytes": file.stat().st_size, "buckets": [0] * len(rows)}
        )
    write_empty_text(folder, torch.ones(1, 3).bfloat16())
    write_index(
        folder, {"format": FORMAT, "version": VERSION, "complete": True, "key": key, "files": {}, "shards": shards}
    )
    return folder


# Name -> (writer, kind, whether a row can be bad)
FORMATS = {
    "metadata_images": (metadata_images, "images"),
    "paired_images": (paired_images, "images"),
    "image_and_prompt_folders": (image_and_prompt_folders, "images"),
    "paired_clips": (paired_clips, "clips"),
    "text_file": (text_file, "texts"),
    "text_jsonl": (text_jsonl, "texts"),
    "text_folder": (text_folder, "texts"),
    "tar_images": (tar_images, "webdataset"),
    "tar_clips": (tar_clips, "webdataset"),
    "own_lmdb": (own_lmdb, "lmdb"),
    "published_lmdb": (published_lmdb, "lmdb"),
    "encoded": (encoded, "encoded"),
}
CANNOT_BE_BAD = {"text_file", "encoded"}


def write(name: str, folder: Path, number: int, bad=()) -> Path:
    """The path to open."""
    folder.mkdir(parents=True, exist_ok=True)
    return FORMATS[name][0](folder, number, bad)
