"""Odd values and damage to files, for `fuzz.py`: each is chosen by a seeded `random.Random`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

HUGE = 10**30
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    str(HUGE),
    str(2**63),
    "-0",
    "0x10",
]
TEXTS = [
    "", " ", "word", "ä€😀", "e\u0301", "half \udce9", "\u2028line\u2029", "a\nb\r\nc", "x" * 5000, "{", "[1", "'", "a: b", "~", "~nobody/x",
    "null", "true", "-", "--", "%s{}", "../..", "cuda:99", "cpu:7", "meta", "1,0.5", "1,nan", "toy", "no/such", "\x1b[2J", "#", "*a", "&a",
]  # fmt: skip
PATHS = [
    "", ".", "/", "no/such", "in.png", "in.png/below", "data", "loop", "loop/x", "/proc", "/proc/self/mem", "/dev/null", "/dev/zero/x",
    "n" * 300, "a/" * 2100 + "a", "half\udce9", "ä😀", "dangling", "keep", "data/images", "student", "run", "story.yaml", "clip.mp4", "rows.csv",
    "/proc/self/fd/9", "toy", "lora/adapter_model.safetensors", "out.mp4", "sub/../in.png", "~nobody/x", "-",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 1.5, float("nan"), float("inf"), -float("inf"), 1e308, 1e-320, HUGE, -HUGE, 2**63, "", "word", "nan", "1",
    "\0", "ä😀", "half \ud83d", "x" * 5000, "a\nb", [], {}, [None], [[]], [1, 2], ["word"], {"a": 1}, {"": {}}, [0], [-1], [[HUGE, 1]], "../..", "~",
    "in.png", "loop", "/proc/self/mem", "{logdir}", "{nothing}", "toy", "no/such", b"bytes",
]  # fmt: skip


def leaves(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything in a tree of mappings and lists."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in pairs for found in [(*path, key), *leaves(value, (*path, key))]]


def change_tree(tree: Any, random: Random, extra: list[str] | None = None) -> str:
    """Changes one value of a tree of mappings and lists, or removes it, or adds a key; returns what was done."""
    if extra and random.random() < 0.5:
        path: tuple = tuple(random.choice(extra).split("."))
    else:
        path = random.choice(leaves(tree) or [("new",)])
    value = random.choice(VALUES)
    for key in path[:-1]:
        if isinstance(tree, dict):
            tree = tree.setdefault(key, {})
        elif isinstance(tree, list):
            tree = tree[key]
    if not isinstance(tree, (dict, list)):
        return "nothing"
    if random.random() < 0.15 and isinstance(tree, dict):
        tree.pop(path[-1], None)
        return f"without {path}"
    tree[path[-1]] = value
    return f"{path} = {str(value)[:60]!r}"


def damage(path: Path, random: Random, others: list[Path]) -> str:
    """Damages a file; returns how."""
    data = path.read_bytes()
    kind = random.choice(KINDS_OF.get(path.suffix, []) * 2 + KINDS)
    if kind in ("empty", "cut", "flip", "noise", "tail", "pointer", "swap", "upper"):
        path.write_bytes(_bytes(kind, data, random, others))
    elif kind == "tree":
        tree = json.loads(data.splitlines()[0] if path.suffix == ".jsonl" else data)
        kind += " " + change_tree(tree, random)
        path.write_bytes(json.dumps(tree, default=str).encode())
    elif kind == "header":
        kind += " " + _change_header(path, data, random)
    elif kind in ("bom", "utf16", "latin", "nul", "crlf", "yaml"):
        path.write_bytes(_text(kind, data))
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "device":
            path.symlink_to(random.choice(["/dev/null", "/proc/self/mem", "/proc/self/status", "/"]))
    return f"{path.name}: {kind}"


KINDS = [
    "empty",
    "cut",
    "cut",
    "flip",
    "flip",
    "noise",
    "tail",
    "pointer",
    "swap",
    "folder",
    "missing",
    "loop",
    "device",
]
_TEXT = ["bom", "utf16", "latin", "nul", "crlf", "upper"]
KINDS_OF = {
    ".json": ["tree", "tree", "tree", *_TEXT], ".jsonl": ["tree", "tree", *_TEXT], ".csv": _TEXT, ".txt": _TEXT, ".yaml": ["yaml", *_TEXT],
    ".safetensors": ["header"] * 6,
}  # fmt: skip


def _bytes(kind: str, data: bytes, random: Random, others: list[Path]) -> bytes:
    if kind in ("empty", "pointer"):
        return b"" if kind == "empty" else POINTER
    if kind == "cut":
        return data[: random.randrange(len(data) + 1)]
    if kind == "swap":
        return random.choice(others).read_bytes()
    if kind == "tail":
        return data + random.randbytes(random.choice([1, 8, 5000]))
    if kind == "upper":
        return data.upper()
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 3, 50])):
        if changed:
            # Heads say what a file is; a flip there is worth more.
            changed[random.randrange(min(len(changed), random.choice([64, 1024, 10**9])))] ^= 1 << random.randrange(8)
    if kind == "noise" and changed:
        start = random.randrange(len(changed))
        changed[start : start + 200] = random.randbytes(200)
    return bytes(changed)


def _text(kind: str, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    if kind == "yaml":
        return (text + "\n&a [*a, !!python/object:os.system x, {a: 1, a: 2}]\n").encode()
    return {
        "bom": b"\xef\xbb\xbf" + data,
        "utf16": text.encode("utf-16"),
        "latin": data + "naïve “café”\n".encode("cp1252", "replace"),
        "nul": data[: len(data) // 2] + b"\0" + data[len(data) // 2 :],
        "crlf": data.replace(b"\n", b"\r\n"),
    }[kind]


def _change_header(path: Path, data: bytes, random: Random) -> str:
    """Changes a value in the header of a safetensors file and leaves the rest."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = random.choice([key for key in header if key != "__metadata__"])
    key = random.choice(["dtype", "shape", "data_offsets", "name", "metadata", "prefix", "gone"])
    if key in ("dtype", "shape", "data_offsets"):
        odd = {
            "dtype": ["F8_E4M3", "I64", "U8", "C64", "BOOL", "F4", 3, None],
            "shape": [[], [0], [-1], [HUGE], "x", [2**62, 4]],
        }
        header[name][key] = random.choice(odd.get(key, [[0, 0], [-1, 4], [4, 0], [0, HUGE], "x", None]))
    elif key == "metadata":
        header["__metadata__"] = random.choice(
            [{}, {"format": "tf"}, {"rank": "x"}, {"lora_alpha": "nan"}, {"ss_network_alpha": "0"}, {"a": 1}, 7]
        )
    elif key == "prefix":
        word = random.choice(["model.", "diffusion_model.diffusion_model.", "transformer.", "a" * 3000])
        header = {k if k == "__metadata__" else word + k: v for k, v in header.items()}
    else:
        value = header.pop(name)
        if key == "name":
            header[random.choice(["", "x", "ä", "blocks.99.ffn.0.weight", "blocks.-1.self_attn.q.weight"])] = value
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])
    return f"{key} of {name}"


def copy_fresh(source: Path, target: Path) -> None:
    """Makes `target` a copy of `source`, whatever it holds now."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
